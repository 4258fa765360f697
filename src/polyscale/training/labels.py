"""The classes of a data set: one list of names for all its splits, whatever each split holds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.types as pa_types
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets


_SHOWN = 12  # names that a message lists
# Integers that skip most numbers are identifiers, not classes counted from 0.
_MOST_CLASSES_PER_LABEL = 100


def listed(names: Sequence) -> str:
    """Names as a message shows them, the rest counted."""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def unify_labels(parts: Mapping[str, Sequence[Dataset]], source: str) -> DatasetDict:
    """The parts of each split as one, with labels that mean the same class in all of them.

    Integers stay what they are; class names that two parts number differently are numbered alike; text is numbered in
    the order of the alphabet, over all splits. A split of which no label is known (hidden test labels) is left out
    where others have labels.

    Args:
        parts: for each split, data sets with a column `label`: a `ClassLabel`, text, integers or booleans.
        source: what the data set is called, for errors.

    Raises:
        ValueError: for labels of another kind, missing or negative ones, or integers that do not count classes.
    """
    columns = {name: [_labels_of(part, name, source) for part in split] for name, split in parts.items()}
    known = {name: any(_is_known(column).any() for column in split) for name, split in columns.items()}
    if not any(known.values()):
        raise ValueError(f"The {source} has no labels: all are missing or negative, as where they are kept secret.")
    for name, split in columns.items():
        missing = sum(int((~_is_known(column)).sum()) for column in split)
        if known[name] and missing:
            first = next(int(np.argmin(_is_known(column))) for column in split if not _is_known(column).all())
            raise ValueError(
                f"The split {name!r} of the {source} has {missing} images without a label (missing or negative), the "
                f"first in row {first}: label them, or leave them out."
            )
    kept = [name for name in parts if known[name]]
    names = _class_names([(part, column) for key in kept for part, column in _paired(parts, columns, key)], source)
    numbers = {name: index for index, name in enumerate(names)}
    return DatasetDict(
        {
            key: concatenate_datasets(
                [_numbered(part, column, names, numbers) for part, column in _paired(parts, columns, key)]
            )
            for key in kept
        }
    )


def _paired(parts: Mapping, columns: Mapping, name: str) -> list[tuple[Dataset, np.ndarray]]:
    return list(zip(parts[name], columns[name], strict=True))


def _labels_of(part: Dataset, name: str, source: str) -> np.ndarray:
    """The labels as an array of objects: text or integers, `None` where one is missing."""
    column = part.data.column("label")
    is_kind = (pa_types.is_integer, pa_types.is_boolean, pa_types.is_string, pa_types.is_large_string)
    if not any(check(column.type) for check in is_kind) and not pa_types.is_null(column.type):
        raise ValueError(
            f"The labels of the split {name!r} of the {source} must be integers or text, one for each image; got the "
            f"type {column.type}."
        )
    values = part.with_format(None)["label"]
    return np.array([int(value) if isinstance(value, bool) else value for value in values], dtype=object)


def _is_known(column: np.ndarray) -> np.ndarray:
    return np.array([value is not None and (isinstance(value, str) or value >= 0) for value in column], dtype=bool)


def _class_names(parts: Sequence[tuple[Dataset, np.ndarray]], source: str) -> list[str]:
    named = [part.features["label"].names for part, _ in parts if isinstance(part.features["label"], ClassLabel)]
    text = sorted({value for _, column in parts for value in column if isinstance(value, str)})
    unnamed = [part for part, column in parts if len(column) and not _names_classes(part, column)]
    if unnamed and (text or len(set(map(tuple, named))) > 1):
        raise ValueError(
            f"The {source} has class names in some parts, and plain integers in others: nothing says which class an "
            "integer means. Give all of them names, or all of them integers."
        )
    if named and text:
        return list(dict.fromkeys([name for names in named for name in names] + text))
    if text:
        return text
    if named:
        names = list(dict.fromkeys(name for names in named for name in names))
        for part, column in parts:
            own = part.features["label"]
            most = len(own.names if isinstance(own, ClassLabel) else names)
            if len(column) and max(column) >= most:
                raise ValueError(f"The {source} has the label {max(column)}, but only {most} class names.")
        return names
    found = {value for _, column in parts for value in column}
    highest = max(found)
    if highest >= _MOST_CLASSES_PER_LABEL * len(found):
        raise ValueError(
            f"The integer labels of the {source} must count classes from 0: the highest is {highest}, of {len(found)} "
            "different ones. Number the classes 0, 1, 2, ..., or give their names as text."
        )
    return [str(label) for label in range(highest + 1)]


def _names_classes(part: Dataset, column: np.ndarray) -> bool:
    return isinstance(part.features["label"], ClassLabel) or isinstance(column[0], str)


def _numbered(part: Dataset, column: np.ndarray, names: list[str], numbers: dict[str, int]) -> Dataset:
    own = part.features["label"]
    if isinstance(own, ClassLabel) and own.names == names:
        return part
    if isinstance(own, ClassLabel):
        column = [numbers[own.names[value]] for value in column]
    else:
        column = [numbers[value] if isinstance(value, str) else int(value) for value in column]
    part = part.remove_columns("label")
    return part.add_column("label", np.array(column, dtype=np.int64), feature=ClassLabel(names=names))


def renumbered(split: Dataset, numbers: Sequence[int], names: Sequence[str]) -> Dataset:
    """A split whose label i becomes `numbers[i]`, the index of the same class in `names`."""
    features = split.features
    if list(numbers) == list(range(len(names))) and features["label"].names == list(names):
        return split
    labels = [numbers[label] for label in split.with_format(None)["label"]]
    column_format = split.format
    split = split.with_format(None).remove_columns("label")
    split = split.add_column("label", np.array(labels, dtype=np.int64), feature=ClassLabel(names=list(names)))
    if column_format["type"] == "custom":
        split = split.with_transform(**column_format["format_kwargs"])
    return split


__all__ = ["listed", "renumbered", "unify_labels"]
