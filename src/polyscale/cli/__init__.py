"""The `polyscale` command: each subcommand parses, calls a function of the package, and prints."""

import typer


app = typer.Typer(
    name="polyscale",
    help="Vision models with an adjustable number of visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The entry point of the `polyscale` command."""
    app()


__all__ = ["app", "main"]
