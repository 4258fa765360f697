"""Checkpoints evaluated on a data set by its name: the function behind `polyscale evaluate`."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..layers.token_budget import choose_budgets, format_budget
from ..loading import LoadedModel, load_classifier
from ..utils.processors import output_size
from ..utils.validation import check_distinct, check_flag, check_function, check_list, check_path, shown
from .accuracy import BudgetResult, score_plan
from .contestants import (
    Contestant,
    check_options,
    control_budgets,
    fitting_checkpoints,
    left_out_texts,
    same_place,
    typed_budgets,
)
from .inputs import image_batches, model_inputs, size_options
from .options import EvaluationOptions
from .planning import Plan, plan_rows


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What one model reached on one data set, and all that a reader needs to judge it.

    Attributes:
        model (`str`): the checkpoint, as it was named.
        data (`str`): the data set, as it was named.
        split (`str`): of the data set.
        images (`int`): how many were scored.
        classes (`int`): of the data.
        device (`str`): that it ran on.
        dtype (`str`): that it ran in.
        versions (`dict[str, str]`): of Python and the libraries.
        results (`list[BudgetResult]`): one per image size and budget.
        budget_texts (`list[str]`): the budget of each result, as a user types it; "" where it ran at its own.
        control (`bool`): whether it is there to be compared with.
        load (`Callable` or `None`): gives the model, for what is measured afterwards. One model at a time is in
            memory: let it go before the next one is loaded.
        sample (`Callable` or `None`): gives so many images of the data at an image size, (images, channels, height,
            width), where what a model does depends on what images show; `None` where it does not.
    """

    model: str
    data: str
    split: str
    images: int
    classes: int
    device: str
    dtype: str
    versions: dict[str, str]
    results: list[BudgetResult]
    budget_texts: list[str]
    control: bool = False
    load: Callable[[], PreTrainedModel] | None = field(default=None, repr=False, compare=False)
    sample: Callable[[tuple[int, int], int], torch.Tensor] | None = field(default=None, repr=False, compare=False)


class _OneModel:
    """Loads models. The one that was asked for last stays in memory, and no other."""

    def __init__(self, load: Callable[[str | os.PathLike], LoadedModel]):
        self._load = load
        self._source: str | os.PathLike | None = None
        self._loaded: LoadedModel | None = None

    def __call__(self, source: str | os.PathLike) -> LoadedModel:
        if self._loaded is None or source != self._source:
            self._loaded = None  # before the next one comes
            self._source, self._loaded = source, self._load(source)
        return self._loaded

    def model(self, source: str | os.PathLike) -> PreTrainedModel:
        return self(source).model


@dataclass
class _Comparison:
    """Models on one data set: each is planned, then scored.

    Attributes:
        rows (`datasets.Dataset`): what is scored.
        facts (`dict`): fields of `Evaluation` that all models share.
        one_model (`_OneModel`): loads them.
        models (`list`): those that are no controls.
        several (`bool`): whether there is more than one, or the command chose them.
        words (`dict`): the budgets that were typed, as in `choose_budgets`.
        options (`EvaluationOptions`): what all models are asked for.
        plans, contestants: of the models so far, by their names.
    """

    rows: Dataset
    facts: dict[str, Any]
    one_model: _OneModel
    models: list[str | os.PathLike]
    several: bool
    words: dict[str, list[str] | None]
    options: EvaluationOptions
    plans: dict[str | os.PathLike, Plan] = field(default_factory=dict)
    contestants: dict[str | os.PathLike, Contestant] = field(default_factory=dict)

    def plan(self, source: str | os.PathLike) -> None:
        """Finds out which rows a model can have; one alone must have all that were asked for.

        Raises:
            ValueError: as `plan_rows`.
        """
        model, processor = self.one_model(source)
        self.contestants[source] = contestant = Contestant(model.config, output_size(processor))
        if self.several:
            budgets, left_out = typed_budgets(model.config, self.words)
        else:
            budgets, left_out = choose_budgets(model.config, self.words), []
        typed = bool(budgets)
        if budgets is None and source not in self.models:
            budgets = control_budgets(contestant, [self.contestants[other] for other in self.models])
        plan = plan_rows(model, processor, self.rows, budgets, self.options, typed=typed)
        plan.left_out[:0] = left_out
        self.plans[source] = plan
        if not self.several:
            plan.check(model.config)

    def check(self, options: Sequence[str], note: Callable[[str], object]) -> None:
        """Refuses options of which no model has a row, and tells of each row that is left out."""
        check_options(self.plans, self.contestants, options)
        for source, plan in self.plans.items():
            about = f"`model` {os.fspath(source)}: " if self.several else ""
            for text in left_out_texts(plan, self.contestants[source].config):
                note(f"{about}left out {text}")

    def sample(self, source: str | os.PathLike, image_size: tuple[int, int], count: int) -> torch.Tensor:
        """Images from all over the data as a model sees them at a size; the same ones again where there are fewer."""
        model, processor = self.one_model(source)
        plan = self.plans[source]
        places = np.linspace(0, len(self.rows) - 1, count).round().astype(int)
        ((images, name_of),) = image_batches(self.rows.select(places), count)
        size = image_size if any(row.image_size == image_size for row in plan.rows) else None  # its processor's own
        options = plan.values | size_options(processor, size, plan.crop_pct)
        ((_, inputs, _),) = model_inputs(model, processor, images, name_of, size, options)
        return inputs["pixel_values"]

    def evaluation(self, source: str | os.PathLike) -> Evaluation:
        """Scores a model at the rows of its plan."""
        model, processor = self.one_model(source)
        results = score_plan(model, processor, self.rows, self.plans[source], self.options)
        return Evaluation(
            model=os.fspath(source),
            device=str(model.device),
            dtype=str(model.dtype).rpartition(".")[2],
            versions=library_versions(),
            results=results,
            budget_texts=[format_budget(result.budget, model.config) for result in results],
            control=source not in self.models,
            load=partial(self.one_model.model, source),
            sample=partial(self.sample, source) if getattr(model.config, "tokens_vary", False) else None,
            **self.facts,
        )


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that figures depend on."""
    # The code that runs, not what an installer once noted of an editable checkout.
    versions = {"python": platform.python_version(), "polyscale": __version__}
    for name in ("torch", "torchvision", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _checked_words(words: object) -> dict[str, list[str] | None]:
    """`budget_words`, of which text alone would be read letter by letter."""
    if words is None:
        return {}
    if not isinstance(words, Mapping):
        raise ValueError(f"`budget_words` must be a dict from options to lists of texts, got {shown(words)}.")
    return {
        name: None if texts is None else check_list(f"budget_words[{name!r}]", texts, str, "texts such as '8'")
        for name, texts in words.items()
    }


def evaluate_checkpoints(
    models: Sequence[str | os.PathLike],
    data: str | os.PathLike,
    *,
    bundled: bool = False,
    controls: Sequence[str | os.PathLike] = (),
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    budget_words: Mapping[str, Sequence[str] | None] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    config_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    note: Callable[[str], object] | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Scores checkpoints on one split of a data set, at each budget.

    What a model cannot take is found out before any is scored: all are loaded and tried, then scored. One at a time is
    in memory, so that several are loaded twice. Of several models, rows that one cannot have are left out, and
    `note` says which and why; of one model, a value that it cannot take is an error.

    Args:
        models (`Sequence[str or os.PathLike]`): what `load_classifier(..., convert=True)` takes, each once.
        data (`str` or `os.PathLike`): what `load_image_dataset` takes.
        bundled (`bool`, *optional*, defaults to `False`): whether the checkpoints that ship and know all classes of
            the data are scored too; `models` may then be empty.
        controls (`Sequence[str or os.PathLike]`, *optional*): models to compare with, such as a plain ViT. Where no
            budgets are typed, one is scored at those of the models whose budget is of the same kind, too.
        split (`str`, *optional*): validation or test when `None`; where there is neither, the first.
        limit (`int`, *optional*): a sample of so many images, drawn over the whole split.
        seed (`int`, *optional*, defaults to 0): of that sample.
        budget_words (`Mapping`, *optional*): as in `choose_budgets`.
        device, dtype, trust_remote_code: as in `load_classifier`.
        config_options (`Mapping`, *optional*): config fields to set.
        note (`Callable[[str], object]`, *optional*): called with a sentence about each row that is left out; a
            warning of the log when `None`.
        progress, options: as in `evaluate_budgets`.

    Returns:
        `list[Evaluation]`: one per model that has rows: those given, those that ship, the controls.

    Raises:
        ValueError: as `load_classifier`, `load_image_dataset` and `evaluate_budgets`; for models that are no list, or
            one that comes twice; where `bundled`, budgets, `image_sizes`, `merge_to` or `shrink_to` fit no model.
        OSError: if there is no such checkpoint.
    """
    from ..training.data import evaluation_split, load_image_dataset, sample_rows

    asked = EvaluationOptions(progress=progress, **options)
    check_flag("bundled", bundled)
    check_function("note", note)
    models = _checked_paths("models", models, may_be_empty=bundled)
    controls = _checked_paths("controls", controls, may_be_empty=True)
    words = _checked_words(budget_words)
    check_distinct("models", [*models, *controls], map(same_place, [*models, *controls]))
    splits = load_image_dataset(data)
    name = evaluation_split(splits, split) or next(iter(splits))
    rows = sample_rows(splits[name], limit, seed)
    if bundled:
        given = set(map(same_place, [*models, *controls]))
        fitting = fitting_checkpoints(splits[name], asked.label_map)  # a sample may lack the last class
        models += [checkpoint for checkpoint in fitting if same_place(checkpoint) not in given]
    sources = [*models, *controls]
    several = len(sources) > 1 or bundled
    load = partial(load_classifier, device=device, dtype=dtype, convert=True, trust_remote_code=trust_remote_code)
    comparison = _Comparison(
        rows=rows,
        facts={"data": os.fspath(data), "split": name, "images": len(rows), "classes": _count_classes(splits[name])},
        one_model=_OneModel(partial(load, **(config_options or {}))),
        models=models,
        several=several,
        words=words,
        options=asked,
    )
    for source in sources:
        with _about(source, several):
            comparison.plan(source)
    comparison.check([*(["budgets"] if any(words.values()) else []), *asked.asking()], note or logger.warning)
    return [comparison.evaluation(source) for source in sources if comparison.plans[source].rows]


def _count_classes(split: Dataset) -> int:
    """Classes of a split, of which a sample may miss some."""
    return len({label for label in split.with_format(None)["label"] if label is not None and label >= 0})


@contextmanager
def _about(source: str | os.PathLike, several: bool) -> Iterator[None]:
    """Says in an error of one of several models which one it is."""
    try:
        yield
    except ValueError as error:
        if not several:
            raise
        raise ValueError(f"`model` {os.fspath(source)}: {error}") from error


def _checked_paths(name: str, paths: object, may_be_empty: bool) -> list[str | os.PathLike]:
    if may_be_empty and isinstance(paths, list | tuple) and not paths:
        return []
    return [check_path(name, path) for path in check_list(name, paths, what="checkpoints")]


__all__ = ["Evaluation", "evaluate_checkpoints", "library_versions"]
