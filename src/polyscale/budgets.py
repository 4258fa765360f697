"""How a token budget is asked of a model, whatever its family."""

import torch
from torch import nn
from transformers import PretrainedConfig


# The keyword argument of `forward` that sets the budget of a call.
BUDGET_ARGUMENTS = {"flexivit": "patch_size", "quadtree_vit": "num_tokens"}


def budget_argument(config: PretrainedConfig) -> str | None:
    """The name of the budget argument of a model's `forward`; None where the budget is fixed by the checkpoint."""
    return BUDGET_ARGUMENTS.get(config.model_type)


@torch.no_grad()
def count_tokens(model: nn.Module, pixel_values: torch.Tensor, **budget) -> int:
    """How many tokens the model spends on one picture (prefix tokens not counted), counted in its output.

    Args:
        model: a model with or without a head.
        pixel_values: (batch, channels, height, width); only the first picture is used.
        budget: the budget argument of `forward`, if any.
    """
    tokens = model.base_model(pixel_values[:1], **budget).last_hidden_state
    return tokens.shape[1] - getattr(model.config, "num_prefix_tokens", 0)


__all__ = ["BUDGET_ARGUMENTS", "budget_argument", "count_tokens"]
