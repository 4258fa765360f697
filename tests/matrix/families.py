"""One row a family. Adding a family to the matrix means adding its row here, and nothing else.

Every configuration is tiny (two layers, width 32), every image 32 x 32, so that a whole row takes about two minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, PreTrainedConfig, TrainerCallback

import polyscale

from .table import COLUMNS


@dataclass(frozen=True)
class Budget:
    """A setting of a family's run-time knobs, and what it costs."""

    knobs: dict[str, Any]
    num_tokens: int


def count_a_grid(config: PreTrainedConfig, budget: Budget) -> dict[str, int]:
    """What `LlavaProcessor` counts with where tokens are a grid of patches."""
    return {"patch_size": budget.knobs["patch_size"], "num_additional_image_tokens": config.num_prefix_tokens}


def count_a_number(config: PreTrainedConfig, budget: Budget) -> dict[str, int]:
    """What it counts with where the number of tokens is that of no grid: no patch fits in, and so many are added."""
    return {
        "patch_size": 10_000,
        "num_additional_image_tokens": budget.num_tokens + config.num_prefix_tokens,
    }


@dataclass(frozen=True)
class LlavaRecipe:
    """How a LLaVA model reads the tower: its select strategy and what `LlavaProcessor` counts with."""

    strategy: str  # "default" drops token 0 and needs exactly one prefix token; "full" keeps all
    processor_kwargs: Callable[[PreTrainedConfig, Budget], dict[str, int]]
    # Why the budget of a model in memory is fixed, where it is.
    fixed_budget: str | None = None


@dataclass(frozen=True)
class Gap:
    """Something tried that does not work yet: what its error says, and why, for the README."""

    error: str
    reason: str


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    make_config: Callable[..., PreTrainedConfig]
    model: type
    classifier: type
    backbone: type | None
    processor: type
    processor_pil: type | None
    processor_kwargs: dict[str, Any]
    budgets: tuple[Budget, ...]  # the config's own first; at least two where the family has a knob
    llava: LlavaRecipe | None
    llava_budgets: tuple[Budget, ...]  # two, set in the tower's config
    projecting: type | None = None  # with CLIP's projection, where the family has one
    input_shape: tuple[int, ...] = (3, 32, 32)  # of one image, or of one video (frames first)
    # Overrides of the config for Hugging Face's common suite, where it counts layers otherwise.
    common_overrides: dict[str, Any] = field(default_factory=dict)
    # What a training run sets in the config and adds to the Trainer, for families that draw the knob at every step.
    training_overrides: dict[str, Any] = field(default_factory=dict)
    make_callbacks: Callable[[], list[TrainerCallback]] = list
    dropout_overrides: dict[str, Any] = field(default_factory=dict)
    # For FSDP2 and tensor parallelism, where the plan is that of a model inside.
    parallel_overrides: dict[str, Any] = field(default_factory=dict)
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    # A deeper configuration, which leaves something to decide about where its layers go.
    deeper_overrides: dict[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 4})
    # Column -> why the question makes no sense for this family. Printed below the table.
    not_asked: dict[str, str] = field(default_factory=dict)
    # Column -> what another tool cannot do for this family. The test fails as soon as it can.
    gaps: dict[str, Gap] = field(default_factory=dict)
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
    # Large weights, so that a random model answers different images differently.
    "initializer_range": 0.2,
    **_LABELS,
}
_ENCODER_DROPOUT = {"drop_path_rate": 0.2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_PROCESSOR_32 = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def _flexivit_config(**overrides) -> PreTrainedConfig:
    return polyscale.FlexiViTConfig(**{**_ENCODER, "base_patch_size": 8, **overrides})


_EXECUTORCH = "ExecuTorch (XNNPACK), any batch size"
_NO_TEXT_EMBEDDING = "The input embedding of a vision model is a patch convolution, not an nn.Embedding."

FLEXIVIT = Family(
    name="flexivit",
    title="FlexiViT",
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
    llava=LlavaRecipe("default", count_a_grid),
    llava_budgets=(Budget({"patch_size": 8}, 16), Budget({"patch_size": 16}, 4)),
    projecting=polyscale.FlexiViTModelWithProjection,
    training_overrides={"train_patch_sizes": [4, 8, 16]},
    make_callbacks=lambda: [polyscale.PatchSizeCallback()],
    dropout_overrides=_ENCODER_DROPOUT,
    common_skips={"test_inputs_embeds": _NO_TEXT_EMBEDDING},
)


def _quadtree_config(**overrides) -> PreTrainedConfig:
    sizes = {"min_patch_size": 4, "max_patch_size": 16, "num_tokens": 16}
    return polyscale.QuadtreeViTConfig(**{**_ENCODER, **sizes, **overrides})


QUADTREE_VIT = Family(
    name="quadtree_vit",
    title="Quadtree ViT",
    make_config=_quadtree_config,
    model=polyscale.QuadtreeViTModel,
    classifier=polyscale.QuadtreeViTForImageClassification,
    backbone=polyscale.QuadtreeViTBackbone,
    processor=polyscale.QuadtreeViTImageProcessor,
    processor_pil=polyscale.QuadtreeViTImageProcessorPil,
    processor_kwargs={"size": {"height": 32, "width": 32}, "max_patch_size": 16},
    budgets=(Budget({"num_tokens": 16}, 16), Budget({"num_tokens": 40}, 40)),
    gaps={_EXECUTORCH: Gap("aten.sort.stable", "ExecuTorch has no stable sort.")},
    llava=LlavaRecipe("default", count_a_number),
    llava_budgets=(Budget({"num_tokens": 16}, 16), Budget({"num_tokens": 40}, 40)),
    projecting=polyscale.QuadtreeViTModelWithProjection,
    dropout_overrides=_ENCODER_DROPOUT,
    common_skips={
        "test_inputs_embeds": _NO_TEXT_EMBEDDING,
        "test_model_outputs_equivalence": (
            "The test subtracts outputs, and `token_mask` is boolean; `test_outputs_as_a_tuple` asks the same."
        ),
    },
)


_SPARSEFORMER = {
    "feature_width": 8,
    "num_latent_tokens": 9,
    "num_sampling_points": 4,
    "num_attention_heads": 2,
    "widths": [32, 32],
    "repeats": [2, 1],
    "operations": [["attn", "roi_adj", "sampling_m", "mlp"], ["attn", "mlp"]],
    "image_size": 32,
    "initializer_range": 0.2,
    **_LABELS,
}
_SPARSEFORMER_DEEPER = {
    "widths": [32] * 4,
    "repeats": [1] * 4,
    "operations": [["attn", "roi_adj", "sampling_m", "mlp"], *[["attn", "mlp"]] * 3],
}
_ONE_REPEAT = {"repeats": [1, 1]}


def _sparseformer_config(**overrides) -> PreTrainedConfig:
    return polyscale.SparseFormerConfig(**{**_SPARSEFORMER, **overrides})


_CONVERTED_ROWS = tuple(column for column in COLUMNS if column.startswith("converted"))
_LLAVA_ROWS = tuple(column for column in COLUMNS if column.startswith("LLaVA"))
_FIXED_TOKENS = "The tokens of a SparseFormer are weights: their number is chosen when a model is made."

SPARSEFORMER = Family(
    name="sparseformer",
    title="SparseFormer",
    make_config=_sparseformer_config,
    model=polyscale.SparseFormerModel,
    classifier=polyscale.SparseFormerForImageClassification,
    backbone=None,
    processor=polyscale.SparseFormerImageProcessor,
    processor_pil=polyscale.SparseFormerImageProcessorPil,
    processor_kwargs=_PROCESSOR_32,
    budgets=(Budget({}, 9),),
    llava=LlavaRecipe("full", count_a_number, fixed_budget=_FIXED_TOKENS),
    llava_budgets=(Budget({"num_latent_tokens": 9}, 9), Budget({"num_latent_tokens": 16}, 16)),
    projecting=polyscale.SparseFormerModelWithProjection,
    dropout_overrides={"drop_path_rate": 0.2},
    deeper_overrides=_SPARSEFORMER_DEEPER,
    lora_targets=("qkv", "fc1"),
    common_overrides=_ONE_REPEAT,
    common_skips={"test_inputs_embeds": _NO_TEXT_EMBEDDING},
)


def _sparseformer_video_config(**overrides) -> PreTrainedConfig:
    frames = {"num_latent_tokens": 4, "replicates": 2, "num_frames": 4}
    return polyscale.SparseFormerVideoConfig(**{**_SPARSEFORMER, **frames, **overrides})


SPARSEFORMER_VIDEO = Family(
    name="sparseformer_video",
    title="SparseFormer (video)",
    make_config=_sparseformer_video_config,
    model=polyscale.SparseFormerVideoModel,
    classifier=polyscale.SparseFormerForVideoClassification,
    backbone=None,
    processor=polyscale.SparseFormerVideoProcessor,
    processor_pil=None,
    processor_kwargs=_PROCESSOR_32,
    budgets=(Budget({}, 8),),
    llava=None,
    llava_budgets=(),
    input_shape=(4, 3, 32, 32),
    not_asked={
        'pipeline("image-classification")': 'Not for videos: `pipeline("video-classification")` has its own test.',
        'pipeline("image-feature-extraction")': "transformers has no pipeline for features of videos.",
        **dict.fromkeys(_CONVERTED_ROWS, "Made from a SparseFormer for images: no layout of its own."),
        **dict.fromkeys(_LLAVA_ROWS, "LLaVA takes images, not videos."),
    },
    dropout_overrides={"drop_path_rate": 0.2},
    deeper_overrides=_SPARSEFORMER_DEEPER,
    lora_targets=("qkv", "fc1"),
    common_overrides=_ONE_REPEAT,
    common_skips={"test_inputs_embeds": _NO_TEXT_EMBEDDING},
)


def _clip_config(num_hidden_layers: int = 2) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )


def _s2_config(**overrides) -> PreTrainedConfig:
    return polyscale.S2VisionConfig(
        **{"vision_config": _clip_config(), "scales": [1, 2], "initializer_range": 0.2, **_LABELS, **overrides}
    )


S2_VISION = Family(
    name="s2_vision",
    title="S2",
    make_config=_s2_config,
    model=polyscale.S2VisionWrapper,
    classifier=polyscale.S2VisionForImageClassification,
    backbone=polyscale.S2VisionBackbone,
    processor=polyscale.S2ImageProcessor,
    processor_pil=polyscale.S2ImageProcessorPil,
    processor_kwargs={"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}},
    budgets=(Budget({"scales": [1, 2]}, 16), Budget({"scales": [2, 3]}, 64)),
    llava=LlavaRecipe("default", count_a_number),
    llava_budgets=(Budget({"scales": [1, 2]}, 16), Budget({"scales": [2, 3]}, 64)),
    deeper_overrides={"vision_config": _clip_config(num_hidden_layers=4)},
    parallel_overrides={"vision_config": _flexivit_config(image_size=16)},  # CLIP has no plan of its own
    common_overrides={"attn_implementation": "eager"},  # the only one whose attentions a wrapped model returns
    common_skips={
        "test_inputs_embeds": _NO_TEXT_EMBEDDING,
        "test_can_init_all_missing_weights": (
            "In a third-party model, transformers initialises no module without weights of its own; CLIP draws "
            "the weights of its attention and MLP in such modules. A checkpoint that has the weights is not affected."
        ),
        "test_retain_grad_hidden_states_attentions": (
            "The hidden states of all scales are put together from those of the tiles, beside the way to the output."
        ),
    },
)

FAMILIES = (FLEXIVIT, QUADTREE_VIT, SPARSEFORMER, SPARSEFORMER_VIDEO, S2_VISION)


def cell(column: str, family: Family) -> list[pytest.MarkDecorator] | None:
    """The mark that writes a test's result to the README's table, or None where the family does not ask for it."""
    if column not in COLUMNS:
        raise ValueError(f"{column!r} is not a row of the table: add it to COLUMNS in table.py.")
    return None if column in family.not_asked else [pytest.mark.matrix_cell(column, family.name)]


def each_family(column: str) -> pytest.MarkDecorator:
    """Parametrises a test by family; the results go to the row `column` of the README's table."""
    rows = [(family, cell(column, family)) for family in FAMILIES]
    return pytest.mark.parametrize(
        "family", [pytest.param(family, id=family.name, marks=marks) for family, marks in rows if marks is not None]
    )


def each_check(columns: dict[str, str], group: str, reported_as: str | None = None) -> pytest.MarkDecorator:
    """Parametrises a test by family and by the checks (check -> row of the table) that one worker process answers.

    With `reported_as`, the results go to that row, and the others only say which family a check is for.

    Tests of one process stay together in a parallel run (`--dist loadgroup`), so that it is started once.
    """
    rows = []
    together = pytest.mark.xdist_group(group)
    for family in FAMILIES:
        for check, column in columns.items():
            marks = cell(column, family)
            if marks is not None:
                marks = marks if reported_as is None else cell(reported_as, family)
                rows.append(pytest.param(family, check, id=f"{family.name}-{check}", marks=[*marks, together]))
    return pytest.mark.parametrize(("family", "check"), rows)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


__all__ = ["FAMILIES", "Budget", "Family", "Gap", "LlavaRecipe", "cell", "each_check", "each_family", "family_named"]
