"""Golden tensors and tiny models for the Quadtree ViT tests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyscale import QuadtreeViTConfig


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "min_patch_size": 4,
    "max_patch_size": 16,
    "num_tokens": 19,
    "initializer_range": 0.2,
    "num_labels": 3,
}


@pytest.fixture(scope="session")
def golden():
    return load_file(Path(__file__).parents[2] / "fixtures" / "quadtree_golden.safetensors")


@pytest.fixture(scope="session")
def golden_pixels(golden):
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (golden["pixels_uint8"].float() / 255 - mean) / std


@pytest.fixture
def make_config():
    return lambda **fields: QuadtreeViTConfig(**{**TINY, **fields})


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
