"""The Quadtree ViT that a training starts with."""

import math
from typing import Any

from ...layers.encoder_config import training_shape
from ...layers.token_budget import plain_size
from .configuration_quadtree_vit import QuadtreeViTConfig


_MOST_TOKENS = 256


def default_patch_sizes(image_size: tuple[int, int]) -> tuple[int, int]:
    """(smallest, largest) patch of an image of (height, width) pixels: three levels where they divide it, else two.

    Raises:
        ValueError: for an image that nothing fits.
    """
    height, width = image_size
    side = math.gcd(height, width)
    most = 64 if min(image_size) <= 64 else _MOST_TOKENS
    for levels in (3, 2):
        for smallest in range(1, side + 1):
            largest = smallest * 2 ** (levels - 1)
            fits = side % largest == 0 and height * width <= most * smallest**2
            if fits and height * width >= 4 * largest**2:
                return smallest, largest
    near = max(round(min(image_size) / 16), 1) * 16
    raise ValueError(
        f"`image_size` {image_size} cannot be cut into patches of two sizes: take a multiple of 16, such as {near}, "
        "or give `min_patch_size` and `max_patch_size`."
    )


def training_config(
    image_size: tuple[int, int],
    num_channels: int = 3,
    preset: str | None = None,
    base: QuadtreeViTConfig | None = None,
    **options: Any,
) -> QuadtreeViTConfig:
    """A config to train with: patches that divide the images.

    Args:
        image_size: (height, width) in pixels.
        num_channels: channels of an image.
        preset: a published size; one that fits the images when None.
        base: the config of a checkpoint, which only `options` change.
        options: fields of the config, which go before all others.
    """
    if base is not None:
        return QuadtreeViTConfig.from_dict({**base.to_dict(), **options})
    fields: dict[str, Any] = {
        "image_size": plain_size(image_size),
        "num_channels": num_channels,
    }
    if "min_patch_size" not in options and "max_patch_size" not in options:
        fields["min_patch_size"], fields["max_patch_size"] = default_patch_sizes(image_size)
    if preset is not None:
        return QuadtreeViTConfig.preset(preset, **{**fields, **options})
    return QuadtreeViTConfig(**{**training_shape(image_size), **fields, **options})


__all__ = ["default_patch_sizes", "training_config"]
