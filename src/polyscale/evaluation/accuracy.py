"""Accuracy and speed of a classifier across token budgets, on images in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..layers.budget_choice import checked_budgets
from ..layers.token_budget import TokenBudgetMixin
from ..utils.images import read_image
from ..utils.processors import RESAMPLINGS, options_for_size, output_size, process_images
from ..utils.timing import device_wait, timed
from ..utils.validation import (
    check_choice,
    check_distinct,
    check_flag,
    check_function,
    check_int,
    check_list,
    check_number,
    to_pair,
)
from .labels import match_labels
from .metrics import TopKAccuracy, wilson_interval
from .settings import BUDGET, SMALLER, Setting, costs_less, default_settings, merged_settings


# (mean, standard deviation) of the channels that published models were trained with
IMAGE_STATISTICS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


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


def value_options(
    mean: str | Sequence[float] | None,
    std: str | Sequence[float] | None,
    interpolation: str | None,
    num_channels: int = 3,
) -> dict[str, Any]:
    """Arguments of an image processor's call for other statistics or another interpolation; none for `None`.

    Raises:
        ValueError: for an unknown name, or numbers that are no statistics of so many channels.
    """
    options: dict[str, Any] = {}
    for name, value, index in (("mean", mean, 0), ("std", std, 1)):
        if isinstance(value, str):
            check_choice(name, value, tuple(IMAGE_STATISTICS))
            value = IMAGE_STATISTICS[value][index]
        if value is not None:
            numbers = check_list(name, value, int | float, "numbers, one for each channel")
            values = [float(number) for number in numbers]
            if not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise ValueError(f"`{name}` must be finite{' and above 0' if name == 'std' else ''}, got {values}.")
            if len(values) != num_channels:
                raise ValueError(f"`{name}` must hold {num_channels} numbers, one for each channel, got {values}.")
            options[f"image_{name}"] = values
    if interpolation is not None:
        check_choice("interpolation", interpolation, tuple(RESAMPLINGS))
        options["resample"] = RESAMPLINGS[interpolation]
    return options


def class_indices(split: Dataset, id2label: Mapping[int, str], label_map: Mapping | None = None) -> np.ndarray:
    """For each row of a split, the index of its class in a model (`match_labels`).

    Raises:
        ValueError: for labels that are missing or unknown, or classes that the model does not have.
    """
    labels, names, count = known_labels(split)
    return np.asarray(match_labels(names, id2label, label_map, num_classes=count))[labels]


def known_labels(split: Dataset) -> tuple[np.ndarray, list[str] | None, int]:
    """The label of each row, the names of the classes where the data has any, and how many classes there are.

    Raises:
        ValueError: for no rows, or labels that are missing or unknown.
    """
    if len(split) == 0:
        raise ValueError("The data set is empty: there is nothing to evaluate.")
    feature = split.features["label"]
    labels = list(split.with_format(None)["label"])
    unknown = sum(label is None or label < 0 for label in labels)
    if unknown:
        raise ValueError(
            f"{unknown} of the data's {len(split)} labels are missing or -1: such images cannot be scored."
        )
    labels = np.asarray(labels)
    names = feature.names if isinstance(feature, ClassLabel) else None
    return labels, names, len(names) if names is not None else int(labels.max()) + 1


def _batches(split: Dataset, batch_size: int) -> Iterator[list]:
    opens_itself = split.format["type"] == "custom"  # as `load_image_dataset` gives it
    files = split if opens_itself else split.cast_column("image", Image(decode=False))
    for start in range(0, len(files), batch_size):
        cells = files[start : start + batch_size]["image"]
        yield [
            cell if isinstance(cell, np.ndarray) else read_image(cell, _row_name(cell, start + index))
            for index, cell in enumerate(cells)
        ]


def _stored_name(split: Dataset, start: int, index: int) -> str:
    return _row_name(split.with_format(None)[start + index]["image"], start + index)


def _row_name(value: Any, row: int) -> str:
    path = value.get("path") if isinstance(value, Mapping) else None
    return path or f"image {row} of the data"


@torch.no_grad()
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
        ValueError: for a budget or size that model or processor cannot take or that comes twice, classes that are not
            the model's, an image that cannot be read, scores that are not finite, or an unknown choice.
    """
    check_int("batch_size", batch_size, minimum=1)
    check_flag("per_class", per_class)
    check_function("progress", progress)
    if crop_pct is not None:
        check_number("crop_pct", crop_pct)
    chosen = None if budgets is None else [Setting(budget) for budget in checked_budgets(budgets, model.config)]
    stages = _stages(model.config, output_size(processor), chosen, image_sizes, merge_to, shrink_to)
    labels = class_indices(split, model.config.id2label, label_map)
    values = value_options(mean, std, interpolation, getattr(model.config, "num_channels", 3))

    results = []
    for number, (size, settings) in enumerate(stages):
        # a crop other than the processor's own still ends at the size that it makes
        target = size or (output_size(processor) if crop_pct is not None else None)
        if target is None and crop_pct is not None:
            raise ValueError("`crop_pct` needs `image_sizes`: the image processor has no size of its own.")
        options = values | ({} if target is None else options_for_size(processor, target, crop_pct))
        scores = [_Scores(setting) for setting in settings]
        seen_sizes, done = set(), number * len(split)
        for images in _batches(split, batch_size):
            name_of = partial(_stored_name, split, done - number * len(split))
            seen_sizes |= _score_batch(model, processor, images, name_of, options, scores)
            if size is not None and seen_sizes != {size}:
                raise ValueError(
                    f"`image_sizes` {size} does not take effect: the image processor makes images of {seen_sizes}."
                )
            done += len(images)
            if progress is not None:
                progress(done, len(stages) * len(split))
        made = next(iter(seen_sizes)) if len(seen_sizes) == 1 else None
        results += [_result(made, score, labels, split if per_class else None) for score in scores]
    return results


def _stages(
    config: PreTrainedConfig,
    own_size: tuple[int, int] | None,
    budgets: list[Setting] | None,
    image_sizes: Sequence | None,
    merge_to: Sequence[int] | None,
    shrink_to: Sequence | None,
) -> list[tuple[tuple[int, int] | None, list[Setting]]]:
    """What is scored at each image size, `None` standing for the processor's own."""
    sizes: list[tuple[int, int] | None] = [None]
    if image_sizes is not None:
        sizes = _checked_sizes("image_sizes", image_sizes)
    counts = []
    if merge_to is not None:
        counts = [check_int("merge_to", count, minimum=1) for count in check_list("merge_to", merge_to)]
        check_distinct("merge_to", counts)
    stages = []
    for size in sizes:
        settings = default_settings(config, size or own_size) if budgets is None else budgets
        stages.append((size, [*settings, *merged_settings(config, size or own_size, counts)]))
    smaller = [] if shrink_to is None else _checked_sizes("shrink_to", shrink_to)
    return stages + [(size, [Setting(way=SMALLER)]) for size in smaller if costs_less(config, size, own_size)]


def _checked_sizes(name: str, sizes: Sequence) -> list[tuple[int, int]]:
    given = check_list(name, sizes, what="sizes in pixels")
    pairs = [to_pair(size, name) for size in given]
    check_distinct(name, given, pairs)
    return pairs


def _score_batch(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence,
    name_of: Callable[[int], str],
    options: Mapping[str, Any],
    scores: Sequence[_Scores],
) -> set[tuple[int, int]]:
    """Adds what a model says of a batch to `scores`, one for each setting; returns the sizes of its images."""
    sizes, channels = set(), getattr(model.config, "num_channels", 3)
    calls = [score.setting.call(model.config) for score in scores]
    logits = [np.empty((len(images), model.config.num_labels), dtype=np.float32) for _ in calls]
    counts = [[0] * len(images) for _ in calls]
    for indices, inputs in process_images(processor, images, channels, name_of, **options):
        inputs = {
            name: tensor.to(device=model.device, dtype=model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        shape = tuple(inputs["pixel_values"].shape)
        sizes.add(shape[-2:] if len(shape) == 4 else None)  # tiles are cut by the shape of each image
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
    """Tokens of each image; those of the first batch again, where they cannot differ but by the image's size."""
    if score.tokens and not isinstance(model.config, TokenBudgetMixin):
        return [score.tokens[0]] * len(inputs["pixel_values"])
    return score.setting.tokens(model, inputs, outputs)


def _result(
    image_size: tuple[int, int] | None, score: _Scores, labels: np.ndarray, split: Dataset | None
) -> BudgetResult:
    logits = np.concatenate(score.logits)
    accuracy = TopKAccuracy().compute(predictions=logits, references=labels)
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


__all__ = ["IMAGE_STATISTICS", "BudgetResult", "class_indices", "evaluate_budgets", "known_labels", "value_options"]
