"""What a server asks of a vision-language model and its processor, asked beforehand.

Replays the questions of vLLM's Transformers backend and of SGLang: token counts before and after the fact, features of
each image, the model on the meta device and with its linear layers replaced. Nothing here starts a server.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_utils import SizeDict

from ..layers.token_budget import budget_argument_of
from ..llava.adapters import LlavaAdapter
from ..llava.hosts import adapter_of
from ..llava.processing import CallBudgetMixin


# (height, width) in pixels of the images that are tried: usual, wide, high, small, and a strip.
_SIZES = ((336, 336), (240, 640), (640, 240), (40, 40), (32, 512))
_LARGEST = (10_000, 10_000)  # what vLLM plans its memory for


@dataclass(frozen=True)
class ServingCheck:
    """One question of a server.

    Args:
        question: what is asked.
        passed: whether the answer is one that the server can use.
        detail: what came.
    """

    question: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ServingReport:
    """The answers of a model and its processor. As a string: a table."""

    checks: tuple[ServingCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether a server can use all answers."""
        return all(check.passed for check in self.checks)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        width = max(len(check.question) for check in self.checks)
        return "\n".join(
            f"{'ok  ' if check.passed else 'FAIL'}  {check.question:<{width}}  {check.detail}" for check in self.checks
        )


@dataclass(frozen=True)
class _Subject:
    model: PreTrainedModel
    processor: ProcessorMixin
    adapter: LlavaAdapter

    def images(self) -> list[Image.Image]:
        generator = np.random.default_rng(0)
        return [
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in _SIZES
        ]

    def encode(self, images: Sequence[Image.Image], **options) -> Mapping[str, Any]:
        text = [f"{self.processor.image_token} ?"] * len(images)
        return self.processor(
            images=[[image] for image in images], text=text, padding=True, return_tensors="pt", **options
        )

    @property
    def placeholder_id(self) -> int:
        """The id of the token that stands for a token of an image: not always the one that a prompt has."""
        return self.processor.image_token_ids[0]

    def counts(self, inputs: Mapping[str, Any]) -> list[int]:
        return (inputs["input_ids"] == self.placeholder_id).sum(dim=1).tolist()

    def vision_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        text = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")
        weight = next(self.model.parameters())
        moved = {name: value for name, value in inputs.items() if name not in text}
        moved["pixel_values"] = moved["pixel_values"].to(device=weight.device, dtype=weight.dtype)
        return moved

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Any], model: PreTrainedModel | None = None) -> list[torch.Tensor]:
        output = (model or self.model).get_image_features(**self.vision_inputs(inputs), return_dict=True)
        return list(output.pooler_output)


def _attention_backend(subject: _Subject) -> str:
    models = [module for module in subject.model.modules() if isinstance(module, PreTrainedModel)]
    without = sorted({type(module).__name__ for module in models if not module._supports_attention_backend})
    if without:
        raise ValueError(f"`_supports_attention_backend` is not True: {', '.join(without)}")
    return f"{len(models)} models"


def _encoder(subject: _Subject) -> str:
    encoder = subject.model.get_encoder(modality="image")
    if encoder is not subject.adapter.inner(subject.model).vision_tower:
        raise ValueError(f"`get_encoder(modality='image')` gives a {type(encoder).__name__}, not the vision tower")
    return type(encoder).__name__


def _bound(subject: _Subject) -> str:
    processor = subject.processor
    size = processor.image_processor.size
    size = dict(size) if isinstance(size, SizeDict | Mapping) else {}
    own = (size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge"))
    sizes = [_LARGEST, *([own] if all(own) else []), *_SIZES]
    answer = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])
    bounds = answer["num_image_tokens"]
    if len(bounds) != len(sizes) or len(answer["num_image_patches"]) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes, {len(bounds)} answers")
    images = subject.images()
    actual = [subject.counts(subject.encode([image]))[0] for image in images]
    for size, bound, count in zip(_SIZES, bounds[-len(_SIZES) :], actual, strict=True):
        if count > bound:
            raise ValueError(f"an image of {size} pixels has {count} tokens, {bound} were announced")
    if max(actual) > bounds[0]:
        raise ValueError(f"an image has {max(actual)} tokens, {bounds[0]} were announced for {_LARGEST} pixels")
    return f"at most {bounds[0]}, tried {min(actual)} to {max(actual)}"


def _replacement(subject: _Subject) -> str:
    images = subject.images()
    counts = []
    for image in images:
        processed = subject.processor.image_processor([image], return_tensors="pt")
        if isinstance(subject.processor, CallBudgetMixin):
            processed, _ = subject.processor._process_images([image], return_tensors="pt")
        text = subject.processor.replace_image_token(processed, 0)
        counts.append(text.count(subject.processor.tokenizer.convert_ids_to_tokens(subject.placeholder_id)))
    expected = [subject.counts(subject.encode([image]))[0] for image in images]
    if counts != expected:
        raise ValueError(f"`replace_image_token` gives {counts} tokens, the processor {expected}")
    return "as many as the processor"


def _features_match(subject: _Subject) -> str:
    inputs = subject.encode(subject.images())
    features, counts = subject.features(inputs), subject.counts(inputs)
    lengths = [len(image) for image in features]
    if lengths != counts:
        raise ValueError(f"features of {lengths} tokens for {counts} placeholders")
    return f"{len(features)} images, {min(lengths)} to {max(lengths)} tokens"


def _each_alone(subject: _Subject) -> str:
    images = subject.images()
    together = subject.features(subject.encode(images))
    worst = 0.0
    for image, expected in zip(images, together, strict=True):
        alone = subject.features(subject.encode([image]))[0]
        if alone.shape != expected.shape:
            raise ValueError(f"alone {tuple(alone.shape)}, in a batch {tuple(expected.shape)}")
        worst = max(worst, float((alone - expected).abs().max() / expected.abs().max().clamp_min(1e-6)))
    if worst > 1e-2:
        raise ValueError(f"an image alone differs from the same image in a batch by {worst:.1e} of its largest value")
    return f"relative difference {worst:.0e}"


def _token_types(subject: _Subject) -> str:
    inputs = subject.encode(subject.images()[:1], return_mm_token_type_ids=True)
    types = inputs["mm_token_type_ids" if "mm_token_type_ids" in inputs else "token_type_ids"]  # as the model calls it
    marked = int((types == 1).sum())
    if marked != subject.counts(inputs)[0]:
        raise ValueError(f"{marked} tokens marked as image, {subject.counts(inputs)[0]} placeholders")
    return f"{marked} tokens marked"


def _runs(subject: _Subject) -> str:
    ids = subject.encode(subject.images()[:1])["input_ids"][0].tolist()
    runs = [len(list(run)) for is_image, run in groupby(i == subject.placeholder_id for i in ids) if is_image]
    if len(runs) != 1:
        raise ValueError(f"one image gives {len(runs)} runs of the image token")
    return f"one run of {runs[0]}"


def _meta(subject: _Subject) -> str:
    config = type(subject.model.config).from_dict(subject.model.config.to_dict())
    with torch.device("meta"):
        model = type(subject.model)(config)
    expected, got = set(subject.model.state_dict()), set(model.state_dict())
    if expected != got:
        raise ValueError(f"other weights than the model: {sorted(expected ^ got)[0]!r}")
    return f"{len(got)} tensors"


class _Called(nn.Module):
    """A layer in the place of a linear one, without a weight to be read."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self._layer = (layer,)  # hidden from the module tree

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._layer[0](hidden)


def _replaced_layers(subject: _Subject) -> str:
    inputs = subject.encode(subject.images()[:1])
    expected = subject.features(inputs)[0]
    model = copy.deepcopy(subject.model)
    tower = subject.adapter.inner(model).vision_tower
    count = 0
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _Called(child))
                count += 1
    got = subject.features(inputs, model)[0]
    if not torch.allclose(got, expected, atol=1e-4, rtol=1e-3):
        raise ValueError("the tower reads weights of its linear layers instead of calling them")
    return f"{count} linear layers of the tower"


def _request_budget(subject: _Subject) -> str:
    processor = subject.processor
    if not isinstance(processor, CallBudgetMixin):
        reason = getattr(processor, "why_fixed", "its tower has no token budget")
        return f"none: {reason}"
    config = processor.budget_config
    if not config.changeable_fields:
        return "none: its tower has no token budget"
    words = {name: getattr(config, name) for name in (budget_argument_of(config),) if name is not None}
    words = {name: value for name, value in words.items() if value is not None} or {"image_size": config.image_size}
    inputs = subject.encode(subject.images()[:1], **words)
    bound = processor._get_num_multimodal_tokens(image_sizes=[list(_LARGEST)], **words)["num_image_tokens"][0]
    count, length = subject.counts(inputs)[0], len(subject.features(inputs)[0])
    if count > bound or count != length:
        raise ValueError(f"{words}: {count} tokens, {length} features, {bound} announced")
    limit = "" if processor.batch_limit is None else f"; {processor.batch_limit}"
    return f"{', '.join(config.changeable_fields)}{limit}"


_CHECKS: tuple[tuple[str, Callable[[_Subject], str]], ...] = (
    ("every model takes the server's attention", _attention_backend),
    ("the vision tower is found", _encoder),
    ("the announced number of tokens is enough", _bound),
    ("the placeholder text of an image has its tokens", _replacement),
    ("features and placeholders of a batch match", _features_match),
    ("an image in a batch is as alone", _each_alone),
    ("image tokens are marked", _token_types),
    ("an image is one run of the image token", _runs),
    ("the model is built without values", _meta),
    ("layers can be replaced", _replaced_layers),
    ("a request brings its own budget", _request_budget),
)


def check_servable(model: PreTrainedModel, processor: ProcessorMixin) -> ServingReport:
    """Asks a LLaVA model and its processor what vLLM's Transformers backend and SGLang ask.

    Args:
        model (`PreTrainedModel`): a LLaVA, LLaVA-NeXT, LLaVA-OneVision, VipLLaVA, PaliGemma or Gemma 3 model, with any
            tower. It is run on a few small images, and copied once.
        processor (`ProcessorMixin`): the one that `swap_vision_tower` or `AutoProcessor` gave.

    Returns:
        `ServingReport`: true where all answers can be used; `print(report)` shows each of them.

    Raises:
        ValueError: for another kind of model, or what is no processor.

    Example:

    ```python
    >>> report = polyscale.serving.check_servable(model, processor)
    >>> print(report)
    ```
    """
    adapter = adapter_of(model, "model")
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"`processor` must be a processor of texts and images, got {type(processor).__name__}.")
    subject = _Subject(model, processor, adapter)
    checks = []
    was_training = model.training
    model.eval()
    try:
        for question, ask in _CHECKS:
            try:
                checks.append(ServingCheck(question, True, ask(subject)))
            except Exception as error:  # whatever it is, the server would meet it
                checks.append(ServingCheck(question, False, f"{type(error).__name__}: {error}"))
    finally:
        model.train(was_training)
    return ServingReport(tuple(checks))


__all__ = ["ServingCheck", "ServingReport", "check_servable"]
