"""Image-classification data for training and evaluation: folders of images, parquet files, data sets of a hub."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets import config as datasets_config
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from PIL import Image as PILImage

from ..loading import is_offline
from ..utils.images import (
    ARRAY_SUFFIX,
    UnreadableImageError,
    check_names,
    files_below,
    is_image_file,
    is_parquet_file,
    open_pixels,
    read_image,
)
from ..utils.validation import check_flag, check_int, check_path, shown
from .labels import listed, unify_labels
from .metadata import METADATA_FILES, read_metadata_folder
from .splits import SPLIT_NAMES, in_order, parquet_splits, split_folders


LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")
IMAGE_COLUMNS = ("image", "img", "images")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Up to so many bytes of files, every image is decoded before training; above, files are only looked for.
_BYTES_TO_CHECK = 100_000_000


def load_image_dataset(source: str | Path, labelled: bool = True) -> DatasetDict:
    """Reads an image data set.

    Splits are told by the names of the folders at the top, if all of them that hold images are called `train`,
    `validation` or `test` (or a usual variant); the folders below, or else those at the top, are the classes. A class
    may have any name. Files of arrays (`.npy`, (height, width) or (height, width, channels)) count as images.

    Args:
        source (`str` or `Path`): a folder of images, a folder of parquet files, one parquet file, or the name of a
            data set on a hub.
        labelled (`bool`, *optional*, defaults to `True`): `False` leaves labels out; then there need not be any, nor
            class folders.

    Returns:
        `DatasetDict`: its splits, each with a column `image` (upright RGB images of PIL, or arrays) and, where
        `labelled`, an integer column `label`, whose classes (`features["label"].names`) are the same in all splits.

    Raises:
        ValueError: if there is no such source, it has no image column or no label column, or labels are missing.
    """
    source = check_path("dataset", source)
    check_flag("labelled", labelled)
    parts = _read(source, labelled)
    described = f"data set {str(source)!r}"
    standard = {name: [_with_standard_columns(part, described, labelled) for part in split] for name, split in parts}
    if labelled:
        splits = unify_labels(standard, described)
    else:
        splits = DatasetDict({name: concatenate_datasets(split) for name, split in standard.items()})
    if not any(len(split) for split in splits.values()):
        raise ValueError(f"The {described} is empty.")
    return DatasetDict({name: split.with_transform(opened) for name, split in splits.items()})


def _read(source: str | Path, labelled: bool) -> list[tuple[str, list[Dataset]]]:
    """(split, its parts), as they are stored."""
    path = Path(source).expanduser()
    if path.is_file():
        if not is_parquet_file(path):
            raise ValueError(f"`dataset` must be a folder, a parquet file or a hub name; {source!s} is another file.")
        return [("train", [_read_parquet(str(path))])]
    if path.is_dir():
        files = list(files_below(path))
        check_names("dataset", files)
        if any(file.name in METADATA_FILES for file in files):
            found = split_folders(path, [file.relative_to(path) for file in files])
            tops = {top: SPLIT_NAMES[top.lower()] for top in found}
            return list(in_order(read_metadata_folder(path, files, tops)).items())
        if any(is_image_file(file) for file in files):
            check_one_kind("dataset", path, files)
            return _read_image_folder(path, files, labelled)
        parquet = list(filter(is_parquet_file, files))
        if parquet:
            return [
                (name, [_read_parquet(str(file)) for file in part])
                for name, part in parquet_splits(path, parquet).items()
            ]
        if not files:
            raise ValueError(f"`dataset` {source!s} is an empty folder.")
        return [(name, [split]) for name, split in _load(str(path)).items()]
    if path.exists() or not _HUB_NAME.fullmatch(str(source)) or str(source).startswith("."):
        raise ValueError(f"`dataset` must be a folder, a parquet file or a hub name; {source!s} is none of them.")
    return [(name, [split]) for name, split in _load(str(source)).items()]


def check_one_kind(name: str, path: Path, files: Iterable[Path]) -> None:
    """Refuses a folder with images both in files and in tables, such as a copy of a hub's data set with its pictures.

    Args:
        name: of the argument that gives the folder, for the error.
        path: the folder.
        files: below it; some are images.

    Raises:
        ValueError: naming one of the tables.
    """
    for file in filter(is_parquet_file, files):
        with suppress(OSError, pa.ArrowException):
            columns = [field.type for field in pq.read_schema(file)]
            if any(pa.types.is_struct(column) and column.get_field_index("bytes") >= 0 for column in columns):
                raise ValueError(
                    f"`{name}` {path} holds image files, and images in {file.relative_to(path)}: give the folder or "
                    "the parquet file that is meant."
                )


def _load(name: str) -> DatasetDict:
    is_on_the_hub = not Path(name).exists()
    kept = Path(datasets_config.HF_DATASETS_CACHE, name.replace("/", "___"))
    if is_on_the_hub and is_offline() and ("/" not in name or not kept.exists()):  # else it is asked again and again
        raise ValueError(f"`dataset` {name!r} is no folder or file here, and cannot be read from the hub: offline.")
    try:
        return load_dataset(_full_name(name) if is_on_the_hub else name)
    except (DatasetNotFoundError, ConnectionError, EmptyDatasetError) as error:
        raise ValueError(
            f"`dataset` {name!r} is no folder or file here, and cannot be read from the hub: offline, or no such data "
            f"set ({type(error).__name__})."
        ) from error
    except Exception as error:  # of the readers of every kind of file
        raise _unread(f"`dataset` {name!r} cannot be read", error) from error


def _full_name(name: str) -> str:
    """Owner and name of a data set of the hub; a short name is what `datasets` also calls a local folder that it keeps
    in its cache, which is another data set.
    """
    if "/" in name:
        return name
    try:
        return HfApi().dataset_info(name).id
    except Exception as error:  # of the network, or that there is none
        raise ConnectionError(f"{name} is not found") from error


def _read_parquet(path: str) -> Dataset:
    said = f"{path} is no readable parquet file"
    try:
        pq.read_schema(path)
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise ValueError(f"{said}: {_first_line(error)}.") from error
    try:
        return Dataset.from_parquet(path)
    except Exception as error:  # and so does datasets
        raise _unread(said, error) from error


def _unread(said: str, error: BaseException) -> ValueError:
    """The fault of the data, or of the place where `datasets` keeps what it made of them."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno is not None:
        return ValueError(
            f"The cache {datasets_config.HF_DATASETS_CACHE} cannot be written ({cause.strerror}): set HF_HOME to a "
            "folder that can."
        )
    return ValueError(f"{said}: {_first_line(cause)}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_image_folder(path: Path, files: list[Path], labelled: bool) -> list[tuple[str, list[Dataset]]]:
    images = [file.relative_to(path) for file in files if is_image_file(file)]
    has_splits = bool(split_folders(path, images))
    depth = int(has_splits)
    bare = [file for file in images if len(file.parts) < depth + 2]
    if labelled and bare:
        where = f"{bare[0].parent}" if has_splits and len(bare[0].parts) > 1 else str(path)
        raise ValueError(
            f"`dataset` {path} must have a folder for each class: {len(bare)} images, such as {bare[0]}, lie in none "
            f"({where} holds them directly)."
        )
    splits: dict[str, list[Path]] = {}
    for file in images:
        name = SPLIT_NAMES[file.parts[0].lower()] if has_splits and len(file.parts) > 1 else "train"
        splits.setdefault(name, []).append(file)
    order = list(in_order(splits))
    columns: Mapping[str, dict] = {name: {"image": [str(path / file) for file in splits[name]]} for name in order}
    features = {"image": Image(decode=False)}
    if labelled:
        # file systems spell accents in two ways, perhaps each split in another
        class_of = {file: unicodedata.normalize("NFC", file.parts[depth]) for file in images}
        names = sorted(set(class_of.values()))
        features["label"] = ClassLabel(names=names)
        numbers = {name: index for index, name in enumerate(names)}
        for name in order:
            columns[name]["label"] = [numbers[class_of[file]] for file in splits[name]]
    return [(name, [Dataset.from_dict(columns[name], features=Features(features))]) for name in order]


def _the_column(
    found: Sequence[str], names: Sequence[str], kind: str, accepted: str, source: str, features: Features
) -> str:
    """The one of the columns of a kind that is meant: the only one, or the first that has one of the usual names."""
    if not found:
        raise ValueError(
            f"The {source} must have {'an' if kind == 'image' else 'a'} {kind} column{accepted}, got the columns "
            f"{listed(list(features))}."
        )
    if len(found) == 1:
        return found[0]
    usual = [name for name in names if name in found]
    if not usual:
        raise ValueError(
            f"The {source} has several {kind} columns, {listed(found)}: rename the one that is meant to {kind!r}."
        )
    return usual[0]


def _with_standard_columns(part: Dataset, source: str, labelled: bool) -> Dataset:
    features = part.features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    images = images or [name for name, feature in features.items() if isinstance(feature, Array2D | Array3D)]
    images = images or [name for name in IMAGE_COLUMNS if _holds_files(features.get(name))]
    accepted = f" (of the type Image, or files as bytes in {', '.join(IMAGE_COLUMNS)})"
    columns = {_the_column(images, IMAGE_COLUMNS, "image", accepted, source, features): "image"}
    if labelled:
        classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        named = [name for name in LABEL_COLUMNS if name in features]
        labels = [name for name in named if name in classes] or named or classes
        accepted = f" ({', '.join(LABEL_COLUMNS)}, or of the type ClassLabel)"
        columns[_the_column(labels, LABEL_COLUMNS, "label", accepted, source, features)] = "label"
    part = part.select_columns(list(columns))
    part = part.rename_columns({old: new for old, new in columns.items() if old != new})
    is_array = isinstance(part.features["image"], Array2D | Array3D)
    return part if is_array else part.cast_column("image", Image(decode=False))


def _holds_files(feature: Any) -> bool:
    """Whether a column is what `Image` stores, or bytes, as other libraries than `datasets` write them."""
    kind = feature.get("bytes") if isinstance(feature, Mapping) and {*feature} == {"bytes", "path"} else feature
    return isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")


def opened(batch: dict[str, list]) -> dict[str, list]:
    """Rows as they are stored -> rows with opened images; a row may lack any column."""
    if "image" not in batch:
        return batch
    return {**batch, "image": [open_cell(cell) for cell in batch["image"]]}


def open_cell(cell) -> PILImage.Image | np.ndarray:
    """What stands in an image column, as an upright RGB image, or as an array where it holds arrays.

    Raises:
        UnreadableImageError: for a damaged image, with the name of its file.
    """
    if isinstance(cell, list | np.ndarray):
        return np.asarray(cell)
    path = cell.get("path") if isinstance(cell, dict) else None
    if path is not None and Path(path).suffix.lower() == ARRAY_SUFFIX and cell.get("bytes") is None:
        return open_pixels(path)
    return read_image(cell)


def stored_name(split: Dataset, row: int) -> str:
    """What an error calls an image of a split: its file, or its row."""
    cell = split.with_format(None)[row]["image"]
    return (cell.get("path") if isinstance(cell, dict) else None) or f"image {row} of the data"


def check_images(split: Dataset, name: str) -> int:
    """Decodes every image of a split, where that is cheap: small files together.

    Args:
        split: as `load_image_dataset` gives it.
        name: of the split, for the error.

    Returns:
        `int`: how many images were decoded; 0 where there are too many bytes of them.

    Raises:
        ValueError: naming the first damaged images, and how many there are.
    """
    stored = split.with_format(None)
    if not isinstance(stored.features["image"], Image):
        return 0
    paths = [cell["path"] for cell in stored["image"] if cell["bytes"] is None]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"The split {name!r} lacks {len(missing)} image files: {listed(missing)}.")
    if sum(map(os.path.getsize, paths)) + stored.data.nbytes > _BYTES_TO_CHECK:
        return 0
    damaged = []
    for row, cell in enumerate(stored["image"]):
        try:
            open_cell(cell)
        except UnreadableImageError as error:
            damaged.append(str(error) if cell["path"] else f"row {row}: {error}")
    if damaged:
        more = f" (and {len(damaged) - 3} more)" if len(damaged) > 3 else ""
        raise ValueError(f"The split {name!r} holds images that cannot be used: {'; '.join(damaged[:3])}{more}.")
    return len(stored)


def evaluation_split(splits: DatasetDict, name: str | None = None) -> str | None:
    """The split to evaluate on: `name`, else the first of validation, valid, test; None if there is none of them.

    Raises:
        ValueError: if `name` is given and the data set has no such split.
    """
    if name is not None:
        if not isinstance(name, str) or name not in splits:
            raise ValueError(f"`split` must be one of {list(splits)}, got {shown(name)}.")
        return name
    return next((split for split in ("validation", "valid", "val", "dev", "test") if split in splits), None)


def sample_rows(split: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """At most `limit` rows, drawn from the whole split by a seed; in the split's order.

    Raises:
        ValueError: for a `limit` below 1, or a `seed` below 0.
    """
    check_int("seed", seed, minimum=0)
    if limit is None or check_int("limit", limit, minimum=1) >= len(split):
        return split
    return split.select(sorted(np.random.default_rng(seed).choice(len(split), limit, replace=False).tolist()))


def image_shapes(split: Dataset, count: int = 32) -> Sequence[tuple[int, int, int]]:
    """(height, width, channels) of some images, spread over the split."""
    shapes = []
    for row in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist():
        image = split[row]["image"]
        is_array = isinstance(image, np.ndarray)
        shapes.append((*image.shape, 1)[:3] if is_array else (image.height, image.width, 3))
    return shapes


__all__ = [
    "LABEL_COLUMNS",
    "SPLIT_NAMES",
    "check_images",
    "check_one_kind",
    "evaluation_split",
    "image_shapes",
    "load_image_dataset",
    "open_cell",
    "sample_rows",
    "stored_name",
]
