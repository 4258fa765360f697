"""Classifies image files at several token budgets."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import ImageClassificationPipeline, pipeline
from transformers.utils import ModelOutput

from .checkpoints import DEFAULT_CHECKPOINT
from .layers.budget_choice import at_budget, checked_budgets
from .layers.token_budget import budget_kwargs, default_budgets_of, plain_size, tokens_per_image
from .loading import LoadedModel, load_classifier
from .utils.images import UnreadableImageError, find_images, open_pixels
from .utils.processors import process_images
from .utils.timing import device_wait, timed
from .utils.validation import check_function, check_int, check_path, shown


class Classification(NamedTuple):
    """What `classify_images` found.

    Attributes:
        records (`list[dict]`): one for each image and budget: "file", "budget" (a value of the model's budget
            argument, or `None`), "tokens", "label", "score" and "milliseconds".
        errors (`list[dict]`): one for each file that could not be read or classified: "file" and "error".
    """

    records: list[dict]
    errors: list[dict]


def as_pipeline(
    model: str | os.PathLike | LoadedModel | ImageClassificationPipeline,
    device: str | int | torch.device | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> ImageClassificationPipeline:
    """`pipeline("image-classification")` of a model that is loaded already, or of a checkpoint (`load_classifier`)."""
    if isinstance(model, torch.nn.Module):
        raise ValueError(
            "`model` must be a checkpoint's name, a pipeline, or `LoadedModel(model, image_processor)`: a model alone "
            f"does not say how images are prepared; got {shown(model)}."
        )
    if image_size is not None and isinstance(model, ImageClassificationPipeline | LoadedModel):
        raise ValueError(
            "`image_size` is for a model that is not loaded yet: give the checkpoint's name, or load it with "
            "`load_classifier(name, image_size=...)`."
        )
    if isinstance(model, ImageClassificationPipeline):
        return model
    if not isinstance(model, LoadedModel):
        model = load_classifier(model, device, image_size=image_size, trust_remote_code=trust_remote_code)
    network, processor = model
    return pipeline("image-classification", model=network, image_processor=processor, device=network.device)


def classify_images(
    files: Iterable[str | os.PathLike],
    model: str | os.PathLike | LoadedModel | ImageClassificationPipeline = DEFAULT_CHECKPOINT,
    budgets: Sequence | None = None,
    *,
    device: str | int | torch.device | None = None,
    repeats: int = 1,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Classification:
    """Classifies image files at several token budgets, with the same answers as transformers' pipeline.

    A file that cannot be read is reported and the others go on. "milliseconds" is the time of the model alone for one
    image (reading and resizing not counted), the median of `repeats` calls, in a batch its share of the call's time;
    before the first image one call per budget is made that is not counted, so that one-time costs do not show.

    Args:
        files (`Iterable[str or os.PathLike]`): image files, and folders that are searched for them. A file that is
            found twice counts once.
        model (`str`, `os.PathLike`, `LoadedModel` or `ImageClassificationPipeline`, *optional*, defaults to
            `polyscale.checkpoints.DEFAULT_CHECKPOINT`): name of a bundled checkpoint, local folder, name on the hub,
            or a loaded one.
        budgets (`Sequence`, *optional*): values of the model's budget argument, e.g. patch sizes of a FlexiViT, token
            counts of a Quadtree ViT, lists of scales of S2; those of its config when `None`. A model without such an
            argument is run once, and takes none.
        device (`str`, `int` or `torch.device`, *optional*): where a model that is not loaded yet runs; the machine's
            accelerator, else the CPU, when `None`.
        repeats (`int`, *optional*, defaults to 1): calls whose median is reported.
        batch_size (`int`, *optional*, defaults to 1): images per call; those of other sizes make calls of their own.
        image_size (`int` or `(height, width)`, *optional*): in pixels, that a model not loaded yet sees images
            at; its own when `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that a checkpoint brings.
        progress (`Callable`, *optional*): called with the images done and their number, after each batch.

    Raises:
        ValueError: for a budget that the first image or the model does not allow or that comes twice, `repeats` or
            `batch_size` below 1, or a checkpoint that is no trained classifier.
        OSError: if there is no such checkpoint.

    Example:

    ```python
    >>> from polyscale.assets import sample_photographs
    >>> from polyscale.classification import classify_images

    >>> records, errors = classify_images(sample_photographs(), "flexivit-cifar10", budgets=[4, 8])
    >>> records[0]["label"], records[0]["tokens"]
    ```
    """
    check_int("repeats", repeats, minimum=1)
    files = check_files(files)
    classifier = as_pipeline(model, device, image_size=image_size, trust_remote_code=trust_remote_code)
    config = classifier.model.config
    budgets = default_budgets_of(config) if budgets is None else checked_budgets(budgets, config)

    def ask(inputs: dict[str, torch.Tensor]) -> list[list[dict]]:
        by_budget = [answer_batch(classifier, inputs, budget, repeats) for budget in budgets]
        return [list(records) for records in zip(*by_budget, strict=True)]

    return classify_files(files, classifier, budgets, ask, batch_size, progress)


def check_files(files: object) -> list[str]:
    """Image files and folders, as they are given to a function that reads many.

    Raises:
        ValueError: for no list, or what is no path in it.
    """
    if isinstance(files, str | bytes | os.PathLike) or not isinstance(files, Iterable):
        raise ValueError(f"`files` must be a list of image files and folders, got {shown(files)}.")
    return [check_path("files", file) for file in files]


def classify_files(
    files: Iterable[str | os.PathLike],
    classifier: ImageClassificationPipeline,
    budgets: Sequence,
    ask: Callable[[dict[str, torch.Tensor]], list[list[dict]]],
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
    argument: str = "budgets",
) -> Classification:
    """Reads and processes image files, and gathers what is said of each.

    Args:
        files (`Iterable[str or os.PathLike]`): image files, and folders that are searched for them.
        classifier (`ImageClassificationPipeline`): see `as_pipeline`.
        budgets (`Sequence`): called once each on the first image, so that illegal ones are refused before any work,
            and one-time costs are paid.
        ask (`Callable`): what the processor made of a batch, on the model's device -> the records of each image,
            without "file".
        batch_size (`int`, *optional*, defaults to 1): images per batch.
        progress (`Callable`, *optional*): called with the images done and their number, after each batch.
        argument (`str`, *optional*, defaults to `"budgets"`): what gave the budgets, for errors.

    Raises:
        ValueError: for files that are no list, or no paths, a `batch_size` below 1, and budgets that the first image
            does not allow.
    """
    files = check_files(files)
    check_int("batch_size", batch_size, minimum=1)
    check_function("progress", progress)
    result = Classification([], [])
    paths, warm = _find(files, result.errors), False
    for done in range(0, len(paths), batch_size):
        images = list(_open(paths[done : done + batch_size], result.errors))
        if images and not warm:
            warm = _try_budgets(classifier, images[0][1], budgets, argument)
        for records, error in _classify_batch(classifier, images, ask):
            result.records.extend(records)
            result.errors.extend([error] if error else [])
        if progress is not None:
            progress(min(done + batch_size, len(paths)), len(paths))
    return result


def _find(paths: Iterable[str | os.PathLike], errors: list[dict]) -> list[Path]:
    """The files of all paths, each once: a folder may be named beside a file in it."""
    files: dict[str, Path] = {}
    for path in paths:
        try:
            for file in find_images(path):
                files.setdefault(os.path.abspath(file), file)
        except UnreadableImageError as error:
            errors.append({"file": str(path), "error": error.reason})
    return list(files.values())


def _open(files: Sequence[Path], errors: list[dict]) -> Iterator[tuple[Path, Image.Image | np.ndarray]]:
    """Each readable image; what cannot be read goes to `errors`."""
    for file in files:
        try:
            yield file, open_pixels(file)
        except UnreadableImageError as error:
            errors.append({"file": str(file), "error": error.reason})


@torch.no_grad()
def _try_budgets(
    classifier: ImageClassificationPipeline, image: Image.Image | np.ndarray, budgets: Sequence, argument: str
) -> bool:
    """One call per budget; `False` for an image that is nothing for the model."""
    try:
        _, inputs = next(process_images(classifier.image_processor, [image], _channels(classifier), str))
    except UnreadableImageError:
        return False
    inputs = _on_device(inputs, classifier.model)
    for budget in budgets:
        with at_budget(budget, argument):
            classifier.model(**inputs, **budget_kwargs(classifier.model.config, budget))
    return True


def _channels(classifier: ImageClassificationPipeline) -> int:
    return getattr(classifier.model.config, "num_channels", 3)


def _on_device(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(device=model.device, dtype=model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _classify_batch(
    classifier: ImageClassificationPipeline,
    images: Sequence[tuple[Path, Image.Image | np.ndarray]],
    ask: Callable[[dict[str, torch.Tensor]], list[list[dict]]],
) -> Iterator[tuple[list[dict], dict | None]]:
    """For each image its records, and an error where there is one."""
    found: dict[int, list[dict]] = {index: [] for index in range(len(images))}
    errors: dict[int, dict] = {}
    try:
        opened = [image for _, image in images]
        groups = list(process_images(classifier.image_processor, opened, _channels(classifier))) if images else []
    except ValueError as error:  # of one of them: each by itself
        if len(images) == 1:
            yield [], {"file": str(images[0][0]), "error": str(error)}
        else:
            for image in images:
                yield from _classify_batch(classifier, [image], ask)
        return
    for indices, inputs in groups:
        inputs = _on_device(inputs, classifier.model)
        try:
            answers = ask(inputs)
        except ValueError as error:  # a budget that images of this size do not allow
            errors |= {index: {"file": str(images[index][0]), "error": str(error)} for index in indices}
            continue
        for index, records in zip(indices, answers, strict=True):
            found[index] = [{"file": str(images[index][0]), **record} for record in records]
    for index, records in found.items():
        yield ([] if index in errors else records), errors.get(index)


@torch.no_grad()
def answer_batch(
    classifier: ImageClassificationPipeline,
    inputs: dict[str, torch.Tensor],
    budget: Any,
    repeats: int = 1,
    margins: list[float] | None = None,
) -> list[dict]:
    """What a model says of each image of a batch at a budget: a record without "file".

    Args:
        classifier (`ImageClassificationPipeline`): see `as_pipeline`.
        inputs (`dict[str, torch.Tensor]`): what its processor made of the images, on the model's device.
        budget: a value of the model's budget argument, or `None`.
        repeats (`int`, *optional*, defaults to 1): calls whose median time is reported.
        margins (`list[float]`, *optional*): gets how far the best score of each image is above the next.

    Raises:
        ValueError: for a budget that images of this size do not allow, or scores that are not finite.
    """
    model = classifier.model
    chosen = budget_kwargs(model.config, budget)
    count = len(inputs["pixel_values"])
    seconds = []
    for _ in range(repeats):
        outputs, duration = timed(lambda: model(**inputs, **chosen), device_wait(model.device))
        seconds.append(duration)
    logits = outputs.logits.float().cpu()
    if not logits.isfinite().all():
        raise ValueError("the model gives scores that are not finite (NaN or infinity): its weights are damaged")
    tokens = tokens_per_image(model, inputs, outputs, **chosen)
    answers = []
    for row in range(count):
        best, *others = classifier.postprocess(ModelOutput(logits=logits[row : row + 1]), top_k=2)
        if margins is not None:
            margins.append(best["score"] - others[0]["score"] if others else 1.0)
        answers.append(
            {
                "budget": plain_size(budget) if isinstance(budget, tuple) else budget,
                "tokens": tokens[row],
                "label": best["label"],
                "score": best["score"],
                "milliseconds": round(1000 * median(seconds) / count, 3),
            }
        )
    return answers


__all__ = ["Classification", "answer_batch", "as_pipeline", "classify_files", "classify_images", "load_classifier"]
