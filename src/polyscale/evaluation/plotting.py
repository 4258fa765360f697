"""Evaluations as curves: accuracy against what it costs, one curve per model and way to spend fewer tokens."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.outputs import written_beside
from ..utils.text import no_math
from .report import format_size, model_names, source_text, timed_images, to_records, write_csv, write_json
from .run import Evaluation
from .settings import BUDGET, MERGING, SMALLER


# Colours that people who see red and green alike tell apart (Okabe and Ito); controls are grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREYS = ("#404040", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = {BUDGET: "-", MERGING: ":", SMALLER: "-."}
_WORDS = {BUDGET: "", MERGING: ", tokens merged", SMALLER: ", smaller images"}
_FONT = 10


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        label (`str`): model and way.
        color, marker, line (`str`): as in matplotlib: a colour and a marker per model, a kind of line per way.
        filled (`bool`): whether its points are: those of a family's own budgets are.
        records (`list[dict]`): of `to_records`, or of `frontier_records`.
        budgets (`list[str]`): of the records, as a user types them.
    """

    label: str
    color: str
    marker: str
    line: str
    filled: bool
    records: list[dict]
    budgets: list[str]


def curves_of(evaluations: Sequence[Evaluation], records: Sequence[dict]) -> list[Curve]:
    """The curves of evaluations: budgets and merging by image size, and smaller images; in the order of the records.

    Args:
        evaluations (`Sequence[Evaluation]`): of `evaluate_checkpoints`.
        records (`Sequence[dict]`): one for each of their results, in their order.
    """
    curves, rest = [], list(records)
    numbers = {True: 0, False: 0}
    for name, evaluation in zip(model_names(evaluations), evaluations, strict=True):
        own, rest = rest[: len(evaluation.results)], rest[len(evaluation.results) :]
        number = numbers[evaluation.control]
        numbers[evaluation.control] += 1
        palette = _GREYS if evaluation.control else _COLORS
        look = {
            "color": palette[number % len(palette)],
            "marker": "X" if evaluation.control else _MARKERS[number % len(_MARKERS)],
        }
        title = f"{name} (control)" if evaluation.control else name
        sizes = {str(record["image_size"]): record["image_size"] or (0,) for record in own if record["way"] == BUDGET}
        largest = max(sizes, key=lambda size: _area(sizes[size]), default=None)
        groups: dict[tuple, list[int]] = {}
        for place, record in enumerate(own):
            size = None if record["way"] == SMALLER else str(record["image_size"])
            groups.setdefault((record["way"], size), []).append(place)
        for (way, size), places in groups.items():
            first = own[places[0]]
            at = f", {format_size(first['image_size'])} pixels" if size is not None and len(sizes) > 1 else ""
            dashed = way == BUDGET and (evaluation.control or size != largest)
            curves.append(
                Curve(
                    label=f"{title}{_WORDS[way]}{at}",
                    line="--" if dashed else _LINES[way],
                    filled=way == BUDGET and size == largest,
                    records=[own[place] for place in places],
                    budgets=[evaluation.budget_texts[place] for place in places],
                    **look,
                )
            )
    return curves


def _area(size: Sequence[int]) -> int:
    return size[0] * size[-1]


def draw_curves(axis: Any, curves: Sequence[Curve], field: str) -> None:
    """Top-1 accuracy of curves against one field of their records, with its intervals, on a logarithmic axis.

    Points are joined from few tokens to many: times have noise, and would change their order.
    """
    for curve in curves:
        points = sorted(curve.records, key=lambda record: (record["tokens"], record.get("gflops", 0)))
        top1 = [100 * record["top1"] for record in points]
        below = [max(value - 100 * record["top1_low"], 0) for value, record in zip(top1, points, strict=True)]
        above = [max(100 * record["top1_high"] - value, 0) for value, record in zip(top1, points, strict=True)]
        axis.errorbar(
            [record[field] for record in points],
            top1,
            yerr=[below, above],
            color=curve.color,
            marker=curve.marker,
            markersize=6,
            markerfacecolor=curve.color if curve.filled else "white",
            linestyle=curve.line,
            linewidth=1.8 if curve.filled else 1.3,
            elinewidth=0.8,
            label=_safe(curve.label),
            zorder=3 if curve.filled else 2,
        )
    values = [record[field] for curve in curves for record in curve.records]
    axis.set_xscale("log", base=2)
    axis.minorticks_off()
    ticks = _round_ticks(min(values), max(values), 2 if field == "tokens" else 10)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.grid(alpha=0.3)


def _safe(label: str) -> str:
    """A label that matplotlib neither typesets nor hides."""
    return f" {no_math(label)}" if label.startswith("_") else no_math(label)


def _round_ticks(low: float, high: float, base: int) -> list[float]:
    """A few powers of 2, or round numbers such as 1, 2, 5, 10, within a range; its ends where none are."""
    steps = [(1,)] if base == 2 else [(1, 2, 5), (1, 3), (1,)]
    most = 8 if base == 2 else 5
    for factors in steps:
        ticks = [factor * float(base) ** exponent for exponent in range(-12, 31) for factor in factors]
        ticks = [tick for tick in ticks if low / 1.01 <= tick <= high * 1.01]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else sorted({float(f"{low:.2g}"), float(f"{high:.2g}")})


def _name_curves(figure: Any, axis: Any) -> None:
    """The names of the curves of a panel, to the right of all panels, in the order of their best points."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda place: -max(handles[place].lines[0].get_ydata()))
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside right upper",
        labelcolor="linecolor",
        fontsize=_FONT,
        handlelength=3.5,
        frameon=False,
    )


def plot_frontier(
    evaluations: Sequence[Evaluation],
    records: Sequence[dict],
    path: str | os.PathLike,
    references: Mapping[str, float] | None = None,
) -> None:
    """Top-1 accuracy against tokens, operations and milliseconds, a panel for each, as an image.

    Args:
        evaluations (`Sequence[Evaluation]`): of `evaluate_checkpoints`.
        records (`Sequence[dict]`): of `frontier_records`.
        path (`str` or `os.PathLike`): of the image.
        references (`Mapping[str, float]`, *optional*): accuracies in [0, 1] that are drawn as horizontal lines.
    """
    from matplotlib.figure import Figure

    panels = {"tokens": "tokens per image", "gflops": "GFLOP per image"}
    for name in records[0]:
        if name.startswith("milliseconds_batch_"):
            panels[name] = f"milliseconds, batch of {name.rpartition('_')[2]}"
    figure = Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    curves = curves_of(evaluations, records)
    for axis, (field, label) in zip(axes, panels.items(), strict=True):
        draw_curves(axis, curves, field)
        axis.set_xlabel(label, fontsize=_FONT + 1)
        axis.tick_params(labelsize=_FONT)
        for accuracy in (references or {}).values():
            axis.axhline(100 * accuracy, color="black", linewidth=1, zorder=1)
    for name, accuracy in (references or {}).items():
        place = (0.02, 100 * accuracy)
        text = f"{_safe(name)}, {100 * accuracy:.1f} %"
        axes[0].text(*place, text, transform=axes[0].get_yaxis_transform(), va="bottom", fontsize=_FONT)
    _name_curves(figure, axes[0])
    axes[0].set_ylabel("top-1 accuracy (%), 95 % intervals", fontsize=_FONT + 1)
    first = evaluations[0]
    figure.suptitle(
        no_math(f"{source_text(first)}. Times: {timed_images(evaluations)}, {first.device}, {first.dtype}"),
        fontsize=_FONT,
        x=0.01,
        horizontalalignment="left",  # the names of the curves stand at the right
    )
    with written_beside(path) as scratch:
        figure.savefig(scratch, dpi=150)


def plot_results(evaluations: Sequence[Evaluation], path: str | os.PathLike) -> None:
    """Top-1 accuracy against tokens per image, with its intervals, one line per model, way and size, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    curves = curves_of(evaluations, to_records(evaluations))
    draw_curves(axis, curves, "tokens")
    for record, budget in zip(curves[0].records, curves[0].budgets, strict=True) if len(curves) == 1 else ():
        place = (record["tokens"], 100 * record["top1"])
        axis.annotate(budget, place, xytext=(4, -11), textcoords="offset points", fontsize=8)
    axis.set_xlabel("tokens per image")
    axis.set_ylabel("top-1 accuracy (%), 95 % intervals")
    axis.set_title(no_math(source_text(evaluations[0])), fontsize=9)
    axis.legend()
    with written_beside(path) as scratch:
        figure.savefig(scratch, dpi=150)


def write_evaluations(evaluations: Sequence[Evaluation], folder: str | os.PathLike) -> list[Path]:
    """`results.json`, `results.csv` and `accuracy.png` in a folder; returns their paths."""
    writers = {"results.json": write_json, "results.csv": write_csv, "accuracy.png": plot_results}
    for name, write in writers.items():
        write(evaluations, Path(folder) / name)
    return [Path(folder) / name for name in writers]


__all__ = ["Curve", "curves_of", "draw_curves", "plot_frontier", "plot_results", "write_evaluations"]
