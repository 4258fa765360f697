"""The S2 model that a training starts with: S2 around a FlexiViT that fits the images."""

from typing import Any

from ..flexivit.training_flexivit import training_config as flexivit_config
from .configuration_s2_vision import S2VisionConfig


def training_config(
    image_size: tuple[int, int],
    num_channels: int = 3,
    preset: str | None = None,
    base: S2VisionConfig | None = None,
    **options: Any,
) -> S2VisionConfig:
    """A config to train with: two scales, the larger one that of the images.

    Args:
        image_size: (height, width) in pixels, the same even number.
        num_channels: channels of an image.
        preset: a published size of FlexiViT; one that fits the tiles when None.
        base: the config of a checkpoint, which only `options` change.
        options: fields of the config, which go before all others; with `vision_config` any model can be wrapped.

    Raises:
        ValueError: for images that two scales do not fit.
    """
    if base is not None:
        return S2VisionConfig.from_dict({**base.to_dict(), **options})
    if "vision_config" in options:
        return S2VisionConfig(**{"scales": [1, 2], **options})
    scales = options.setdefault("scales", [1, 2]) if "img_sizes" not in options else None
    largest = max(scales) if scales else 2
    side, remainder = divmod(image_size[0], int(largest))
    if image_size[0] != image_size[1] or remainder or side < 4 or largest != int(largest):
        near = max(round(min(image_size) / largest), 4) * int(largest)
        raise ValueError(
            f"`image_size` must be a square whose side is a multiple of {int(largest)} and at least "
            f"{4 * int(largest)} for S2 at the scales {scales}: got {image_size}; for example {near}."
        )
    vision = flexivit_config((side, side), num_channels, preset)
    return S2VisionConfig(**{"vision_config": vision.to_dict(), **options})


__all__ = ["training_config"]
