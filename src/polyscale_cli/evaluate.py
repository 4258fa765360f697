"""`polyscale evaluate`."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    Budgets,
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
    budgets: Budgets = None,
    patch_sizes: PatchSizes = None,
    num_tokens: NumTokens = None,
    image_sizes: Annotated[
        list[str] | None, typer.Option(metavar="N|HxW ...", help="Image sizes in pixels; the model's own by default.")
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
    if len(sources) < 2:
        raise typer.BadParameter("give at least one model, and a data set after it", param_hint="MODEL... DATASET")
    *models, dataset = sources
    with reporting("evaluate"), ExitStack() as lock:
        import datasets
        import torch
        from rich.console import Console

        from polyscale.evaluation.frontier import costs_table, frontier_records, write_frontier
        from polyscale.evaluation.labels import read_label_map
        from polyscale.evaluation.report import per_class_table, results_table, to_records, write_evaluations
        from polyscale.evaluation.run import evaluate_checkpoints
        from polyscale.utils.outputs import check_output, only_writer

        quiet()
        datasets.disable_progress_bars()
        if output is not None:
            check_output(output, folder=True)
            lock.enter_context(only_writer(output, "output", "evaluation"))
        config_options = {"resize_method": resize_method} if resize_method else {}
        with progress_bar("Evaluating") as progress:
            evaluations = evaluate_checkpoints(
                models,
                dataset,
                split=split,
                limit=limit,
                seed=seed,
                budget_words=budget_words(budgets, patch_sizes, num_tokens),
                device=device,
                dtype=torch.bfloat16 if bf16 else None,
                trust_remote_code=trust_remote_code,
                config_options=config_options,
                progress=progress,
                image_sizes=[parse_size(value, "--image-sizes") for value in split_list(image_sizes)]
                if image_sizes
                else None,
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
                records = frontier_records(
                    evaluations,
                    config_options=config_options,
                    dtype=torch.bfloat16 if bf16 else None,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
        if split is None and evaluations[0].split not in ("validation", "valid", "test"):
            note("evaluate", f"{dataset} has no validation or test split: scored on {evaluations[0].split!r}.")
        if as_json:
            typer.echo(json.dumps(records, indent=2, allow_nan=False))
        else:
            for evaluation in evaluations:
                Console().print(results_table(evaluation))
                if per_class:
                    Console().print(per_class_table(evaluation))
            if speed:
                Console().print(costs_table(evaluations, records))
        if output is not None:
            written = write_evaluations(evaluations, output)
            if speed:
                written += write_frontier(evaluations, records, output)
            typer.echo(f"Wrote {', '.join(str(path) for path in written)}", err=as_json)


def _statistic(text: str | None, option: str) -> str | list[float] | None:
    values = split_list(text)
    if values is None or (len(values) == 1 and values[0].isalpha()):
        return text
    return parse_numbers(text, option)


__all__ = ["evaluate"]
