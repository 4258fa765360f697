"""Loads saved checkpoints in a process that never saw them being made, with or without polyscale.

A family's folder holds its checkpoint and `expected.safetensors` (see `reference.py`). Nothing here imports polyscale
unless the facts say so: without it, the checkpoint's own code has to do.
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoVideoProcessor,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..running import answer_checks
from ..video import moving_frames


class _Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "polyscale":
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)")


class Context:
    def __init__(self, family: str, folder: Path, facts: dict[str, Any]):
        self.checkpoint = Path(facts["checkpoint"])
        self.expected = load_file(folder / "expected.safetensors")
        self.auto_classes: dict[str, str] = facts["auto_classes"]
        self.processors: dict[str, str] = facts["processors"]
        self.budgets: list[dict] = facts["budgets"]
        self.num_prefix_tokens: int = facts["num_prefix_tokens"]
        self.is_video: bool = facts["is_video"]
        self.paths: list[str] = facts["pictures"]
        pictures = [Image.open(path).convert("RGB") for path in self.paths]
        self.samples = [moving_frames(picture) for picture in pictures] if self.is_video else pictures
        self.with_polyscale: bool = facts["with_polyscale"]
        self.trust = {} if self.with_polyscale else {"trust_remote_code": True}

    def load(self, auto_class: str, **kwargs):
        """Through the Auto class; a backbone through its own class (see `check_auto_backbone`)."""
        if auto_class == "AutoBackbone":
            return self.backbone_class().from_pretrained(self.checkpoint, **kwargs)
        return getattr(transformers, auto_class).from_pretrained(self.checkpoint, **self.trust, **kwargs)

    def backbone_class(self) -> type:
        if self.with_polyscale:
            import polyscale

            return getattr(polyscale, self.auto_classes["AutoBackbone"])
        config = AutoConfig.from_pretrained(self.checkpoint, **self.trust)
        return get_class_from_dynamic_module(config.auto_map["AutoBackbone"], self.checkpoint)

    def close(self, actual: torch.Tensor, name: str) -> None:
        assert_close(actual, self.expected[name], rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


def check_polyscale_is_or_is_not_there(context: Context) -> None:
    assert ("polyscale" in sys.modules) == context.with_polyscale
    if not context.with_polyscale:
        with pytest.raises(ModuleNotFoundError):
            import polyscale  # noqa: F401


def check_trust_is_asked_for(context: Context) -> None:
    if context.with_polyscale:
        return
    processor = "AutoVideoProcessor" if context.is_video else "AutoImageProcessor"
    for auto_class in ("AutoConfig", processor, *context.auto_classes):
        if auto_class == "AutoBackbone":
            continue
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            getattr(transformers, auto_class).from_pretrained(context.checkpoint, trust_remote_code=False)


def check_auto_classes(context: Context) -> None:
    for auto_class, name in context.auto_classes.items():
        model, info = context.load(auto_class, output_loading_info=True)
        assert type(model).__name__ == name
        assert type(model).__module__.startswith("polyscale.") == context.with_polyscale
        assert not info["missing_keys"], info["missing_keys"]
        assert not info["mismatched_keys"], info["mismatched_keys"]


@torch.no_grad()
def check_model(context: Context) -> None:
    model = context.load("AutoModel")
    for index, budget in enumerate(context.budgets):
        outputs = model(context.expected["pixel_values"], **budget["knobs"])
        context.close(outputs.last_hidden_state, f"last_hidden_state.{index}")
        context.close(outputs.pooler_output, f"pooler_output.{index}")


@torch.no_grad()
def check_classifier(context: Context) -> None:
    model = context.load(next(name for name in context.auto_classes if name.endswith("Classification")))
    for index, budget in enumerate(context.budgets):
        context.close(model(context.expected["pixel_values"], **budget["knobs"]).logits, f"logits.{index}")


@torch.no_grad()
def check_knobs_in_the_config(context: Context) -> None:
    """A pipeline or a LLaVA model passes no knobs: they are set in the config, also while loading."""
    for index, budget in enumerate(context.budgets):
        model = context.load("AutoModel", **budget["knobs"])
        tokens = model(context.expected["pixel_values"]).last_hidden_state
        context.close(tokens, f"last_hidden_state.{index}")
        assert tokens.shape[1] == context.num_prefix_tokens + budget["num_tokens"]


@torch.no_grad()
def check_auto_backbone(context: Context) -> None:
    """`AutoBackbone.from_pretrained` takes no local folder in transformers 5.23: it asks the Hub whether it exists."""
    if "AutoBackbone" not in context.auto_classes:
        return
    config = AutoConfig.from_pretrained(context.checkpoint, **context.trust)
    empty = transformers.AutoBackbone.from_config(config, **context.trust)
    assert type(empty).__name__ == context.auto_classes["AutoBackbone"]
    outputs = context.load("AutoBackbone")(context.expected["pixel_values"])
    context.close(outputs.feature_maps[-1], "feature_map")


def check_processors(context: Context) -> None:
    auto_class = AutoVideoProcessor if context.is_video else AutoImageProcessor
    for backend, name in context.processors.items():
        options = {} if context.is_video else {"backend": backend}
        processor = auto_class.from_pretrained(context.checkpoint, **options, **context.trust)
        assert type(processor).__name__ == name
        inputs = processor(context.samples, return_tensors="pt")
        context.close(inputs["pixel_values"], f"processed.{backend}")


def check_classification_pipeline(context: Context) -> None:
    classify = pipeline("image-classification", model=str(context.checkpoint), **context.trust)
    model = AutoModelForImageClassification.from_pretrained(context.checkpoint, **context.trust)
    with torch.no_grad():
        scores = model(context.expected["processed.torchvision"]).logits.softmax(-1)
    expected = [{model.config.id2label[i]: s.item() for i, s in enumerate(row)} for row in scores]

    def check(answers: list[list[dict]]) -> None:
        assert len(answers) == len(expected)
        for answer, reference in zip(answers, expected, strict=True):
            found = {entry["label"]: entry["score"] for entry in answer}
            assert found.keys() == reference.keys(), found
            assert_close([found[name] for name in reference], list(reference.values()), rtol=1e-4, atol=1e-5)

    check([classify(context.paths[0]), *(classify(picture) for picture in context.samples[1:])])
    check(classify(context.samples))
    check(classify(context.paths, batch_size=2))


def check_feature_pipeline(context: Context) -> None:
    extract = pipeline("image-feature-extraction", model=str(context.checkpoint), **context.trust)
    with torch.no_grad():
        outputs = context.load("AutoModel")(context.expected["processed.torchvision"])

    def check(answers: list, reference: torch.Tensor) -> None:
        assert_close(torch.tensor(answers), reference, rtol=1e-4, atol=1e-5)

    first = outputs.last_hidden_state[:1]
    check(extract(context.samples[0]), first)
    check(extract(context.paths[0], pool=True), outputs.pooler_output[:1])
    check([answer[0] for answer in extract(context.samples)], outputs.last_hidden_state)
    batched = extract(context.samples, batch_size=2, pool=True)
    check([answer[0] for answer in batched], outputs.pooler_output)


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _facts = json.loads((_folder / "context.json").read_text())
    if any(facts["with_polyscale"] for facts in _facts.values()):
        import polyscale  # noqa: F401
    else:
        sys.meta_path.insert(0, _Blocker())
    answer_checks(dict(globals()), _folder, Context)
