"""The images that `polyscale embed` embeds, and what tells them from others under the same names."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from .utils.identity import digest_of, image_digest
from .utils.images import UnreadableImageError, check_names, files_below, find_images, is_parquet_file, open_pixels
from .utils.validation import check_path


# The key of the metadata of a parquet file under which `Contents` are kept.
_KEY = b"polyscale.contents"


class Item(NamedTuple):
    """An image of a source.

    Attributes:
        name (`str`): its file, or split and row.
        open (`Callable`): gives the image; raises `UnreadableImageError`.
        stored (`Callable`): gives the file that it is, or what stands in its place in a table.
    """

    name: str
    open: Callable[[], Image.Image | np.ndarray]
    stored: Callable[[], Any]


class Contents(NamedTuple):
    """Tells the images of a part from others under the same names.

    Attributes:
        times (`str`): digest of the size of each file, and of the time when it was changed last.
        bytes (`str`): digest of what is in them.
    """

    times: str
    bytes: str

    def as_metadata(self) -> dict[bytes, bytes]:
        """For the schema of a parquet file."""
        return {_KEY: json.dumps({"times": self.times, "bytes": self.bytes}).encode()}

    @classmethod
    def of_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "Contents | None":
        """What `as_metadata` gave; `None` where there is none, as in files of older versions."""
        try:
            return cls(**json.loads((metadata or {})[_KEY]))
        except (KeyError, TypeError, ValueError):
            return None

    def are_those_of(self, items: Sequence[Item]) -> bool:
        """Whether images are still the same. They are read only where one was written since."""
        are_untouched = self.times != "" and self.times == times_of(items)
        return are_untouched or self.bytes == digest_of(map(content_of, items))


def items_of(source: str | os.PathLike) -> list[Item]:
    """The images of a folder, or the rows of parquet files and data sets of a hub.

    Raises:
        ValueError: for a source without images.
    """
    from .training.data import check_one_kind, load_image_dataset

    path = Path(check_path("source", source))
    if path.is_dir() or (path.is_file() and not is_parquet_file(path)):
        below = list(files_below(path))
        try:
            files = find_images(path, below)
        except UnreadableImageError:  # a folder without images
            if not any(map(is_parquet_file, below)):
                raise
        else:
            check_names("source", files)
            check_one_kind("source", path, below)
            return [_file_item(file) for file in files]
    items = []
    for split_name, split in load_image_dataset(source, labelled=False).items():
        stored = split.with_format(None)
        items += [_row_item(f"{split_name}/{row}", split, stored, row) for row in range(len(split))]
    return items


def _file_item(file: Path) -> Item:
    return Item(str(file), lambda: open_pixels(file), lambda: file)


def _row_item(name: str, split: Dataset, stored: Dataset, row: int) -> Item:
    def cell() -> Any:
        value = stored[row]["image"]
        is_file = isinstance(value, dict) and value.get("bytes") is None and value.get("path") is not None
        return Path(value["path"]) if is_file else value

    return Item(name, lambda: split[row]["image"], cell)


def times_of(items: Sequence[Item]) -> str:
    """`Contents.times`; empty where images are no files, which have no times."""
    stored = (item.stored() for item in items)
    return digest_of(map(_time_of, stored)) if isinstance(items[0].stored(), Path) else ""


def _time_of(stored: Any) -> str:
    if not isinstance(stored, Path):
        return image_digest(stored)
    try:
        status = stored.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def content_of(item: Item) -> str:
    """A digest of what is in an image; empty where it cannot be read."""
    return image_digest(item.stored())


__all__ = ["Contents", "Item", "content_of", "items_of", "times_of"]
