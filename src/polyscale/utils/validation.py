"""Checks of what users give: choices, sizes, pixel values, images. Sizes are (height, width) in pixels."""

import difflib
from collections.abc import Iterable, Sequence
from operator import index

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from .images import to_rgb, upright_8_bit


MAX_SIDE = 1 << 16  # pixels; more is a slip, or an attempt to fill the memory


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError naming `name`, its legal values and what came, if `value` is not one of `choices`."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_int(name: str, value: object, minimum: int | None = None) -> int:
    """`value` as an int; raises ValueError naming `name` for anything else, or one below `minimum`."""
    try:
        value = index(None if isinstance(value, bool) else value)
    except TypeError:
        raise ValueError(f"`{name}` must be an int, got {value!r}.") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}.")
    return value


def check_number(name: str, value: object) -> None:
    """Raises ValueError naming `name` for anything but an int or a float that is not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    if value != value:
        raise ValueError(f"`{name}` is NaN: expected a number.")


def check_tensor(name: str, value: object, axes: tuple[str, ...], floating: bool = True) -> None:
    """Raises ValueError naming `name` for anything but a tensor with these axes, none empty; of floats if so asked."""
    expected = f"a tensor {'of floats ' if floating else ''}of shape ({', '.join(axes)})"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be {expected}, got a {type(value).__name__}.")
    if value.ndim != len(axes) or 0 in value.shape or (floating and not value.is_floating_point()):
        raise ValueError(f"`{name}` must be {expected}, got {tuple(value.shape)} of {value.dtype}.")


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` of which `name` is likely a misspelling; `None` where none is near, or it is one of them."""
    by_letters = {known.lower().replace("_", ""): known for known in names}
    letters = name.lower().replace("_", "").replace("-", "")
    nearest = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.8)
    return by_letters[nearest[0]] if nearest and by_letters[nearest[0]] != name else None


def to_pair(value: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """An int or (height, width) as (height, width).

    Raises:
        ValueError: if `value` is neither, or an entry is below 1 or above `MAX_SIDE`.
    """
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    try:
        height, width = pair
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        height, width = index(height), index(width)  # makes a symbolic size of a tracer a constant
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be an int or a pair (height, width) of ints, got {value!r}.") from None
    if height < 1 or width < 1:
        raise ValueError(f"`{name}` must be at least 1 pixel in height and width, got {value!r}.")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"`{name}` must be at most {MAX_SIDE} pixels in height and width, got {value!r}.")
    return height, width


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Refuses anything but a batch of images (batch, channels, height, width) with at least one image.

    Raises:
        ValueError: for a missing input, no tensor, another number of dimensions, an empty batch, images without pixels
            or a wrong channel count.
    """
    _check_pixels(pixel_values, ("batch", "channels", "height", "width"), num_channels)


def check_video(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """`check_pixel_values` for a batch of videos (batch, frames, channels, height, width)."""
    _check_pixels(pixel_values, ("batch", "frames", "channels", "height", "width"), num_channels)


def _check_pixels(pixel_values: torch.Tensor | None, axes: tuple[str, ...], num_channels: int) -> None:
    expected = f"a tensor of shape ({', '.join(axes)})"
    if pixel_values is None:
        raise ValueError(f"`pixel_values` is required: {expected}.")
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"`pixel_values` must be {expected}, got a {type(pixel_values).__name__}. An image processor makes it of "
            'images: `processor(images, return_tensors="pt")`.'
        )
    shape = tuple(pixel_values.shape)
    if len(shape) != len(axes):
        alone = "`pixel_values[:, None]` makes videos of images" if "frames" in axes else "`pixel_values[None]`"
        raise ValueError(
            f"`pixel_values` must have the shape ({', '.join(axes)}), got {shape}. One alone needs the batch "
            f"dimension too: {alone}."
        )
    empty = {"batch": "an empty batch", "frames": "videos of zero frames", "height": "no pixels", "width": "no pixels"}
    for axis, length in zip(axes, shape, strict=True):
        if axis in empty and length == 0:
            raise ValueError(f"`pixel_values` holds {empty[axis]}, got the shape {shape}: {expected} is needed.")
    if shape[-3] != num_channels:
        raise ValueError(
            f"`pixel_values` must have {num_channels} channels (`config.num_channels`), got {shape[-3]} in shape "
            f"{shape}; the order is ({', '.join(axes)})."
        )
    if pixel_values.is_complex():
        raise ValueError(f"`pixel_values` must hold real numbers, got {pixel_values.dtype}.")


# What transformers' image processors raise at arrays of other shapes, and at options of other types.
_PROCESSOR_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError),
)


def _check_images(images: object) -> None:
    """Refuses what is no image, or list of images: arrays, tensors, PIL images, and names of files."""
    waiting = [images]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, (list, tuple)) and entry:
            waiting.extend(entry)
        elif isinstance(entry, (np.ndarray, torch.Tensor)):
            is_complex = entry.is_complex() if isinstance(entry, torch.Tensor) else entry.dtype.kind not in "biuf"
            if entry.ndim < 2 or 0 in entry.shape or is_complex:
                kind = f"{entry.dtype} and shape {tuple(entry.shape)}"
                raise ValueError(f"`images` holds an array of {kind}, which is no image.")
        elif not isinstance(entry, (Image.Image, str)):
            raise ValueError(
                f"`images` must be an image or a list of images (PIL, NumPy, torch, or names of files), got {entry!r}."
            )


class FiniteImagesMixin:
    """Reads PIL images as every tool of this library does (`to_rgb`), and refuses images that hold NaN or infinity.

    Goes in front of transformers' torchvision or PIL backend.

    Raises:
        ValueError: from the call of the processor, before anything is resized.
    """

    def preprocess(self, images, *args, **kwargs):
        _check_images(images)
        try:
            return super().preprocess(images, *args, **kwargs)
        except _PROCESSOR_ERRORS as error:
            if isinstance(error, ValueError) and "`" in str(error):  # it names what is wrong
                raise
            raise ValueError(f"`images` cannot be processed ({type(error).__name__}: {error}).") from error

    def process_image(self, image, do_convert_rgb: bool | None = None, **kwargs) -> np.ndarray | torch.Tensor:
        if isinstance(image, Image.Image):
            image = to_rgb(image) if do_convert_rgb else upright_8_bit(image)
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        is_tensor = isinstance(image, torch.Tensor)
        if is_tensor and image.is_floating_point() and image.device.type == "cpu":
            finite = bool(torch.isfinite(image).all())
        elif not is_tensor and np.issubdtype(image.dtype, np.floating):
            finite = bool(np.isfinite(image).all())
        else:
            finite = True  # integers always are; an image on a GPU is not worth a synchronisation
        if not finite:
            raise ValueError(
                "`images` holds NaN or infinite pixel values: expected finite numbers. Check how the image was made "
                f"(its shape, channels first, is {tuple(image.shape)})."
            )
        return image


__all__ = [
    "FiniteImagesMixin",
    "check_choice",
    "check_int",
    "check_number",
    "check_pixel_values",
    "check_tensor",
    "check_video",
    "closest_name",
    "to_pair",
]
