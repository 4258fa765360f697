"""Image files: finding them, and the one way from a file or a PIL image to upright RGB pixels of 8 bits.

Files of arrays (`.npy`) count as images too: they may have any number of channels.
"""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .arrays import with_values_of_files


IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAY_SUFFIX = ".npy"
# Pillow can also read formats that start other programs (EPS); images of unknown origin do not get to choose those.
_PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


class UnreadableImageError(ValueError):
    """An image that cannot be used. The message is "name: reason".

    Attributes:
        name (`str`): the file, or what the caller called the image.
        reason (`str`): what is wrong with it.
    """

    def __init__(self, name: str | os.PathLike, reason: str):
        self.name, self.reason = os.fspath(name), reason
        super().__init__(f"{self.name}: {reason}")

    def __reduce__(self):
        return type(self), (self.name, self.reason)


def files_below(folder: str | os.PathLike) -> Iterator[Path]:
    """The files in a folder and below, sorted; hidden ones and what operating systems leave are not looked at."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def is_image_file(file: Path) -> bool:
    """Whether a file is an image by its name."""
    return file.suffix.lower() in (*IMAGE_SUFFIXES, ARRAY_SUFFIX)


def is_parquet_file(file: Path) -> bool:
    """Whether a file is a parquet file by its name."""
    return file.suffix.lower() == ".parquet"


def check_names(name: str, files: Iterable[str | os.PathLike]) -> None:
    """Refuses files whose names are no text: tables and records cannot hold them.

    Args:
        name (`str`): of the argument that they come from, for the error.
        files (`Iterable[str or os.PathLike]`): the files.

    Raises:
        ValueError: naming the first one, and how many there are.
    """
    unnamed = [os.fsencode(file) for file in files if not _is_text(file)]
    if unnamed:
        raise ValueError(
            f"`{name}` holds {len(unnamed)} files whose names are not UTF-8, such as {unnamed[0]!r}: rename them."
        )


def _is_text(file: str | os.PathLike) -> bool:
    try:
        return bool(os.fspath(file).encode())
    except UnicodeEncodeError:
        return False


def find_images(path: str | os.PathLike, files: Iterable[Path] | None = None) -> list[Path]:
    """The file itself, or the image files in a folder and below, sorted.

    Args:
        path (`str` or `os.PathLike`): the file or folder.
        files (`Iterable[Path]`, *optional*): what `files_below` gives of the folder, where that is known.

    Raises:
        ValueError: for a folder that holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    # a link to nothing is an image that cannot be read, and is told as such; a pipe or a socket is none
    found = filter(is_image_file, files_below(path) if files is None else files)
    images = sorted(file for file in found if file.is_file() or not file.exists())
    if not images:
        suffixes = ", ".join((*IMAGE_SUFFIXES, ARRAY_SUFFIX))
        raise UnreadableImageError(path, f"a folder without image files ({suffixes})")
    return images


def upright_8_bit(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL image turned upright as its EXIF data says, with 8 bits per channel; its mode is else kept.

    16 bits are reduced to their upper 8, as Pillow itself does with colours of 16 bits. Of an animation the frame
    that the image stands at is taken: the first, where it was just opened.

    Args:
        image (`PIL.Image.Image`): of any mode.
        name (`str`, *optional*, defaults to `"image"`): what an error calls it.

    Raises:
        UnreadableImageError: for a damaged image, and for pixels whose range is unknown (32-bit integers and
            floats).
    """
    try:
        image.load()
        # a PGM file of more than 8 bits is opened as 32 bits, but scaled to 16
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        upright = ImageOps.exif_transpose(image)
        if is_16_bit:
            return Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8))
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise UnreadableImageError(name, f"not a readable image ({type(error).__name__}: {error})") from error
    if upright.mode in ("I", "F"):
        kind = "integers" if upright.mode == "I" else "floats"
        raise UnreadableImageError(
            name, f"pixels are 32-bit {kind} (mode {upright.mode!r}), whose range is unknown; convert it to 8 bits"
        )
    return upright


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL image of any mode as an upright RGB image of 8 bits per channel; transparency is dropped.

    Every tool of this library and every image processor goes through here, so that all see the same pixels.
    Arguments and errors: `upright_8_bit`.
    """
    image = upright_8_bit(image, name)
    if image.mode == "LAB":  # the one mode that `convert` has no way from
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode == "La":  # greys multiplied by their transparency
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """An image file, or its bytes, as an upright RGB image (`to_rgb`).

    Args:
        source (`str`, `os.PathLike` or `bytes`): the file, or what is in it.
        name (`str`, *optional*): what an error calls it; the file by default.

    Raises:
        UnreadableImageError: if the file is missing or no image, is damaged, has more pixels than Pillow thinks safe
            (`PIL.Image.MAX_IMAGE_PIXELS`), or has pixels of 32 bits, whose range is unknown.
    """
    if isinstance(source, bytes):
        name, file = name or "image", io.BytesIO(source)
    else:
        name, file = name or os.fspath(source), Path(source)
        if not file.is_file():
            raise UnreadableImageError(name, "not a file" if file.exists() else "no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            with Image.open(file, formats=[format for format in _PILLOW_FORMATS if format in Image.OPEN]) as image:
                return to_rgb(image, name)
    except UnreadableImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(name, f"too many pixels, perhaps a decompression bomb ({error})") from error
    except Exception as error:
        raise UnreadableImageError(name, f"not a readable image ({type(error).__name__}: {error})") from error


def open_pixels(source: str | os.PathLike) -> Image.Image | np.ndarray:
    """An image file as an upright RGB image (`open_image`), or a file of an array (`.npy`) as that array.

    Raises:
        UnreadableImageError: as `open_image`, and for a file that is no whole array of numbers.
    """
    file = Path(source)
    if file.suffix.lower() != ARRAY_SUFFIX or not file.is_file():
        return open_image(source)
    try:
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged header raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableImageError(source, f"not a readable array ({reason})") from error
    kind = f"{array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
    if kind == "several arrays" or array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "biuf":
        raise UnreadableImageError(source, f"an array (height, width, channels) of numbers was expected, got {kind}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def displayed(image: Image.Image | np.ndarray) -> Image.Image:
    """What a reader is shown of an image: RGB, of arrays with other channels the first three, or the first as grey."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = image if image.ndim == 3 else image[..., None]
    if array.shape[2] > array.shape[0]:  # channels first
        array = array.transpose(1, 2, 0)
    array = array[..., :3] if array.shape[2] >= 3 else array[..., 0]
    return Image.fromarray(np.asarray(with_values_of_files(array)).round().astype(np.uint8)).convert("RGB")


def read_image(value: Any, name: str | None = None) -> Image.Image:
    """Whatever stands for an image in a data set or a call, as an upright RGB image.

    Args:
        value (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image` or `dict`): a file, its bytes, an opened image, or
            what a `datasets.Image(decode=False)` column holds: a dict with "bytes" or "path".
        name (`str`, *optional*): what an error calls it; the file by default.

    Raises:
        UnreadableImageError: as `open_image`, and for a missing value.
    """
    if isinstance(value, Image.Image):
        return to_rgb(value, name or getattr(value, "filename", "") or "image")
    if isinstance(value, Mapping):
        path = value.get("path")
        return read_image(path if value.get("bytes") is None else value["bytes"], name or path)
    if isinstance(value, str | os.PathLike | bytes):
        return open_image(value, name)
    raise UnreadableImageError(name or "image", f"expected a file, bytes or a PIL image, got {type(value).__name__}")


__all__ = [
    "ARRAY_SUFFIX",
    "IMAGE_SUFFIXES",
    "UnreadableImageError",
    "check_names",
    "displayed",
    "files_below",
    "find_images",
    "is_image_file",
    "is_parquet_file",
    "open_image",
    "open_pixels",
    "read_image",
    "to_rgb",
    "upright_8_bit",
]
