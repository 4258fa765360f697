"""What bundled checkpoints say of the sample photographs, whose classes are known, at a few token budgets each."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from .assets import photograph_class, sample_photographs
from .checkpoints import available_checkpoints, bundled_checkpoint
from .classification import classify_images
from .layers.token_budget import TokenBudgetMixin, budget_kwargs, budget_ladder_of
from .loading import LoadedModel, load_classifier, load_config
from .utils.validation import check_distinct, check_list, check_path


BUDGETS = 3  # of each model, at most


class ModelAnswers(NamedTuple):
    """What one model said of the photographs.

    Attributes:
        name (`str`): of the checkpoint, as it was given.
        loaded (`LoadedModel`): the model and its image processor.
        records (`list[dict]`): as `classify_images` returns them, with "model" (the name), "class" (of the photograph)
            and "right" (whether the label is that class).
    """

    name: str
    loaded: LoadedModel
    records: list[dict]


def answer_photographs(
    models: Sequence[str | os.PathLike] | None = None,
    *,
    device: str | int | torch.device | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[ModelAnswers]:
    """Asks models for the classes of the sample photographs, each at up to three budgets (`spread_budgets`).

    Args:
        models (`Sequence[str or os.PathLike]`, *optional*): bundled checkpoints, local folders or names on the hub, of
            one set of classes; `demonstration_checkpoints()` when `None`.
        device (`str`, `int` or `torch.device`, *optional*): where they run; the machine's accelerator, else the CPU,
            when `None`.
        progress (`Callable`, *optional*): called with the photographs done and their number, all models together.

    Returns:
        `list[ModelAnswers]`: one for each model. The photographs are those of the first model's classes.

    Raises:
        ValueError: for no list of models, one that comes twice, or one that lacks a class of the photographs.
        OSError: if there is no such checkpoint.
    """
    models = demonstration_checkpoints() if models is None else check_list("models", models, what="checkpoints")
    names = [check_path("models", model) for model in models]
    check_distinct("models", names, names)
    loaded = [load_classifier(name, device) for name in names]
    photographs = sample_photographs(_labels(loaded[0].model.config))
    for name, classifier in zip(names, loaded, strict=True):
        unknown = _unknown(_labels(classifier.model.config), photographs)
        if unknown:
            raise ValueError(
                f"`models` {name!r} must know the classes of the photographs, and has no label {unknown[0]!r}: give "
                f"checkpoints of the same classes, such as {', '.join(demonstration_checkpoints())}."
            )
    answers = []
    for done, (name, classifier) in enumerate(zip(names, loaded, strict=True)):
        told = None if progress is None else _shifted(progress, done * len(photographs), len(names))
        records, errors = classify_images(
            photographs, classifier, spread_budgets(classifier.model.config), progress=told
        )
        if errors:
            raise ValueError(f"`models` {name!r} cannot classify {errors[0]['file']}: {errors[0]['error']}")
        for record in records:
            record |= {"model": name, "class": photograph_class(record["file"])}
            record["right"] = record["label"] == record["class"]
        answers.append(ModelAnswers(name, classifier, records))
    return answers


def demonstration_checkpoints() -> list[str]:
    """The bundled checkpoints that know the classes of sample photographs; of those, the ones for the larger set.

    Raises:
        ValueError: if no such checkpoint is installed.
    """
    knowing: dict[int, list[str]] = {}  # by the number of photographs
    for name in available_checkpoints():
        labels = _labels(load_config(bundled_checkpoint(name)))
        photographs = sample_photographs(labels)
        if not _unknown(labels, photographs):
            knowing.setdefault(len(photographs), []).append(name)
    if not knowing:
        raise ValueError("`models` must be given: no checkpoint that knows the sample photographs is installed.")
    return knowing[max(knowing)]


def spread_budgets(config: PreTrainedConfig, count: int = BUDGETS) -> list:
    """A few budgets of a model, from the fewest tokens to the most in even ratios.

    Args:
        config (`PreTrainedConfig`): of the model.
        count (`int`, *optional*, defaults to 3): how many at most, 2 or more.

    Returns:
        `list`: values of its budget argument, of those that `budget_ladder` names; `[None]` for a model without any.
    """
    ladder = budget_ladder_of(config)
    if len(ladder) <= count or not isinstance(config, TokenBudgetMixin):
        return ladder
    tokens = [math.log(config.max_num_tokens_for(**budget_kwargs(config, budget))) for budget in ladder]
    wanted = [tokens[0] + (tokens[-1] - tokens[0]) * step / (count - 1) for step in range(count)]
    nearest = {min(range(len(ladder)), key=lambda place: abs(tokens[place] - target)) for target in wanted}
    return [ladder[place] for place in sorted(nearest)]


def _labels(config: PreTrainedConfig) -> list[str]:
    return list((config.id2label or {}).values())


def _unknown(labels: Iterable[str], photographs: Sequence[Path]) -> list[str]:
    """The classes of the photographs that are not among the labels."""
    known = set(labels)
    classes = dict.fromkeys(photograph_class(file) for file in photographs)
    return [name for name in classes if name not in known]


def _shifted(progress: Callable[[int, int], object], before: int, models: int) -> Callable[[int, int], object]:
    return lambda done, total: progress(before + done, models * total)


__all__ = ["ModelAnswers", "answer_photographs", "demonstration_checkpoints", "spread_budgets"]
