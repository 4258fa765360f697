"""What commands share: options of several values, sizes such as `10x15`, and the options that mean the same in all."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .library import written_in


# Options that may be followed by several numbers.
LIST_OPTIONS = (
    "--budgets",
    "--image-sizes",
    "--mean",
    "--merge-to",
    "--num-tokens",
    "--patch-size",
    "--patch-size-probs",
    "--patch-sizes",
    "--shrink-to",
    "--std",
    "--tune-budgets",
)
_NUMBER = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
_VALUE = re.compile(rf"{_NUMBER}([x+,]{_NUMBER})*,?", re.IGNORECASE)

DEFAULT_MODEL = written_in("checkpoints/__init__.py", "DEFAULT_CHECKPOINT")

Budgets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BUDGET ...",
        help="Budgets to run, as the model's family has them: patch sizes of FlexiViT (8 or 8x16), token counts of "
        "Quadtree ViT, scales of S2 (1+2). Its own, or all it was trained with, by default.",
    ),
]
PatchSizes = Annotated[
    list[str] | None,
    typer.Option(metavar="N|HxW ...", help="The same for a model whose budget is a patch size.", hidden=True),
]
NumTokens = Annotated[
    list[str] | None,
    typer.Option(metavar="N ...", help="The same for a model whose budget is a number of tokens.", hidden=True),
]
Model = Annotated[str, typer.Option(help="Bundled checkpoint, local folder or hub name.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the accelerator, if there is one, by default.")
]
ImageSize = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Pixels that the model sees images at; its own by default.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings. Never asked for else.")
]


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Command-line words in which the numbers that follow an option of several values are one word, with commas.

    `--budgets 4 8 FILE` -> `--budgets 4,8 FILE`: what is no number ends the list, and so does `--`.
    """
    joined: list[str] = []
    open_list = False  # whether the last word is the value of such an option
    for position, word in enumerate(arguments):
        if word == "--":
            return [*joined, *arguments[position:]]
        if open_list and _VALUE.fullmatch(word):
            joined[-1] = f"{joined[-1].rstrip(',')},{word}"
            continue
        previous_is_option = bool(joined) and joined[-1] in LIST_OPTIONS
        open_list = previous_is_option or (word.partition("=")[0] in LIST_OPTIONS and "=" in word)
        joined.append(word)
    return joined


class ListGroup(TyperGroup):
    """The group of commands; its words go through `join_lists`."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        return super().main(join_lists(sys.argv[1:] if args is None else args), *more, **options)


def parse_size(text: str, option: str | None = None) -> int | tuple[int, int]:
    """A number of pixels, or height and width: "16" -> 16, "10x15" -> (10, 15). An error names the option."""
    parts = text.lower().split("x")
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        message = f"expected a number such as 16, or height and width such as 10x15, got {text!r}"
        raise typer.BadParameter(message, param_hint=option)
    return numbers[0] if len(numbers) == 1 else numbers


def split_list(text: str | Sequence[str] | None) -> list[str] | None:
    """The entries of a list, typed once or in parts: "8,12 16" or ["8,12", "16"] -> ["8", "12", "16"]; None stays."""
    if text is None:
        return None
    return (text if isinstance(text, str) else " ".join(text)).replace(",", " ").split()


def parse_numbers(text: str | Sequence[str] | None, option: str | None = None) -> list[float] | None:
    """The numbers of a list: "0.5,0.25 0.25" -> [0.5, 0.25, 0.25]; None stays None. An error names the option."""
    try:
        return None if text is None else [float(value) for value in split_list(text)]
    except ValueError:
        raise typer.BadParameter(f"expected numbers, got {text!r}", param_hint=option) from None


def parse_fields(entries: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """["patch_size=16", "pooling=cls"] -> {"patch_size": 16, "pooling": "cls"}: JSON where it is JSON, else text."""
    fields: dict[str, Any] = {}
    for entry in entries or []:
        name, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter(f"expected FIELD=JSON, got {entry!r}", param_hint=option)
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parsed = value
        if fields.setdefault(name, parsed) != parsed:
            raise typer.BadParameter(f"{name} is set twice, to {fields[name]!r} and {parsed!r}", param_hint=option)
    return fields


def budget_words(
    budgets: list[str] | None, patch_sizes: list[str] | None, num_tokens: list[str] | None
) -> dict[str, list[str] | None]:
    """The three ways to name budgets, as `polyscale.layers.token_budget.choose_budgets` takes them."""
    words = {"budgets": budgets, "patch_sizes": patch_sizes, "num_tokens": num_tokens}
    # typer gives an empty list for an option that was not typed
    return {name: split_list(values) if values else None for name, values in words.items()}


__all__ = [
    "DEFAULT_MODEL",
    "Budgets",
    "Device",
    "ImageSize",
    "ListGroup",
    "Model",
    "NumTokens",
    "PatchSizes",
    "TrustRemoteCode",
    "budget_words",
    "join_lists",
    "parse_fields",
    "parse_numbers",
    "parse_size",
    "split_list",
]
