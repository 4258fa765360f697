"""Checks of what users give: choices, sizes, pixel values, images. Sizes are (height, width) in pixels."""

import difflib
from collections.abc import Iterable, Sequence
from operator import index

import numpy as np
import torch
from PIL import Image

from .images import to_rgb, upright_8_bit


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError naming `name`, its legal values and what came, if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` of which `name` is likely a misspelling; `None` where none is near, or it is one of them."""
    by_letters = {known.lower().replace("_", ""): known for known in names}
    letters = name.lower().replace("_", "").replace("-", "")
    nearest = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.8)
    return by_letters[nearest[0]] if nearest and by_letters[nearest[0]] != name else None


def to_pair(value: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """An int or (height, width) as (height, width).

    Raises:
        ValueError: if `value` is neither, or an entry is below 1.
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
    return height, width


def check_pixel_values(pixel_values, num_channels: int) -> None:
    """Refuses anything but a batch of images (batch, channels, height, width) with at least one image.

    Raises:
        ValueError: for a missing input, another number of dimensions, an empty batch or a wrong channel count.
    """
    if pixel_values is None:
        raise ValueError("`pixel_values` is required: a tensor of shape (batch, channels, height, width).")
    if pixel_values.ndim != 4:
        raise ValueError(
            "`pixel_values` must have the shape (batch, channels, height, width), got "
            f"{tuple(pixel_values.shape)}. For a single image, add a batch dimension: `pixel_values[None]`."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("`pixel_values` holds an empty batch (batch size 0); at least one image is needed.")
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must have {num_channels} channels (`config.num_channels`), got "
            f"{pixel_values.shape[1]} in shape {tuple(pixel_values.shape)}."
        )


class FiniteImagesMixin:
    """Reads PIL images as every tool of this library does (`to_rgb`), and refuses images that hold NaN or infinity.

    Goes in front of transformers' torchvision or PIL backend.

    Raises:
        ValueError: from the call of the processor, before anything is resized.
    """

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
            finite = True  # integers always are; a picture on a GPU is not worth a synchronisation
        if not finite:
            raise ValueError(
                "`images` holds NaN or infinite pixel values: expected finite numbers. Check how the picture was made "
                f"(its shape, channels first, is {tuple(image.shape)})."
            )
        return image


__all__ = ["FiniteImagesMixin", "check_choice", "check_pixel_values", "closest_name", "to_pair"]
