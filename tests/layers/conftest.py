import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch recompiles a function eight times and then gives up; all models of transformers share one decorator."""
    yield
    torch.compiler.reset()
