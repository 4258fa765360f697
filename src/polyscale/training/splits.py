"""Which split of a data set a file belongs to, by the names of files and folders."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .labels import listed


# What the folder of a split may be called, and the name it gets.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# Of one file of several: "train-00000-of-00002".
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")


def in_order(splits: Mapping[str, list]) -> dict[str, list]:
    """Splits with the usual ones first."""
    usual = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in [*usual, *sorted(splits.keys() - set(usual))]}


def parquet_splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split: by their own names (train.parquet, train-00000-of-00002.parquet), or by those of the
    folders that they lie in; one split where no name says anything.

    Raises:
        ValueError: where some names do, and others do not.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.stem)
        own = shard[1] if shard else file.stem
        words = [own, re.split(r"[\W\d_]", own, maxsplit=1)[0], *reversed(file.relative_to(path).parts[:-1])]
        found = next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), shard and own)
        splits.setdefault(found or "", []).append(file)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise ValueError(
            f"`dataset` {path} has files of the splits {listed(list(splits))}, and others that name none, such as "
            f"{unnamed[0].name}: begin their names with train, validation or test."
        )
    return in_order(splits) if splits else {"train": unnamed}


def split_folders(path: Path, files: Sequence[Path]) -> list[str]:
    """The folders at the top of a data set, where they are its splits; none where they are its classes.

    Raises:
        ValueError: where folders of folders are called like splits, but not all of them.
    """
    tops = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    if tops and all(top.lower() in SPLIT_NAMES for top in tops):
        return tops
    deep = sorted({file.parts[0] for file in files if len(file.parts) > 2})
    like = [top for top in deep if re.split(r"[\W\d_]", top, maxsplit=1)[0].lower() in SPLIT_NAMES]
    if like and len(tops) > 1:
        raise ValueError(
            f"`dataset` {path}: {listed(like)} are called like splits, and hold folders; all of {listed(tops)} would "
            "be classes. Call the splits train, validation and test, with nothing beside them, or give the folder of "
            "one."
        )
    return []


__all__ = ["SPLIT_NAMES", "in_order", "parquet_splits", "split_folders"]
