"""Checks of what users give: choices, sizes, pixel values, images. Sizes are (height, width) in pixels."""

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from operator import index
from types import UnionType
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.image_utils import ChannelDimension

from .arrays import (
    as_floats,
    channel_axis,
    check_finite,
    map_images,
    readable_arrays,
    resized_bands,
    with_values_of_files,
    without_wrapping,
)
from .images import to_rgb, upright_8_bit


MAX_SIDE = 1 << 16  # pixels; more is a slip, or an attempt to fill the memory
_SHOWN = 100  # characters of a value in an error


def shown(value: object) -> str:
    """A value as an error shows it, in one line: a model or an array has pages of them."""
    if isinstance(value, torch.Tensor | torch.nn.Module | np.ndarray):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError naming `name`, its legal values and what came, if `value` is not one of `choices`."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


def check_flag(name: str, value: object) -> None:
    """Raises ValueError naming `name` for anything but True and False: the text "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_function(name: str, value: object) -> None:
    """Raises ValueError naming `name` for anything but `None` and what can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"`{name}` must be a function or None, got {shown(value)}.")


def check_list(name: str, value: object, kind: type | UnionType = object, what: str = "values") -> list:
    """The entries of a list, tuple or array; raises ValueError naming `name` for anything else (text among it), an
    empty one, and entries that are not of `kind`.
    """
    if isinstance(value, np.ndarray | torch.Tensor):
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"`{name}` must be a list of {what}, got {shown(value)}.")
    entries = list(value)
    if not entries:
        raise ValueError(f"`{name}` is empty: give at least one.")
    for entry in entries:
        if not isinstance(entry, kind):
            raise ValueError(f"`{name}` must be a list of {what}, got {shown(entry)} in it.")
    return entries


def check_distinct(name: str, entries: Iterable[Any], keys: Iterable[Hashable] | None = None, hint: str = "") -> None:
    """Raises ValueError naming `name` where an entry comes twice.

    Args:
        name (`str`): of the argument.
        entries (`Iterable`): as they were given.
        keys (`Iterable[Hashable]`, *optional*): by what they are told apart, where it is not by themselves.
        hint (`str`, *optional*): what the error ends with.
    """
    entries, seen = list(entries), set()
    for entry, key in zip(entries, entries if keys is None else keys, strict=True):
        if key in seen:
            raise ValueError(f"`{name}` holds {shown(entry)} twice: give each once.{hint and ' '}{hint}")
        seen.add(key)


def check_int(name: str, value: object, minimum: int | None = None) -> int:
    """`value` as an int; raises ValueError naming `name` for anything else, or one below `minimum`."""
    try:
        value = index(None if isinstance(value, bool) else value)
    except TypeError:
        raise ValueError(f"`{name}` must be an int, got {shown(value)}.") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}.")
    return value


def check_number(name: str, value: object) -> None:
    """Raises ValueError naming `name` for anything but an int or a float, of Python or NumPy, that is not NaN."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"`{name}` must be a number, got {shown(value)}.")
    if value != value:
        raise ValueError(f"`{name}` is NaN: expected a number.")


def check_path(name: str, value: object) -> str:
    """A path, or a name in its place, as text; raises ValueError naming `name` for anything else."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise ValueError(f"`{name}` must be a path or a name, got {shown(value)}.")
    return os.fspath(value)


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
        raise ValueError(f"`{name}` must be an int or a pair (height, width) of ints, got {shown(value)}.") from None
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


# What processors of transformers raise at arrays of other shapes, and at options of other types.
PROCESSOR_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError),
)


# Filters of Pillow that torchvision has too.
_RESAMPLINGS = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "NEAREST_EXACT")

# Options of a processor's call that say what its values are.
_VALUES = ("do_rescale", "rescale_factor", "do_convert_rgb", "input_data_format", "image_mean")
_NUMBERS = ("image_mean", "image_std", "rescale_factor")


def _check_images(images: object) -> None:
    """Refuses what is no image, or list of images: arrays, tensors, PIL images, and names of files. Of a batch of
    texts, each with a list of its images, some may have none.
    """
    waiting, count = [images], 0
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, (list, tuple)):
            waiting.extend(entry)
            continue
        count += 1
        if isinstance(entry, (np.ndarray, torch.Tensor)):
            is_complex = entry.is_complex() if isinstance(entry, torch.Tensor) else entry.dtype.kind not in "biuf"
            if entry.ndim < 2 or 0 in entry.shape or is_complex:
                kind = f"{entry.dtype} and shape {tuple(entry.shape)}"
                raise ValueError(f"`images` holds an array of {kind}, which is no image.")
        elif not isinstance(entry, (Image.Image, str)):
            raise ValueError(
                f"`images` must be an image or a list of images (PIL, NumPy, torch, or names of files), got "
                f"{shown(entry)}."
            )
    if not count:
        raise ValueError(f"`images` must be an image or a list of at least one image, got {images!r}.")


def _with_channels(images: object, num_channels: int, input_data_format: object) -> tuple[object, object]:
    """Images with the channels where transformers finds them, and its `input_data_format`.

    Grey arrays (height, width) get their channel. Where images are of other channels than files have, transformers
    cannot tell which axis they are.
    """
    last = input_data_format in ("channels_last", ChannelDimension.LAST)
    are_unusual = num_channels not in (1, 3, 4) and input_data_format is None

    def change(image: object) -> object:
        if not isinstance(image, np.ndarray | torch.Tensor):
            if are_unusual:
                raise ValueError(
                    f"`images` must be arrays of {num_channels} channels, as many as `image_mean` has entries: images "
                    "of PIL and files have 1 (grey) or 3 (RGB)."
                )
            return image
        if image.ndim == 2:
            image = image[..., None] if last else image[None]
        if not are_unusual:
            return image
        axis = channel_axis(image, (num_channels,))
        if axis is None:
            raise ValueError(
                f"`images` must have {num_channels} channels, as many as `image_mean` has entries, got an array of "
                f"the shape {tuple(image.shape)}."
            )
        return image if axis == -3 else image.swapaxes(-1, -2).swapaxes(-2, -3)

    return map_images(images, change), ChannelDimension.FIRST if are_unusual else input_data_format


def check_statistics(mean: object, std: object, factor: object = None) -> None:
    """Refuses values of `image_mean`, `image_std` and `rescale_factor` that make no numbers of pixels.

    Raises:
        ValueError: naming the one.
    """
    for name, values in (("image_mean", mean), ("image_std", std)):
        for value in values if isinstance(values, list | tuple) else [] if values is None else [values]:
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {values}.")
            if name == "image_std" and value <= 0:
                raise ValueError(f"`{name}` must be above 0: values are divided by it; got {values}.")
    if factor is not None:
        check_number("rescale_factor", factor)
        if not math.isfinite(factor) or factor == 0:
            raise ValueError(f"`rescale_factor` must be finite and not 0, got {factor}.")


def _check_resample(value: object) -> None:
    """Refuses what is no filter; transformers takes some for others without a word."""
    if isinstance(value, str | bool) or not (value is None or hasattr(value, "name") or value in range(6)):
        raise ValueError(f"`resample` must be a filter of Pillow, such as `PIL.Image.BICUBIC`, got {shown(value)}.")


def checked_options(processor: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a processor's call, numbers among them as floats; what they leave open is the processor's own.

    Raises:
        ValueError: for statistics that make no numbers of pixels, and what is no filter.
    """
    options = {name: as_floats(value) if name in _NUMBERS else value for name, value in options.items()}
    names = (*_NUMBERS, "resample")
    given = [getattr(processor, name, None) if options.get(name) is None else options[name] for name in names]
    _check_resample(given.pop())
    check_statistics(*given)
    return options


def option_error(processor: object, error: BaseException, options: Mapping[str, Any]) -> ValueError | None:
    """What transformers says of an unknown option, or one of another type, in a sentence; `None` for other errors."""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return ValueError(f"`{unknown[1]}` is no option of {type(processor).__name__}.")
    option = re.search(r"error for field '(\w+)'(?:.*any type in \((.+)\)\. )?", str(error), re.DOTALL)
    if option is None:
        return None
    kinds = re.sub(r"<class '(\w+)'>", r"\1", option[2] or "another").replace("NoneType", "None")
    return ValueError(f"`{option[1]}` must be of {kinds}, got {shown(options.get(option[1]))}.")


class FiniteImagesMixin:
    """Gives image processors the same pixels, whatever an image comes as: PIL images are read as every tool of this
    library reads files (`to_rgb`), arrays and tensors get the values of files (`with_values_of_files`).

    Arrays are left alone where values are not rescaled (`do_rescale=False`), or not by 1/255.

    Goes in front of transformers' torchvision or PIL backend.

    Raises:
        ValueError: from the call of the processor, before anything is resized: for what is no image, NaN or infinite
            values, and values of an unknown range.
    """

    def preprocess(self, images, *args, **kwargs):
        _check_images(images)
        kwargs = checked_options(self, kwargs)
        check_finite(images)
        images = readable_arrays(images)
        own = {name: kwargs[name] if kwargs.get(name) is not None else getattr(self, name, None) for name in _VALUES}
        if own["do_rescale"] and own["rescale_factor"] == 1 / 255:
            images = with_values_of_files(images, without_alpha=bool(own["do_convert_rgb"]))
        else:
            images = without_wrapping(images)
        num_channels = len(own["image_mean"]) if isinstance(own["image_mean"], list | tuple) else 3
        images, kwargs["input_data_format"] = _with_channels(images, num_channels, own["input_data_format"])
        try:
            return super().preprocess(images, *args, **kwargs)
        except PROCESSOR_ERRORS as error:
            if isinstance(error, ValueError) and "`" in str(error):  # it names what is wrong
                raise
            if named := option_error(self, error, kwargs):
                raise named from error
            raise ValueError(f"`images` cannot be processed ({type(error).__name__}: {error}).") from error

    def process_image(self, image, do_convert_rgb: bool | None = None, **kwargs) -> np.ndarray | torch.Tensor:
        if isinstance(image, Image.Image):
            is_grey = isinstance(self.image_mean, list | tuple) and len(self.image_mean) == 1
            image = to_rgb(image) if do_convert_rgb or is_grey else upright_8_bit(image)
            image = image.convert("L") if is_grey and not do_convert_rgb else image
        if isinstance(image, torch.Tensor) and self.backend == "pil":
            image = image.detach().cpu()
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def resize(self, image, size, resample=None, **kwargs) -> np.ndarray | torch.Tensor:
        if isinstance(image, torch.Tensor):
            resample = Image.Resampling(resample) if isinstance(resample, int) else resample
            name = getattr(resample, "name", "")
            check_choice("resample", name or "BILINEAR", _RESAMPLINGS)
            return super().resize(image, size, resample=resample, **kwargs)
        if image.dtype == np.uint8 and len(image) in (1, 3):  # Pillow takes a fourth channel for transparency
            return super().resize(image, size, resample=resample, **kwargs)
        new_size = super().resize(np.zeros((1, *image.shape[-2:]), np.uint8), size, resample=resample).shape[-2:]
        return resized_bands(image, new_size, resample)

    def center_crop(self, image, size, **kwargs) -> np.ndarray | torch.Tensor:
        if isinstance(image, np.ndarray) and size.height and size.width:  # padded as the other backend does
            lacking = (max(size.height - image.shape[-2], 0), max(size.width - image.shape[-1], 0))
            image = np.pad(image, [(0, 0), *((count // 2, count - count // 2) for count in lacking)])
        return super().center_crop(image, size, **kwargs)


__all__ = [
    "PROCESSOR_ERRORS",
    "FiniteImagesMixin",
    "check_choice",
    "check_distinct",
    "check_flag",
    "check_function",
    "check_int",
    "check_list",
    "check_number",
    "check_path",
    "check_pixel_values",
    "check_statistics",
    "check_tensor",
    "check_video",
    "checked_options",
    "closest_name",
    "option_error",
    "shown",
    "to_pair",
]
