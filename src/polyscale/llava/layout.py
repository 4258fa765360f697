"""What a LLaVA model and its processor have to know about the tokens of a vision tower."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..layers.token_budget import TokenBudgetMixin
from ..utils.validation import to_pair
from ..utils.vision_configs import base_feature_grid, base_image_size, base_num_prefix_tokens
from .packed import PackedTowerConfig


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a picture.

    Args:
        image_size: (height, width) of the pictures in pixels.
        num_prefix_tokens: tokens in front that have no place in the picture.
        num_tokens: the other tokens; None where that depends on the picture.
        grid: (rows, columns) of those tokens, if they are one.
    """

    image_size: tuple[int, int]
    num_prefix_tokens: int
    num_tokens: int | None
    grid: tuple[int, int] | None = None

    @property
    def select_strategy(self) -> str:
        """What LLaVA does with prefix tokens: "default" drops exactly one, "full" keeps all."""
        return "default" if self.num_prefix_tokens == 1 and self.num_tokens is not None else "full"

    @property
    def image_seq_length(self) -> int | None:
        """Tokens of a picture that reach the language model."""
        if self.num_tokens is None:
            return None
        return self.num_tokens + (0 if self.select_strategy == "default" else self.num_prefix_tokens)

    @property
    def processor_settings(self) -> dict:
        """Arguments of `LlavaProcessor` with which it counts these tokens.

        It counts `(height // patch_size) * (width // patch_size)` and adds `num_additional_image_tokens`. Where no
        int `patch_size` gives the grid, and for tokens that are none, the patch is larger than the picture, so that
        only the second term counts.
        """
        settings = {"vision_feature_select_strategy": self.select_strategy}
        patch_size = self._patch_size()
        if patch_size is not None:
            return {**settings, "patch_size": patch_size, "num_additional_image_tokens": self.num_prefix_tokens}
        total = self.num_tokens + self.num_prefix_tokens
        return {**settings, "patch_size": max(self.image_size) + 1, "num_additional_image_tokens": total}

    def _patch_size(self) -> int | None:
        if self.grid is None:
            return None
        height, width = self.image_size
        patch_size = height // self.grid[0]
        return patch_size if (height // patch_size, width // patch_size) == self.grid else None


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """The tokens that a tower with this config gives.

    Raises:
        ValueError: for a tower whose tokens cannot be counted from its config.
    """
    if isinstance(config, PackedTowerConfig):
        inner = config.vision_config
        return TokenLayout(to_pair_of(inner.image_size), inner.num_prefix_tokens, None)
    if isinstance(config, TokenBudgetMixin):
        size = to_pair_of(config.image_size)
        count = config.num_tokens_for(size)
        if count is None:
            raise ValueError(
                f"`tower` of type {config.model_type!r}: its tokens cannot be counted from its config. Where it wraps "
                "another model, that one's config has no `patch_size`."
            )
        return TokenLayout(size, config.num_prefix_tokens, count, config.token_grid_for(size))
    size = base_image_size(config)
    grid = None if size is None else base_feature_grid(config, size)
    if grid is None:
        raise ValueError(
            f"`tower` of type {config.model_type!r}: its config has no `image_size` and `patch_size`, so "
            "its tokens cannot be counted."
        )
    return TokenLayout(size, base_num_prefix_tokens(config), grid[0] * grid[1], grid)


def to_pair_of(size: object) -> tuple[int, int]:
    """An `image_size` of any config as (height, width)."""
    return to_pair(tuple(size) if isinstance(size, list | tuple) else size, "image_size")


__all__ = ["TokenLayout", "to_pair_of", "token_layout"]
