"""The `polyscale` command: each subcommand parses, calls a function of the package, and prints."""

import typer

from .arguments import ListCommand
from .evaluate import evaluate
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


def main() -> None:
    """The entry point of the `polyscale` command."""
    app()


__all__ = ["app", "main"]
