"""Which models an evaluation compares, and at which budgets."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedConfig

from ..checkpoints import available_checkpoints, bundled_checkpoint
from ..layers.token_budget import budget_argument_of, budget_ladder_of, choose_budgets, default_budgets_of
from ..loading import load_config
from .labels import data_class_names, known_labels, match_labels
from .planning import LeftOut, Plan, left_out_text
from .settings import tokens_at


class Contestant(NamedTuple):
    """What is kept of a model that takes part, while it is not in memory.

    Attributes:
        config (`PreTrainedConfig`): of the model.
        image_size (`(height, width)` or `None`): in pixels, of the images that its processor makes; `None` where that
            depends on the image.
    """

    config: PreTrainedConfig
    image_size: tuple[int, int] | None


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


def control_budgets(control: Contestant, models: Sequence[Contestant]) -> list[Any] | None:
    """The budgets at which a control stands beside models whose budget is of the same kind: its own and theirs.

    Returns:
        `list` or `None`: from few tokens to many, as far as its images allow them; `None` without such a model.
    """
    config, size = control
    alike = [other for other in models if budget_argument_of(other.config) == budget_argument_of(config)]
    if budget_argument_of(config) is None or not alike:
        return None
    budgets = list(default_budgets_of(config))
    for other in alike:
        budgets += [budget for budget in budget_ladder_of(*other) if budget not in budgets]
    costs = []
    for budget in budgets:
        with suppress(ValueError):
            costs.append((tokens_at(config, size, budget), budget))
    return [budget for _, budget in sorted(costs, key=lambda cost: cost[0])] or None


def typed_budgets(
    config: PreTrainedConfig, words: Mapping[str, Sequence[str] | None]
) -> tuple[list[Any] | None, list[LeftOut]]:
    """The budgets that a user typed for several models, and the texts that are none of this one.

    Returns:
        Values of its budget argument, none where no text is one of its budgets; `None` where nothing was typed, and
        for a model that has no budget to choose: it runs at its own.
    """
    given = {name: texts for name, texts in words.items() if texts is not None}
    if len(given) != 1 or not any(given.values()):
        return choose_budgets(config, words), []
    ((name, texts),) = given.items()
    if budget_argument_of(config) is None:
        reason = f"a model of type {config.model_type!r} has no budget to choose, it runs at its own"
        return None, [LeftOut({"budgets": text}, reason) for text in texts]
    budgets, left_out = [], []
    for text in texts:
        try:
            budgets += choose_budgets(config, {name: [text]})
        except ValueError as error:
            left_out.append(LeftOut({"budgets": text}, str(error)))
    return budgets, left_out


def check_options(
    plans: Mapping[str | os.PathLike, Plan],
    contestants: Mapping[str | os.PathLike, Contestant],
    options: Sequence[str],
) -> None:
    """Refuses an option of which no model has a row, and a text that is a budget of none.

    Args:
        plans, contestants: of each model, by its name.
        options: that were given, such as "merge_to".

    Raises:
        ValueError: that says why, of each model.
    """
    for option in options:
        if any(plan.has(option) for plan in plans.values()):
            continue
        reasons = {
            source: " ".join(
                left_out_texts(plan, contestants[source].config, option)
                or left_out_texts(plan, contestants[source].config)
            )
            for source, plan in plans.items()
        }
        if len(reasons) == 1:
            raise ValueError(next(iter(reasons.values())))
        told = " ".join(f"{os.fspath(source)}: {reason}" for source, reason in reasons.items())
        raise ValueError(f"`{option}`: no model can have a row for it. {told}")
    unread = [
        {text: left.reason for left in plan.left_out if isinstance(text := left.asked.get("budgets"), str)}
        for plan in plans.values()
    ]
    for text, reason in unread[0].items():
        if all(text in others for others in unread):
            raise ValueError(f"`budgets` {text!r} is a budget of no model: {reason}")


def left_out_texts(plan: Plan, config: PreTrainedConfig, option: str | None = None) -> list[str]:
    """The rows that a model is without, and why, in sentences; those that an option asked for, if one is named."""
    alike: dict[tuple, list[LeftOut]] = {}
    for left in plan.left_out:
        if option is None or option in left.asked:
            others = list(left.asked.items())[left.own is None :]
            alike.setdefault((left.reason, left.own is None, tuple(left.asked), *others), []).append(left)
    return [f"{left_out_text(group, config)}: {reason.rstrip('.')}." for (reason, *_), group in alike.items()]


__all__ = [
    "Contestant",
    "check_options",
    "control_budgets",
    "fitting_checkpoints",
    "left_out_texts",
    "same_place",
    "typed_budgets",
]
