"""The `polyscale` command: each subcommand parses, calls a function of the package, and prints."""

import typer

from .arguments import ListCommand
from .benchmark import benchmark
from .classify import classify
from .convert import convert, convert_patch_embed
from .evaluate import evaluate
from .show import show
from .train import train


app = typer.Typer(
    name="polyscale",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def polyscale() -> None:
    """Vision models with an adjustable number of visual tokens."""


app.command(cls=ListCommand)(train)
app.command(cls=ListCommand)(evaluate)
app.command(cls=ListCommand)(classify)
app.command(cls=ListCommand)(show)
app.command(cls=ListCommand)(benchmark)
app.command(cls=ListCommand)(convert)
app.command(cls=ListCommand)(convert_patch_embed)


def main() -> None:
    """The entry point of the `polyscale` command."""
    app()


__all__ = ["app", "main"]
