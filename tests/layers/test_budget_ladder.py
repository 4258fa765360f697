"""Which budgets a family tries when nobody names any."""

import pytest
from transformers import CLIPVisionConfig, ViTConfig

from polyscale import FlexiViTConfig, QuadtreeViTConfig, S2VisionConfig, SparseFormerConfig
from polyscale.layers.token_budget import budget_ladder_of


_TOWER = CLIPVisionConfig(image_size=16, patch_size=4)
_FLEXIVIT = FlexiViTConfig(image_size=32, base_patch_size=8, train_patch_sizes=[4, [8, 4], 8, 24])
_QUADTREE = QuadtreeViTConfig(image_size=32, min_patch_size=4, max_patch_size=16)


@pytest.mark.parametrize(
    ("config", "image_size", "expected"),
    [
        (_FLEXIVIT, None, [24, 8, [8, 4], 4]),
        (_FLEXIVIT, 16, [8, [8, 4], 4]),  # a patch of 24 pixels is larger than the image
        (_FLEXIVIT, 2, [4, [8, 4], 8, 24]),  # none fits: the model says so when it runs
        (FlexiViTConfig(base_patch_size=16), None, [16]),
        (_QUADTREE, None, [4, 10, 19, 28, 37, 46, 55, 64]),
        (_QUADTREE, (16, 32), [2, 5, 8, 14, 17, 23, 26, 32]),
        (SparseFormerConfig(), None, [None]),
        (S2VisionConfig(vision_config=_TOWER, scales=[1, 2]), None, [[1, 1], [1, 2]]),
        (S2VisionConfig(vision_config=_TOWER, scales=[0.5, 2, 1]), None, [[0.5] * 3, [0.5, 1, 1], [0.5, 2, 1]]),
        (S2VisionConfig(vision_config=_TOWER, img_sizes=[16, [16, 32]]), None, [[16, 16], [16, [16, 32]]]),
        (S2VisionConfig(vision_config=_TOWER, scales=[1]), None, [[1]]),
        (S2VisionConfig(vision_config=_TOWER, scales=[1, 2], num_tiles=2), None, [[1, 2]]),
        (S2VisionConfig(vision_config=_TOWER, scales=[1, 2], dynamic=True), None, [[1, 2]]),
        (ViTConfig(), None, [None]),
    ],
)
def test_the_ladder_goes_from_few_tokens_to_many(config, image_size, expected):
    assert budget_ladder_of(config, image_size) == expected
