import pytest
from datasets import Dataset

from .tiny_data import make_split, save_checkpoint


@pytest.fixture(scope="session")
def split() -> Dataset:
    return make_split()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
