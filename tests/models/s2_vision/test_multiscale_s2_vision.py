"""multiscale_forward against the official outputs, and against a plain reference where the official function does
not go.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from polyscale.models.s2_vision.multiscale_s2_vision import multiscale_forward
from polyscale.models.s2_vision.tiling_s2_vision import cut_tiles, join_tiles, plan_tiles, token_grid
from tests.golden import assert_golden


GOLDEN = load_file(Path(__file__).parents[2] / "fixtures" / "s2_golden.safetensors")


def toy_map(images):
    return F.conv2d(images, GOLDEN["proj.weight"], GOLDEN["proj.bias"], stride=16)


def toy_tokens(images):
    tokens = toy_map(images).flatten(2).transpose(1, 2)
    return torch.tanh(tokens + 0.1 * tokens.mean(dim=1, keepdim=True))


def toy_with_cls(images):
    tokens = toy_tokens(images)
    return torch.cat([GOLDEN["cls"] + tokens.mean(dim=1, keepdim=True), tokens], dim=1)


CASES = {
    "scales_1_2": (toy_with_cls, "x64", {"scales": [1, 2], "num_prefix_token": 1}),
    "scales_1_2_3": (toy_with_cls, "x64", {"scales": [1, 2, 3], "num_prefix_token": 1}),
    "scales_1_2_noprefix": (toy_tokens, "x64", {"scales": [1, 2]}),
    "scales_1_2_split": (toy_with_cls, "x64", {"scales": [1, 2], "num_prefix_token": 1, "split_forward": True}),
    "scales_half_1_split64": (
        toy_with_cls,
        "x128",
        {"scales": [0.5, 1], "max_split_size": 64, "num_prefix_token": 1},
    ),
    "sizes_64_128_192_resize1": (
        toy_with_cls,
        "x64",
        {"img_sizes": [64, 128, 192], "max_split_size": 64, "resize_output_to_idx": 1, "num_prefix_token": 1},
    ),
    "bchw_scales_1_2": (toy_map, "x64", {"scales": [1, 2], "output_shape": "bchw"}),
}
CHUNKS = [{}, {"split_forward": True}, {"tiles_per_forward": 1}, {"tiles_per_forward": 3}, {"tiles_per_forward": 99}]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_function(name, chunks):
    model, images, options = CASES[name]
    result = multiscale_forward(model, GOLDEN[images], **{**options, **chunks})
    assert_golden(result, GOLDEN[name])


def reference(model, images, sizes, tile, uneven, target):
    """Tile by tile and scale by scale, written down as it is described."""
    maps = []
    for height, width in sizes:
        rows, columns = math.ceil(height / tile[0]), math.ceil(width / tile[1])
        scaled = F.interpolate(images, size=(height, width), mode="bicubic")
        if uneven == "resize":
            scaled = F.interpolate(scaled, size=(rows * tile[0], columns * tile[1]), mode="bicubic")
        else:
            scaled = F.pad(scaled, (0, columns * tile[1] - width, 0, rows * tile[0] - height))
        lines = []
        for row in range(rows):
            line = []
            for column in range(columns):
                top, left = row * tile[0], column * tile[1]
                line.append(model(scaled[:, :, top : top + tile[0], left : left + tile[1]]))
            lines.append(torch.cat(line, dim=3))
        whole = torch.cat(lines, dim=2)
        grid = (math.ceil(height * 4 / tile[0]), math.ceil(width * 4 / tile[1]))
        maps.append((whole if uneven == "resize" else whole[:, :, : grid[0], : grid[1]], grid))
    return torch.cat([F.interpolate(part, size=maps[target][1], mode="area") for part, _ in maps], dim=1)


def four_by_four(images):
    """A model of a fixed grid: 4 x 4 features of any tile, that see where in the tile they are."""
    height, width = images.shape[-2:]
    ramp = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 2, width)
    return F.adaptive_avg_pool2d(torch.tanh(images * (1 + ramp)), 4)


@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    sizes=st.lists(st.tuples(st.integers(3, 50), st.integers(3, 50)), min_size=1, max_size=3),
    tile=st.tuples(st.sampled_from([8, 12, 16]), st.sampled_from([8, 12, 16])),
    uneven=st.sampled_from(["resize", "pad"]),
    chunk=st.sampled_from([None, 1, 4]),
    target=st.integers(-3, 2),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_reference(height, width, sizes, tile, uneven, chunk, target):
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    target = target % len(sizes)
    result = multiscale_forward(
        four_by_four,
        images,
        img_sizes=sizes,
        max_split_size=tile,
        output_shape="bchw",
        uneven=uneven,
        tiles_per_forward=chunk,
        resize_output_to_idx=target,
    )
    expected = reference(four_by_four, images, sizes, tile, uneven, target)
    torch.testing.assert_close(result, expected, atol=3e-5, rtol=1e-4)


def test_a_model_sees_only_tiles_of_the_split_size():
    seen = []

    def model(tiles):
        seen.append(tuple(tiles.shape))
        return toy_tokens(tiles)

    for uneven in ("resize", "pad"):
        result = multiscale_forward(model, GOLDEN["x64"], img_sizes=[64, 96], max_split_size=64, uneven=uneven)
        assert result.shape == (2, 16, 24)
    assert seen == [(10, 3, 64, 64)] * 2  # one batch: 1 + 4 tiles of two images


@pytest.mark.parametrize("uneven", ["resize", "pad"])
def test_the_feature_grid_is_that_of_the_image(uneven):
    wide = torch.randn(1, 3, 32, 64)
    sizes = [(32, 64), (64, 128), (96, 160)]
    for target, tokens in enumerate([2 * 4, 4 * 8, 6 * 10]):
        result = multiscale_forward(
            toy_tokens, wide, img_sizes=sizes, max_split_size=64, uneven=uneven, resize_output_to_idx=target
        )
        assert result.shape == (1, tokens, 36)


def test_output_objects_and_tuples():
    from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

    expected = multiscale_forward(toy_tokens, GOLDEN["x64"], scales=[1, 2])
    for wrap in (lambda x: BaseModelOutput(last_hidden_state=toy_tokens(x)), lambda x: (toy_tokens(x), None)):
        torch.testing.assert_close(multiscale_forward(wrap, GOLDEN["x64"], scales=[1, 2]), expected)
    maps = multiscale_forward(
        lambda x: BackboneOutput(feature_maps=(x, toy_map(x))), GOLDEN["x64"], scales=[1, 2], output_shape="bchw"
    )
    assert_golden(maps, GOLDEN["bchw_scales_1_2"])


def test_half_precision_keeps_its_dtype_and_gradients_reach_the_input():
    result = multiscale_forward(lambda x: x.flatten(2).transpose(1, 2), GOLDEN["x64"].bfloat16(), scales=[1, 2])
    assert result.dtype == torch.bfloat16
    for chunks in CHUNKS:
        images = GOLDEN["x64"].clone().requires_grad_()
        multiscale_forward(toy_tokens, images, scales=[1, 2], **chunks).square().sum().backward()
        expected = images.grad if not chunks else expected  # noqa: F821
        torch.testing.assert_close(images.grad, expected, atol=1e-5, rtol=1e-4)


def test_cut_and_join_are_inverse():
    images = torch.randn(3, 2, 12, 20)
    tiles = cut_tiles(images, (2, 5))
    assert torch.equal(tiles[0], images[0, :, :6, :4])
    assert torch.equal(tiles[3], images[0, :, :6, 4:8])  # tile-major: (rows, columns, batch)
    assert torch.equal(join_tiles(tiles, (2, 5)), images)


def test_token_grids():
    assert token_grid(196, (224, 224)) == (14, 14)
    assert token_grid(98, (224, 112)) == (14, 7)
    assert token_grid(12, (64, 48)) == (4, 3)
    assert token_grid(6, (50, 33)) == (3, 2)


BAD = [
    ({"scales": [1, 2], "img_sizes": [64]}, "not both and not neither: got both"),
    ({}, "got neither"),
    ({"scales": []}, "`scales` must be a list"),
    ({"scales": [1, 0]}, "positive"),
    ({"scales": [float("nan")]}, "positive"),
    ({"scales": [1, 0.001]}, "empty tile"),
    ({"img_sizes": [0]}, "`img_sizes` must be at least 1"),
    ({"scales": [1], "max_split_size": 0}, "`max_split_size`"),
    ({"scales": [1], "uneven": "crop"}, "`uneven` must be one of 'resize', 'pad'"),
    ({"scales": [1], "output_shape": "nchw"}, "`output_shape`"),
    ({"scales": [1], "resize_output_to_idx": 1}, "`resize_output_to_idx`"),
    ({"scales": [1], "tiles_per_forward": 0}, "`tiles_per_forward`"),
    ({"scales": [1], "num_prefix_token": -1}, "`num_prefix_token`"),
    ({"scales": [1], "output_shape": "bchw", "num_prefix_token": 1}, "`num_prefix_token`"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_refused_before_the_model_runs(options, message):
    def never(tiles):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=message):
        multiscale_forward(never, GOLDEN["x64"], **options)


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 8, 8).int()])
def test_bad_images_are_refused(images):
    with pytest.raises(ValueError, match="`input` must be floating-point images"):
        multiscale_forward(toy_tokens, images, scales=[1])


def test_outputs_that_are_no_features_are_refused():
    from transformers.modeling_outputs import ImageClassifierOutput

    x64 = GOLDEN["x64"]
    with pytest.raises(ValueError, match="logits"):
        multiscale_forward(lambda x: toy_tokens(x).mean(dim=1), x64, scales=[1])
    with pytest.raises(ValueError, match="logits"):
        multiscale_forward(lambda x: ImageClassifierOutput(logits=torch.zeros(1)), x64, scales=[1])
    with pytest.raises(ValueError, match="num_prefix_token"):
        multiscale_forward(toy_with_cls, x64, scales=[1])
    with pytest.raises(ValueError, match="Use `output_shape='bchw'`"):
        multiscale_forward(toy_map, x64, scales=[1])
    with pytest.raises(ValueError, match="must return features"):
        multiscale_forward(lambda x: None, x64, scales=[1])
    with pytest.raises(ValueError, match="`model` must be a model or a function from images to features, got 5"):
        multiscale_forward(5, x64, scales=[1])
    with pytest.raises(ValueError, match="`model` gives features of 1 images for"):
        multiscale_forward(lambda x: toy_tokens(x)[:1], torch.cat([x64, x64]), scales=[1])
    with pytest.raises(ValueError, match=r"`num_prefix_token` must be below the \d+ tokens .*, got 500"):
        multiscale_forward(toy_tokens, x64, scales=[1], num_prefix_token=500)


def test_plans():
    plan = plan_tiles((64, 32), scales=[1, 2.5], max_split_size=64)
    assert plan.sizes == ((64, 32), (160, 80))
    assert [plan.tile_grid(scale) for scale in (0, 1)] == [(1, 1), (3, 2)]
    assert plan_tiles((64, 32), scales=[1]).tile == (64, 32)
