"""The fill "map" of a tile budget: least squares, its use, its place in the checkpoint, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from s2_tiny import make_base
from transformers import AutoModel, AutoModelForImageClassification

import polyscale
from polyscale.models.s2_vision import S2VisionForImageClassification, S2VisionWrapper


SCALES = [1, 2]


def images(number=12, size=64, seed=5):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wrapped(name, **fields):
    return S2VisionWrapper.from_vision_model(make_base(name), scales=SCALES, **fields).eval()


@torch.no_grad()
def pairs(model, batch):
    """(enlarged features of the first scale, features of the tiles), each (4 * images, 16, width), tile by tile."""
    base, prefix = model.vision_model, model.config.num_prefix_tokens
    small = F.interpolate(batch, size=32, mode="bicubic")
    first = base(small).last_hidden_state[:, prefix:].transpose(1, 2).unflatten(2, (4, 4))
    spread = F.interpolate(first, size=8, mode="bilinear")
    inputs, targets = [], []
    for row in (0, 1):
        for column in (0, 1):
            inputs.append(spread[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(2).transpose(1, 2))
            tile = batch[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            targets.append(base(tile).last_hidden_state[:, prefix:])
    return torch.cat(inputs), torch.cat(targets)


def test_the_map_is_that_of_least_squares():
    model, batch = wrapped("clip"), images()
    polyscale.fit_tile_map(model, batch.split(5), ridge=0.0)
    inputs, targets = (values.flatten(0, 1).double() for values in pairs(model, batch))
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(inputs, targets).solution.float()
    layer = model.tile_map.maps["last_hidden_state"][0]
    fitted = inputs.float() @ torch.cat([layer.weight.T, layer.bias[None]])
    torch.testing.assert_close(fitted, inputs.float() @ expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_filled_tiles_are_what_the_map_says():
    model, batch = wrapped("clip"), images()
    polyscale.fit_tile_map(model, batch, ridge=0.1)
    mapped = model.tile_map.maps["last_hidden_state"][0](pairs(model, batch)[0]).transpose(1, 2)
    tiles = mapped.unflatten(2, (4, 4)).unflatten(0, (2, 2, len(batch)))  # (rows, columns, images, width, 4, 4)
    whole = tiles.permute(2, 3, 0, 4, 1, 5).reshape(len(batch), -1, 8, 8)
    expected = F.interpolate(whole, size=4, mode="area").flatten(2).transpose(1, 2)
    outputs = model(batch, num_tiles=0)
    torch.testing.assert_close(outputs.last_hidden_state[:, 1:, 16:], expected, atol=1e-5, rtol=1e-4)
    pooled = model.tile_map.maps["pooler_output"][0](model(batch).pooler_output[:, :16])
    torch.testing.assert_close(outputs.pooler_output[:, 16:], pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(batch, num_tiles=4)[0], model(batch)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flexivit", "quadtree_vit", "siglip", "dinov2_with_registers", "convnext"])
@torch.no_grad()
def test_it_is_nearer_than_the_first_scale(name):
    size = 128 if name == "convnext" else 64
    batch = images(number=16, size=size)
    model = wrapped(name)
    exact = model(batch, output_hidden_states=-2)
    model.config.tile_fill = "first_scale"
    copied = model(batch, num_tiles=1)
    polyscale.fit_tile_map(model, batch, layers=-2)
    filled = model(batch, num_tiles=1, output_hidden_states=-2)

    def error(outputs, name="last_hidden_state"):
        return (outputs[name] - exact[name]).square().mean()

    assert filled.tile_mask.sum(dim=1).tolist() == [1] * 16
    assert error(filled) < error(copied)
    assert error(filled, "pooler_output") < error(copied, "pooler_output")
    assert filled.hidden_states[-2].shape == exact.hidden_states[-2].shape


@torch.no_grad()
def test_it_is_in_the_checkpoint(tmp_path):
    batch = images()
    model = S2VisionForImageClassification.from_vision_model(make_base("flexivit"), scales=SCALES, num_labels=3).eval()
    polyscale.fit_tile_map(model, batch, layers=[-2])
    model.config.num_tiles = 2
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert (reloaded.config.tile_fill, reloaded.config.tile_map_layers) == ("map", [2])
    torch.testing.assert_close(reloaded(batch).logits, model(batch).logits, atol=0, rtol=0)
    tower = AutoModel.from_pretrained(tmp_path).eval()
    expected = model.s2_vision(batch, output_hidden_states=2).hidden_states[2]
    torch.testing.assert_close(tower(batch, output_hidden_states=2).hidden_states[2], expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="no map for the hidden states of layer 1"):
        tower(batch, output_hidden_states=1)
    model.config.tile_fill = "coarse"
    assert not torch.equal(model(batch).logits, reloaded(batch).logits)


def test_what_was_not_fitted_and_cannot_be_is_refused():
    model, batch = wrapped("clip", tile_fill="map"), images(number=2)
    assert model.tile_map is None
    with torch.no_grad():
        assert model(batch).last_hidden_state.shape[-1] == 32  # all tiles run
        with pytest.raises(ValueError, match=r"fit them with `polyscale\.fit_tile_map"):
            model(batch, num_tiles=2)
    with pytest.raises(ValueError, match="between -4 and 3"):
        polyscale.fit_tile_map(model, batch, layers=4)
    with pytest.raises(ValueError, match="holds no image"):
        polyscale.fit_tile_map(model, [])
    assert model.config.tile_map_layers is None
    with pytest.raises(ValueError, match="`ridge`"):
        polyscale.fit_tile_map(model, batch, ridge=-1.0)
    with pytest.raises(ValueError, match="S2VisionWrapper"):
        polyscale.fit_tile_map(make_base("clip"), batch)
    dynamic = wrapped("clip", dynamic=True, resize_output_to_idx=-1)
    with pytest.raises(ValueError, match="`dynamic=True`"):
        polyscale.fit_tile_map(dynamic, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "`images` must be a tensor, or batches of them, got a NoneType"),
        ({"images": 5}, "`images` must be a tensor, or batches of them, got a int"),
        ({"images": "photographs"}, "`images` must be a tensor, or batches of them, got a str"),
        ({"images": [None]}, "`pixel_values` is required"),
        ({"images": [torch.rand(3, 64, 64)]}, "`pixel_values` must have the shape"),
        ({"images": [torch.full((1, 3, 64, 64), float("nan"))]}, "`images` holds NaN or infinite values"),
        ({"ridge": float("nan")}, "`ridge` is NaN"),
        ({"ridge": float("inf")}, "`ridge` must be finite"),
        ({"ridge": "much"}, "`ridge` must be a number, got 'much'"),
        ({"layers": "all"}, "`layers` must be an int or a list of ints, got 'all'"),
        ({"layers": ["a"]}, "`layers` must be an int, got 'a'"),
        ({"layers": True}, "`layers` must be an int, got True"),
        ({"layers": None}, "`layers` must be an int or a list of ints, got None"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": True}, "`batch_size` must be an int, got True"),
    ],
)
def test_arguments_that_are_none_leave_the_model_as_it_was(change, message):
    model = wrapped("clip")
    with pytest.raises(ValueError, match=message):
        polyscale.fit_tile_map(model, **({"images": images(number=2)} | change))
    assert (model.config.tile_fill, model.config.tile_map_layers, model.tile_map) == (None, None, None)


@pytest.mark.parametrize("layers", [[99], [-1], [4], [1, 1]])
def test_layers_of_a_config_are_those_of_the_model(layers):
    with pytest.raises(ValueError, match=r"`tile_map_layers` must be different layers from 0 to 3, got \["):
        wrapped("clip", tile_fill="map", tile_map_layers=layers)
