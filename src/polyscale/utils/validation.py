"""Checks of what users give: choices, sizes, pixel values. Sizes are (height, width) in pixels."""

import difflib
import os
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from operator import index
from types import UnionType
from typing import Any

import numpy as np
import torch


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
    """Raises ValueError naming `name` for anything but an int or a float, of Python or NumPy, that is not NaN and not
    larger than floats are.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"`{name}` must be a number, got {shown(value)}.")
    if value != value:
        raise ValueError(f"`{name}` is NaN: expected a number.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"`{name}` must be at most {sys.float_info.max}, the largest float; got {shown(value)}.")


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


__all__ = [
    "check_choice",
    "check_distinct",
    "check_flag",
    "check_function",
    "check_int",
    "check_list",
    "check_number",
    "check_path",
    "check_pixel_values",
    "check_tensor",
    "check_video",
    "closest_name",
    "shown",
    "to_pair",
]
