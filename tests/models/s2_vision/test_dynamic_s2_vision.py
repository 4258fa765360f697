"""Dynamic-S2: tiles by aspect ratio, each image with its own number of tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from s2_tiny import make_base

from polyscale.models.s2_vision import (
    S2ImageProcessor,
    S2VisionBackbone,
    S2VisionForImageClassification,
    S2VisionWrapper,
)
from polyscale.models.s2_vision.dynamic_tiling_s2_vision import dynamic_tile_grid
from polyscale.models.s2_vision.modeling_s2_vision import S2VisionOutput


OPTIONS = {"scales": [1, 2], "dynamic": True, "max_tiles": 6, "resize_output_to_idx": -1}


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1080, 1920), (3, 4)),
        ((1920, 1080), (5, 2)),
        ((1000, 1000), (3, 3)),
        ((100, 3000), (1, 12)),
        ((448, 1344), (2, 6)),
    ],
)
def test_published_tilings(size, grid):
    """(height, width) -> (rows, columns) at 448 pixels, at most 12 tiles."""
    assert dynamic_tile_grid(size, 3, 12, 448) == grid


def test_ties_go_to_more_tiles_only_for_large_images():
    assert dynamic_tile_grid((10, 10), 1, 4, 448) == (1, 1)
    assert dynamic_tile_grid((4480, 4480), 1, 4, 448) == (2, 2)


@pytest.fixture
def model():
    return S2VisionWrapper.from_vision_model(make_base("clip"), **OPTIONS)


@pytest.fixture
def photographs():
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((40, 90), (70, 60), (90, 30))
    ]


def reference(base, tiles, rows, columns):
    """The tokens of one image: tiles of the first scale (1), the second (2 x 2) with rows x columns in its place."""

    def joined(part, grid):
        maps = base(part).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        lines = [torch.cat(list(maps[row * grid[1] : (row + 1) * grid[1]]), dim=2) for row in range(grid[0])]
        return torch.cat(lines, dim=1)[None]

    first, last = joined(tiles[:1], (1, 1)), joined(tiles[1 : 1 + rows * columns], (rows, columns))
    features = torch.cat([F.interpolate(first, size=last.shape[-2:], mode="area"), last], dim=1)
    return features.flatten(2).transpose(1, 2)[0]


def test_what_the_processor_cuts_the_model_takes(model, photographs):
    processor = S2ImageProcessor.for_config(model.config)
    inputs = processor(photographs, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 7, 3, 32, 32)
    assert inputs["image_sizes"].tolist() == [[64, 96], [64, 64], [128, 32]]
    outputs = model(**inputs)
    assert outputs.block_sizes.tolist() == [[2, 3], [2, 2], [4, 1]]
    assert outputs.num_tokens.tolist() == [96, 64, 64]
    assert outputs.token_mask.sum(dim=1).tolist() == [96, 64, 64]
    assert outputs.last_hidden_state.shape == (3, 97, 32)
    for index, (rows, columns) in enumerate(outputs.block_sizes.tolist()):
        expected = reference(model.vision_model, inputs["pixel_values"][index], rows, columns)
        torch.testing.assert_close(
            outputs.last_hidden_state[index, 1 : 1 + len(expected)], expected, atol=1e-5, rtol=1e-4
        )
    assert outputs.last_hidden_state[1, 65:].abs().max() == 0


def test_packed_tiles_give_the_same_as_padded(model, photographs):
    inputs = S2ImageProcessor.for_config(model.config)(photographs, return_tensors="pt")
    padded = model(**inputs)
    tiles = torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], (7, 5, 5), strict=True)])
    packed = model(tiles, image_sizes=inputs["image_sizes"])
    torch.testing.assert_close(packed.last_hidden_state, padded.last_hidden_state)
    for chunked in ({"tiles_per_forward": 2}, {"split_forward": True}):
        other = S2VisionWrapper.from_vision_model(model.vision_model, **OPTIONS, **chunked)
        torch.testing.assert_close(other(**inputs)[0], padded[0], atol=1e-5, rtol=1e-4)


def test_hidden_states_and_one_image_alone(model, photographs):
    processor = S2ImageProcessor.for_config(model.config)
    batch = model(**processor(photographs, return_tensors="pt"), output_hidden_states=-2)
    alone = model(**processor(photographs[1], return_tensors="pt"), output_hidden_states=-2)
    assert [state is None for state in alone.hidden_states] == [True, True, False, True]
    torch.testing.assert_close(alone.hidden_states[2][0], batch.hidden_states[2][1, :65], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.pooler_output[0], batch.pooler_output[1], atol=1e-5, rtol=1e-4)


def test_whole_images_are_tiled_by_the_model(model):
    """A tensor without `image_sizes`: the same scales, resized as the image processor resizes (antialiased)."""
    images = torch.randn(2, 3, 64, 96)
    outputs = model(images)
    assert outputs.num_tokens.tolist() == [96, 96]
    small = F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True)
    tiles = [images[:, :, row : row + 32, column : column + 32] for row in (0, 32) for column in (0, 32, 64)]
    for index in range(2):
        expected = reference(model.vision_model, torch.stack([small[index], *(tile[index] for tile in tiles)]), 2, 3)
        torch.testing.assert_close(outputs.last_hidden_state[index, 1:], expected, atol=1e-5, rtol=1e-4)


def test_classifier_pools_only_real_tokens(photographs):
    model = S2VisionForImageClassification.from_vision_model(
        make_base("clip"), **OPTIONS, num_labels=3, pooling="mean"
    )
    processor = S2ImageProcessor.for_config(model.config)
    batch = model(**processor(photographs, return_tensors="pt")).logits
    for index, photograph in enumerate(photographs):
        alone = model(**processor(photograph, return_tensors="pt")).logits
        torch.testing.assert_close(alone[0], batch[index], atol=1e-5, rtol=1e-4)


def test_the_mean_of_many_tokens_in_half_precision_is_finite():
    model = S2VisionForImageClassification.from_vision_model(
        make_base("clip"), **OPTIONS, num_labels=3, pooling="mean"
    )
    features = torch.full((2, model.config.num_prefix_tokens + 4000, 8), 20.0, dtype=torch.float16)
    features[1, model.config.num_prefix_tokens + 1000 :] = 0  # padding
    counts = torch.tensor([4000, 1000])
    pooled = model._pool(S2VisionOutput(last_hidden_state=features, num_tokens=counts, token_mask=counts))
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled, features[:, 1])


def test_bad_tiles_are_refused(model):
    tiles = torch.zeros(7, 3, 32, 32)
    with pytest.raises(ValueError, match="multiples of the tile of 32"):
        model(tiles, image_sizes=torch.tensor([[64, 90]]))
    with pytest.raises(ValueError, match=r"does not fit `image_sizes`, which say \[5\] tiles"):
        model(tiles, image_sizes=torch.tensor([[64, 64]]))
    with pytest.raises(ValueError, match="tiles of"):
        model(torch.zeros(5, 3, 16, 16), image_sizes=torch.tensor([[64, 64]]))
    with pytest.raises(ValueError, match="not a backbone"):
        S2VisionBackbone.from_vision_model(model.vision_model, **OPTIONS)
