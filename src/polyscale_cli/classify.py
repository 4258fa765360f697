"""`polyscale classify`."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    DEFAULT_MODEL,
    Budgets,
    Device,
    ImageSize,
    Model,
    NumTokens,
    PatchSizes,
    TrustRemoteCode,
    budget_words,
    parse_size,
)
from .printing import note, progress_bar, quiet, reporting


LONG_TABLE = 12  # images up to which a table has a row for each budget, and calls are repeated for a steady time


def classify(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Image files and folders; the sample photographs when none is given.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    budgets: Budgets = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Give each image the budget it needs: the file that `polyscale calibrate` wrote."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Draw the images and their patches to this image file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Timed calls per batch and budget; the median counts. 5 for at most 12 files, else 1.", min=1
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the model.", min=1)] = 1,
    image_size: ImageSize = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Classify images at several token budgets.

    A file that cannot be read is reported on the standard error and the others go on; the exit code is then 1.
    """
    with reporting("classify"):
        from polyscale.assets import sample_photographs
        from polyscale.budget_policy import classify_with_policy
        from polyscale.classification import classify_images
        from polyscale.figures import check_image_output, draw_classification
        from polyscale.layers.token_budget import choose_budgets
        from polyscale.loading import load_classifier
        from polyscale.utils.outputs import written_beside

        quiet()
        if output is not None:
            check_image_output(output)
        chosen = budget_words(budgets, patch_sizes, num_tokens)
        excluded = [name for name, value in {**chosen, "repeats": repeats}.items() if value is not None]
        if policy is not None and excluded:
            raise ValueError(f"`policy` chooses the budgets and runs each once: leave `{excluded[0]}` out.")
        loaded = load_classifier(
            model,
            device,
            image_size=image_size and parse_size(image_size, "--image-size"),
            trust_remote_code=trust_remote_code,
        )
        files = files or sample_photographs(loaded.model.config.id2label.values())
        few = len(files) <= LONG_TABLE and not any(file.is_dir() for file in files)
        with progress_bar("Classifying") as progress:
            if policy is not None:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")  # whatever the environment leaves out
                    records, errors = classify_with_policy(
                        files, policy, loaded, batch_size=batch_size, progress=progress
                    )
                for warning in warned:
                    note("classify", warning.message)
            else:
                records, errors = classify_images(
                    files,
                    loaded,
                    choose_budgets(loaded.model.config, chosen),
                    repeats=repeats or (5 if few else 1),
                    batch_size=batch_size,
                    progress=progress,
                )
        for error in errors:
            note("classify", f"{error['file']}: {error['error']}")
        try:
            if as_json:
                typer.echo(json.dumps(records, indent=2, allow_nan=False))
            elif records:
                _print_tables(records, loaded.model.config, policy is not None)
        finally:  # also where nobody reads what is printed
            if output is not None and records:
                with written_beside(output) as scratch:
                    draw_classification(*loaded, records).savefig(scratch)
        if output is not None and records:
            typer.echo(f"Wrote {output}", err=as_json)
        if errors:
            raise typer.Exit(1)


def _print_tables(records: Sequence[dict], config, has_policy: bool) -> None:
    from rich.console import Console

    from polyscale.layers.token_budget import budget_argument_of

    argument = (budget_argument_of(config) or "").replace("_", " ")
    num_images = len({record["file"] for record in records})
    console = Console()
    is_long = num_images <= LONG_TABLE or has_policy
    console.print((_long_table if is_long else _wide_table)(records, config, argument))
    if has_policy:
        tokens = sum(record["tokens"] for record in records) / len(records)
        console.print(f"{tokens:.1f} tokens per image, all tries together", highlight=False)
    elif num_images > 1:
        console.print(_summary(records, config, argument))


def _long_table(records: Sequence[dict], config, argument: str):
    """A row for each image and budget."""
    from rich.table import Table

    from polyscale.layers.token_budget import format_budget
    from polyscale.utils.text import plain

    table = Table("image", *([argument] if argument else []), "tokens", "label", "score", "ms")
    for column in table.columns:
        column.justify = "left" if column.header in ("image", "label") else "right"
    previous = None
    for record in records:
        if previous not in (None, record["file"]):
            table.add_section()
        table.add_row(
            plain("" if record["file"] == previous else Path(record["file"]).name),
            *([format_budget(record["budget"], config)] if argument else []),
            str(record["tokens"]),
            plain(record["label"]),
            f"{record['score']:.1%}",
            f"{record['milliseconds']:.2f}",
        )
        previous = record["file"]
    return table


def _wide_table(records: Sequence[dict], config, argument: str):
    """A row for each image, a column for each budget."""
    from rich.table import Table

    from polyscale.utils.text import plain

    table = Table("image", *[f"{argument} {text}".strip() for text in _by_budget(records, config)])
    by_file: dict[str, list[dict]] = {}
    for record in records:
        by_file.setdefault(record["file"], []).append(record)
    for file, of_file in by_file.items():
        cells = [plain(f"{record['label']} {record['score']:.0%}") for record in of_file]
        table.add_row(plain(Path(file).name), *cells)
    return table


def _by_budget(records: Sequence[dict], config) -> dict[str, list[dict]]:
    from polyscale.layers.token_budget import format_budget

    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(format_budget(record["budget"], config), []).append(record)
    return groups


def _summary(records: Sequence[dict], config, argument: str):
    """A row for each budget: what it costs, and how often it says what the costliest one says."""
    from collections import Counter
    from statistics import fmean

    from rich.table import Table

    from polyscale.utils.text import plain

    groups = _by_budget(records, config)
    reference = max(groups.values(), key=lambda group: fmean(record["tokens"] for record in group))
    labels = {record["file"]: record["label"] for record in reference}
    table = Table(*([argument] if argument else []), "images", "tokens", "ms", "score", "same label", "most frequent")
    for column in table.columns[:-1]:
        column.justify = "right"
    for text, group in groups.items():
        tokens = fmean(record["tokens"] for record in group)
        label, count = Counter(record["label"] for record in group).most_common(1)[0]
        table.add_row(
            *([text] if argument else []),
            str(len(group)),
            f"{tokens:g}" if tokens.is_integer() else f"{tokens:.1f}",
            f"{fmean(record['milliseconds'] for record in group):.2f}",
            f"{fmean(record['score'] for record in group):.1%}",
            f"{fmean(record['label'] == labels.get(record['file']) for record in group):.1%}",
            plain(f"{label} ({count})"),
        )
    table.caption = "Means over the images; same label: as at the budget of most tokens."
    return table


__all__ = ["classify"]
