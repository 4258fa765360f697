"""Fixtures of the S2 tests."""

import pytest
import torch
from s2_tiny import make_base


@pytest.fixture
def clip():
    return make_base("clip")


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
