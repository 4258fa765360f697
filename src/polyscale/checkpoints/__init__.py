"""Small trained checkpoints that ship with the package."""

import os
from pathlib import Path


# What functions and commands take when no model is named.
DEFAULT_CHECKPOINT = "flexivit-tiny200"

_FOLDER = Path(__file__).parent


def available_checkpoints() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))


def bundled_checkpoint(name: str) -> Path:
    """The folder of a checkpoint that ships with the package, as `from_pretrained` takes it.

    Args:
        name (`str`): one of `available_checkpoints()`, such as `"flexivit-tiny200"`.

    Raises:
        ValueError: for an unknown name; it names those that there are.
    """
    names = available_checkpoints()
    if not isinstance(name, str) or name not in names:
        choices = ", ".join(map(repr, names)) or "(none is installed)"
        raise ValueError(f"`name` must be one of {choices}, got {name!r}.")
    return _FOLDER / name


def resolve_checkpoint(name_or_path: str | os.PathLike) -> str:
    """What `from_pretrained` takes: a local folder as it is, the folder of a bundled checkpoint, else a hub name."""
    name = os.fspath(name_or_path)
    if not Path(name).exists() and name in available_checkpoints():
        return str(bundled_checkpoint(name))
    return name


__all__ = ["DEFAULT_CHECKPOINT", "available_checkpoints", "bundled_checkpoint", "resolve_checkpoint"]
