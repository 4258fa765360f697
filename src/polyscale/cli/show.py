"""`polyscale show`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_size, split_list


def show(
    file: Annotated[Path | None, typer.Argument(help="A picture; a sample photograph when not given.")] = None,
    model: Annotated[str, typer.Option(help="Bundled checkpoint, local folder or hub name.")] = "flexivit-cifar10",
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N|HxW ...", help="Patch sizes of FlexiViT, token counts of Quadtree ViT."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("polyscale.png"),
) -> None:
    """Draw what a model looks at in a picture, at several token budgets."""
    from transformers.utils import logging

    from ..assets import sample_photographs
    from ..figures import show as draw

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        values = None if budgets is None else [parse_size(value) for value in split_list(budgets)]
        picture = draw(model, file or sample_photographs()[0], values)
    except (OSError, ValueError) as error:
        typer.echo(f"polyscale show: {error}", err=True)
        raise typer.Exit(2) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    typer.echo(f"Wrote {output}")


__all__ = ["show"]
