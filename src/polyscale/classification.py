"""Classifies picture files with `pipeline("image-classification")` at several token budgets."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ImageClassificationPipeline,
    PreTrainedModel,
    pipeline,
)

from .checkpoints import available_checkpoints, resolve_checkpoint
from .layers.token_budget import default_budgets_of, plain_size, token_budget
from .utils.images import find_images, open_image


# Parameters that hold the tokens in front of the patch tokens, in transformers' models and in ours.
_PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class Classification(NamedTuple):
    """What `classify_images` found.

    Attributes:
        records: a dict for each picture and budget: "file", "budget" (patch size, token count, or None), "tokens",
            "label", "score" and "milliseconds".
        errors: a dict for each file that could not be read or classified: "file" and "error".
    """

    records: list[dict]
    errors: list[dict]


def load_classifier(
    model: str | os.PathLike, device: str | int | torch.device | None = None
) -> ImageClassificationPipeline:
    """`pipeline("image-classification")` for a checkpoint.

    Args:
        model: name of a bundled checkpoint, local folder, or name on the hub.
        device: where it runs; the pipeline's own choice when None.

    Raises:
        ValueError: if the checkpoint holds no trained classifier.
        OSError: if there is no such checkpoint.
    """
    source = resolve_checkpoint(model)
    try:
        network, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(
                f"`model` {source!r} holds no trained image classifier: {len(info['missing_keys'])} tensors are "
                f"missing, such as {sorted(info['missing_keys'])[0]!r}."
            )
        processor = AutoImageProcessor.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"`model` {source!r} cannot be loaded: it is neither a bundled checkpoint "
            f"({', '.join(available_checkpoints())}) nor a complete one in a local folder or on the hub. {error}"
        ) from error
    return pipeline("image-classification", model=network, image_processor=processor, device=device)


def num_prefix_tokens(model: PreTrainedModel) -> int:
    """Tokens in front of a model's patch tokens: what its config says, or else its parameters."""
    count = getattr(model.config, "num_prefix_tokens", None)
    if count is not None:
        return count
    return sum(
        parameter.shape[1] if parameter.ndim == 3 else 1
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _PREFIX_PARAMETERS
    )


class ForwardMeter:
    """Times each forward call of a classifier by a pipeline, and counts the tokens of the last one.

    Attributes:
        milliseconds: the duration of each call since `reset`.
        tokens: tokens of one picture in the last call, prefix tokens not counted; None where the model has none.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.prefix = num_prefix_tokens(model)
        self.reset()
        self._handles = [
            model.register_forward_pre_hook(self._start, with_kwargs=True),
            model.base_model.register_forward_hook(self._count),
            model.register_forward_hook(self._stop),
        ]

    def reset(self) -> None:
        self.milliseconds: list[float] = []
        self.tokens: int | None = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _start(self, module, inputs, arguments) -> None:
        self._image_size = tuple(arguments[self.model.main_input_name].shape[-2:])
        self._started = self._now()

    def _stop(self, *_) -> None:
        self.milliseconds.append(1000 * (self._now() - self._started))

    def _count(self, module, inputs, output) -> None:
        mask = getattr(output, "token_mask", None)
        hidden = getattr(output, "last_hidden_state", None)
        if mask is not None:
            self.tokens = int(mask[0].sum())
        elif hasattr(self.model.config, "num_tokens_for"):
            # the last hidden state of a classifier may hold the prefix tokens alone
            self.tokens = self.model.config.num_tokens_for(self._image_size)
        elif hidden is not None:
            # (batch, tokens, hidden) or, of a convolutional network, (batch, hidden, rows, columns)
            is_map = hidden.ndim == 4
            self.tokens = hidden.shape[2] * hidden.shape[3] if is_map else hidden.shape[1] - self.prefix


def classify_images(
    files: Iterable[str | os.PathLike],
    model: str | os.PathLike | ImageClassificationPipeline = "flexivit-cifar10",
    budgets: Sequence | None = None,
    *,
    device: str | int | torch.device | None = None,
    repeats: int = 1,
) -> Classification:
    """Classifies picture files at several token budgets, through transformers' image-classification pipeline.

    A file that cannot be read is reported and the others go on. "milliseconds" is the time of the model alone on one
    picture (reading and resizing not counted), the median of `repeats` calls; before the first picture at a budget
    one call is made that is not counted, so that one-time costs do not show.

    Args:
        files: picture files, and folders that are searched for them.
        model: name of a bundled checkpoint, local folder, name on the hub, or a pipeline that is loaded already.
        budgets: patch sizes (pixels, int or (height, width)) of a FlexiViT, token counts of a Quadtree ViT;
            those of the model's config when None. Any other model is run once, and takes none.
        device: where the model runs; the pipeline's own choice when None.
        repeats: calls whose median is reported.

    Raises:
        ValueError: for a budget that the first picture or the model does not allow, `repeats` below 1, or a checkpoint
            that is no trained classifier.
        OSError: if there is no such checkpoint.

    Example:

    ```python
    >>> from polyscale.assets import sample_photographs
    >>> from polyscale.classification import classify_images

    >>> records, errors = classify_images(sample_photographs(), "flexivit-cifar10", budgets=[4, 8])
    >>> records[0]["label"], records[0]["tokens"]
    ```
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    classifier = model if isinstance(model, ImageClassificationPipeline) else load_classifier(model, device)
    budgets = default_budgets_of(classifier.model.config) if budgets is None else list(budgets)
    if not budgets:
        raise ValueError("`budgets` is empty: give at least one, or None for the model's own.")

    result = Classification([], [])
    warm = False
    meter = ForwardMeter(classifier.model)
    try:
        for file, image in _open_images(files, result.errors):
            if not warm:
                for budget in budgets:
                    with token_budget(classifier.model.config, budget):
                        classifier(image)
                warm = True
            try:
                result.records.extend(_classify(classifier, meter, file, image, budgets, repeats))
            except ValueError as error:
                result.errors.append({"file": str(file), "error": str(error)})
    finally:
        meter.remove()
    return result


def _open_images(paths: Iterable[str | os.PathLike], errors: list[dict]) -> Iterator[tuple[Path, Image.Image]]:
    """Each readable picture; what cannot be read goes to `errors`."""
    for path in paths:
        try:
            files = find_images(path)
        except ValueError as error:
            errors.append({"file": str(path), "error": str(error)})
            continue
        for file in files:
            try:
                image = open_image(file)
            except ValueError as error:
                errors.append({"file": str(file), "error": str(error)})
            else:
                yield file, image


def _classify(
    classifier: ImageClassificationPipeline,
    meter: ForwardMeter,
    file: Path,
    image: Image.Image,
    budgets: Sequence,
    repeats: int,
) -> list[dict]:
    records = []
    for budget in budgets:
        meter.reset()
        with token_budget(classifier.model.config, budget):
            best = [classifier(image, top_k=1)[0] for _ in range(repeats)][-1]
        records.append(
            {
                "file": str(file),
                "budget": plain_size(budget) if isinstance(budget, tuple) else budget,
                "tokens": meter.tokens,
                "label": best["label"],
                "score": best["score"],
                "milliseconds": round(median(meter.milliseconds), 3),
            }
        )
    return records


__all__ = [
    "Classification",
    "ForwardMeter",
    "classify_images",
    "load_classifier",
    "num_prefix_tokens",
]
