"""Results across budgets as a table, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from .accuracy import BudgetResult


def _size(value: int | Sequence[int] | None) -> str:
    if value is None:
        return "default"
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


def results_table(results: Sequence[BudgetResult], title: str = "") -> Table:
    """A rich table, one row a budget."""
    table = Table(title=title)
    for name in ("image", "budget", "tokens", "top-1", "top-5", "images/s"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            _size(result.image_size),
            _size(result.budget),
            str(result.tokens),
            f"{100 * result.top1:.2f}",
            f"{100 * result.top5:.2f}",
            f"{result.images_per_second:.1f}",
        )
    return table


def write_json(results: Sequence[BudgetResult], path: str | Path) -> None:
    """A list of objects with the fields of `BudgetResult`."""
    Path(path).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def plot_results(series: Mapping[str, Sequence[BudgetResult]], path: str | Path) -> None:
    """Top-1 accuracy against tokens a picture, one line for each entry of `series`, as a picture at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, results in series.items():
        ordered = sorted(results, key=lambda result: result.tokens)
        axes.plot(
            [result.tokens for result in ordered], [100 * result.top1 for result in ordered], marker="o", label=name
        )
        if len(series) == 1:
            for result in ordered:
                axes.annotate(
                    _size(result.budget),
                    (result.tokens, 100 * result.top1),
                    xytext=(4, -11),
                    textcoords="offset points",
                    fontsize=8,
                )
    axes.set_xscale("log", base=2)
    ticks = sorted({result.tokens for results in series.values() for result in results})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens a picture")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


__all__ = ["plot_results", "results_table", "write_json"]
