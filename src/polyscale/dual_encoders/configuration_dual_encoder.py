"""Configurations of CLIP-like models whose vision tower is any model of this library."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..layers.config_checks import CheckedConfigMixin, checked_config, positive
from ..layers.token_budget import TokenBudgetMixin, budget_argument_of
from ..utils.transformers_internals import sub_config


class DualEncoderConfig(CheckedConfigMixin, TokenBudgetMixin, PreTrainedConfig):
    """What the two configs share: the token budget is that of the vision tower."""

    @property
    def budget_argument(self) -> str | None:
        return budget_argument_of(self.vision_config)

    @property
    def changeable_fields(self) -> tuple[str, ...]:
        return getattr(self.vision_config, "changeable_fields", ())

    @property
    def tokens_vary(self) -> bool:
        return getattr(self.vision_config, "tokens_vary", False)

    def default_budgets(self) -> list:
        return self.vision_config.default_budgets()

    def num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int | None:
        return self.vision_config.num_tokens_for(image_size, **budget)

    def token_grid_for(self, image_size: int | Sequence[int] | None = None, **budget) -> tuple[int, int] | None:
        return self.vision_config.token_grid_for(image_size, **budget)

    def with_budget(self, **changes) -> "DualEncoderConfig":
        changed = type(self).from_dict(self.to_dict())
        changed.vision_config = self.vision_config.with_budget(**changes)
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
