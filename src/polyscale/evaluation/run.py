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
from transformers import PreTrainedModel

from .. import __version__
from ..layers.token_budget import choose_budgets, format_budget
from ..loading import load_classifier
from ..utils.validation import check_distinct, check_flag, check_list, check_path, shown
from .accuracy import BudgetResult, evaluate_budgets
from .contestants import control_budgets, fitting_checkpoints, same_place
from .settings import MERGING, SMALLER


# Arguments of `evaluate_budgets` that ask for other ways to spend fewer tokens; why no model may have rows for them.
_OTHER_WAYS = {
    "merge_to": (MERGING, "none of the models can merge tokens and has more of them at its own budget"),
    "shrink_to": (SMALLER, "none of the models has fewer tokens in such images than in its own, at its own budget"),
}


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
        loaded (`PreTrainedModel` or `None`): the model, for what is measured afterwards.
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
    loaded: PreTrainedModel | None = field(default=None, repr=False, compare=False)


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
    **options: Any,
) -> list[Evaluation]:
    """Scores checkpoints on one split of a data set, at each budget. Each is loaded once, and kept.

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
        progress, options: as in `evaluate_budgets`.

    Returns:
        `list[Evaluation]`: one per model: those given, those that ship, the controls.

    Raises:
        ValueError: as `load_classifier`, `load_image_dataset` and `evaluate_budgets`; for models that are no list, or
            one that comes twice; where `bundled`, `merge_to` or `shrink_to` fits no model.
        OSError: if there is no such checkpoint.
    """
    from ..training.data import evaluation_split, load_image_dataset, sample_rows

    check_flag("bundled", bundled)
    models = _checked_paths("models", models, may_be_empty=bundled)
    controls = _checked_paths("controls", controls, may_be_empty=True)
    words = _checked_words(budget_words)
    check_distinct("models", [*models, *controls], map(same_place, [*models, *controls]))
    splits = load_image_dataset(data)
    name = evaluation_split(splits, split) or next(iter(splits))
    rows = sample_rows(splits[name], limit, seed)
    if bundled:
        given = set(map(same_place, [*models, *controls]))
        fitting = fitting_checkpoints(rows, options.get("label_map"))
        models += [checkpoint for checkpoint in fitting if same_place(checkpoint) not in given]
    sources = [*models, *controls]

    load = partial(load_classifier, device=device, dtype=dtype, convert=True, trust_remote_code=trust_remote_code)
    loaded = [load(source, **(config_options or {})) for source in sources]
    budgets = []
    for source, contestant in zip(sources, loaded, strict=True):
        with _about(source, len(sources) > 1):
            chosen = choose_budgets(contestant.model.config, words)
        if chosen is None and source in controls:
            chosen = control_budgets(contestant, loaded[: len(models)])
        budgets.append(chosen)

    # What a model cannot take is said before another one is scored: one image goes through all of them, that of the
    # highest label, which tells how many there are.
    labels = [-1 if label is None else label for label in rows.with_format(None)["label"]]
    ways = {option: options[option] for option in _OTHER_WAYS if options.get(option) is not None}
    if labels and (len(sources) > 1 or ways):
        one, tried = rows.select([int(np.argmax(labels))]), set()
        for source, contestant, chosen in zip(sources, loaded, budgets, strict=True):
            with _about(source, len(sources) > 1):
                tried |= {result.way for result in evaluate_budgets(*contestant, one, chosen, **options)}
        for argument, value in ways.items():
            way, reason = _OTHER_WAYS[argument]
            if way not in tried:
                raise ValueError(f"`{argument}` {list(value)}: {reason}.")
    evaluations = []
    for source, contestant, chosen in zip(sources, loaded, budgets, strict=True):
        model = contestant.model
        results = evaluate_budgets(*contestant, rows, chosen, progress=progress, **options)
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
                control=source in controls,
                loaded=model,
            )
        )
    return evaluations


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
