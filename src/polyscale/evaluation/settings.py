"""What one row of an evaluation measures: a model at a budget, or at its own with fewer tokens in another way."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
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


def tokens_at(config: PreTrainedConfig, image_size: Sequence[int] | None, budget: Any = None) -> int | None:
    """The most tokens of an image at a budget, the model's own when `None`; `None` where nobody knows.

    Raises:
        ValueError: where the model cannot take images of this size at this budget.
    """
    if not isinstance(config, TokenBudgetMixin):
        return None
    return config.max_num_tokens_for(image_size, **budget_kwargs(config, budget))


__all__ = ["BUDGET", "MERGING", "SMALLER", "Setting", "default_settings", "tokens_at"]
