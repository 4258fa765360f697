"""The `polyscale` command: each subcommand parses, calls a function of `polyscale`, and prints.

Nothing here imports `polyscale` (and with it torch and transformers) before a command runs.
"""

from typing import Annotated

import typer

from .arguments import ListGroup
from .benchmark import benchmark
from .calibrate import calibrate
from .classify import classify
from .convert import convert, convert_patch_embed
from .demo import demo
from .embed import embed
from .evaluate import evaluate
from .explore import explore
from .library import written_in
from .printing import escape_unprintable, silence_torch
from .show import show
from .train import train
from .wording import WordedCommand


app = typer.Typer(
    name="polyscale",
    cls=ListGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Tab completion: polyscale --install-completion. Options that take several values take them with commas, "
    "with spaces or repeated: --budgets 4,8 or --budgets 4 8 or --budgets 4 --budgets 8.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyscale {written_in('__init__.py', '__version__')}")
        raise typer.Exit


@app.callback()
def polyscale(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Vision models with an adjustable number of visual tokens."""


_COMMANDS = (
    demo,
    train,
    evaluate,
    classify,
    calibrate,
    show,
    explore,
    benchmark,
    embed,
    convert,
    convert_patch_embed,
)
for command in _COMMANDS:
    app.command(cls=WordedCommand)(command)


def main() -> None:
    """The entry point of the `polyscale` command."""
    silence_torch()
    escape_unprintable()
    app()


__all__ = ["app", "main"]
