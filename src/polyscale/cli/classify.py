"""`polyscale classify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_size, split_list


def classify(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Picture files and folders; the sample photographs when none is given.")
    ] = None,
    model: Annotated[str, typer.Option(help="Bundled checkpoint, local folder or hub name.")] = "flexivit-cifar10",
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N|HxW ...", help="Patch sizes of FlexiViT, token counts of Quadtree ViT."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Draw the pictures and their patches to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls a picture and budget; the median counts.", min=1)] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; chosen when not given.")] = None,
) -> None:
    """Classify pictures at several token budgets.

    A file that cannot be read is reported on the standard error and the others go on; the exit code is then 1.
    """
    from transformers.utils import logging

    from ..assets import sample_photographs
    from ..classification import classify_images, load_classifier
    from ..figures import draw_classification

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        values = None if budgets is None else [parse_size(value) for value in split_list(budgets)]
        classifier = load_classifier(model, device)
        records, errors = classify_images(files or sample_photographs(), classifier, values, repeats=repeats)
    except (OSError, ValueError) as error:
        typer.echo(f"polyscale classify: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(records, indent=2))
    else:
        _print_table(records, classifier.model.config)
    for error in errors:
        typer.echo(f"polyscale classify: {error['file']}: {error['error']}", err=True)
    if output is not None and records:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_classification(classifier.model, classifier.image_processor, records).savefig(output)
        typer.echo(f"Wrote {output}", err=as_json)
    if errors:
        raise typer.Exit(1)


def _print_table(records: list[dict], config) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..layers.token_budget import budget_argument_of, format_budget

    argument = budget_argument_of(config)
    table = Table("picture", *([argument.replace("_", " ")] if argument else []), "tokens", "label", "score", "ms")
    for column in table.columns:
        column.justify = "left" if column.header in ("picture", "label") else "right"
    previous = None
    for record in records:
        if previous not in (None, record["file"]):
            table.add_section()
        table.add_row(
            "" if record["file"] == previous else Path(record["file"]).name,
            *([format_budget(record["budget"])] if argument else []),
            "" if record["tokens"] is None else str(record["tokens"]),
            record["label"],
            f"{record['score']:.1%}",
            f"{record['milliseconds']:.2f}",
        )
        previous = record["file"]
    Console().print(table)


__all__ = ["classify"]
