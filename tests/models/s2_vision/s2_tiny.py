"""Tiny models to wrap."""

import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from polyscale.models.flexivit import FlexiViTConfig
from polyscale.models.quadtree_vit import QuadtreeViTConfig


ENCODER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
PLAIN = {**ENCODER, "patch_size": 8}
WIDE = {**PLAIN, "intermediate_size": 24}

BASES = {
    "clip": lambda: CLIPVisionConfig(**WIDE),
    "siglip": lambda: SiglipVisionConfig(**WIDE),
    "vit": lambda: ViTConfig(**WIDE),
    "deit": lambda: DeiTConfig(**WIDE),
    "dinov2": lambda: Dinov2Config(**PLAIN),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**PLAIN, num_register_tokens=2),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64),
    "flexivit": lambda: FlexiViTConfig(**ENCODER, base_patch_size=8),
}

# Models whose tokens are laid out by themselves.
UNEVEN_PATCHES = {
    "quadtree_vit": lambda: QuadtreeViTConfig(**ENCODER, min_patch_size=4, max_patch_size=16, num_tokens=40),
}


def make_base(name: str) -> torch.nn.Module:
    """A tiny model to wrap, with random weights that are the same in every call."""
    torch.manual_seed(0)
    return AutoModel.from_config({**BASES, **UNEVEN_PATCHES}[name]()).eval()
