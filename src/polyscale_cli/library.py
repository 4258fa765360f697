"""What commands know of `polyscale` before they run: importing the package takes seconds."""

import re
from importlib.util import find_spec
from pathlib import Path


def written_in(file: str, name: str) -> str:
    """A text constant of the library, read where it is written.

    Args:
        file (`str`): the source file, from the package's folder on.
        name (`str`): of the constant.
    """
    source = (Path(find_spec("polyscale").origin).parent / file).read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+)"$', source, re.MULTILINE)[1]


__all__ = ["written_in"]
