"""What image processors make of images: of which size, and from which part of an image.

A processor whose answers do not follow from `size`, `crop_size`, `do_resize` and `do_center_crop` gives its own: a
property `output_size`, methods `options_for_size(image_size, crop_pct)` and `seen_region(image)`.

Some have a field `fit`, which says how an image comes to the size that the model takes: "squash" (resized, whatever
its shape), "crop" (resized to cover the size, then a centre crop), "pad" (resized to fit into the size, the rest
filled with the mean colour), or, where a model takes many sizes, "aspect" (the one nearest to the image's own shape).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TVImage
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from .arrays import with_values_of_files
from .images import UnreadableImageError, displayed, to_rgb
from .processor_input import check_statistics
from .validation import MAX_SIDE, check_int, shown, to_pair


# Names of interpolations, as users and timm write them.
RESAMPLINGS = {name: PILImageResampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}


def _side_lengths(size: Any) -> dict[str, int | None]:
    names = ("height", "width", "shortest_edge")
    if isinstance(size, Mapping):
        return {name: size.get(name) for name in names}
    return {name: getattr(size, name, None) for name in names}


def _crops(processor: BaseImageProcessor) -> bool:
    return bool(getattr(processor, "do_center_crop", False)) and getattr(processor, "crop_size", None) is not None


def check_processor(processor: BaseImageProcessor) -> None:
    """Refuses an image processor whose settings make no images, as a damaged file gives it.

    Raises:
        ValueError: naming the setting.
    """
    check_statistics(*(getattr(processor, name, None) for name in ("image_mean", "image_std", "rescale_factor")))
    for name in ("size", "crop_size"):
        for side, length in _side_lengths(getattr(processor, name, None)).items():
            if length is not None and not 1 <= check_int(f"{name}[{side!r}]", length) <= MAX_SIDE:
                raise ValueError(f"`{name}[{side!r}]` must be from 1 to {MAX_SIDE} pixels, got {length}.")
    resample = getattr(processor, "resample", None)
    if isinstance(resample, int) and resample not in list(Image.Resampling):
        raise ValueError(f"`resample` must be a filter of Pillow, from 0 to 5, got {shown(resample)}.")


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


def processor_for_size(processor: BaseImageProcessor, image_size: int | tuple[int, int]) -> BaseImageProcessor:
    """A copy of an image processor that brings images to `image_size` (`options_for_size`).

    Raises:
        ValueError: for a size that the processor cannot follow.
    """
    options = options_for_size(processor, to_pair(image_size, "image_size"))
    return type(processor).from_dict({**processor.to_dict(), **options})


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


def seen_region(image: Image.Image | np.ndarray, processor: BaseImageProcessor) -> Image.Image:
    """The part of an image that a processor hands to the model, at the image's own resolution (`displayed`)."""
    image = image if isinstance(image, Image.Image) else displayed(image)
    if hasattr(type(processor), "seen_region"):
        return processor.seen_region(image)
    return plain_seen_region(image, processor)


def plain_seen_region(image: Image.Image, processor: BaseImageProcessor) -> Image.Image:
    """`seen_region` of a processor that resizes to `size` and perhaps crops to `crop_size`."""
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


def pixels_of(image: Image.Image | np.ndarray, num_channels: int = 3) -> TVImage:
    """An image as a tensor (channels, height, width): uint8, or float in [0, 1].

    Args:
        image: of PIL, for 1 channel (grey) or 3 (RGB); or an array (height, width), (height, width, channels) or
            (channels, height, width) of integers (`with_values_of_files`) or floats in [0, 1], of any number of
            channels.
        num_channels (`int`, *optional*, defaults to 3): channels wanted.

    Raises:
        ValueError: for another number of channels, another type, or floats of another range.
    """
    if isinstance(image, Image.Image):
        if num_channels not in (1, 3):
            raise ValueError(
                f"An image file gives 1 channel (grey) or 3 (RGB), not {num_channels}: store images of {num_channels} "
                "channels as arrays (.npy)."
            )
        rgb = to_rgb(image)
        return v2.functional.to_image(rgb.convert("L") if num_channels == 1 else rgb)
    array = image[..., None] if image.ndim == 2 else image
    if num_channels == 3 and array.ndim == 3 and array.shape[2] == 1:  # grey, as grey files are read
        array = array.repeat(3, axis=2)
    if array.ndim != 3 or num_channels not in (array.shape[2], array.shape[0]):
        raise ValueError(f"An array of the shape {image.shape} is no image of {num_channels} channels.")
    if array.shape[2] == num_channels:
        array = array.transpose(2, 0, 1)
    if array.dtype == np.uint16 and num_channels not in (1, 3):  # no file has these: all of their precision counts
        array = array.astype(np.float32) / 65535
    elif not np.issubdtype(array.dtype, np.floating):
        array = with_values_of_files(array, "array", without_alpha=False)
    else:
        array = array.astype(np.float32)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"An array of floats must lie in [0, 1], got {array.min():.4g} to {array.max():.4g}: scale it first."
            )
    return TVImage(torch.from_numpy(np.ascontiguousarray(array)))


def pixels_and_options(image: Image.Image | np.ndarray, num_channels: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """An image as `pixels_of`, and the arguments of an image processor's call that takes it as it is."""
    pixels = pixels_of(image, num_channels).as_subclass(torch.Tensor)
    options: dict[str, Any] = {"do_convert_rgb": False, "input_data_format": "channels_first"}
    return pixels, options | ({"do_rescale": False} if pixels.is_floating_point() else {})


def process_images(
    processor: BaseImageProcessor,
    images: Sequence[Image.Image | np.ndarray],
    num_channels: int = 3,
    name_of: Callable[[int], str] | None = None,
    **options,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Images as inputs of a model, in as few batches as their sizes allow.

    Args:
        processor (`BaseImageProcessor`): of any model.
        images (sequence of `PIL.Image.Image` or `np.ndarray`): any number of them.
        num_channels (`int`, *optional*, defaults to 3): of the model; of PIL images 1 (grey) or 3 (RGB).
        name_of (`Callable`, *optional*): the name of an image by its place, for errors.
        options: of the processor's call.

    Raises:
        ValueError: for an image that has other channels, or that the processor refuses.

    Yields:
        The places of some images in `images`, and the tensors that the processor makes of them, by name.
    """
    are_plain = num_channels == 3 and all(isinstance(image, Image.Image) for image in images)
    if are_plain and output_size(processor) is not None:
        yield list(range(len(images))), dict(processor(list(images), return_tensors="pt", **options))
        return
    groups: dict[tuple, list[int]] = {}
    inputs = []
    for index, image in enumerate(images):
        own: dict[str, Any] = {}
        if not are_plain:
            try:
                image, own = pixels_and_options(image, num_channels)
            except ValueError as error:
                if name_of is None or isinstance(error, UnreadableImageError):
                    raise
                raise UnreadableImageError(name_of(index), str(error)) from error
        inputs.append(dict(processor([image], return_tensors="pt", **options, **own)))
    for index, tensors in enumerate(inputs):
        groups.setdefault(tuple(tensors["pixel_values"].shape), []).append(index)
    for indices in groups.values():
        names = inputs[indices[0]]
        yield indices, {name: torch.cat([inputs[index][name] for index in indices]) for name in names}


__all__ = [
    "RESAMPLINGS",
    "check_processor",
    "options_for_size",
    "output_size",
    "pixels_and_options",
    "pixels_of",
    "plain_options_for_size",
    "plain_seen_region",
    "process_images",
    "processor_for_size",
    "seen_region",
]
