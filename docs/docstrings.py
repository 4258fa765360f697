"""Lets griffe, which reads the sources for the reference, understand docstrings in the format of transformers."""

import re

import griffe


# name (`int` or `str`, *optional*, defaults to 3): what it is
_ENTRY = re.compile(r"^(?P<indent>\s+)(?P<name>\*{0,2}\w+) \((?P<kind>[^\n]*`[^\n]*)\): ?", flags=re.MULTILINE)
# `Path`: what it is
_RESULT = re.compile(r"^(?P<indent>\s+)`(?P<kind>[^`\n]+)`: ", flags=re.MULTILINE)


class TransformersDocstrings(griffe.Extension):
    """Types and defaults of functions come from their signature; those of fields stay in the text."""

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        if func.docstring is not None:
            text = _ENTRY.sub(r"\g<indent>\g<name>: ", func.docstring.value)
            func.docstring.value = _RESULT.sub(r"\g<indent>\g<kind>: ", text)

    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        if cls.docstring is not None:
            cls.docstring.value = _ENTRY.sub(r"\g<indent>\g<name>: \g<kind>: ", cls.docstring.value)
