"""What a finished run leaves beside the weights: a model card, the record of the run, its curve."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.metrics import wilson_interval
from ..models.auto import projection_of
from ..utils.text import no_markup
from .report import describe_budget, duration, forward_arguments
from .resume import write_json
from .tuning_watch import comparison_text, is_worse


_PACKAGES = ("polyscale", "transformers", "torch", "torchvision", "datasets", "accelerate")
_METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "agreement": "agreement with the full budget",
    "cosine": "cosine to the full budget",
    "loss": "loss",
}


def versions() -> dict[str, str]:
    """Of Python and the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """`training.json`: everything that is known of a run."""
    write_json(path, _without_nan(facts))


def _without_nan(value: Any) -> Any:
    """JSON has no numbers for NaN and infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_curve(path: Path, history: Sequence[Mapping[str, Any]], argument: str | None) -> bool:
    """The loss of each step and, where there is an evaluation, its metric by budget after each epoch, as a PNG.

    Args:
        path: the file.
        history: `log_history` of the trainer.
        argument: what the budgets are values of.

    Returns:
        `bool`: whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    epochs = [entry for entry in history if "budgets" in entry]
    if not losses:
        return False
    figure = Figure(figsize=(10 if epochs else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if epochs else 1, squeeze=False)[0]
    axes[0].plot(*zip(*losses, strict=True), color="0.25", linewidth=1.2, marker="o" if len(losses) < 3 else None)
    axes[0].set(xlabel="step", ylabel="training loss", title="Loss")
    if epochs:
        _draw_metric(axes[1], epochs, argument)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def _draw_metric(axis: Any, epochs: Sequence[Mapping[str, Any]], argument: str | None) -> None:
    from matplotlib import colormaps

    metric = next(name for name in _METRIC_NAMES if name in epochs[-1]["budgets"][0])
    is_share = metric in ("top1", "agreement")
    scale = 100 if is_share else 1
    steps = [entry["step"] for entry in epochs]
    count = len(epochs[-1]["budgets"])
    for index, result in enumerate(epochs[-1]["budgets"]):
        values = [scale * entry["budgets"][index][metric] for entry in epochs]
        color = colormaps["viridis"](0.85 * index / max(count - 1, 1))
        label = describe_budget(argument, result)
        axis.plot(steps, values, marker="o", markersize=3.5, linewidth=1.5, color=color, label=label)
    unit = " (%)" if is_share else ""
    axis.set(xlabel="step", ylabel=f"{_METRIC_NAMES[metric]}{unit}", title="By budget, after each epoch")
    if is_share:
        bottom, top = axis.get_ylim()
        axis.set_ylim(max(bottom, -2), min(top, 102))
    axis.legend(fontsize=8, frameon=False)


def write_card(path: Path, facts: Mapping[str, Any], config: Any, is_classifier: bool) -> None:
    """`README.md`: a model card of the Hub, with the metrics by budget as YAML.

    Args:
        path: the file.
        facts: what `write_record` writes.
        config: of the model.
        is_classifier: whether it has a head for classes.
    """
    name, argument = facts["name"], facts["budget_argument"]
    results, data = facts["results"], facts["data"]
    task = "image-classification" if is_classifier else "image-feature-extraction"
    dataset = Path(data["source"]).name or data["source"]
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=data["evaluated"],
            metric_type="accuracy" if metric == "top1" else metric,
            metric_value=round(result[metric], 6),
            metric_name=f"{_METRIC_NAMES[metric]} at {describe_budget(argument, result)}",
        )
        for result in results
        for metric in _METRIC_NAMES
        if metric in result and (metric != "loss" or not {"top1", "agreement", "cosine"} & set(result))
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[config.model_type, "polyscale", "adaptive-tokens"],
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    text = "\n\n".join(filter(None, _card_sections(facts, config, is_classifier)))
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=True).save(path)


def _card_sections(facts: Mapping[str, Any], config: Any, is_classifier: bool) -> list[str]:
    data = facts["data"]
    auto_class = "AutoModelForImageClassification" if is_classifier else "AutoModel"
    imports, model_class = f"from transformers import AutoImageProcessor, {auto_class}", auto_class
    projection = projection_of(config)
    if projection is not None:
        module, model_class = projection.__module__, projection.__name__
        module = "polyscale" if module.startswith("polyscale.") else module
        imports = f"from {module} import {model_class}\nfrom transformers import AutoImageProcessor"
    budget = forward_arguments(facts["cheapest_call"])
    sections = [
        f"# {facts['name']}",
        f"A `{config.model_type}` model with {facts['parameters']:,} parameters for images of "
        f"{facts['image_size'][0]} x {facts['image_size'][1]} pixels, trained with polyscale.",
        "```python\nimport polyscale  # registers the model type\n"
        f"{imports}\n\n"
        f"processor = AutoImageProcessor.from_pretrained({facts['name']!r})\n"
        f"model = {model_class}.from_pretrained({facts['name']!r})\n"
        f'outputs = model(**processor(image, return_tensors="pt"){budget})\n```',
    ]
    if facts["results"]:
        sections.append(_results_table(facts, facts["budget_argument"]))
    counts = ", ".join(f"{split}: {count:,} images" for split, count in data["splits"].items())
    lines = [f"- data: `{data['source']}` ({counts})"]
    if data["classes"]:
        shown = ", ".join(map(no_markup, data["classes"][:20]))
        more = ", ..." if len(data["classes"]) > 20 else ""
        lines.append(f"- classes: {len(data['classes'])} ({shown}{more})")
    if "tuning" in facts["metrics"]:
        compared = facts["metrics"]["tuning"]
        worse = " **The weights that it was tuned from are better.**" if is_worse(compared) else ""
        lines.append(f"- {comparison_text(compared)}.{worse}")
    lines += [
        f"- {facts['steps']:,} steps, epochs: {facts['epochs']:g}, {duration(facts['seconds'])} on {facts['device']}",
        f"- command: `{facts['command']}`",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    sections.append("## Training\n\n" + "\n".join(lines))
    if facts["has_curve"]:
        sections.append("![loss by step, and the metric by budget after each epoch](curve.png)")
    sections.append("All choices, and the loss of each step, are in `training.json`.")
    return sections


def _results_table(facts: Mapping[str, Any], argument: str | None) -> str:
    metrics = [metric for metric in _METRIC_NAMES if metric in facts["results"][0]]
    header = [argument or "budget", "tokens", *(_METRIC_NAMES[metric] for metric in metrics)]
    rows = [header, ["---"] * len(header)]
    for result in facts["results"]:
        budget = result["budget"]
        shown = "x".join(map(str, budget)) if isinstance(budget, list) else budget
        is_share = {metric: metric in ("top1", "agreement") for metric in metrics}
        values = [f"{100 * result[name]:.2f} %" if is_share[name] else f"{result[name]:.4f}" for name in metrics]
        if is_share.get(metrics[0]):
            low, high = (100 * bound for bound in wilson_interval(result[metrics[0]], result["images"]))
            values[0] += f" ({low:.1f} to {high:.1f})"
        rows.append(["default" if budget is None else shown, result["tokens"] or "vary", *values])
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    where = f"{facts['results'][0]['images']:,} images of the split `{facts['data']['evaluated']}`"
    intervals = " In brackets: Wilson's 95 % interval." if metrics[0] in ("top1", "agreement") else ""
    return f"## By budget\n\nOn {where}, {facts['precision']}.{intervals}\n\n{table}"


__all__ = ["draw_curve", "versions", "write_card", "write_record"]
