"""Command-line options that take several values: `--patch-sizes 8 12 16` or `8,12,16`, and sizes such as `10x15`."""

import json
from typing import Any

import typer
from typer.core import TyperCommand


def parse_size(text: str) -> int | tuple[int, int]:
    """A number of pixels, or height and width: "16" -> 16, "10x15" -> (10, 15)."""
    parts = text.lower().split("x")
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise typer.BadParameter(f"expected a number such as 16, or height and width such as 10x15, got {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_numbers(text: str | None) -> list[float] | None:
    """The numbers of a list: "0.5,0.25 0.25" -> [0.5, 0.25, 0.25]; None stays None."""
    try:
        return None if text is None else [float(value) for value in split_list(text)]
    except ValueError:
        raise typer.BadParameter(f"expected numbers, got {text!r}") from None


def split_list(text: str | None) -> list[str] | None:
    """The entries of a list: "8,12 16" -> ["8", "12", "16"]; None stays None."""
    return None if text is None else text.replace(",", " ").split()


def parse_fields(entries: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """["patch_size=16", "pooling=cls"] -> {"patch_size": 16, "pooling": "cls"}: JSON where it is JSON, else text."""
    fields: dict[str, Any] = {}
    for entry in entries or []:
        name, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter(f"expected FIELD=JSON, got {entry!r}", param_hint=option)
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


class ListCommand(TyperCommand):
    """A command whose options may be followed by several values, where their metavar ends in "...".

    The values that follow such an option are joined to one, which `split_list` takes apart.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        lists = {
            name
            for param in self.params
            if (getattr(param, "metavar", None) or "").endswith("...")
            for name in getattr(param, "opts", [])
        }
        joined: list[str] = []
        in_list = False
        for arg in args:
            if in_list and not arg.startswith("--"):
                joined[-1] = f"{joined[-1]} {arg}".strip()
            else:
                joined.append(arg)
                in_list = arg in lists
                if in_list:
                    joined.append("")
        return super().parse_args(ctx, joined)


__all__ = ["ListCommand", "parse_fields", "parse_numbers", "parse_size", "split_list"]
