"""Accuracy against what it costs: tokens, operations and time of several models side by side."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from ..utils.outputs import write_text
from ..utils.text import plain
from ..utils.validation import check_distinct, check_function, check_int, check_list
from .plotting import plot_frontier
from .report import csv_text, format_setting, format_size, model_names, source_text, timed_images, to_records
from .run import Evaluation
from .settings import Setting
from .speed import time_settings


BATCH_SIZES = (1, 32)


def frontier_records(
    evaluations: Sequence[Evaluation],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 10,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict]:
    """The records of `to_records`, with what each budget costs.

    Random images are timed, budgets of a model in turn; images of the data where the number of tokens depends on what
    they show. Where images of one model differ in size, the model's own size is timed.

    Args:
        evaluations (`Sequence[Evaluation]`): of `evaluate_checkpoints`, whose models are loaded and timed one by one.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 32)`): images per forward pass.
        rounds (`int`, *optional*, defaults to 10): timed passes per budget; the median counts.
        progress (`Callable`, *optional*): called with the measurements done and their number.

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

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return [record for evaluation in evaluations for record in _records_of(evaluation, batch_sizes, rounds, step)]


def _records_of(
    evaluation: Evaluation, batch_sizes: Sequence[int], rounds: int, step: Callable[[], None]
) -> list[dict]:
    """Those of one model, which is in memory until they are made."""
    model, records = evaluation.load(), to_records([evaluation])
    for size in dict.fromkeys(result.image_size for result in evaluation.results):
        rows = [
            (Setting(result.budget, result.merge_to, result.way), record)
            for result, record in zip(evaluation.results, records, strict=True)
            if result.image_size == size
        ]
        for batch_size in batch_sizes:
            speeds = time_settings(
                model,
                [setting for setting, _ in rows],
                image_size=size,
                batch_size=batch_size,
                rounds=rounds,
                images=None if evaluation.sample is None or size is None else evaluation.sample(size, batch_size),
            )
            for (_, record), speed in zip(rows, speeds, strict=True):
                record["gflops"] = speed.gflops
                record[f"milliseconds_batch_{batch_size}"] = speed.milliseconds
            step()
    return records


def costs_table(
    evaluations: Sequence[Evaluation], records: Sequence[dict], references: Mapping[str, float] | None = None
) -> Table:
    """A rich table of accuracy and costs, one row per model, image size and budget; `references` stand below it.

    Image sizes are named where they are not the first of their model.
    """
    below = ", ".join(f"{name}: {100 * accuracy:.2f}" for name, accuracy in (references or {}).items())
    table = Table(
        title=plain(f"{source_text(evaluations[0])}\noperations and times on {timed_images(evaluations)}"),
        caption=plain(f"For comparison, top-1 of {below}") if below else None,
    )
    times = _times(records)
    for name in ("model and budget", "tokens", "top-1", "GFLOP"):
        table.add_column(name, justify="left" if name.startswith("model") else "right")
    for name in times:
        table.add_column(f"ms, batch {_batch_size(name)}", justify="right")
    costs = iter(records)
    for name, evaluation in zip(model_names(evaluations), evaluations, strict=True):
        table.add_section()
        table.add_row(plain(f"{name} (control)" if evaluation.control else name))
        first = evaluation.results[0].image_size
        for result, budget in zip(evaluation.results, evaluation.budget_texts, strict=True):
            record = next(costs)
            at_size = "" if result.image_size == first else f" at {format_size(result.image_size)}"
            table.add_row(
                plain(f"  {format_setting(result, budget) or 'its own'}{at_size}"),
                str(record["tokens"]),
                f"{100 * record['top1']:.2f}",
                f"{record['gflops']:.3g}",
                *(f"{record[time]:.1f}" for time in times),
            )
    return table


def _times(records: Sequence[dict]) -> list[str]:
    return [name for name in records[0] if name.startswith("milliseconds_batch_")]


def _batch_size(field: str) -> str:
    return field.rpartition("_")[2]


def write_frontier(
    evaluations: Sequence[Evaluation],
    records: Sequence[dict],
    folder: str | os.PathLike,
    references: Mapping[str, float] | None = None,
) -> list[Path]:
    """`frontier.csv` and `frontier.png` in a folder; returns their paths."""
    table, plot = Path(folder) / "frontier.csv", Path(folder) / "frontier.png"
    write_text(table, csv_text(evaluations, records))
    plot_frontier(evaluations, records, plot, references)
    return [table, plot]


__all__ = ["costs_table", "frontier_records", "write_frontier"]
