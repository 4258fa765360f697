"""Checkpoints evaluated on a data set by its name: the function behind `polyscale evaluate`."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .. import __version__
from ..layers.token_budget import choose_budgets, format_budget
from ..loading import load_classifier
from ..utils.validation import check_distinct, check_list, check_path, shown
from .accuracy import BudgetResult, evaluate_budgets


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
        budget_texts (`list[str]`): the budget of each result, as a user types it.
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


def _place(model: str) -> str:
    """The same for names of one checkpoint."""
    return os.path.realpath(model) if os.path.exists(model) else model


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
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    budget_words: Mapping[str, Sequence[str] | None] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    config_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Scores checkpoints on one split of a data set, at each budget.

    Args:
        models (`Sequence[str or os.PathLike]`): what `load_classifier(..., convert=True)` takes, each once.
        data (`str` or `os.PathLike`): what `load_image_dataset` takes.
        split (`str`, *optional*): validation or test when `None`; where there is neither, the first.
        limit (`int`, *optional*): a sample of so many images, drawn over the whole split.
        seed (`int`, *optional*, defaults to 0): of that sample.
        budget_words (`Mapping`, *optional*): as in `choose_budgets`.
        device, dtype, trust_remote_code: as in `load_classifier`.
        config_options (`Mapping`, *optional*): config fields to set.
        progress, options: as in `evaluate_budgets`.

    Returns:
        `list[Evaluation]`: one per model.

    Raises:
        ValueError: as `load_classifier`, `load_image_dataset` and `evaluate_budgets`; for models that are no list, or
            one that comes twice.
        OSError: if there is no such checkpoint.
    """
    from ..training.data import evaluation_split, load_image_dataset, sample_rows

    models = [check_path("models", model) for model in check_list("models", models, what="checkpoints")]
    check_distinct("models", models, map(_place, models))
    words = _checked_words(budget_words)
    splits = load_image_dataset(data)
    name = evaluation_split(splits, split) or next(iter(splits))
    rows = sample_rows(splits[name], limit, seed)

    def score(source: str, images: Dataset, progress: Callable | None) -> tuple[PreTrainedModel, list[BudgetResult]]:
        model, processor = load_classifier(
            source,
            device,
            dtype=dtype,
            convert=True,
            trust_remote_code=trust_remote_code,
            **(config_options or {}),
        )
        budgets = choose_budgets(model.config, words)
        return model, evaluate_budgets(model, processor, images, budgets, progress=progress, **options)

    # What one of several models cannot take is said before another one is scored: one image goes through all of them,
    # that of the highest label, which tells how many there are.
    labels = [-1 if label is None else label for label in rows.with_format(None)["label"]]
    for source in models if len(models) > 1 and labels else ():
        try:
            score(source, rows.select([int(np.argmax(labels))]), None)
        except ValueError as error:
            raise ValueError(f"`model` {os.fspath(source)}: {error}") from error
    evaluations = []
    for source in models:
        model, results = score(source, rows, progress)
        evaluations.append(
            Evaluation(
                model=os.fspath(source),
                data=os.fspath(data),
                split=name,
                images=len(rows),
                classes=len(set(rows.with_format(None)["label"])),
                device=str(model.device),
                dtype=str(model.dtype).rpartition(".")[2],
                versions=library_versions(),
                results=results,
                budget_texts=[format_budget(result.budget, model.config) for result in results],
            )
        )
    return evaluations


__all__ = ["Evaluation", "evaluate_checkpoints", "library_versions"]
