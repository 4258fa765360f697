"""What image processors make of images: of which size, and from which part of an image.

A processor whose answers do not follow from `size`, `crop_size`, `do_resize` and `do_center_crop` gives its own: a
property `output_size`, a method `options_for_size(image_size, crop_pct)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor


def _side_lengths(size: Any) -> dict[str, int | None]:
    names = ("height", "width", "shortest_edge")
    if isinstance(size, Mapping):
        return {name: size.get(name) for name in names}
    return {name: getattr(size, name, None) for name in names}


def _crops(processor: BaseImageProcessor) -> bool:
    return bool(getattr(processor, "do_center_crop", False)) and getattr(processor, "crop_size", None) is not None


def output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a processor makes; `None` where that depends on the image."""
    if hasattr(type(processor), "output_size"):
        return processor.output_size
    sides = _side_lengths(processor.crop_size if _crops(processor) else getattr(processor, "size", None))
    if sides["height"] is None or sides["width"] is None:
        return None
    return sides["height"], sides["width"]


def options_for_size(
    processor: BaseImageProcessor, image_size: tuple[int, int], crop_pct: float | None = None
) -> dict[str, Any]:
    """Arguments of a processor's call that bring images to `image_size`, keeping its own way of doing it.

    A processor that crops keeps the share of the resized image that its crop has.

    Args:
        processor (`BaseImageProcessor`): of any model.
        image_size (`(height, width)`): in pixels.
        crop_pct (`float`, *optional*): share of the resized image's side that the centre crop keeps; the processor's
            own when `None`.

    Raises:
        ValueError: for a size or a share that the processor cannot follow.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"`crop_pct` must be above 0 and at most 1, got {crop_pct}.")
    if hasattr(type(processor), "options_for_size"):
        return processor.options_for_size(image_size, crop_pct)
    return plain_options_for_size(processor, image_size, crop_pct)


def plain_options_for_size(
    processor: BaseImageProcessor, image_size: tuple[int, int], crop_pct: float | None = None
) -> dict[str, Any]:
    """`options_for_size` of a processor that resizes to `size` and perhaps crops to `crop_size`."""
    height, width = image_size
    if crop_pct is None and _crops(processor):
        shortest = _side_lengths(processor.size)["shortest_edge"]
        crop_pct = _side_lengths(processor.crop_size)["height"] / shortest if shortest else None
    final = {"height": height, "width": width}
    if crop_pct is None:
        return {"size": final, "do_resize": True, "do_center_crop": False}
    shortest_edge = max(int(max(height, width) / crop_pct), 1)
    return {
        "size": {"shortest_edge": shortest_edge},
        "crop_size": final,
        "do_resize": True,
        "do_center_crop": True,
    }


def seen_region(image: Image.Image, processor: BaseImageProcessor) -> Image.Image:
    """The part of an image that a processor hands to the model, at the image's own resolution."""
    if not _crops(processor):
        return image
    crop = _side_lengths(processor.crop_size)
    width, height = image.size
    size = _side_lengths(processor.size if getattr(processor, "do_resize", False) else None)
    if size["shortest_edge"]:
        scale_x = scale_y = size["shortest_edge"] / min(width, height)
    elif size["height"] and size["width"]:
        scale_x, scale_y = size["width"] / width, size["height"] / height
    else:
        scale_x = scale_y = 1.0
    seen_width = min(width, crop["width"] / scale_x)
    seen_height = min(height, crop["height"] / scale_y)
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return image.crop((round(left), round(top), round(left + seen_width), round(top + seen_height)))


def process_images(
    processor: BaseImageProcessor, images: Sequence[Image.Image], **options
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Images as inputs of a model, in as few batches as their sizes allow.

    Args:
        processor (`BaseImageProcessor`): of any model.
        images (sequence of `PIL.Image.Image`): any number of them.
        options: of the processor's call.

    Yields:
        The places of some images in `images`, and the tensors that the processor makes of them, by name.
    """
    if output_size(processor) is not None:
        yield list(range(len(images))), dict(processor(list(images), return_tensors="pt", **options))
        return
    groups: dict[tuple, list[int]] = {}
    inputs = [dict(processor([image], return_tensors="pt", **options)) for image in images]
    for index, tensors in enumerate(inputs):
        groups.setdefault(tuple(tensors["pixel_values"].shape), []).append(index)
    for indices in groups.values():
        names = inputs[indices[0]]
        yield indices, {name: torch.cat([inputs[index][name] for index in indices]) for name in names}


__all__ = ["options_for_size", "output_size", "plain_options_for_size", "process_images", "seen_region"]
