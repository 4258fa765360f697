"""One row a family. Adding a family to the matrix means adding its row here, and nothing else.

Every configuration is tiny (two layers, width 32), every picture 32 x 32, so that a whole row takes about two minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

import polyscale


@dataclass(frozen=True)
class Budget:
    """A setting of a family's run-time knobs, and what it costs."""

    knobs: dict[str, Any]
    num_tokens: int


@dataclass(frozen=True)
class LlavaRecipe:
    """How a LLaVA model reads the tower: its select strategy and what `LlavaProcessor` counts with."""

    strategy: str  # "default" drops token 0 and needs exactly one prefix token; "full" keeps all
    processor_kwargs: Callable[[PreTrainedConfig, Budget], dict[str, int]]


@dataclass(frozen=True)
class Family:
    name: str
    make_config: Callable[..., PreTrainedConfig]
    model: type
    classifier: type
    backbone: type | None
    processor: type
    processor_pil: type | None
    processor_kwargs: dict[str, Any]
    budgets: tuple[Budget, ...]  # the config's own first; at least two where the family has a knob
    llava: LlavaRecipe | None
    input_shape: tuple[int, ...] = (3, 32, 32)  # of one picture, or of one video (frames first)
    # What a training run sets in the config, for recipes that draw the knob at every step.
    training_overrides: dict[str, Any] = field(default_factory=dict)
    # Column -> why the question makes no sense for this family. Printed below the table.
    not_asked: dict[str, str] = field(default_factory=dict)
    # Test of Hugging Face's common suite -> why it is skipped: the method itself makes its expectation wrong.
    common_skips: dict[str, str] = field(default_factory=dict)
    # Attributes of the tester object that Hugging Face's common suite reads, where they differ from the config's.
    common_tester: dict[str, Any] = field(default_factory=dict)

    @property
    def is_video(self) -> bool:
        return len(self.input_shape) == 4

    def make_model(self, model_class: type | None = None, seed: int = 0, **overrides) -> torch.nn.Module:
        """A freshly initialised model in eval mode, the same for the same seed."""
        torch.manual_seed(seed)
        return (model_class or self.classifier)(self.make_config(**overrides)).eval()

    def make_inputs(self, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch_size, *self.input_shape, generator=generator)

    def make_processor(self, backend: str = "torchvision"):
        return {"torchvision": self.processor, "pil": self.processor_pil}[backend](**self.processor_kwargs)


_LABELS = {"id2label": {0: "cat", 1: "cup", 2: "rocket"}, "label2id": {"cat": 0, "cup": 1, "rocket": 2}}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    # Large weights, so that a random model answers different pictures differently.
    "initializer_range": 0.2,
    **_LABELS,
}
_PROCESSOR_32 = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def _flexivit_config(**overrides) -> PreTrainedConfig:
    return polyscale.FlexiViTConfig(**{**_ENCODER, "base_patch_size": 8, **overrides})


_NO_TEXT_EMBEDDING = "The input embedding of a vision model is a patch convolution, not an nn.Embedding."

FLEXIVIT = Family(
    name="flexivit",
    make_config=_flexivit_config,
    model=polyscale.FlexiViTModel,
    classifier=polyscale.FlexiViTForImageClassification,
    backbone=polyscale.FlexiViTBackbone,
    processor=polyscale.FlexiViTImageProcessor,
    processor_pil=polyscale.FlexiViTImageProcessorPil,
    processor_kwargs=_PROCESSOR_32,
    budgets=(
        Budget({"patch_size": 8}, 16),
        Budget({"patch_size": 16}, 4),
        Budget({"patch_size": [4, 8]}, 32),
    ),
    llava=LlavaRecipe(
        strategy="default",
        processor_kwargs=lambda config, budget: {
            "patch_size": budget.knobs["patch_size"],
            "num_additional_image_tokens": config.num_prefix_tokens,
        },
    ),
    training_overrides={"train_patch_sizes": [4, 8, 16]},
    common_skips={"test_inputs_embeds": _NO_TEXT_EMBEDDING},
)

FAMILIES = (FLEXIVIT,)


def each_family(*, backbone: bool = False, llava: bool = False, column: str | None = None):
    """Parametrises a test by family; with `column`, the result is written to that row of the README's table."""
    rows = []
    for family in FAMILIES:
        marks = [pytest.mark.matrix_cell(column, family.name)] if column else []
        if (backbone and family.backbone is None) or (llava and family.llava is None):
            continue
        if column in family.not_asked:
            continue
        rows.append(pytest.param(family, id=family.name, marks=marks))
    return pytest.mark.parametrize("family", rows)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


__all__ = ["FAMILIES", "Budget", "Family", "LlavaRecipe", "each_family", "family_named"]
