"""The FlexiViT that a training starts with."""

import math
from typing import Any

from ...layers.encoder_config import training_shape
from ...layers.token_budget import plain_size
from ...utils.validation import check_distinct, to_pair
from .configuration_flexivit import FlexiViTConfig


def default_patch_sizes(image_size: tuple[int, int]) -> list[int]:
    """Patch sizes that divide an image of (height, width) pixels: 4 to 64 tokens of a small one, 16 to 256 of others.

    Where none divide it, an eighth, a quarter and a half of the shorter side.
    """
    height, width = image_size
    fewest, most = (4, 64) if min(image_size) <= 64 else (16, 256)
    side = math.gcd(height, width)
    sizes = [size for size in range(1, side + 1) if side % size == 0]
    sizes = [size for size in sizes if fewest <= (height // size) * (width // size) <= most]
    return sizes or sorted({max(min(image_size) // parts, 1) for parts in (8, 4, 2)})


def training_config(
    image_size: tuple[int, int],
    num_channels: int = 3,
    preset: str | None = None,
    base: FlexiViTConfig | None = None,
    **options: Any,
) -> FlexiViTConfig:
    """A config to train with. It draws from patch sizes that fit the images, and is evaluated at the smallest of them.

    Args:
        image_size: (height, width) in pixels.
        num_channels: channels of an image.
        preset: a published size; one that fits the images when None.
        base: the config of a checkpoint, which only `options` change.
        options: fields of the config, which go before all others.

    Raises:
        ValueError: for a patch size that comes twice, or is larger than the image.
    """
    if isinstance(options.get("train_patch_sizes"), list | tuple):
        given = options["train_patch_sizes"]
        sizes = [to_pair(size, "train_patch_sizes") for size in given]
        check_distinct("train_patch_sizes", given, sizes, "`train_patch_size_probs` draws one more often.")
    if base is not None:
        if "train_patch_sizes" in options:
            options.setdefault("train_patch_size_probs", None)  # those of the base belong to its own sizes
        config = FlexiViTConfig.from_dict({**base.to_dict(), **options})
        trained = [to_pair(size, "train_patch_sizes") for size in config.train_patch_sizes or []]
        is_new = "train_patch_sizes" in options and "patch_size" not in options
        if is_new and config.resolve_patch_size() not in trained:
            config.patch_size = config.default_budgets()[0]
        return config
    if options.get("train_patch_sizes"):
        sizes = [to_pair(size, "train_patch_sizes") for size in options["train_patch_sizes"]]
    elif options.get("patch_size") or options.get("base_patch_size"):
        sizes = [to_pair(options.get("patch_size") or options["base_patch_size"], "patch_size")]
    else:
        sizes = [to_pair(size) for size in default_patch_sizes(image_size)]
        options["train_patch_sizes"] = [height for height, _ in sizes]
    for size in sizes:
        if size[0] > image_size[0] or size[1] > image_size[1]:
            raise ValueError(f"`patch_size` {size} is larger than the image of {image_size} pixels (height, width).")
    sizes.sort(key=math.prod)
    smallest, middle = sizes[0], sizes[len(sizes) // 2]
    fields: dict[str, Any] = {
        "image_size": plain_size(image_size),
        "num_channels": num_channels,
        "base_patch_size": plain_size(middle),
        "patch_size": plain_size(smallest),
        "position_grid": [side // patch for side, patch in zip(image_size, smallest, strict=True)],
        "use_cls_token": False,
        "pooling": "mean",
    }
    if preset is not None:
        return FlexiViTConfig.preset(preset, **{**fields, **options})
    return FlexiViTConfig(**{**training_shape(image_size), **fields, **options})


__all__ = ["default_patch_sizes", "training_config"]
