"""Accuracy and speed of a classifier across token budgets, on images in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..layers.token_budget import TokenBudgetMixin
from ..utils.timing import device_wait, timed
from .inputs import image_batches, model_inputs, size_options
from .metrics import top_k_shares, wilson_interval
from .options import EvaluationOptions
from .planning import Plan, plan_rows
from .settings import BUDGET, Setting


@dataclass(frozen=True)
class BudgetResult:
    """Accuracy and speed at one budget.

    Attributes:
        image_size (`(height, width)`): in pixels; `None` where it differs from image to image.
        budget: the value of the budget argument (a patch size, a number of tokens), `None` where there is none and
            where the model ran at its own.
        tokens (`int` or `float`): tokens per image, prefix tokens and padding not counted; the mean where they differ.
        top1 (`float`): share of images whose label has the highest score, in [0, 1].
        top5 (`float`): share of images whose label is among the five highest scores, in [0, 1].
        images_per_second (`float`): images per second through the model alone, reading and resizing not counted.
        images (`int`): how many were scored.
        top1_interval (`(low, high)`): Wilson's 95 % interval of `top1`.
        per_class (`dict[str, dict]` or `None`): for each class of the data its "images" and "top1", where asked for.
        way (`str`): what spends fewer tokens: "budget", or "token merging" or "smaller images" at the model's own.
        merge_to (`int` or `None`): tokens that were left by token merging.
    """

    image_size: tuple[int, int] | None
    budget: Any
    tokens: int | float
    top1: float
    top5: float
    images_per_second: float
    images: int
    top1_interval: tuple[float, float]
    per_class: dict[str, dict] | None = None
    way: str = BUDGET
    merge_to: int | None = None


@dataclass
class _Scores:
    """What is gathered at one setting, batch by batch."""

    setting: Setting
    logits: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    tokens_by_shape: dict[tuple, int] = field(default_factory=dict)


def evaluate_budgets(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset,
    budgets: Sequence | None = None,
    image_sizes: Sequence | None = None,
    *,
    merge_to: Sequence[int] | None = None,
    shrink_to: Sequence | None = None,
    crop_pct: float | None = None,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    interpolation: str | None = None,
    batch_size: int = 64,
    label_map: Mapping[str, str | int] | None = None,
    per_class: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[BudgetResult]:
    """Scores a classifier on a data set at each budget and image size. Each image is read once per image size.

    Args:
        model (`PreTrainedModel`): the classifier, on the device and in the dtype it is to run in.
        processor (`BaseImageProcessor`): its image processor.
        split (`datasets.Dataset`): rows with `image` and `label` (see `load_image_dataset`). Classes are matched with
            the model's by name (see `match_labels`).
        budgets (`Sequence`, *optional*): values of the model's budget argument (patch sizes of FlexiViT, token counts
            of Quadtree ViT, lists of scales of S2); when `None`, those it was trained with or a ladder of them, from
            few tokens to many.
        image_sizes (`Sequence`, *optional*): (height, width) or int, in pixels; the processor's own when `None`.
        merge_to (`Sequence[int]`, *optional*): besides, the model's own budget with tokens merged until so many are
            left; numbers that are no fewer than it has, and models that cannot merge, are left out.
        shrink_to (`Sequence`, *optional*): besides, the model's own budget at smaller image sizes; those that do not
            cost it fewer tokens are left out.
        crop_pct (`float`, *optional*): share of the resized image's side that the centre crop keeps; the processor's
            own when `None`.
        mean (`str` or `Sequence[float]`, *optional*): mean of each channel, or "imagenet", "inception" or "clip"; the
            processor's own when `None`.
        std (`str` or `Sequence[float]`, *optional*): standard deviation, likewise.
        interpolation (`str`, *optional*): "nearest", "bilinear", "bicubic" or "lanczos"; the processor's own when
            `None`.
        batch_size (`int`, *optional*, defaults to 64): images per forward pass.
        label_map (`Mapping[str, str or int]`, *optional*): the model's class for a class of the data.
        per_class (`bool`, *optional*, defaults to `False`): whether results hold the accuracy of each class.
        progress (`Callable`, *optional*): called with the images done and their number, over all image sizes.

    Returns:
        `list[BudgetResult]`: one per image size and budget, in the order given.

    Raises:
        ValueError: for a budget, size or number of tokens that model or processor cannot take (found out before
            anything is scored) or that comes twice, classes that are not the model's, an image that cannot be read,
            scores that are not finite, or an unknown choice.
    """
    options = EvaluationOptions(
        image_sizes=image_sizes,
        merge_to=merge_to,
        shrink_to=shrink_to,
        crop_pct=crop_pct,
        mean=mean,
        std=std,
        interpolation=interpolation,
        batch_size=batch_size,
        label_map=label_map,
        per_class=per_class,
        progress=progress,
    )
    plan = plan_rows(model, processor, split, budgets, options)
    plan.check(model.config)
    return score_plan(model, processor, split, plan, options)


@torch.no_grad()
def score_plan(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset,
    plan: Plan,
    options: EvaluationOptions,
) -> list[BudgetResult]:
    """Scores a classifier at the rows of the plan that was made for it and these rows of data."""
    stages, results, done = plan.stages(), [], 0
    for size, rows in stages:
        prepared = plan.values | size_options(processor, size, plan.crop_pct)
        scores = [_Scores(row.setting) for row in rows]
        seen_sizes = set()
        for images, name_of in image_batches(split, options.batch_size):
            inputs = model_inputs(model, processor, images, name_of, size, prepared)
            seen_sizes |= _score_batch(model, len(images), inputs, scores)
            done += len(images)
            if options.progress is not None:
                options.progress(done, len(stages) * len(split))
        made = next(iter(seen_sizes)) if len(seen_sizes) == 1 else None
        results += [_result(made, score, plan.labels, split if options.per_class else None) for score in scores]
    return results


def _score_batch(
    model: PreTrainedModel, count: int, inputs_by_size: Iterable[tuple], scores: Sequence[_Scores]
) -> set[tuple[int, int] | None]:
    """Adds what a model says of a batch of `count` images to `scores`, one for each setting; returns their sizes."""
    sizes = set()
    calls = [score.setting.call(model.config) for score in scores]
    logits = [np.empty((count, model.config.num_labels), dtype=np.float32) for _ in calls]
    counts = [[0] * count for _ in calls]
    for indices, inputs, size in inputs_by_size:
        sizes.add(size)
        for index, call in enumerate(calls):
            if not scores[index].logits and not scores[index].seconds:
                with scores[index].setting.named():  # one-time costs
                    model(**{name: tensor[:1] for name, tensor in inputs.items()}, **call)
            outputs, seconds = timed(lambda: model(**inputs, **call), device_wait(model.device))  # noqa: B023
            scores[index].seconds += seconds
            logits[index][indices] = outputs.logits.float().cpu().numpy()
            for place, count in zip(indices, _tokens(model, inputs, outputs, scores[index]), strict=True):
                counts[index][place] = count
    for score, batch, tokens in zip(scores, logits, counts, strict=True):
        if not np.isfinite(batch).all():
            raise ValueError("The model gives scores that are not finite (NaN or infinity): its weights are damaged.")
        score.logits.append(batch)
        score.tokens += tokens
    return sizes


def _tokens(model: PreTrainedModel, inputs: dict, outputs: Any, score: _Scores) -> list[int]:
    """Tokens of each image; those of the first batch of this shape again, where nothing else makes them differ."""
    if isinstance(model.config, TokenBudgetMixin):
        return score.setting.tokens(model, inputs, outputs)
    count, *shape = inputs["pixel_values"].shape
    if tuple(shape) not in score.tokens_by_shape:
        score.tokens_by_shape[tuple(shape)] = score.setting.tokens(model, inputs, outputs)[0]
    return [score.tokens_by_shape[tuple(shape)]] * count


def _result(
    image_size: tuple[int, int] | None, score: _Scores, labels: np.ndarray, split: Dataset | None
) -> BudgetResult:
    logits = np.concatenate(score.logits)
    accuracy = top_k_shares(logits, labels)
    mean = sum(score.tokens) / len(score.tokens)
    return BudgetResult(
        image_size=image_size,
        budget=score.setting.budget,
        tokens=int(mean) if mean == int(mean) else round(mean, 1),
        top1=accuracy["top1"],
        top5=accuracy["top5"],
        images_per_second=len(labels) / score.seconds,
        images=len(labels),
        top1_interval=wilson_interval(accuracy["top1"], len(labels)),
        per_class=None if split is None else _per_class(logits.argmax(axis=1) == labels, split),
        way=score.setting.way,
        merge_to=score.setting.merge_to,
    )


def _per_class(right: np.ndarray, split: Dataset) -> dict[str, dict]:
    labels = np.asarray(split.with_format(None)["label"])
    feature = split.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    return {
        names[label] if names is not None else str(label): {
            "images": int((labels == label).sum()),
            "top1": float(right[labels == label].mean()),
        }
        for label in np.unique(labels).tolist()
    }


__all__ = ["BudgetResult", "evaluate_budgets", "score_plan"]
