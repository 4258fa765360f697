"""Which rows an evaluation of a model has: those that were asked for, less those that the model cannot have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..layers.budget_choice import checked_budgets
from ..layers.token_budget import default_budgets_of, format_budget, plain_size
from ..utils.images import UnreadableImageError
from ..utils.processors import output_size
from ..utils.validation import check_distinct, check_int, check_list, to_pair
from .inputs import image_batches, model_inputs, size_options, value_options
from .labels import class_indices
from .options import EvaluationOptions
from .settings import MERGING, SMALLER, Setting, default_settings, tokens_at


@dataclass(frozen=True)
class Row:
    """One row of an evaluation.

    Attributes:
        image_size (`(height, width)` or `None`): in pixels; that of the image processor when `None`.
        setting (`Setting`): how the model is called.
        asked (`dict[str, Any]`): the options that ask for it, with the value of each: "budgets", "merge_to",
            "shrink_to", "image_sizes"; empty where the command chose it by itself.
    """

    image_size: tuple[int, int] | None
    setting: Setting
    asked: dict[str, Any] = field(default_factory=dict)

    def left_out(self, reason: str) -> "LeftOut":
        return LeftOut(self.asked, reason, own=None if "budgets" in self.asked else self.setting.budget)


@dataclass(frozen=True)
class LeftOut:
    """A row that a model cannot have.

    Attributes:
        asked (`dict[str, Any]`): as in `Row`.
        reason (`str`): why.
        needless (`bool`): whether the model could take it, or be without it, but it would show nothing new.
        own: the budget of its own ladder that is left out.
    """

    asked: dict[str, Any]
    reason: str
    needless: bool = False
    own: Any = None

    def message(self, config: PreTrainedConfig) -> str:
        """What is left out, and why."""
        return f"{left_out_text([self], config)}: {self.reason}" if self.asked or self.own is not None else self.reason


def left_out_text(alike: Sequence[LeftOut], config: PreTrainedConfig) -> str:
    """Rows that are left out and differ in one value, as a user types them: "`merge_to` 4, 2 at `image_sizes` 32"."""
    columns = {}
    if alike[0].own is not None:
        columns["its own budgets"] = [format_budget(left.own, config) for left in alike]
    for option in alike[0].asked:
        columns[f"`{option}`"] = [_value_text(option, left.asked[option], config) for left in alike]
    return " at ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in columns.items())


def _value_text(option: str, value: Any, config: PreTrainedConfig) -> str:
    if isinstance(value, str):  # as it was typed
        return value
    return format_budget(value, config) if option == "budgets" else format_budget(plain_size(value))


@dataclass
class Plan:
    """The rows of a model in the order of its results, those that it cannot have, and how images are prepared.

    Attributes:
        labels (`np.ndarray`): for each image of the data, the index of its class in the model.
        rows (`list[Row]`): budgets and merging by image size, then smaller images.
        left_out (`list[LeftOut]`): rows that were asked for, and are not among them.
        crop_pct, values: of the preparation, as in `size_options` and `value_options`.
    """

    labels: np.ndarray
    rows: list[Row]
    left_out: list[LeftOut]
    crop_pct: float | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def stages(self) -> list[tuple[tuple[int, int] | None, list[Row]]]:
        """The rows that see the same images, with the size of these."""
        groups = groupby(self.rows, lambda row: (row.image_size, row.setting.way == SMALLER))
        return [(size, list(rows)) for (size, _), rows in groups]

    def has(self, option: str, value: Any = None) -> bool:
        """Whether a row stands for an option; with `value`, for this value of it."""
        return any(option in row.asked and value in (None, row.asked[option]) for row in self.rows)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses what one model alone was asked for and cannot take.

        Raises:
            ValueError: for a value of which no row is left.
        """
        for left in self.left_out:
            if not left.needless and not all(self.has(option, value) for option, value in left.asked.items()):
                raise ValueError(left.message(config))


def plan_rows(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset,
    budgets: Sequence | None,
    options: EvaluationOptions,
    *,
    typed: bool = True,
) -> Plan:
    """Finds out what a model can take of what it is asked for: one image goes through it at each row.

    Args:
        model, processor, split, budgets: as in `evaluate_budgets`.
        options (`EvaluationOptions`): what it is asked for beside the budgets.
        typed (`bool`, *optional*, defaults to `True`): whether `budgets` are a user's, and not a ladder, or empty.

    Raises:
        ValueError: for classes of the data that the model does not have, values that no model could take, an image
            that cannot be read, or a model that cannot run at all.
    """
    config = model.config
    labels = class_indices(split, config.id2label, options.label_map)
    image_sizes, merge_to, shrink_to = options.image_sizes, options.merge_to, options.shrink_to
    if typed and budgets is not None:
        budgets = checked_budgets(budgets, config)
    sizes = None if image_sizes is None else _checked_sizes("image_sizes", image_sizes)
    counts = []
    if merge_to is not None:
        counts = [check_int("merge_to", count, minimum=1) for count in check_list("merge_to", merge_to)]
        check_distinct("merge_to", counts)
    smaller = [] if shrink_to is None else _checked_sizes("shrink_to", shrink_to)
    values = value_options(options.mean, options.std, options.interpolation, getattr(config, "num_channels", 3))
    plan = Plan(labels, [], [], options.crop_pct, values)
    own_size = output_size(processor)
    proposed = [
        *_budget_rows(config, own_size, budgets, sizes, counts, typed),
        *(_smaller_row(config, own_size, size) for size in smaller),
    ]
    plan.rows = [row for row in proposed if isinstance(row, Row)]
    plan.left_out = [row for row in proposed if isinstance(row, LeftOut)]
    _try_rows(model, processor, split.select([0]), plan)
    if not plan.rows and all(not left.asked for left in plan.left_out):
        raise ValueError(plan.left_out[0].reason)
    return plan


def _checked_sizes(name: str, sizes: Sequence) -> list[tuple[int, int]]:
    given = check_list(name, sizes, what="sizes in pixels")
    pairs = [to_pair(size, name) for size in given]
    check_distinct(name, given, pairs)
    return pairs


def _budget_rows(
    config: PreTrainedConfig,
    own_size: tuple[int, int] | None,
    budgets: list | None,
    sizes: list[tuple[int, int]] | None,
    merge_to: Sequence[int],
    typed: bool,
) -> Iterator[Row | LeftOut]:
    """Budgets, and the model's own with tokens merged, at each image size."""
    unmerged = _why_unmerged(config)
    if unmerged is not None:
        yield from (LeftOut({"merge_to": count}, unmerged, needless=True) for count in merge_to)
        merge_to = []
    for size in sizes or [None]:
        at = {} if size is None else {"image_sizes": size}
        if budgets is None:
            yield from _ladder_rows(config, size, size or own_size, at)
        else:
            asked = [{"budgets": budget, **at} if typed else at for budget in budgets]
            yield from (Row(size, Setting(budget), words) for budget, words in zip(budgets, asked, strict=True))
        for count in merge_to:
            yield _merged_row(config, size, size or own_size, count, {"merge_to": count, **at})


def _ladder_rows(
    config: PreTrainedConfig, size: tuple[int, int] | None, seen: tuple[int, int] | None, at: Mapping[str, Any]
) -> Iterator[Row | LeftOut]:
    """The budgets of a model's own ladder, and those that it was trained with and images of this size do not allow."""
    try:
        settings = default_settings(config, seen)
    except ValueError as error:
        yield LeftOut(dict(at), str(error))
        return
    ladder = [setting.budget for setting in settings]
    trained = default_budgets_of(config)
    if all(budget in trained for budget in ladder):
        for budget in trained:
            if budget not in ladder:
                yield LeftOut(dict(at), _why_no_tokens(config, seen, budget), own=budget)
    yield from (Row(size, setting, dict(at)) for setting in settings)


def _why_no_tokens(config: PreTrainedConfig, image_size: tuple[int, int] | None, budget: Any) -> str:
    try:
        tokens_at(config, image_size, budget)
    except ValueError as error:
        return str(error)
    return "its images do not allow it"


def _why_unmerged(config: PreTrainedConfig) -> str | None:
    if not hasattr(config, "merge_tokens_to"):
        return f"a model of type {config.model_type!r} cannot merge tokens"
    return "tokens cannot be merged where images differ in their number" if config.tokens_vary else None


def _merged_row(
    config: PreTrainedConfig,
    size: tuple[int, int] | None,
    seen: tuple[int, int] | None,
    count: int,
    asked: dict[str, Any],
) -> Row | LeftOut:
    try:
        most = tokens_at(config, seen)
    except ValueError as error:
        return LeftOut(asked, str(error))
    if count >= most:
        return LeftOut(asked, f"it has no more than {most} tokens at its own budget", needless=True)
    return Row(size, Setting(merge_to=count, way=MERGING), asked)


def _smaller_row(config: PreTrainedConfig, own_size: tuple[int, int] | None, size: tuple[int, int]) -> Row | LeftOut:
    asked = {"shrink_to": size}
    try:
        fewer, own = tokens_at(config, size), tokens_at(config, own_size)
    except ValueError as error:
        return LeftOut(asked, str(error))
    if fewer is None or own is None:
        return LeftOut(asked, f"nobody knows how many tokens a model of type {config.model_type!r} has", needless=True)
    if fewer >= own:
        return LeftOut(asked, f"such images cost it {fewer} tokens, no fewer than its own: {own}", needless=True)
    return Row(size, Setting(way=SMALLER), asked)


@torch.no_grad()
def _try_rows(model: PreTrainedModel, processor: BaseImageProcessor, one: Dataset, plan: Plan) -> None:
    """Moves the rows that a model refuses from `plan.rows` to `plan.left_out`."""
    ((images, name_of),) = image_batches(one, 1)
    kept = []
    for size, rows in plan.stages():
        try:
            options = plan.values | size_options(processor, size, plan.crop_pct)
            ((_, inputs, _),) = model_inputs(model, processor, images, name_of, size, options)
        except UnreadableImageError:
            raise
        except ValueError as error:
            plan.left_out += [row.left_out(str(error)) for row in rows]
            continue
        for row in rows:
            try:
                model(**inputs, **row.setting.call(model.config))
            except ValueError as error:
                plan.left_out.append(row.left_out(str(error)))
            else:
                kept.append(row)
    plan.rows = kept
    _join_sizes(plan)


def _join_sizes(plan: Plan) -> None:
    """Makes one of all that is left out at an image size of which no row is left."""
    joined = {}
    for left in plan.left_out:
        size = left.asked.get("image_sizes")
        if size is None or plan.has("image_sizes", size):
            joined[id(left)] = left
        else:
            joined.setdefault(size, LeftOut({"image_sizes": size}, left.reason))
    plan.left_out = list(joined.values())


__all__ = ["LeftOut", "Plan", "Row", "left_out_text", "plan_rows"]
