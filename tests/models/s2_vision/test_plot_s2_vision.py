"""The drawings of S2: sizes, lines and colours."""

import numpy as np
import pytest
import torch
from PIL import Image
from s2_tiny import make_base

from polyscale.models.s2_vision import S2VisionWrapper, multiscale_forward
from polyscale.models.s2_vision.plot_s2_vision import (
    LINE,
    draw_tiles,
    scale_features,
)


@pytest.fixture
def model(clip):
    return S2VisionWrapper.from_vision_model(clip, scales=[1, 2])


def test_tiles_have_borders(model):
    grey = Image.new("RGB", (100, 100), (90, 90, 90))
    drawn = np.array(draw_tiles(grey, model.config.plan_for((64, 64)), scale=1))
    assert drawn.shape == (64, 64, 3)
    assert tuple(drawn[32, 10]) == LINE
    assert tuple(drawn[10, 32]) == LINE
    assert tuple(drawn[20, 20]) == (90, 90, 90)


def test_features_of_each_scale(model, images):
    first, second = scale_features(model, images[:1])
    assert first.shape == (16, 4, 4)
    assert second.shape == (16, 8, 8)
    both = multiscale_forward(
        model.vision_model, images[:1], img_sizes=[32, 64], max_split_size=32, num_prefix_token=1
    )
    torch.testing.assert_close(first.flatten(1).T, both[0, 1:, :16])
    pooled = torch.nn.functional.avg_pool2d(second[None], 2)[0]
    torch.testing.assert_close(pooled.flatten(1).T, both[0, 1:, 16:], atol=1e-5, rtol=1e-4)
    convnet = S2VisionWrapper.from_vision_model(make_base("convnext"), scales=[1, 2])
    assert scale_features(convnet, images[:1])[1].shape == (16, 4, 4)
