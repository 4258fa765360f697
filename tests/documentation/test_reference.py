"""The reference names every public name, and every public name is there."""

import re
from pathlib import Path

import polyscale


PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_can_be_had():
    assert [name for name in polyscale.__all__ if getattr(polyscale, name, None) is None] == []


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: (\S+)$", PAGE, flags=re.MULTILINE)
    named = {entry.rpartition(".")[2] for entry in listed} | set(re.findall(r"`(\w+)`", PAGE))
    assert sorted(set(polyscale.__all__) - named) == []
