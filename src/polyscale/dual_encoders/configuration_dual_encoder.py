"""Configurations of CLIP-like models whose vision tower is any model of this library."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..layers.config_checks import CheckedConfigMixin, checked_config, positive
from ..layers.token_budget import TokenBudgetMixin
from ..utils.transformers_internals import sub_config
from ..utils.validation import to_pair
from ..utils.vision_configs import base_feature_grid, base_image_size, base_num_prefix_tokens


class _FixedBudget(TokenBudgetMixin):
    """What is said in the place of a vision tower of another library, which has no budget to choose."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.model_type = config.model_type

    def token_grid_for(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int] | None:
        size = base_image_size(self.config) if image_size is None else to_pair(image_size, "image_size")
        try:
            base_num_prefix_tokens(self.config)
        except ValueError:  # its tokens are no grid of patches
            return None
        return None if size is None else base_feature_grid(self.config, size)


class DualEncoderConfig(CheckedConfigMixin, TokenBudgetMixin, PreTrainedConfig):
    """What the two configs share: the token budget is that of the vision tower."""

    @property
    def _tower(self) -> TokenBudgetMixin:
        """What the vision tower says of its budget."""
        config = self.vision_config
        return config if isinstance(config, TokenBudgetMixin) else _FixedBudget(config)

    @property
    def budget_argument(self) -> str | None:
        return self._tower.budget_argument

    @property
    def changeable_fields(self) -> tuple[str, ...]:
        return self._tower.changeable_fields

    @property
    def fixed_fields(self) -> dict[str, str]:
        return self._tower.fixed_fields

    @property
    def tokens_vary(self) -> bool:
        return self._tower.tokens_vary

    def default_budgets(self) -> list:
        return self._tower.default_budgets()

    def budget_ladder(self, image_size: int | Sequence[int] | None = None) -> list:
        return self._tower.budget_ladder(image_size)

    def budget_for_share(self, image_size: int | Sequence[int] | None, share: float) -> Any:
        return self._tower.budget_for_share(image_size, share)

    def parse_budget(self, text: str) -> Any:
        return self._tower.parse_budget(text)

    def format_budget(self, budget: Any) -> str:
        return self._tower.format_budget(budget)

    def num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int | None:
        return self._tower.num_tokens_for(image_size, **budget)

    def max_num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int | None:
        return self._tower.max_num_tokens_for(image_size, **budget)

    def token_grid_for(self, image_size: int | Sequence[int] | None = None, **budget) -> tuple[int, int] | None:
        return self._tower.token_grid_for(image_size, **budget)

    def feature_grid_for(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int] | None:
        return self._tower.feature_grid_for(image_size)

    def with_budget(self, **changes) -> "DualEncoderConfig":
        changed = type(self).from_dict(self.to_dict())
        changed.vision_config = self._tower.with_budget(**changes)
        return changed


@checked_config
class BudgetCLIPConfig(DualEncoderConfig):
    """Configuration of `BudgetCLIPModel`: a CLIP (or any pair of a vision and a text model) whose vision tower has a
    token budget.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): of the text model; CLIP's by default.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): of the vision tower; a FlexiViT by default.
        projection_dim (`int`, *optional*, defaults to 512): width of the embeddings that are compared.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592): logarithm of the initial scale of logits.

    Raises:
        ValueError: for an unknown field or an illegal value.
    """

    model_type = "polyscale_clip"
    sub_configs_defaults = {"text_config": sub_config("clip_text_model"), "vision_config": sub_config("flexivit")}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = positive(512)
    logit_scale_init_value: float | int = 2.6592


@checked_config
class BudgetSiglipConfig(DualEncoderConfig):
    """Configuration of `BudgetSiglipModel`: a SigLIP whose vision tower has a token budget.

    Its `model_type` holds "siglip": transformers' zero-shot pipeline pads texts and turns logits into scores by that.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): of SigLIP's text model.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): of the vision tower; a FlexiViT by default.

    Raises:
        ValueError: for an unknown field or an illegal value.
    """

    model_type = "polyscale_siglip"
    sub_configs_defaults = {"text_config": sub_config("siglip_text_model"), "vision_config": sub_config("flexivit")}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None


__all__ = ["BudgetCLIPConfig", "BudgetSiglipConfig", "DualEncoderConfig"]
