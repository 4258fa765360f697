"""Evaluations as a table, JSON and CSV; each says what was measured on what."""

import csv
import io
import json
import os
from collections.abc import Sequence

from rich.table import Table

from ..utils.outputs import write_text
from ..utils.text import plain
from .accuracy import BudgetResult
from .run import Evaluation
from .settings import BUDGET, SMALLER


_OWN = {BUDGET: "", SMALLER: "its own"}  # what stands for a budget that nobody chose


def format_size(size: Sequence[int] | None) -> str:
    """(32, 48) -> "32x48"; "varying" for `None`."""
    return "varying" if size is None else "x".join(map(str, size))


def format_setting(result: BudgetResult, budget: str) -> str:
    """The budget of a result for a reader: as a user types it, or what spent fewer tokens at the model's own."""
    return f"merged to {result.merge_to}" if result.merge_to is not None else budget or _OWN[result.way]


def source_text(evaluation: Evaluation) -> str:
    """What was scored: data, split, images, classes."""
    return f"{evaluation.data}, split {evaluation.split}, {evaluation.images} images, {evaluation.classes} classes"


def timed_images(evaluations: Sequence[Evaluation]) -> str:
    """What `frontier_records` times."""
    of_data = any(evaluation.sample is not None for evaluation in evaluations)
    return "random images" + (", those of the data where tokens differ" if of_data else "")


def results_table(evaluation: Evaluation) -> Table:
    """A rich table, one row per image size and budget."""
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.versions.items())
    table = Table(
        title=plain(f"{evaluation.model}\n{source_text(evaluation)}"),
        caption=plain(f"95 %: Wilson's interval of top-1. {evaluation.device}, {evaluation.dtype}; {versions}"),
    )
    with_top5 = evaluation.classes > 5
    for name in ("image", "budget", "tokens", "top-1", "95 %", *(["top-5"] if with_top5 else []), "images/s"):
        table.add_column(name, justify="right")
    for result, budget in zip(evaluation.results, evaluation.budget_texts, strict=True):
        low, high = result.top1_interval
        table.add_row(
            format_size(result.image_size),
            format_setting(result, budget),
            str(result.tokens),
            f"{100 * result.top1:.2f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            *([f"{100 * result.top5:.2f}"] if with_top5 else []),
            f"{result.images_per_second:.1f}",
        )
    return table


def per_class_table(evaluation: Evaluation) -> Table:
    """A rich table of the top-1 accuracy of each class, one column per image size and budget."""
    first = evaluation.results[0].per_class
    several = len({result.image_size for result in evaluation.results}) > 1
    table = Table(title=plain(f"{evaluation.model}: top-1 accuracy (%) by class and budget"))
    table.add_column("class")
    table.add_column("images", justify="right")
    for result, budget in zip(evaluation.results, evaluation.budget_texts, strict=True):
        at_size = f" at {format_size(result.image_size)}" if several else ""
        setting = format_setting(result, budget) or "default"
        table.add_column(plain(f"{setting}{at_size}"), justify="right")
    for name, found in first.items():
        accuracies = [f"{100 * result.per_class[name]['top1']:.1f}" for result in evaluation.results]
        table.add_row(plain(name), str(found["images"]), *accuracies)
    return table


def to_records(evaluations: Sequence[Evaluation]) -> list[dict]:
    """One flat dict per model, image size and budget."""
    records = []
    for evaluation in evaluations:
        names = ("model", "control", "data", "split", "images", "classes")
        shared = {name: getattr(evaluation, name) for name in names}
        for result in evaluation.results:
            record = {
                **shared,
                "image_size": result.image_size and list(result.image_size),
                "way": result.way,
                "budget": list(result.budget) if isinstance(result.budget, tuple) else result.budget,
                "merge_to": result.merge_to,
                "tokens": result.tokens,
                "top1": result.top1,
                "top1_low": result.top1_interval[0],
                "top1_high": result.top1_interval[1],
                "top5": result.top5,
                "images_per_second": result.images_per_second,
                "device": evaluation.device,
                "dtype": evaluation.dtype,
                "versions": evaluation.versions,
            }
            records.append(record if result.per_class is None else record | {"per_class": result.per_class})
    return records


def write_json(evaluations: Sequence[Evaluation], path: str | os.PathLike) -> None:
    """A list of the objects of `to_records`."""
    write_text(path, json.dumps(to_records(evaluations), indent=2, allow_nan=False) + "\n")


def write_csv(evaluations: Sequence[Evaluation], path: str | os.PathLike) -> None:
    """The records of `to_records` as rows, without the classes; sizes, budgets and versions as text."""
    write_text(path, csv_text(evaluations, to_records(evaluations)))


def csv_text(evaluations: Sequence[Evaluation], records: Sequence[dict]) -> str:
    """Records of evaluations as comma-separated rows, without the classes; sizes, budgets and versions as text."""
    texts = [text for evaluation in evaluations for text in evaluation.budget_texts]
    buffer = io.StringIO()
    writer = None
    for source, budget in zip(records, texts, strict=True):
        record = {name: value for name, value in source.items() if name != "per_class"}
        record["image_size"] = format_size(record["image_size"])
        record["budget"] = budget
        record["versions"] = "; ".join(f"{name} {number}" for name, number in record["versions"].items())
        if writer is None:
            writer = csv.DictWriter(buffer, record, lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)
    return buffer.getvalue()


def model_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The last part of each model's path; the whole path where two end alike."""
    short = [os.path.basename(evaluation.model.rstrip("/")) or evaluation.model for evaluation in evaluations]
    return short if len(set(short)) == len(short) else [evaluation.model for evaluation in evaluations]


__all__ = [
    "csv_text",
    "format_setting",
    "format_size",
    "model_names",
    "per_class_table",
    "results_table",
    "source_text",
    "timed_images",
    "to_records",
    "write_csv",
    "write_json",
]
