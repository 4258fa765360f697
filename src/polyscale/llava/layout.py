"""What a LLaVA model and its processor have to know about the tokens of a vision tower."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..layers.token_budget import TokenBudgetMixin
from ..utils.validation import to_pair
from ..utils.vision_configs import base_feature_grid, base_image_size, base_num_prefix_tokens
from .packed import inner_config


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of an image.

    Args:
        image_size: (height, width) of the images in pixels.
        num_prefix_tokens: tokens in front that have no place in the image.
        num_tokens: the other tokens; None where that depends on the image.
        grid: (rows, columns) of those tokens, if they are one.
    """

    image_size: tuple[int, int]
    num_prefix_tokens: int
    num_tokens: int | None
    grid: tuple[int, int] | None = None

    @property
    def select_strategy(self) -> str:
        """What LLaVA does with prefix tokens: "default" drops exactly one, "full" keeps all."""
        return "default" if self.num_prefix_tokens == 1 else "full"

    @property
    def image_seq_length(self) -> int | None:
        """Tokens of an image that reach the language model."""
        if self.num_tokens is None:
            return None
        return self.num_tokens + (0 if self.select_strategy == "default" else self.num_prefix_tokens)

    @property
    def processor_settings(self) -> dict:
        """Arguments of `LlavaProcessor` with which it counts these tokens.

        It counts `(height // patch_size) * (width // patch_size)` and adds `num_additional_image_tokens`. Where no
        int `patch_size` gives the grid, and for tokens that are no grid, the patch is larger than the image, so that
        only the second term counts.
        """
        settings = {"vision_feature_select_strategy": self.select_strategy}
        patch_size = self.patch_size
        if patch_size is not None:
            return {**settings, "patch_size": patch_size, "num_additional_image_tokens": self.num_prefix_tokens}
        total = (self.num_tokens or 0) + self.num_prefix_tokens
        return {**settings, "patch_size": max(self.image_size) + 1, "num_additional_image_tokens": total}

    @property
    def patch_size(self) -> int | None:
        """Pixels per token, if an int gives the grid."""
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
    inner = inner_config(config)
    if isinstance(inner, TokenBudgetMixin):
        size = to_pair(inner.image_size, "image_size")
        prefix = 0 if inner is not config else inner.num_prefix_tokens
        if inner.tokens_vary:
            return TokenLayout(size, prefix, None)
        count = inner.num_tokens_for(size)
        if count is None:
            raise ValueError(
                f"`tower` of type {inner.model_type!r}: its tokens cannot be counted from its config. Where it wraps "
                "another model, that one's config has no `patch_size`."
            )
        return TokenLayout(size, prefix, count, inner.token_grid_for(size))
    size = base_image_size(config)
    grid = None if size is None else base_feature_grid(config, size)
    if grid is None:
        raise ValueError(
            f"`tower` of type {config.model_type!r}: its config has no `image_size` and `patch_size`, so its tokens "
            "cannot be counted."
        )
    return TokenLayout(size, base_num_prefix_tokens(config), grid[0] * grid[1], grid)


__all__ = ["TokenLayout", "token_layout"]
