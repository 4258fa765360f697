"""Words of users and files, safe for what prints or draws them."""

import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.text import Text


def plain(text: object) -> "Text":
    """Text for a rich table, whatever is in it: neither markup nor control characters have an effect."""
    from rich.text import Text

    return Text(_printable(text))


def _printable(text: object) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def no_math(text: object) -> str:
    """Text for matplotlib, which would read what stands between dollars as a formula, and fail at half characters."""
    return _printable(text).replace("$", r"\$")


def no_markup(text: object) -> str:
    """Text for a line of Markdown: neither links, code and tags nor line breaks and control characters in it."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


__all__ = ["no_markup", "no_math", "plain"]
