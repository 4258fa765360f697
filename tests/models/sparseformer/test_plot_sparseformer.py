import numpy as np
import pytest
import torch
from PIL import Image
from sparseformer_reference import make_model, tiny_config

from polyscale.models.sparseformer import SparseFormerForImageClassification, SparseFormerImageProcessor
from polyscale.models.sparseformer.plot_sparseformer import (
    draw_rois,
    draw_sampling_points,
    draw_sparseformer,
    token_color,
)


def test_a_roi_is_drawn_where_it_is():
    rois = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    drawn = np.asarray(draw_rois(Image.new("RGB", (80, 40)), rois, tokens=[0], width=80))
    marked = (drawn == token_color(0)).all(axis=-1)
    rows, columns = np.nonzero(marked)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 20, 59)
    assert marked.sum() == 2 * 40 + 2 * 18
    assert not (drawn == token_color(1)).all(axis=-1).any()


def test_points_are_drawn_where_they_are():
    points = torch.tensor([[[0.5, 0.25]], [[0.1, 0.9]]])
    drawn = np.asarray(draw_sampling_points(Image.new("RGB", (100, 100)), points, width=100))
    for token, (x, y) in enumerate([(50, 25), (10, 90)]):
        rows, columns = np.nonzero((drawn == token_color(token)).all(axis=-1))
        assert abs(rows.mean() - y) <= 1
        assert abs(columns.mean() - x) <= 1


def test_a_very_long_image_is_drawn_squashed():
    drawn = draw_rois(Image.new("RGB", (1, 3000), "black"), torch.tensor([[0.0, 0.5, 1.0, 1.0]]), width=100)
    assert drawn.size == (100, 400)
    assert drawn.getpixel((50, 200)) == token_color(0)


def test_a_model_sampling_by_sampling():
    model = make_model(SparseFormerForImageClassification, tiny_config())
    processor = SparseFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    grid = draw_sparseformer(model, processor, image, tokens=[0, 4], width=50)
    assert grid.size == (4 * 54 - 4, 3 * 54 - 4)  # image and three samplings; all tokens and two of them
    with pytest.raises(ValueError, match="indices from 0 to 4"):
        draw_sparseformer(model, processor, image, tokens=[5])
