"""S2 with a tile budget, against a reference that loops over images and tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from s2_tiny import make_base

from polyscale.models.s2_vision import S2VisionForImageClassification, S2VisionWrapper


SCALES = [1, 2, 3]


def images(batch=2, size=96, seed=5):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wrapped(name, **fields):
    return S2VisionWrapper.from_vision_model(make_base(name), scales=SCALES, **fields).eval()


def tiles_of(image, scale):
    side = 32 * scale
    whole = F.interpolate(image[None], size=side, mode="bicubic") if side != image.shape[-1] else image[None]
    return [
        whole[:, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        for row in range(scale)
        for column in range(scale)
    ], whole


def detail(image):
    """Mean squared difference of each tile of the scales 2 and 3 to the enlarged first scale."""
    _, first = tiles_of(image, 1)
    scores = []
    for scale in (2, 3):
        enlarged = F.interpolate(first, size=32 * scale, mode="bicubic")[0]
        own, _ = tiles_of(image, scale)
        other, _ = tiles_of(enlarged, scale)
        scores += [float((a - b).square().mean()) for a, b in zip(own, other, strict=True)]
    return scores


def reference(model, image, chosen, fill):
    """Tokens without prefix of one image (1, tokens, 3 * width); `chosen`: places of the tiles that run."""
    base, prefix, side = model.vision_model, model.config.num_prefix_tokens, model.config.features_per_tile[0]

    def run(tile, **budget):
        tokens = base(tile, **budget).last_hidden_state[:, prefix:]
        return tokens.transpose(1, 2).unflatten(2, (int(tokens.shape[1] ** 0.5),) * 2)

    first = run(tiles_of(image, 1)[0][0])
    maps, place = [first], 0
    for scale in (2, 3):
        spread = F.interpolate(first, size=scale * side, mode="bilinear")
        rows = []
        for row in range(scale):
            columns = []
            for column in range(scale):
                tile = tiles_of(image, scale)[0][row * scale + column]
                if place in chosen:
                    part = run(tile)
                elif fill == "coarse":
                    part = F.interpolate(run(tile, patch_size=16), size=side, mode="bilinear")
                else:
                    part = spread[:, :, row * side : row * side + side, column * side : column * side + side]
                columns.append(part)
                place += 1
            rows.append(torch.cat(columns, dim=3))
        maps.append(F.interpolate(torch.cat(rows, dim=2), size=side, mode="area"))
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("name", "fill"), [("flexivit", "coarse"), ("flexivit", "first_scale"), ("clip", None)])
@pytest.mark.parametrize("num_tiles", [0, 4, 9])
def test_values_are_those_of_a_loop(name, fill, num_tiles):
    model = wrapped(name, num_tiles=num_tiles, tile_fill=fill)
    batch = images()
    with torch.no_grad():
        outputs = model(batch, output_hidden_states=-1)
        for index, image in enumerate(batch):
            scores = detail(image)
            chosen = sorted(range(13), key=lambda place: -scores[place])[:num_tiles]
            assert outputs.tile_mask[index].nonzero().flatten().tolist() == sorted(chosen)
            expected = reference(model, image, chosen, fill)
            prefix = model.config.num_prefix_tokens
            torch.testing.assert_close(outputs[0][index, prefix:], expected[0], atol=1e-5, rtol=1e-4)
    assert outputs.hidden_states[-1].shape == outputs[0].shape


@pytest.mark.parametrize("name", ["flexivit", "quadtree_vit", "clip", "siglip", "convnext"])
def test_exact_at_the_full_number(name):
    base = make_base(name)
    size = 64 if name == "convnext" else 32
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2]).eval()
    batch = images(size=2 * size)
    with torch.no_grad():
        full, budget = model(batch, output_hidden_states=True), model(batch, num_tiles=4, output_hidden_states=True)
        torch.testing.assert_close(budget[0], full[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(budget.pooler_output, full.pooler_output, atol=1e-5, rtol=1e-4)
        for one, other in zip(budget.hidden_states, full.hidden_states, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        fewer = model(batch, num_tiles=2)
    assert budget.tile_mask.all()
    assert full.tile_mask is None
    assert fewer.tile_mask.sum(dim=1).tolist() == [2, 2]
    assert fewer[0].shape == full[0].shape
    assert torch.isfinite(fewer[0]).all()
    assert (fewer[0] - full[0]).abs().max() > 1e-4


def test_a_quadtree_inside_runs_the_other_tiles_at_a_quarter_of_its_tokens():
    model = wrapped("quadtree_vit", num_tiles=0)
    assert model.config.coarse_budget({}) == {"num_tokens": 10}
    assert model.config.coarse_budget({"num_tokens": 64}) == {"num_tokens": 16}
    batch = images()
    with torch.no_grad():
        coarse = S2VisionWrapper.from_vision_model(model.vision_model, scales=SCALES)(batch, num_tokens=10)
        fine = S2VisionWrapper.from_vision_model(model.vision_model, scales=SCALES)(batch)
        outputs = model(batch)
    width = model.vision_model.config.hidden_size
    torch.testing.assert_close(outputs[0][..., :width], fine[0][..., :width], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0][..., width:], coarse[0][..., width:], atol=1e-5, rtol=1e-4)


def test_scores_from_outside_and_each_image_alone():
    model = wrapped("flexivit", num_tiles=3)
    batch = images(3)
    scores = torch.rand(3, 13, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = model(batch, tile_scores=scores)
        expected = scores >= scores.topk(3, dim=1).values[:, -1:]
        assert torch.equal(outputs.tile_mask, expected)
        own = model(batch)
        for index in range(3):
            alone = model(batch[index : index + 1])
            torch.testing.assert_close(alone[0][0], own[0][index], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numbers_of_numpy_and_torch_are_taken(kind):
    model = wrapped("flexivit")
    with torch.no_grad():
        torch.testing.assert_close(model(images(), num_tiles=kind(5))[0], model(images(), num_tiles=5)[0])


@pytest.mark.parametrize("options", [{"tiles_per_forward": 2}, {"split_forward": True}])
def test_chunks_change_nothing(options):
    model, other = wrapped("flexivit", num_tiles=5), wrapped("flexivit", num_tiles=5, **options)
    with torch.no_grad():
        torch.testing.assert_close(other(images())[0], model(images())[0], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_model_inside_and_equal_those_of_the_loop():
    model = wrapped("flexivit", num_tiles=4)
    batch = images(1)
    scores = detail(batch[0])
    chosen = sorted(range(13), key=lambda place: -scores[place])[:4]
    weight = model.vision_model.embeddings.patch_embeddings.projection.weight
    prefix = model.config.num_prefix_tokens
    target = torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(0))
    grad = torch.autograd.grad((model(batch)[0][:, prefix:] * target).sum(), weight)[0]
    expected = torch.autograd.grad((reference(model, batch[0], chosen, "coarse") * target).sum(), weight)[0]
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)


def test_sizes_that_do_not_come_out_even():
    for uneven in ("resize", "pad"):
        model = wrapped("clip", uneven=uneven)
        batch = images(2, 96)[:, :, :70]
        with torch.no_grad():
            full = model(batch)
            total = sum(model.config.plan_for((70, 96)).num_tiles(scale) for scale in (1, 2))
            torch.testing.assert_close(model(batch, num_tiles=total)[0], full[0], atol=1e-5, rtol=1e-4)
            assert model(batch, num_tiles=2)[0].shape == full[0].shape


def test_saved_and_classified(tmp_path):
    model = S2VisionForImageClassification.from_vision_model(
        make_base("flexivit"), scales=SCALES, num_tiles=5, num_labels=3
    ).eval()
    model.save_pretrained(tmp_path)
    reloaded = S2VisionForImageClassification.from_pretrained(tmp_path).eval()
    assert reloaded.config.num_tiles == 5
    with torch.no_grad():
        torch.testing.assert_close(reloaded(images()).logits, model(images()).logits)
        full = model(images(), num_tiles=13).logits
    assert (full - model(images()).logits).abs().max() > 1e-5


def test_attentions_are_those_of_the_tiles_that_ran():
    model = S2VisionWrapper.from_vision_model(make_base("flexivit"), scales=SCALES, attn_implementation="eager")
    model.set_attn_implementation("eager")
    outputs = model(images(), num_tiles=4, output_attentions=True)
    assert len(outputs.attentions) == 3
    assert outputs.attentions[0].shape[:2] == (2, 1 + 4)


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported():
    model = wrapped("flexivit", num_tiles=4)
    with torch.no_grad():
        expected = model(images())[0]
        program = torch.export.export(model, (images(),))
        torch.testing.assert_close(program.module()(images())[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tiles": 14}, "between 0 and 13"),
        ({"num_tiles": -1}, "at least 0"),
        ({"tile_fill": "maps"}, "'coarse', 'first_scale', 'map'"),
        ({"num_tiles": 2, "dynamic": True, "resize_output_to_idx": -1}, "use `max_tiles`"),
    ],
)
def test_illegal_budgets_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        wrapped("flexivit", **fields)


def test_what_the_wrapped_model_cannot_do_is_refused():
    with pytest.raises(ValueError, match="use 'first_scale'"):
        wrapped("clip", tile_fill="coarse")
    model = wrapped("clip")
    with pytest.raises(ValueError, match="between 0 and 13"):
        model(images(), num_tiles=20)
    with pytest.raises(ValueError, match=r"\(2, 13\), got \(2, 9\)"):
        model(images(), num_tiles=2, tile_scores=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="needs `num_tiles`"):
        model(images(), tile_scores=torch.zeros(2, 13))
