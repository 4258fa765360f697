"""Which models an evaluation compares, and at which budgets."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from datasets import Dataset

from ..checkpoints import available_checkpoints, bundled_checkpoint
from ..layers.token_budget import budget_argument_of, budget_ladder_of, default_budgets_of
from ..loading import LoadedModel, load_config
from ..utils.processors import output_size
from .accuracy import known_labels
from .labels import data_class_names, match_labels
from .settings import most_tokens


def fitting_checkpoints(split: Dataset, label_map: Mapping[str, str | int] | None = None) -> list[str]:
    """The bundled checkpoints that know all classes of a data set; where these have no names, those with as many.

    Args:
        split (`datasets.Dataset`): rows with `label`.
        label_map (`Mapping[str, str or int]`, *optional*): the model's class for a class of the data.

    Raises:
        ValueError: where there is none, or for labels that are missing.
    """
    _, names, count = known_labels(split)
    fitting, known = [], []
    for checkpoint in available_checkpoints():
        id2label = load_config(bundled_checkpoint(checkpoint)).id2label
        known.append(f"{checkpoint} ({len(id2label)} classes, such as {id2label[0]!r})")
        if data_class_names(names) is None and count != len(id2label):
            continue
        with suppress(ValueError):
            match_labels(names, id2label, label_map, num_classes=count)
            fitting.append(checkpoint)
    if not fitting:
        example = f", such as {names[0]!r}" if names else ""
        raise ValueError(
            f"None of the checkpoints that ship has the data's {count} classes{example}. There are "
            f"{', '.join(known)}. Name a model of these classes, or their counterparts with `label_map` "
            "(`--label-map`)."
        )
    return fitting


def same_place(model: str) -> str:
    """The same for names of one checkpoint."""
    if os.path.exists(model):
        return os.path.realpath(model)
    return str(bundled_checkpoint(model)) if model in available_checkpoints() else model


def control_budgets(control: LoadedModel, models: Sequence[LoadedModel]) -> list[Any] | None:
    """The budgets at which a control stands beside models whose budget is of the same kind: its own and theirs.

    Returns:
        `list` or `None`: from few tokens to many, as far as its images allow them; `None` without such a model.
    """
    config, size = control.model.config, output_size(control.image_processor)
    alike = [other for other in models if budget_argument_of(other.model.config) == budget_argument_of(config)]
    if budget_argument_of(config) is None or not alike:
        return None
    budgets = list(default_budgets_of(config))
    for other in alike:
        ladder = budget_ladder_of(other.model.config, output_size(other.image_processor))
        budgets += [budget for budget in ladder if budget not in budgets]
    costs = [(most_tokens(config, size, budget), budget) for budget in budgets]
    allowed = [cost for cost in costs if cost[0] is not None]
    return [budget for _, budget in sorted(allowed, key=lambda cost: cost[0])] or None


__all__ = ["control_budgets", "fitting_checkpoints", "same_place"]
