"""Accuracy against what it costs: tokens, operations and time of several models side by side."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..loading import load_classifier
from ..utils.outputs import write_text, written_beside
from ..utils.text import no_math, plain
from ..utils.validation import check_distinct, check_function, check_int, check_list
from .report import csv_text, format_size, model_names, source_text, to_records
from .run import Evaluation
from .speed import benchmark_budgets


BATCH_SIZES = (1, 32)


def frontier_records(
    evaluations: Sequence[Evaluation],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 10,
    config_options: dict[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> list[dict]:
    """The records of `to_records`, with what each budget costs.

    Random images are timed, budgets of a model in turn. Where images of one model differ in size, the model's own
    size is timed.

    Args:
        evaluations (`Sequence[Evaluation]`): of `evaluate_checkpoints`.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 32)`): images per forward pass.
        rounds (`int`, *optional*, defaults to 10): timed passes per budget; the median counts.
        config_options (`dict`, *optional*): config fields to set, as for the evaluations.
        progress (`Callable`, *optional*): called with the measurements done and their number.
        options: `dtype` and `trust_remote_code` of `load_classifier`.

    Returns:
        `list[dict]`: with `gflops` per image and `milliseconds_batch_N` per batch.

    Raises:
        ValueError: for no evaluations, a number below 1, or a batch size that comes twice.
    """
    evaluations = check_list("evaluations", evaluations, Evaluation, "evaluations")
    batch_sizes = [check_int("batch_sizes", size, minimum=1) for size in check_list("batch_sizes", batch_sizes)]
    check_distinct("batch_sizes", batch_sizes)
    check_int("rounds", rounds, minimum=1)
    check_function("progress", progress)
    done, total = 0, sum(len({r.image_size for r in e.results}) for e in evaluations) * len(batch_sizes)
    records = []
    for evaluation in evaluations:
        model, _ = load_classifier(
            evaluation.model, evaluation.device, convert=True, **(config_options or {}), **options
        )
        own = to_records([evaluation])
        for size in dict.fromkeys(result.image_size for result in evaluation.results):
            rows = [
                (result.budget, record)
                for result, record in zip(evaluation.results, own, strict=True)
                if result.image_size == size
            ]
            for batch_size in batch_sizes:
                speeds = benchmark_budgets(
                    model, [budget for budget, _ in rows], image_size=size, batch_size=batch_size, rounds=rounds
                )
                for (_, record), speed in zip(rows, speeds, strict=True):
                    record["gflops"] = speed.gflops
                    record[f"milliseconds_batch_{batch_size}"] = speed.milliseconds
                done += 1
                if progress is not None:
                    progress(done, total)
        records += own
    return records


def costs_table(evaluations: Sequence[Evaluation], records: Sequence[dict]) -> Table:
    """A rich table of accuracy and costs, one row per model, image size and budget."""
    table = Table(title=plain(f"{source_text(evaluations[0])}\noperations and times on random images"))
    times = _times(records)
    for name in ("model", "image", "budget", "tokens", "top-1", "GFLOP"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in times:
        table.add_column(f"ms, batch {_batch_size(name)}", justify="right")
    names = dict(zip([evaluation.model for evaluation in evaluations], model_names(evaluations), strict=True))
    budgets = [text for evaluation in evaluations for text in evaluation.budget_texts]
    for record, budget in zip(records, budgets, strict=True):
        table.add_row(
            plain(names[record["model"]]),
            format_size(record["image_size"]),
            budget,
            str(record["tokens"]),
            f"{100 * record['top1']:.2f}",
            f"{record['gflops']:.3g}",
            *(f"{record[name]:.1f}" for name in times),
        )
    return table


def _times(records: Sequence[dict]) -> list[str]:
    return [name for name in records[0] if name.startswith("milliseconds_batch_")]


def _batch_size(field: str) -> str:
    return field.rpartition("_")[2]


def write_frontier(
    evaluations: Sequence[Evaluation], records: Sequence[dict], folder: str | os.PathLike
) -> list[Path]:
    """`frontier.csv` and `frontier.png` in a folder; returns their paths."""
    table, plot = Path(folder) / "frontier.csv", Path(folder) / "frontier.png"
    write_text(table, csv_text(evaluations, records))
    plot_frontier(evaluations, records, plot)
    return [table, plot]


def plot_frontier(evaluations: Sequence[Evaluation], records: Sequence[dict], path: str | os.PathLike) -> None:
    """Top-1 accuracy against tokens, operations and milliseconds, one line per model and image size, as an image."""
    from matplotlib.figure import Figure

    panels = {"tokens": "tokens per image", "gflops": "GFLOP per image"}
    panels |= {name: f"milliseconds, batch {_batch_size(name)}" for name in _times(records)}
    figure = Figure(figsize=(3.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    names = dict(zip([evaluation.model for evaluation in evaluations], model_names(evaluations), strict=True))
    lines: dict[str, list[dict]] = {}
    for record in records:
        lines.setdefault(_line_name(record, records, names), []).append(record)
    for axis, (field, label) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda point: point[field])
            values = [100 * point["top1"] for point in ordered]
            errors = [
                [max(100 * point["top1"] - 100 * point["top1_low"], 0) for point in ordered],
                [max(100 * point["top1_high"] - 100 * point["top1"], 0) for point in ordered],
            ]
            axis.errorbar([p[field] for p in ordered], values, yerr=errors, marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        ticks = _apart(sorted({float(f"{record[field]:.2g}") for record in records}))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy (%), 95 % intervals")
    figure.suptitle(no_math(source_text(evaluations[0])), fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    with written_beside(path) as scratch:
        figure.savefig(scratch, dpi=150)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of ascending ticks that have room for their text on a logarithmic axis."""
    room = (ticks[-1] / ticks[0]) ** (1 / 7)
    chosen: list[float] = []
    for tick in ticks:
        if not chosen or tick >= room * chosen[-1]:
            chosen.append(tick)
    return chosen


def _line_name(record: dict, records: Sequence[dict], names: dict[str, str]) -> str:
    sizes = {str(other["image_size"]) for other in records if other["model"] == record["model"]}
    name = no_math(names[record["model"]])
    return name if len(sizes) == 1 else f"{name}, {format_size(record['image_size'])} pixels"


__all__ = ["costs_table", "frontier_records", "plot_frontier", "write_frontier"]
