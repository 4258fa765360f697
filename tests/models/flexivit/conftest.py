"""Tiny models for the FlexiViT tests."""

import pytest
import torch

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTModel


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "base_patch_size": 8,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter away from its initial value, so that no bias, scale or token is left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(name="randomise")
def randomise_fixture():
    return randomise


@pytest.fixture
def make_model():
    """A tiny FlexiViTModel, or with `num_labels` a classifier, with the config fields given."""

    def make(**fields):
        torch.manual_seed(0)
        model_class = FlexiViTForImageClassification if "num_labels" in fields else FlexiViTModel
        return randomise(model_class(FlexiViTConfig(**{**TINY, **fields})))

    return make


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
