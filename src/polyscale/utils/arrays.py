"""Arrays and tensors that stand for images, with the values that the same images have in files: 0 to 255."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image


_CHANNELS = (1, 3, 4)  # of images that a file may hold: grey, RGB, and RGB with transparency
_ADVICE = "Convert them first (image processors take values as they are with `do_rescale=False`)."
_SLACK = 1e-4  # of floats that were computed, as a share of the range


def map_images(images: Any, change: Callable[[Any], Any]) -> Any:
    """Lists and tuples of images, in the same order, with `change` applied to each image; a lone image likewise."""
    return [map_images(entry, change) for entry in images] if isinstance(images, list | tuple) else change(images)


def _is_array(image: Any) -> bool:
    return isinstance(image, np.ndarray | torch.Tensor)


def _is_float(array: np.ndarray | torch.Tensor) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"


def _on_cpu(array: np.ndarray | torch.Tensor) -> bool:
    return isinstance(array, np.ndarray) or array.device.type == "cpu"


def _limits(array: np.ndarray | torch.Tensor) -> tuple[float, float]:
    array = array.detach() if isinstance(array, torch.Tensor) else array
    return (0.0, 0.0) if 0 in array.shape else (float(array.min()), float(array.max()))


def _cast(array: np.ndarray | torch.Tensor, dtype: str) -> np.ndarray | torch.Tensor:
    return array.to(getattr(torch, dtype)) if isinstance(array, torch.Tensor) else array.astype(dtype)


def check_finite(images: Any, name: str = "images") -> None:
    """Refuses NaN and infinity in arrays of floats. Those on a GPU are not worth a synchronisation.

    Raises:
        ValueError: naming the argument.
    """

    def check(image: Any) -> None:
        if _is_array(image) and _is_float(image) and _on_cpu(image) and not all(map(math.isfinite, _limits(image))):
            raise ValueError(
                f"`{name}` holds NaN or infinite pixel values: expected finite numbers. Check how the image was made "
                f"(its shape is {tuple(image.shape)})."
            )

    map_images(images, check)


def readable_arrays(images: Any) -> Any:
    """Images in layouts and of types that torch and Pillow read: flipped views are copied, halves become float32."""

    def change(image: Any) -> Any:
        if isinstance(image, np.ndarray):
            is_unread = image.dtype.kind == "f" and image.dtype.itemsize not in (4, 8)
            dtype = np.dtype(np.float32) if is_unread else image.dtype.newbyteorder("=")
            return np.ascontiguousarray(image, dtype=dtype)
        is_half = isinstance(image, torch.Tensor) and image.is_floating_point() and image.element_size() < 4
        return image.float() if is_half else image

    return map_images(images, change)


def without_wrapping(images: Any) -> Any:
    """Images whose values stay as they are, integers of other types than uint8 as floats: a bicubic resize goes above
    and below the values around, and torch lets the others wrap around at their ends.
    """

    def change(image: Any) -> Any:
        is_plain = not _is_array(image) or _is_float(image) or image.dtype in (np.uint8, torch.uint8)
        return image if is_plain else _cast(image, "float32")

    return map_images(images, change)


def resized_bands(image: np.ndarray, size: tuple[int, int], resample: object) -> np.ndarray:
    """(channels, height, width) -> (channels, *size) by Pillow, each channel as an image of its own: of any number of
    channels, and of floats, which keep their precision.
    """
    dtype = np.uint8 if image.dtype == np.uint8 else np.float32
    resample = getattr(resample, "name", resample)  # torchvision's has the names of Pillow's
    resample = Image.Resampling[resample] if isinstance(resample, str) else resample
    bands = [Image.fromarray(band.astype(dtype)).resize(size[::-1], resample=resample) for band in image]
    return np.stack([np.asarray(band) for band in bands])


def plain_values(value: Any) -> Any:
    """Numbers and lists of Python, as JSON holds them, where a value is of NumPy or torch; others as they are."""
    if type(value) in (list, tuple):
        return type(value)(map(plain_values, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def as_floats(value: object) -> object:
    """Numbers as transformers takes them: floats, and lists of them."""
    value = plain_values(value)
    if isinstance(value, list | tuple):
        return [as_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def channel_axis(array: np.ndarray | torch.Tensor, channels: tuple[int, ...] = _CHANNELS) -> int | None:
    """-3 or -1, where an image or a batch of them has one of these numbers of channels; -3 first, as transformers."""
    return next((axis for axis in (-3, -1) if array.ndim >= 3 and array.shape[axis] in channels), None)


def with_values_of_files(images: Any, name: str = "images", without_alpha: bool = True) -> Any:
    """Images as they would come from files: arrays and tensors of other types than uint8 with values from 0 to 255.

    16 bits are reduced to their upper 8, as those of files are (`utils.images.upright_8_bit`); with other channels
    than a file has, they keep their precision, as floats. Booleans are black and white. Other integers must lie
    between 0 and 255. Floats lie in [0, 1], or in [0, 255] where one value of the call is above 1. Whatever is an
    integer then is uint8, so that resizing treats it as it treats a file.

    Args:
        images: an image or nested lists of them; what is no array stays as it is.
        name (`str`, *optional*, defaults to `"images"`): of the argument, for errors.
        without_alpha (`bool`, *optional*, defaults to `True`): whether a fourth channel is dropped, as that of files.

    Raises:
        ValueError: for values of another, unknown range.
    """
    arrays: list = []
    map_images(images, lambda image: arrays.append(image) if _is_array(image) and _is_float(image) else None)
    here = [_limits(array)[1] for array in arrays if _on_cpu(array)]
    elsewhere = [array.amax().float() for array in arrays if not _on_cpu(array)]
    scale = 255.0 if here and max(here) <= 1 + _SLACK else 1.0
    if elsewhere:  # without a synchronisation, and so without a look at the range
        scale_elsewhere = torch.where(torch.stack(elsewhere).amax() <= 1 + _SLACK, 255.0, 1.0)

    def convert(image: Any) -> Any:
        if not _is_array(image):
            return image
        if isinstance(image, np.ndarray):
            image = image.astype(image.dtype.newbyteorder("="), copy=False)
        if not _is_float(image):
            image = _integers_of_files(image, name, _CHANNELS if without_alpha else (1, 3))
        elif _on_cpu(image):
            image = _floats_of_files(image, name, scale)
        else:
            image = image.float() * scale_elsewhere
        axis = channel_axis(image)
        if without_alpha and axis is not None and image.shape[axis] == 4:
            return image[..., :3, :, :] if axis == -3 else image[..., :3]
        return image

    return map_images(images, convert)


def _integers_of_files(
    image: np.ndarray | torch.Tensor, name: str, channels: tuple[int, ...]
) -> np.ndarray | torch.Tensor:
    kind = str(image.dtype).rpartition(".")[2]
    if kind == "uint8":
        return image
    if kind == "bool":
        return _cast(image, "uint8") * 255
    if kind == "uint16":
        wide = _cast(image, "int32")
        like_a_file = image.ndim == 2 or channel_axis(image, channels) is not None
        return _cast(wide >> 8, "uint8") if like_a_file else _cast(wide, "float32") / 257
    if _on_cpu(image):
        low, high = (int(limit) for limit in _limits(image))
        if low < 0 or high > 255:
            raise ValueError(
                f"`{name}` holds {kind} values from {low} to {high}, whose range is unknown: expected 0 to 255, or "
                f"uint16. {_ADVICE}"
            )
    return _cast(image, "uint8")


def _floats_of_files(image: np.ndarray | torch.Tensor, name: str, scale: float) -> np.ndarray | torch.Tensor:
    low, high = _limits(image)
    most = 255 / scale
    if not (low >= -_SLACK * most and high <= most * (1 + _SLACK)):
        raise ValueError(
            f"`{name}` holds floats from {low:.4g} to {high:.4g}, whose range is unknown: expected 0 to 1, or 0 to "
            f"255. {_ADVICE}"
        )
    scaled = _cast(image, "float32") * scale
    rounded = scaled.round()
    if _limits(abs(scaled - rounded))[1] < 255 * _SLACK / 10:
        return _cast(rounded, "uint8")
    return scaled


__all__ = [
    "as_floats",
    "channel_axis",
    "check_finite",
    "map_images",
    "plain_values",
    "readable_arrays",
    "resized_bands",
    "with_values_of_files",
    "without_wrapping",
]
