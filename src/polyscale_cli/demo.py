"""`polyscale demo`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import Device
from .printing import progress_bar, quiet, reporting


if TYPE_CHECKING:
    from rich.table import Table

    from polyscale.demonstration import ModelAnswers


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint to ask, bundled or a local folder or of the hub; give it again for more. Those that "
            "ship and know what the photographs show, by default."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Draw photographs and answers to this image file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    device: Device = None,
) -> None:
    """Ask the checkpoints that ship what the sample photographs show, at a few token budgets each."""
    with reporting("demo"):
        from rich.console import Console

        from polyscale.answer_sheet import draw_answer_sheet
        from polyscale.demonstration import answer_photographs
        from polyscale.figures import check_image_output
        from polyscale.utils.outputs import written_beside
        from polyscale.utils.text import plain

        quiet()
        if output is not None:
            check_image_output(output)
        with progress_bar("Classifying") as progress:
            answers = answer_photographs(model or None, device=device, progress=progress)
        try:
            if as_json:
                records = [record for answer in answers for record in answer.records]
                typer.echo(json.dumps(records, indent=2, allow_nan=False))
            else:
                console = Console()
                for answer in answers:
                    console.print(plain(answer.name), style="bold")
                    console.print(_table(answer, console.encoding.startswith("utf")))
        finally:  # also where nobody reads what is printed
            if output is not None:
                with written_beside(output) as scratch:
                    draw_answer_sheet(answers).savefig(scratch)
        if output is not None:
            typer.echo(f"Wrote {output}", err=as_json)


def _table(answer: "ModelAnswers", has_signs: bool) -> "Table":
    """A row for each photograph, a column for each budget, and below them how many answers are right."""
    from rich.table import Table

    from polyscale.answer_sheet import RIGHT, WRONG
    from polyscale.figures import budget_lines
    from polyscale.utils.text import plain

    signs = {True: RIGHT, False: WRONG} if has_signs else {True: "+", False: "-"}
    by_file: dict[str, list[dict]] = {}
    for record in answer.records:
        by_file.setdefault(record["file"], []).append(record)
    by_budget: Sequence[Sequence[dict]] = list(zip(*by_file.values(), strict=True))
    table = Table(show_footer=True)
    table.add_column("photograph", footer="right")
    for records in by_budget:
        tokens = [record["tokens"] for record in records]
        right = sum(record["right"] for record in records)
        head = "\n".join(budget_lines(answer.loaded.model.config, records[0]["budget"], tokens))
        table.add_column(head, footer=f"{right} of {len(records)}")
    for records in by_file.values():
        cells = [f"{signs[record['right']]} {record['label']} {record['score']:.0%}" for record in records]
        table.add_row(plain(records[0]["class"]), *map(plain, cells))
    return table


__all__ = ["demo"]
