"""`polyscale evaluate`."""

import json
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    Device,
    NumTokens,
    PatchSizes,
    TrustRemoteCode,
    budget_words,
    parse_numbers,
    parse_size,
    split_list,
)
from .printing import note, progress_bar, quiet, reporting


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... DATASET",
            help="One or more checkpoints of this library, or any transformers or timm ViT or big_vision npz; then a "
            "folder of images, a parquet file or folder, or a hub name.",
        ),
    ],
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Also the checkpoints that ship and know all classes of the data.")
    ] = False,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="MODEL",
            help="A model to compare with, such as a ViT of one patch size: at the budgets of the models whose budget "
            "is of the same kind. May be given several times.",
        ),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET ...",
            help="Budgets to run, as the model's family has them: patch sizes of FlexiViT (8 or 8x16), token counts "
            "of Quadtree ViT, scales of S2 (1+2). All that it was trained with, or a ladder of them, by default.",
        ),
    ] = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    image_sizes: Annotated[
        list[str] | None, typer.Option(metavar="N|HxW ...", help="Image sizes in pixels; the model's own by default.")
    ] = None,
    merge_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N ...", help="Also the model's own budget with tokens merged down to so many, where it can merge."
        ),
    ] = None,
    shrink_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|HxW ...",
            help="Also the model's own budget on smaller images, where these cost it fewer tokens.",
        ),
    ] = None,
    resize_method: Annotated[
        str | None, typer.Option(help="FlexiViT: pi or interpolate; the checkpoint's by default.")
    ] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the side that the centre crop keeps.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="X ...", help="Numbers, or imagenet, inception, clip.")] = None,
    std: Annotated[str | None, typer.Option(metavar="X ...", help="Numbers, or imagenet, inception, clip.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")] = None,
    split: Annotated[str | None, typer.Option(help="Split; validation or test by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only a random sample of so many images.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of that sample.", min=0)] = 0,
    label_map: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NAME|FILE", help="The model's class for a class of the data, or a JSON file of them."
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the accuracy of each class too.")] = False,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Also count operations and time batches of 1 and 32; frontier.csv and frontier.png."
        ),
    ] = False,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PERCENT",
            help="With --speed: an accuracy that is drawn as a horizontal line, such as a teacher's. May be given "
            "several times.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 64,
    device: Device = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run in bfloat16.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json, results.csv and accuracy.png; made if missing.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure accuracy and speed at several token budgets."""
    if len(sources) < 2 - bundled:
        raise typer.BadParameter("give at least one model, and a data set after it", param_hint="MODEL... DATASET")
    *models, dataset = sources
    references = _references(reference)
    if references and not speed:
        raise typer.BadParameter("is drawn in frontier.png: give --speed too", param_hint="--reference")
    with reporting("evaluate"), ExitStack() as lock:
        import datasets
        import torch
        from rich.console import Console

        from polyscale.evaluation.frontier import costs_table, frontier_records, write_frontier
        from polyscale.evaluation.labels import read_label_map
        from polyscale.evaluation.plotting import write_evaluations
        from polyscale.evaluation.report import per_class_table, results_table, to_records
        from polyscale.evaluation.run import evaluate_checkpoints
        from polyscale.utils.outputs import check_output, only_writer

        quiet()
        datasets.disable_progress_bars()
        if output is not None:
            check_output(output, folder=True)
            lock.enter_context(only_writer(output, "output", "evaluation"))
        with progress_bar("Evaluating") as progress:
            evaluations = evaluate_checkpoints(
                models,
                dataset,
                bundled=bundled,
                controls=controls or [],
                split=split,
                limit=limit,
                seed=seed,
                budget_words=budget_words(budgets, patch_sizes, num_tokens),
                device=device,
                dtype=torch.bfloat16 if bf16 else None,
                trust_remote_code=trust_remote_code,
                config_options={"resize_method": resize_method} if resize_method else {},
                progress=progress,
                note=partial(note, "evaluate"),
                image_sizes=_sizes(image_sizes, "--image-sizes"),
                merge_to=_counts(merge_to, "--merge-to"),
                shrink_to=_sizes(shrink_to, "--shrink-to"),
                crop_pct=crop_pct,
                mean=_statistic(mean, "--mean"),
                std=_statistic(std, "--std"),
                interpolation=interpolation,
                batch_size=batch_size,
                label_map=read_label_map(label_map),
                per_class=per_class,
            )
        records = to_records(evaluations)
        if speed:
            with progress_bar("Timing") as progress:
                records = frontier_records(evaluations, progress=progress)
        if split is None and evaluations[0].split not in ("validation", "valid", "test"):
            note("evaluate", f"{dataset} has no validation or test split: scored on {evaluations[0].split!r}.")
        try:
            if as_json:
                typer.echo(json.dumps(records, indent=2, allow_nan=False))
            else:
                for evaluation in evaluations:
                    Console().print(results_table(evaluation))
                    if per_class:
                        Console().print(per_class_table(evaluation))
                if speed:
                    Console().print(costs_table(evaluations, records, references))
        finally:  # also where nobody reads what is printed
            written = [] if output is None else write_evaluations(evaluations, output)
            if output is not None and speed:
                written += write_frontier(evaluations, records, output, references)
        if written:
            typer.echo(f"Wrote {', '.join(str(path) for path in written)}", err=as_json)


def _sizes(texts: list[str] | None, option: str) -> list[int | tuple[int, int]] | None:
    return [parse_size(text, option) for text in split_list(texts)] if texts else None


def _counts(texts: list[str] | None, option: str) -> list[int] | None:
    sizes = _sizes(texts, option)
    if sizes is not None and not all(isinstance(size, int) for size in sizes):
        raise typer.BadParameter(f"expected numbers of tokens such as 16, got {' '.join(texts)!r}", param_hint=option)
    return sizes


def _references(entries: list[str] | None) -> dict[str, float]:
    """["teacher=71.5"] -> {"teacher": 0.715}."""
    accuracies = {}
    for entry in entries or []:
        name, _, text = entry.rpartition("=")
        try:
            percent = float(text)
        except ValueError:
            percent = math.nan
        if not name or not 1 <= percent <= 100:
            message = f"expected NAME=PERCENT such as teacher=71.5, got {entry!r}"
            raise typer.BadParameter(message, param_hint="--reference")
        accuracies[name] = percent / 100
    return accuracies


def _statistic(text: str | None, option: str) -> str | list[float] | None:
    values = split_list(text)
    if values is None or (len(values) == 1 and values[0].isalpha()):
        return text
    return parse_numbers(text, option)


__all__ = ["evaluate"]
