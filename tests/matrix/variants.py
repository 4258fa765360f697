"""What people really have: checkpoints converted from other models, and S2 around several models.

Each variant belongs to a family, in whose column of the documentation's table its results go.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from polyscale import S2VisionForImageClassification
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit

from .families import FLEXIVIT, QUADTREE_VIT, S2_VISION, SPARSEFORMER, Family, cell


_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}
_MLP = {**_SHAPE, "intermediate_size": 64}
_SMALL = {**_MLP, "image_size": 16, "patch_size": 4}
_CLASSES = {"num_labels": 3}


def _vit(**fields) -> PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**_MLP, **_CLASSES, **fields}))


def _clip() -> PreTrainedModel:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_MLP))


def _dinov2_registers() -> PreTrainedModel:
    config = transformers.Dinov2WithRegistersConfig(**_SHAPE, **_CLASSES, num_register_tokens=3, mlp_ratio=2)
    return transformers.Dinov2WithRegistersForImageClassification(config)


def _dinov2_giant() -> PreTrainedModel:
    return transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**_SHAPE, **_CLASSES, use_swiglu_ffn=True)
    )


_SOURCES = {
    "learned positions (ViT)": _vit,
    "pre-norm (CLIP)": _clip,
    "registers (DINOv2)": _dinov2_registers,
    "SwiGLU (DINOv2 giant)": _dinov2_giant,
}
_WRAPPED = {
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_SMALL)),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**_SMALL)),
    "DINOv2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**{**_SHAPE, "image_size": 16, "patch_size": 4}, mlp_ratio=2)
    ),
    "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SMALL)),
}
_BOOTSTRAPPED = {
    "shared_token_embedding": True,
    "cls_token_layer": 1,
    "roi_adjustment": "mlp",
    "mixing_bias": False,
    "generator_width": 8,
    "sampling_padding": "border",
    "stage_embedding": True,
    "pooling": "cls",
    "operations": [["sampling_m", "pe_inject", "attn", "mlp", "roi_adj"], ["attn", "mlp"]],
}


@dataclass(frozen=True)
class Variant:
    """A model that is not the family's default configuration: its name, its family, and how it is made."""

    name: str
    family: Family
    build: Callable[[], PreTrainedModel]

    def make_model(self) -> PreTrainedModel:
        """In eval mode; no parameter is zero, so that each path matters."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() and "bias" not in name:
                    parameter.normal_(std=0.1)
        return model.eval()

    def make_inputs(self, batch_size: int = 2) -> torch.Tensor:
        return self.family.make_inputs(batch_size)


def _flexivit(source: Callable) -> PreTrainedModel:
    return flexivit_from_source(load_flexivit_source(source()))


def _quadtree(source: Callable) -> PreTrainedModel:
    return load_quadtree_vit(source(), num_tokens=10, max_patch_size=16)[0]


def _s2(base: Callable) -> PreTrainedModel:
    return S2VisionForImageClassification.from_vision_model(base(), scales=[1, 2], **_CLASSES)


VARIANTS = (
    *(Variant(name, FLEXIVIT, lambda make=make: _flexivit(make)) for name, make in _SOURCES.items()),
    *(Variant(name, QUADTREE_VIT, lambda make=make: _quadtree(make)) for name, make in _SOURCES.items()),
    Variant("bootstrapped", SPARSEFORMER, lambda: SPARSEFORMER.make_model(**_BOOTSTRAPPED)),
    *(Variant(f"around {name}", S2_VISION, lambda make=make: _s2(make)) for name, make in _WRAPPED.items()),
)


def each_variant(column: str, needs_classes: bool = False) -> pytest.MarkDecorator:
    """Parametrises a test by variant; with `needs_classes` by those that are classifiers."""
    rows = [
        pytest.param(variant, id=f"{variant.family.name}-{variant.name}", marks=cell(column, variant.family))
        for variant in VARIANTS
        if not (needs_classes and "CLIP" in variant.name and variant.family.name != "s2_vision")
    ]
    return pytest.mark.parametrize("variant", rows)


__all__ = ["VARIANTS", "Variant", "each_variant"]
