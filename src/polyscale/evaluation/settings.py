"""What one row of an evaluation measures: a model at a budget, or at its own with fewer tokens in another way."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..layers.budget_choice import at_budget
from ..layers.token_budget import (
    TokenBudgetMixin,
    budget_kwargs,
    budget_ladder_of,
    default_budgets_of,
    tokens_per_image,
)


# Ways to spend fewer tokens: the family's own, and two that any ViT has.
BUDGET, MERGING, SMALLER = "budget", "token merging", "smaller images"


@dataclass(frozen=True)
class Setting:
    """How a model is called.

    Attributes:
        budget: value of its budget argument; its own when `None`.
        merge_to (`int` or `None`): tokens that are left by token merging; none are merged when `None`.
        way (`str`): "budget", "token merging" or "smaller images".
    """

    budget: Any = None
    merge_to: int | None = None
    way: str = BUDGET

    def call(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Arguments of `forward`."""
        merging = {} if self.merge_to is None else {"merge_tokens_to": self.merge_to}
        return budget_kwargs(config, self.budget) | merging

    def tokens(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], outputs: ModelOutput) -> list[int]:
        """Tokens of each image of a batch after the last layer, prefix tokens and padding not counted."""
        counts = tokens_per_image(model, inputs, outputs, **budget_kwargs(model.config, self.budget))
        return counts if self.merge_to is None else [min(count, self.merge_to) for count in counts]

    @contextmanager
    def named(self):
        """Says in a model's `ValueError` where it was raised."""
        with at_budget(self.budget), at_budget(self.merge_to, "merge_to"):
            yield


def default_settings(config: PreTrainedConfig, image_size: Sequence[int] | None) -> list[Setting]:
    """The budgets of a model from few tokens to many; its own alone where the image decides how many it costs."""
    varies = getattr(config, "tokens_vary", False)
    budgets = default_budgets_of(config) if varies else budget_ladder_of(config, image_size)
    return [Setting(budget) for budget in budgets]


def merged_settings(
    config: PreTrainedConfig, image_size: Sequence[int] | None, merge_to: Sequence[int]
) -> list[Setting]:
    """A model at its own budget, tokens merged; none where it cannot merge, or has no more tokens than that."""
    if not hasattr(config, "merge_tokens_to") or config.tokens_vary:
        return []
    most = most_tokens(config, image_size)
    return [Setting(merge_to=count, way=MERGING) for count in merge_to if most is not None and count < most]


def most_tokens(config: PreTrainedConfig, image_size: Sequence[int] | None, budget: Any = None) -> int | None:
    """The most tokens of an image at a budget, the model's own when `None`; `None` where this size does not allow it,
    or nobody knows.
    """
    if isinstance(config, TokenBudgetMixin):
        with suppress(ValueError):
            return config.max_num_tokens_for(image_size, **budget_kwargs(config, budget))
    return None


def costs_less(config: PreTrainedConfig, image_size: Sequence[int], own_size: Sequence[int] | None) -> bool:
    """Whether images of another size than a model's own cost it fewer tokens at its own budget."""
    fewer, own = most_tokens(config, image_size), most_tokens(config, own_size)
    return fewer is not None and own is not None and fewer < own


__all__ = [
    "BUDGET",
    "MERGING",
    "SMALLER",
    "Setting",
    "costs_less",
    "default_settings",
    "merged_settings",
    "most_tokens",
]
