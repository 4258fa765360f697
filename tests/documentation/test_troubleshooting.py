"""The messages on the page "Troubleshooting" are those that users see."""

import re
from pathlib import Path

import pytest
import torch

import polyscale
from polyscale import FlexiViTForImageClassification, QuadtreeViTConfig, QuadtreeViTModel
from polyscale.layers.wrapping import check_has_no_head

from ..tiny_checkpoints import save_tiny_flexivit, save_tiny_sparseformer


PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| .+ \|$", PAGE, flags=re.MULTILINE)[1:]  # after the head


def assert_on_the_page(message: str) -> None:
    """A row's parts, between dots, stand in the message in their order."""
    patterns = [".*".join(re.escape(part.strip()) for part in row.split("...")) for row in ROWS]
    assert any(re.search(pattern, message, flags=re.DOTALL) for pattern in patterns), message


@pytest.fixture
def flexivit(tmp_path):
    return FlexiViTForImageClassification.from_pretrained(save_tiny_flexivit(tmp_path / "flexivit"))


@pytest.fixture
def quadtree():
    return QuadtreeViTModel(QuadtreeViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


@pytest.fixture
def sparseformer(tmp_path):
    folder = save_tiny_sparseformer(tmp_path / "sparseformer")
    return polyscale.SparseFormerForImageClassification.from_pretrained(folder)


def test_the_page_has_rows():
    assert len(ROWS) > 12


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("flexivit", lambda model: model(torch.randn(1, 3, 32, 32), num_tokens=3)),
        ("flexivit", lambda model: model(torch.randn(1, 3, 32, 32), patch_size=64)),
        ("flexivit", lambda model: check_has_no_head(model, "tower")),
        ("flexivit", lambda model: polyscale.FlexiViTConfig(patchsize=4)),
        ("quadtree", lambda model: model(torch.randn(1, 3, 256, 256), num_tokens=99)),
        ("quadtree", lambda model: model(torch.randn(1, 3, 250, 256))),
        ("sparseformer", lambda model: model(torch.randn(1, 3, 32, 32), num_tokens=3)),
    ],
)
def test_messages_are_on_the_page(name, call, request):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the page holds the messages)
        call(request.getfixturevalue(name))
    assert_on_the_page(str(caught.value))


def test_a_folder_that_is_taken_and_a_pickle_are_on_the_page(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="exists already") as caught:
        polyscale.convert_checkpoint(save_tiny_flexivit(tmp_path / "source"), tmp_path / "taken")
    assert_on_the_page(str(caught.value))
