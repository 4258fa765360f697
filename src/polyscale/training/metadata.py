"""Image folders whose labels stand in files beside the images: `metadata.csv`, `.jsonl` or `.parquet`."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image

from ..utils.images import is_image_file


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NAME_COLUMN = "file_name"
# What a cell of text must be for its column to be numbers: "007" is a name.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"-?\d+\.\d*|-?\.\d+")


def read_metadata_folder(path: Path, files: Sequence[Path], tops: Mapping[str, str]) -> dict[str, list[Dataset]]:
    """The images that metadata files name, with the other columns of these files.

    Args:
        path: the folder.
        files: all files below it.
        tops: the folders at its top that are splits -> their names; an image belongs to the one that it lies in.
            Empty where all images are one split.

    Returns:
        For each split its parts, one for each metadata file.

    Raises:
        ValueError: for a damaged file, names of images that lead out of its folder, images in no split, and a split
            of whose images none is named.
    """
    parts: dict[str, list[Dataset]] = {}
    for file in files:
        if file.name in METADATA_FILES:
            table, names = _with_paths(file, _read_table(file))
            splits = [_split_of(path, file, name, tops) for name in names]
            for split in dict.fromkeys(splits):
                rows = Dataset(table.filter(pa.array([other == split for other in splits])))
                for column in filter(_names_images, table.column_names):
                    called = column.removesuffix(_NAME_COLUMN).rstrip("_") or "image"
                    rows = rows.rename_column(column, called).cast_column(called, Image(decode=False))
                parts.setdefault(split, []).append(rows)
    for image in filter(is_image_file, files):
        split = tops.get(image.relative_to(path).parts[0], "train") if tops else "train"
        if split not in parts:
            raise ValueError(
                f"`dataset` {path}: no metadata file names images of the split {split!r}, such as "
                f"{image.relative_to(path)}: add its rows, or move it elsewhere."
            )
    return parts


def _names_images(column: str) -> bool:
    return column == _NAME_COLUMN or column.endswith(f"_{_NAME_COLUMN}")


def _read_table(file: Path) -> pa.Table:
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": pq.read_table}
    try:
        return readers[file.suffix](file)
    except Exception as error:  # of three parsers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is no readable metadata file: {reason.rstrip('.')}.") from error


def _read_csv(file: Path) -> pa.Table:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = next(reader, [])
        rows = []
        for row in filter(None, reader):
            if len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} cells, the header {len(header)}")
            rows.append(row)
    if len(set(header)) < len(header):
        raise ValueError(f"its header {header} has a name twice")
    return pa.table({name: _cells([row[place] for row in rows]) for place, name in enumerate(header)})


def _cells(texts: Sequence[str]) -> pa.Array:
    """A column of CSV: numbers where all cells are, else text; an empty cell is a missing value."""
    values: list[Any] = [text or None for text in texts]
    found = [text for text in texts if text]
    if found and all(map(_INTEGER.fullmatch, found)):
        return pa.array([value and int(value) for value in values], pa.int64())
    if found and all(_INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text) for text in found):
        return pa.array([value and float(value) for value in values], pa.float64())
    return pa.array(values, pa.string())


def _read_jsonl(file: Path) -> pa.Table:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return pa.Table.from_pylist([json.loads(line) for line in lines if line.strip()])


def _with_paths(file: Path, table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The table with whole paths in place of the names of images, and the names as they stand in its first column."""
    columns = list(filter(_names_images, table.column_names))
    if not columns or len(table) == 0:
        lack = f"a column {_NAME_COLUMN}" if not columns else "rows"
        raise ValueError(f"{file} must have {lack}; its columns are {table.column_names}.")
    for column in columns:
        names = table.column(column).to_pylist()
        for row, name in enumerate(names):
            if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
                raise ValueError(
                    f"{file}: {column} of row {row} must be a file in the folder of the metadata file, got {name!r}."
                )
        paths = pa.array([os.path.normpath(file.parent / name) for name in names], pa.string())
        table = table.set_column(table.column_names.index(column), column, paths)
    return table, table.column(columns[0]).to_pylist()


def _split_of(path: Path, file: Path, name: str, tops: Mapping[str, str]) -> str:
    if not tops:
        return "train"
    top = os.path.relpath(name, os.path.normpath(path)).split(os.sep)[0]
    if top not in tops:
        raise ValueError(f"{file} names {name}, which lies in none of the splits {', '.join(tops)}.")
    return tops[top]


__all__ = ["METADATA_FILES", "read_metadata_folder"]
