"""Accuracy and speed of a classifier across token budgets: the function behind `polyscale evaluate`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from rich.progress import Progress
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from ..checkpoints import resolve_checkpoint
from ..layers.token_budget import budget_kwargs, count_tokens
from ..models.auto import family_of
from ..models.flexivit import FlexiViTForImageClassification
from ..utils.validation import check_choice, to_pair
from .data_statistics import IMAGE_STATISTICS
from .metrics import TopKAccuracy


INTERPOLATIONS = {"nearest": PILImageResampling.NEAREST} | {
    name: PILImageResampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")
}


@dataclass(frozen=True)
class BudgetResult:
    """Accuracy and speed at one budget.

    Attributes:
        image_size: (height, width) in pixels.
        budget: the value of the budget argument (a patch size, a number of tokens), None where there is none.
        tokens: tokens a picture, prefix tokens not counted.
        top1: share of pictures whose label has the highest score, in [0, 1].
        top5: share of pictures whose label is among the five highest scores, in [0, 1].
        images_per_second: pictures a second through the model alone, reading and resizing not counted.
    """

    image_size: tuple[int, int]
    budget: int | tuple[int, int] | None
    tokens: int
    top1: float
    top5: float
    images_per_second: float


def load_classifier(source: str | Path, **config_options) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier of this library, or an ordinary ViT converted to FlexiViT in memory, with its image processor.

    Args:
        source: the name of a bundled checkpoint, a folder or hub name of any family, or whatever
            `convert_checkpoint(..., to="flexivit")` reads: a transformers or timm ViT, a big_vision `.npz`.
        config_options: config fields to set, e.g. `resize_method`.

    Raises:
        ValueError: if the source cannot be used, or has no classifier.
    """
    source = resolve_checkpoint(source)
    if _is_ours(source):
        model = AutoModelForImageClassification.from_pretrained(source, **config_options)
        return model.eval(), AutoImageProcessor.from_pretrained(source)

    from ..models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source

    loaded = load_flexivit_source(source, **config_options)
    model, processor = flexivit_from_source(loaded), loaded.image_processor
    if not isinstance(model, FlexiViTForImageClassification):
        raise ValueError(f"{source!s} has no classifier: accuracy needs an image-classification checkpoint.")
    if processor is None:
        raise ValueError(f"{source!s} brings no image processor: convert it first, and write one beside the result.")
    return model.eval(), processor


def _is_ours(source: str | Path) -> bool:
    if str(source).endswith(".npz"):
        return False
    try:
        return family_of(AutoConfig.from_pretrained(source)) is not None
    except (OSError, ValueError):  # no config, or one that transformers does not know: a timm name or folder
        return False


def _processor_options(
    processor: BaseImageProcessor,
    image_size: tuple[int, int],
    crop_pct: float | None,
    mean: str | Sequence[float] | None,
    std: str | Sequence[float] | None,
    interpolation: str | None,
) -> dict:
    """Arguments of the processor's call that bring pictures to `image_size`, keeping its own way of doing it."""
    height, width = image_size
    options: dict = {}
    if crop_pct is None and processor.do_center_crop:
        shortest, crop = processor.size.shortest_edge, processor.crop_size
        crop_pct = crop.height / shortest if shortest else None
    if crop_pct is None:
        options |= {"size": {"height": height, "width": width}, "do_center_crop": False}
    else:
        shortest_edge = int(max(height, width) / crop_pct)
        options |= {
            "size": {"shortest_edge": shortest_edge},
            "crop_size": {"height": height, "width": width},
            "do_center_crop": True,
        }
    for name, value, index in (("image_mean", mean, 0), ("image_std", std, 1)):
        if isinstance(value, str):
            check_choice(name.removeprefix("image_"), value, tuple(IMAGE_STATISTICS))
            value = IMAGE_STATISTICS[value][index]
        if value is not None:
            options[name] = list(value)
    if interpolation is not None:
        check_choice("interpolation", interpolation, tuple(INTERPOLATIONS))
        options["resample"] = INTERPOLATIONS[interpolation]
    return options


def _batches(split: Dataset, batch_size: int) -> Iterator[tuple[list[Image.Image], np.ndarray]]:
    for start in range(0, len(split), batch_size):
        rows = split[start : start + batch_size]
        yield [image.convert("RGB") for image in rows["image"]], np.asarray(rows["label"])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def evaluate_budgets(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    split: Dataset,
    budgets: Sequence | None = None,
    image_sizes: Sequence | None = None,
    *,
    crop_pct: float | None = None,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    interpolation: str | None = None,
    batch_size: int = 64,
) -> list[BudgetResult]:
    """Scores a classifier on a data set at each budget and image size. Each picture is read once an image size.

    Args:
        model: the classifier, on the device and in the dtype it is to run in.
        processor: its image processor.
        split: rows with `image` and `label` (see `load_image_dataset`).
        budgets: values of the model's budget argument (patch sizes of FlexiViT, token counts of Quadtree ViT); the
            model's default when None.
        image_sizes: (height, width) or int, in pixels; the processor's own when None.
        crop_pct: share of the resized picture's side that the centre crop keeps; the processor's own when None.
        mean: mean of each channel, or "imagenet", "inception" or "clip"; the processor's own when None.
        std: standard deviation, likewise.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos"; the processor's own when None.
        batch_size: pictures a forward pass.

    Returns:
        One result an image size and budget, in the order given.

    Raises:
        ValueError: for a budget that the model cannot take, labels that are not the model's, or an unknown choice.
    """
    num_classes = split.features["label"].num_classes
    if num_classes != model.config.num_labels:
        raise ValueError(f"The data set has {num_classes} classes and the model {model.config.num_labels}.")
    if len(split) == 0:
        raise ValueError("The data set is empty: there is nothing to evaluate.")
    calls = [{}] if budgets is None else [budget_kwargs(model.config, budget) for budget in budgets]
    sizes = [_default_image_size(processor)] if image_sizes is None else [to_pair(size) for size in image_sizes]

    results = []
    with Progress(transient=True) as progress:
        task = progress.add_task("Evaluating", total=len(sizes) * len(calls) * len(split))
        for size in sizes:
            options = _processor_options(processor, size, crop_pct, mean, std, interpolation)
            scores: list[list[np.ndarray]] = [[] for _ in calls]
            seconds = [0.0] * len(calls)
            labels, tokens = [], []
            for images, batch_labels in _batches(split, batch_size):
                inputs = processor(images, return_tensors="pt", **options)["pixel_values"]
                inputs = inputs.to(device=model.device, dtype=model.dtype)
                if not tokens:
                    size = tuple(inputs.shape[-2:])
                    warmed = [model.base_model(inputs[:1], **call) for call in calls]
                    tokens = [
                        count_tokens(outputs, model.config, size, **call)[0]
                        for outputs, call in zip(warmed, calls, strict=True)
                    ]
                labels.append(batch_labels)
                for index, call in enumerate(calls):
                    _synchronize(model.device)
                    start = time.perf_counter()
                    logits = model(inputs, **call).logits
                    _synchronize(model.device)
                    seconds[index] += time.perf_counter() - start
                    scores[index].append(logits.float().cpu().numpy())
                    progress.advance(task, len(images))
            for index, call in enumerate(calls):
                accuracy = TopKAccuracy().compute(
                    predictions=np.concatenate(scores[index]), references=np.concatenate(labels)
                )
                results.append(
                    BudgetResult(
                        image_size=size,
                        budget=next(iter(call.values()), None),
                        tokens=tokens[index],
                        top1=accuracy["top1"],
                        top5=accuracy["top5"],
                        images_per_second=len(split) / seconds[index],
                    )
                )
    return results


def _default_image_size(processor: BaseImageProcessor) -> tuple[int, int]:
    size = processor.crop_size if processor.do_center_crop else processor.size
    if size.height and size.width:
        return size.height, size.width
    raise ValueError("The image processor has no fixed (height, width): give `image_sizes`.")


__all__ = ["BudgetResult", "evaluate_budgets", "load_classifier"]
