"""Sample photographs; `ATTRIBUTION.md` beside this file names authors and licences."""

import os
from collections.abc import Iterable
from pathlib import Path


_FOLDER = Path(__file__).parent
_SETS = ("photographs", "tiny200")  # of CIFAR-10's classes; of TinyImageNet's


def photograph_class(file: str | os.PathLike) -> str:
    """The class of what a sample photograph shows, as the models that know it call it.

    Args:
        file (`str` or `os.PathLike`): a sample photograph: its name is the class, an underscore and what tells it from
            others of its class, so `German_shepherd_1.jpg` is a "German shepherd".
    """
    return Path(file).stem.rpartition("_")[0].replace("_", " ")


def sample_photographs(labels: Iterable[str] | None = None) -> list[Path]:
    """The photographs that ship with the package, of the classes that a model tells apart.

    Args:
        labels (`Iterable[str]`, *optional*): the model's labels, `model.config.id2label.values()`. Those of CIFAR-10
            when `None`.

    Returns:
        `list[Path]`: the photographs of the first set whose classes (`photograph_class`) are all among `labels`; those
        of CIFAR-10's classes where there is none.
    """
    sets = [sorted((_FOLDER / name).glob("*.jpg"), key=lambda file: file.name.lower()) for name in _SETS]
    known = set() if labels is None else set(labels)
    return next((files for files in sets if {photograph_class(file) for file in files} <= known), sets[0])


__all__ = ["photograph_class", "sample_photographs"]
