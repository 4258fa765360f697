"""A budget for each image: start small, spend more where the model is unsure.

A `BudgetPolicy` tries budgets from few tokens to many, and takes the first answer whose margin, the best score less
the next, is wide enough. `calibrate_policy` finds the margins on images without labels, so that the answers agree with
those of the full budget as often as wanted.
"""

import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ImageClassificationPipeline

from .checkpoints import DEFAULT_CHECKPOINT
from .classification import Classification, answer_batch, as_pipeline, check_files, classify_files
from .layers.budget_choice import checked_budgets
from .layers.token_budget import budget_argument_of, budget_ladder_of, plain_size
from .loading import LoadedModel
from .utils.identity import changes_of, processing_of, weights_digest
from .utils.outputs import write_text
from .utils.validation import check_int, check_path, shown


_MOST_TRIES = 3  # budgets that a policy runs on one image at most
_RISKS = 64  # how many risks calibration tries


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class BudgetPolicy:
    """Which budgets to try on an image, and how sure an answer must be to be taken.

    Args:
        budgets (`list`): values of the model's budget argument, from few tokens to many.
        margins (`list[float]`): for each budget but the last, how far the best score must be above the next for its
            answer to be taken; 0 takes each, above 1 none.
        budget_argument (`str`): of the models that it is for.
        wanted_agreement (`float`, *optional*): what it was calibrated for.
        agreement (`float`, *optional*): share of the calibration images with the label of the full budget.
        mean_tokens (`float`, *optional*): tokens per calibration image, those of all tries together.
        full_tokens (`float`, *optional*): tokens per calibration image of the full budget alone.
        images (`int`, *optional*): number of calibration images.
        model (`str`, *optional*): name of the model that it was calibrated on, the last part of its path.
        weights (`str`, *optional*): digest of that model's weights, by which it is known under another name.
        processing (`dict`, *optional*): how its images were prepared: size, crop, mean and the other fields of the
            image processor.

    Raises:
        ValueError: for no budgets, or margins that do not fit them.
    """

    budgets: list
    margins: list[float]
    budget_argument: str
    wanted_agreement: float | None = None
    agreement: float | None = None
    mean_tokens: float | None = None
    full_tokens: float | None = None
    images: int | None = None
    model: str | None = None
    weights: str | None = None
    processing: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.budgets, list) or not self.budgets:
            raise ValueError(f"`budgets` of a policy must be a list of at least one budget, got {self.budgets!r}.")
        is_list = isinstance(self.margins, list)
        if not is_list or not all(_is_number(value) and 0 <= value < math.inf for value in self.margins):
            raise ValueError(f"`margins` of a policy must be a list of numbers of at least 0, got {self.margins!r}.")
        if len(self.margins) != len(self.budgets) - 1:
            raise ValueError(
                f"`margins` of a policy must hold one number for each budget but the last: expected "
                f"{len(self.budgets) - 1}, got {len(self.margins)}."
            )
        if not isinstance(self.budget_argument, str):
            raise ValueError(f"`budget_argument` of a policy must be a name, got {self.budget_argument!r}.")
        for name in ("wanted_agreement", "agreement", "mean_tokens", "full_tokens", "images"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"`{name}` of a policy must be a number of at least 0, or None, got {value!r}.")
        for name, kind in (("model", str), ("weights", str), ("processing", dict)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"`{name}` of a policy must be a {kind.__name__}, or None, got {value!r}.")

    def unlike(self, classifier: ImageClassificationPipeline) -> list[str]:
        """What of a classifier is not as it was calibrated with, in sentences."""
        said = []
        name = _name_of(classifier)
        is_other = self.model and self.model != name
        if self.weights is not None:
            is_other = self.weights != weights_digest(classifier.model)
        if is_other:
            weights = " with other weights" if self.model == name else ""
            said.append(f"`policy` was calibrated on {self.model!r}, and this is {name!r}{weights}")
        if self.processing is not None:
            changes = changes_of(self.processing, processing_of(classifier.image_processor))
            if changes:
                said.append(f"`policy` was calibrated on images that were prepared otherwise: {'; '.join(changes)}")
        return said

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON, whole or not at all.

        Raises:
            ValueError: for a place where nothing can be written.
        """
        write_text(check_path("path", path), json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BudgetPolicy":
        """What `save` wrote.

        Raises:
            ValueError: for a file that holds no policy.
            OSError: for a file that cannot be read.
        """
        path = check_path("policy", path)
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise type(error)(f"`policy` {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`policy` {path} is not JSON: {error}.") from None
        needed, known = {"budgets", "margins", "budget_argument"}, {field.name for field in fields(cls)}
        if not isinstance(record, dict) or not needed <= record.keys() <= known:
            raise ValueError(
                f"`policy` {path} is no policy: expected an object with budgets, margins and budget_argument, as "
                "`polyscale calibrate` writes it."
            )
        try:
            return cls(**record)
        except ValueError as error:
            raise ValueError(f"`policy` {path}: {str(error).replace('`', '')}") from error


@dataclass(frozen=True)
class _Trials:
    """What each calibration image gets at each budget, cheapest budget first: arrays (budgets, images)."""

    agrees: np.ndarray  # with the full budget
    margins: np.ndarray
    tokens: np.ndarray


def calibrate_policy(
    files: Iterable[str | os.PathLike],
    model: str | os.PathLike | LoadedModel | ImageClassificationPipeline = DEFAULT_CHECKPOINT,
    budgets: Sequence | None = None,
    *,
    agreement: float = 0.98,
    device: str | int | torch.device | None = None,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> BudgetPolicy:
    """The policy that spends fewest tokens on images like these, and agrees with the full budget as often as wanted.

    The images need no labels; some hundreds that the model was not trained on give margins that hold on others. All
    budgets run on all of them. An image that is tried at several budgets costs the tokens of all tries, so budgets
    that do not pay are left out; at most three are tried on an image.

    Args:
        files (`Iterable[str or os.PathLike]`): image files, and folders that are searched for them. What cannot be
            read is left out, and a file that is found twice counts once.
        model (`str`, `os.PathLike`, `LoadedModel` or `ImageClassificationPipeline`, *optional*, defaults to
            `polyscale.checkpoints.DEFAULT_CHECKPOINT`): as in `polyscale.classification.classify_images`.
        budgets (`Sequence`, *optional*): values of the model's budget argument; the one of most tokens is the full
            budget. From few to many as the model's family proposes when `None`.
        agreement (`float`, *optional*, defaults to 0.98): share of the images that must get the label of the full
            budget.
        device (`str`, `int` or `torch.device`, *optional*): as in `classify_images`.
        batch_size (`int`, *optional*, defaults to 1): images per call.
        image_size (`int` or `(height, width)`, *optional*): as in `classify_images`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that a checkpoint brings.
        progress (`Callable`, *optional*): called with the images done and their number, after each batch.

    Returns:
        `BudgetPolicy`: with what it reached on these images.

    Raises:
        ValueError: for a model or a list of one budget alone, budgets of as many tokens or one that comes twice, no
            image that can be read, or an agreement out of (0, 1].

    Example:

    ```python
    >>> import polyscale

    >>> policy = polyscale.calibrate_policy(["calibration/"], "flexivit-cifar10", agreement=0.95)
    >>> policy.save("policy.json")
    >>> records, errors = polyscale.classify_with_policy(["photograph.jpg"], policy, "flexivit-cifar10")
    ```
    """
    check_int("batch_size", batch_size, minimum=1)
    if not _is_number(agreement) or not 0 < agreement <= 1:
        raise ValueError(f"`agreement` must be a share above 0 and at most 1, got {shown(agreement)}.")
    files = check_files(files)
    classifier = as_pipeline(model, device, image_size=image_size, trust_remote_code=trust_remote_code)
    config = classifier.model.config
    budgets = budget_ladder_of(config) if budgets is None else checked_budgets(budgets, config)
    budgets = [plain_size(budget) if isinstance(budget, tuple) else budget for budget in budgets]
    if len(budgets) < 2:
        raise ValueError(
            f"`budgets`: a policy chooses between budgets, and there is one alone ({budgets}) of this model of type "
            f"{config.model_type!r}. Give at least two, or another model."
        )

    def ask(inputs: dict[str, torch.Tensor]) -> list[list[dict]]:
        by_budget = []
        for budget in budgets:
            margins: list[float] = []
            records = answer_batch(classifier, inputs, budget, margins=margins)
            by_budget.append([{**record, "margin": value} for record, value in zip(records, margins, strict=True)])
        return [list(records) for records in zip(*by_budget, strict=True)]

    records, errors = classify_files(files, classifier, budgets, ask, batch_size, progress)
    if not records:
        reason = f" The first error: {errors[0]['error']}" if errors else ""
        raise ValueError(f"`files` holds no image to calibrate on.{reason}")
    table = [records[start : start + len(budgets)] for start in range(0, len(records), len(budgets))]
    tokens = np.array([[record["tokens"] for record in row] for row in table], dtype=float).T
    costs = tokens.mean(axis=1)
    if costs.min() == costs.max():
        raise ValueError(f"`budgets` {budgets} all cost {costs[0]:g} tokens per image: there is nothing to save.")
    order = np.argsort(costs, kind="stable")
    labels = np.array([[record["label"] for record in row] for row in table]).T[order]
    margins = np.array([[record["margin"] for record in row] for row in table]).T[order]
    trials = _Trials(labels == labels[-1], margins, tokens[order])
    tried, limits = _cheapest(trials, agreement)
    reached, spent = _outcome(trials, tried, limits)
    return BudgetPolicy(
        budgets=[budgets[order[place]] for place in tried],
        margins=limits,
        budget_argument=budget_argument_of(config),
        wanted_agreement=float(agreement),
        agreement=reached,
        mean_tokens=spent,
        full_tokens=float(trials.tokens[-1].mean()),
        images=len(table),
        model=_name_of(classifier) or None,
        weights=weights_digest(classifier.model),
        processing=processing_of(classifier.image_processor),
    )


def _cheapest(trials: _Trials, agreement: float) -> tuple[list[int], list[float]]:
    """The places of the budgets to try, and the margins of all but the last, that cost least.

    Of each choice of budgets, each takes as many answers as a risk allows: the share of wrong ones among them. The
    risk is that of the cheapest policy that still agrees often enough.
    """
    last = len(trials.tokens) - 1
    best: tuple[float, list[int], list[float]] = (float(trials.tokens[-1].mean()), [last], [])
    for count in range(1, _MOST_TRIES):
        for chosen in itertools.combinations(range(last), count):
            tried = [*chosen, last]
            for risk in np.linspace(0, 1, _RISKS) ** 2:
                limits = _limits(trials, chosen, float(risk))
                reached, spent = _outcome(trials, tried, limits)
                if reached >= agreement and spent < best[0]:
                    best = (spent, tried, limits)
    return best[1], best[2]


def _limits(trials: _Trials, chosen: Sequence[int], risk: float) -> list[float]:
    """For each budget the smallest margin above which at most a share `risk` of its answers are wrong."""
    left = np.ones(trials.margins.shape[1], dtype=bool)
    limits = []
    for place in chosen:
        margins, wrong = trials.margins[place][left], ~trials.agrees[place][left]
        order = np.argsort(-margins, kind="stable")
        allowed = np.cumsum(wrong[order]) <= risk * np.arange(1, len(order) + 1)
        ends = np.append(margins[order][1:] < margins[order][:-1], True)[: len(order)]  # equal margins go together
        fits = np.flatnonzero(allowed & ends)
        limit = float(margins[order][fits[-1]]) if len(fits) else math.nextafter(1.0, 2.0)
        limits.append(limit)
        left &= trials.margins[place] < limit
    return limits


def _outcome(trials: _Trials, tried: Sequence[int], limits: Sequence[float]) -> tuple[float, float]:
    """(agreement with the full budget, mean tokens of all tries) of a policy."""
    left = np.ones(trials.margins.shape[1], dtype=bool)
    agrees, spent = 0, 0.0
    for place, limit in zip(tried, [*limits, -math.inf], strict=True):
        spent += trials.tokens[place][left].sum()
        taken = left & (trials.margins[place] >= limit)
        agrees += int(trials.agrees[place][taken].sum())
        left &= ~taken
    count = trials.margins.shape[1]
    return agrees / count, float(spent / count)


def _name_of(classifier: ImageClassificationPipeline) -> str:
    return os.path.basename(classifier.model.name_or_path.rstrip("/"))


def classify_with_policy(
    files: Iterable[str | os.PathLike],
    policy: BudgetPolicy | str | os.PathLike,
    model: str | os.PathLike | LoadedModel | ImageClassificationPipeline = DEFAULT_CHECKPOINT,
    *,
    device: str | int | torch.device | None = None,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Classification:
    """Classifies image files, each at the first budget of a policy whose answer is sure enough.

    A warning says where the model, or how its images are prepared, is not as the policy was calibrated with.

    Args:
        files (`Iterable[str or os.PathLike]`): image files, and folders that are searched for them.
        policy (`BudgetPolicy`, `str` or `os.PathLike`): of `calibrate_policy`, or the file that it was saved to.
        model (`str`, `os.PathLike`, `LoadedModel` or `ImageClassificationPipeline`, *optional*, defaults to
            `polyscale.checkpoints.DEFAULT_CHECKPOINT`): as in `polyscale.classification.classify_images`.
        device (`str`, `int` or `torch.device`, *optional*): as there.
        batch_size (`int`, *optional*, defaults to 1): images per call; those that need more go on together.
        image_size (`int` or `(height, width)`, *optional*): as in `classify_images`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that a checkpoint brings.
        progress (`Callable`, *optional*): called with the images done and their number, after each batch.

    Returns:
        `Classification`: one record per image: "file", "budget" (whose answer it is), "tokens" and "milliseconds" (of
        all tries together), "label" and "score"; and the errors.

    Raises:
        ValueError: for a policy of another budget argument than the model's.
        OSError: if there is no such policy or checkpoint.

    Example:

    ```python
    >>> import polyscale

    >>> records, errors = polyscale.classify_with_policy(["photograph.jpg"], "policy.json", "flexivit-cifar10")
    >>> sum(record["tokens"] for record in records) / len(records)
    ```
    """
    check_int("batch_size", batch_size, minimum=1)
    if not isinstance(policy, BudgetPolicy):
        policy = BudgetPolicy.load(policy)
    classifier = as_pipeline(model, device, image_size=image_size, trust_remote_code=trust_remote_code)
    argument = budget_argument_of(classifier.model.config)
    if argument != policy.budget_argument:
        has = "has no budget to choose" if argument is None else f"has the budget `{argument}`"
        raise ValueError(
            f"`policy` is for models whose budget is `{policy.budget_argument}`; this one, of type "
            f"{classifier.model.config.model_type!r}, {has}."
        )
    checked_budgets(policy.budgets, classifier.model.config, "policy")
    for difference in policy.unlike(classifier):
        warnings.warn(f"{difference}. How often it agrees with the full budget is not known.", stacklevel=2)

    def ask(inputs: dict[str, torch.Tensor]) -> list[list[dict]]:
        return [[record] for record in _try_in_turn(classifier, inputs, policy)]

    return classify_files(files, classifier, policy.budgets, ask, batch_size, progress, argument="policy")


def _try_in_turn(
    classifier: ImageClassificationPipeline, inputs: dict[str, torch.Tensor], policy: BudgetPolicy
) -> list[dict]:
    """The record of each image of a batch."""
    count = len(inputs["pixel_values"])
    left = list(range(count))
    taken: list[dict[str, Any]] = [{} for _ in left]
    spent: list[tuple[int, float]] = [(0, 0.0) for _ in left]
    for budget, limit in zip(policy.budgets, [*policy.margins, -math.inf], strict=True):
        margins: list[float] = []
        rows = {name: tensor[left] for name, tensor in inputs.items()}
        records = answer_batch(classifier, rows, budget, margins=margins)
        for place, record in zip(left, records, strict=True):
            tokens, milliseconds = spent[place]
            spent[place] = (tokens + record["tokens"], milliseconds + record["milliseconds"])
            taken[place] = {**record, "tokens": spent[place][0], "milliseconds": round(spent[place][1], 3)}
        left = [place for place, margin in zip(left, margins, strict=True) if margin < limit]
        if not left:
            break
    return taken


__all__ = ["BudgetPolicy", "calibrate_policy", "classify_with_policy"]
