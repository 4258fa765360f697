"""Which class of a model a class of a data set is: by name, never by its place in a list."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset

from ..utils.validation import shown


_GENERIC = re.compile(r"LABEL_\d+")
_SHOWN = 12  # names of each side that an error lists


def model_class_names(id2label: Mapping[int, str]) -> list[str] | None:
    """The class names of a model in the order of its logits; `None` where they say nothing ("LABEL_0", ...)."""
    names = [str(id2label[index]) for index in sorted(id2label)]
    return None if all(_GENERIC.fullmatch(name) for name in names) else names


def data_class_names(names: Sequence[str] | None) -> list[str] | None:
    """The class names of a data set by label; `None` where it has none, or plain integers for names."""
    if names is None:
        return None
    names = [str(name) for name in names]
    return None if all(name.isascii() and name.isdecimal() for name in names) else names


def known_labels(split: Dataset) -> tuple[np.ndarray, list[str] | None, int]:
    """The label of each row, the names of the classes where the data has any, and how many classes there are.

    Raises:
        ValueError: for no rows, or labels that are missing or unknown.
    """
    if len(split) == 0:
        raise ValueError("The data set is empty: there is nothing to evaluate.")
    feature = split.features["label"]
    labels = list(split.with_format(None)["label"])
    unknown = sum(label is None or label < 0 for label in labels)
    if unknown:
        raise ValueError(
            f"{unknown} of the data's {len(split)} labels are missing or -1: such images cannot be scored."
        )
    labels = np.asarray(labels)
    names = feature.names if isinstance(feature, ClassLabel) else None
    return labels, names, len(names) if names is not None else int(labels.max()) + 1


def class_indices(split: Dataset, id2label: Mapping[int, str], label_map: Mapping | None = None) -> np.ndarray:
    """For each row of a split, the index of its class in a model (`match_labels`).

    Raises:
        ValueError: for labels that are missing or unknown, or classes that the model does not have.
    """
    labels, names, count = known_labels(split)
    return np.asarray(match_labels(names, id2label, label_map, num_classes=count))[labels]


def match_labels(
    data_names: Sequence[str] | None,
    id2label: Mapping[int, str],
    label_map: Mapping[str, str | int] | None = None,
    *,
    num_classes: int | None = None,
) -> list[int]:
    """For each label of a data set, the index of the same class in a model.

    Names are compared exactly, and where that leaves some over, without regard to upper and lower case. A name that
    two classes of the model have stands for neither. Integers stand for themselves, where the model's names are
    `LABEL_n` or the data has no names.

    Args:
        data_names (`Sequence[str]` or `None`): the data's class names by label; `None` where it has none.
        id2label (`Mapping[int, str]`): of the model's config.
        label_map (`Mapping[str, str or int]`, *optional*): the model's class, by name or index, for a class of the
            data; it goes before any rule.
        num_classes (`int`, *optional*): how many labels the data has; needed where `data_names` is `None`.

    Returns:
        `list[int]`: one index of a logit for each label of the data.

    Raises:
        ValueError: where classes of the data have no counterpart, or two have the same; it lists both sides.
    """
    if label_map is not None and not isinstance(label_map, Mapping):
        raise ValueError(
            f"`label_map` must be a dict, class of the data -> class of the model, got {shown(label_map)}."
        )
    id2label = {int(index): str(name) for index, name in id2label.items()}
    count = len(data_names) if data_names is not None else num_classes
    if count is None:
        raise ValueError("`num_classes` is needed where `data_names` is None.")
    keys = [str(name) for name in data_names] if data_names is not None else [str(label) for label in range(count)]
    mapped = _resolve_map(label_map or {}, keys, id2label)
    theirs, ours = model_class_names(id2label), data_class_names(data_names)
    if theirs is not None and data_names is not None and set(keys) <= set(theirs):
        ours = keys  # digits as names on both sides
    if theirs is None and ours is not None and count != len(id2label) and not mapped:
        raise ValueError(
            f"The data has {count} classes ({_listed(keys)}) and the model {len(id2label)} without names: nobody "
            "knows which is which. Name their counterparts with `label_map` (`--label-map`)."
        )
    if theirs is None or ours is None:
        found = {key: int(key) if key.isdecimal() and ours is None else label for label, key in enumerate(keys)}
        found = {key: index for key, index in found.items() if index in id2label}
    else:
        found = _by_name(ours, _index_of_names(id2label))
    found |= mapped
    missing = [key for key in keys if key not in found]
    if missing:
        twice = [name for name in missing if list(id2label.values()).count(name) > 1]
        several = f" The model has several called {_listed(twice)}." if twice else ""
        raise ValueError(
            f"{len(missing)} of the data's {count} classes are none of the model's {len(id2label)}: "
            f"{_listed(missing)}.{several} Classes of the data: {_listed(keys)}. Of the model: "
            f"{_listed([id2label[index] for index in sorted(id2label)])}. "
            "Name their counterparts with `label_map` (`--label-map`)."
        )
    indices = [found[key] for key in keys]
    if len(set(indices)) < len(indices) and not mapped:
        twice = [key for key, index in zip(keys, indices, strict=True) if indices.count(index) > 1]
        raise ValueError(f"The data's classes {_listed(twice)} are one class of the model: map them with `label_map`.")
    return indices


def _by_name(names: Sequence[str], indices: Mapping[str, int]) -> dict[str, int]:
    """Exact matches, and for the other names those that differ in case alone, where there is just one."""
    folded: dict[str, set[int]] = {}
    for name, index in indices.items():
        folded.setdefault(_folded(name), set()).add(index)
    found = {name: indices[name] for name in names if name in indices}
    for name in names:
        candidates = folded.get(_folded(name), set())
        if name not in found and len(candidates) == 1:
            found[name] = next(iter(candidates))
    return found


def _index_of_names(id2label: Mapping[int, str]) -> dict[str, int]:
    """The index of each name that a model has once: a name of two classes says nothing of either."""
    counts = Counter(id2label.values())
    return {name: index for index, name in id2label.items() if counts[name] == 1}


def _folded(name: str) -> str:
    """A name without regard to case, and to how its accents are encoded: some file systems change that."""
    return unicodedata.normalize("NFC", name).casefold()


def _resolve_map(label_map: Mapping, keys: Sequence[str], id2label: Mapping[int, str]) -> dict[str, int]:
    indices = _index_of_names(id2label)
    resolved = {}
    for key, target in label_map.items():
        if str(key) not in keys:
            raise ValueError(f"`label_map` names {key!r}, which is no class of the data: {_listed(keys)}.")
        index = indices.get(str(target))
        if index is None and str(target).isdecimal() and int(target) in id2label:
            index = int(target)
        if index is None:
            raise ValueError(
                f"`label_map` maps {key!r} to {target!r}, which is no class of the model: {_listed(list(indices))}."
            )
        resolved[str(key)] = index
    return resolved


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(map(repr, names[:_SHOWN]))
    return text if len(names) <= _SHOWN else f"{text} and {len(names) - _SHOWN} more"


def read_label_map(entries: Sequence[str] | None) -> dict[str, str]:
    """`label_map` as it is typed: "data class=model class", any number of them, or a JSON file with an object.

    Raises:
        ValueError: for an entry that is neither, and for two of one class.
    """
    mapping: dict[str, str] = {}
    for entry in entries or []:
        name, separator, target = entry.partition("=")
        for key, value in ({name: target} if separator else _map_in_file(entry)).items():
            if mapping.setdefault(key, value) != value:
                raise ValueError(f"`label_map` maps {key!r} to {mapping[key]!r} and to {value!r}: give one of them.")
    return mapping


def _map_in_file(file: str) -> dict[str, str]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`label_map` must be NAME=NAME or a JSON file, got {file!r} ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"`label_map` {file!r} must hold a JSON object, got a {type(content).__name__}.")
    return {str(name): str(target) for name, target in content.items()}


__all__ = [
    "class_indices",
    "data_class_names",
    "known_labels",
    "match_labels",
    "model_class_names",
    "read_label_map",
]
