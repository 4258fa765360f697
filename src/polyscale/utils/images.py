"""Image files: finding them, and opening them as upright RGB images."""

import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps


IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow can also read formats that start other programs (EPS); pictures of unknown origin do not get to choose those.
_PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


def find_images(path: str | os.PathLike) -> list[Path]:
    """The file itself, or the picture files in a folder and below, sorted.

    Raises:
        ValueError: for a folder that holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"a folder without picture files ({', '.join(IMAGE_SUFFIXES)})")
    return files


def open_image(path: str | os.PathLike) -> Image.Image:
    """A picture file as an upright RGB image.

    Raises:
        ValueError: if the file is missing or no picture, is damaged, has more pixels than Pillow thinks safe
            (`PIL.Image.MAX_IMAGE_PIXELS`), or has pixels of 32 bits, whose range nobody knows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("no such file" if not path.exists() else "not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            with Image.open(path, formats=[name for name in _PILLOW_FORMATS if name in Image.OPEN]) as image:
                image = ImageOps.exif_transpose(image)
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"too many pixels, perhaps a decompression bomb ({error})") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ValueError(f"not a readable picture ({type(error).__name__}: {error})") from error
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256, "L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode!r}); convert the picture to 8 bits a channel")
    return image.convert("RGB")


__all__ = ["IMAGE_SUFFIXES", "find_images", "open_image"]
