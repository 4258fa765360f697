"""What image processors take: images of every kind, and the options of a call."""

import math
import re
from collections.abc import Mapping
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
from .validation import check_choice, check_number, shown


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


__all__ = ["PROCESSOR_ERRORS", "FiniteImagesMixin", "check_statistics", "checked_options", "option_error"]
