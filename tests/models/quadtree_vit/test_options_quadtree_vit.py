"""Better tokens: each option against a plain reference, and what all of them must keep."""

import math

import pytest
import torch
import torch.nn.functional as F

from polyscale import (
    QuadtreeViTBackbone,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTModel,
    quadtree_tokens,
)
from polyscale.layers.key_bias import with_key_bias
from polyscale.layers.token_merging import merge_tokens
from polyscale.models.quadtree_vit import (
    EmbeddingPatchScorer,
    EntropyPatchScorer,
    PatchScorer,
    register_patch_scorer,
)
from polyscale.models.quadtree_vit.configuration_quadtree_vit import PATCH_SCORERS
from polyscale.models.quadtree_vit.pyramid_quadtree_vit import PatchAggregation, feature_scores
from polyscale.models.quadtree_vit.scoring_quadtree_vit import reduce_image


SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "min_patch_size": 4,
    "max_patch_size": 16,
    "num_labels": 5,
    "pooling": "mean",
}
OPTIONS = {
    "antialias": {"reduction": "antialias"},
    "embedding": {"patch_scorer": "embedding"},
    "entropy": {"patch_scorer": "entropy"},
    "area": {"area_attention": 1.0, "area_pooling": True},
    "aggregate": {"large_patch_embedding": "aggregate"},
    "merge_layer": {"merge_layer": 1},
    "all": {
        "reduction": "antialias",
        "patch_scorer": "embedding",
        "area_attention": 0.5,
        "area_pooling": True,
        "large_patch_embedding": "aggregate",
    },
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def make_model(model_class=QuadtreeViTModel, seed: int = 0, **options):
    torch.manual_seed(seed)
    model = model_class(QuadtreeViTConfig(**{**SHAPE, **options})).eval()
    for module in model.modules():
        if isinstance(module, PatchAggregation):  # as if it were trained
            torch.nn.init.normal_(module.output.weight, std=0.1)
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    ramp = torch.linspace(0.05, 1, 32)
    return torch.randn(2, 3, 32, 32, generator=generator) * ramp


@torch.no_grad()
@each_option
def test_all_smallest_patches_are_the_plain_vit(name, images):
    model, plain = make_model(**OPTIONS[name]), make_model(max_patch_size=4)
    plain.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "aggregation" not in key and "scorer" not in key}
    )
    expected = plain(images)
    actual = model(images, num_tokens=64)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@each_option
def test_budgets_are_exact_and_patches_tile_the_image(name, images):
    model = make_model(**OPTIONS[name])
    for num_tokens in (4, 7, 31, 64):
        outputs = model(images, num_tokens=num_tokens)
        assert outputs.last_hidden_state.shape[1] == 1 + num_tokens
        assert (outputs.patch_sizes.square().sum(dim=1) == 32 * 32).all()
        assert outputs.pooler_output.isfinite().all()


@torch.no_grad()
@each_option
def test_an_image_of_a_threshold_batch_is_the_image_alone(name, images):
    model = make_model(**OPTIONS[name])
    scores = model(images, num_tokens=31, output_split_scores=True).split_scores
    threshold = float(scores[0].flatten(1).amax(dim=1).mean())  # one image has a patch above it, the other none
    both = model(images, split_threshold=threshold)
    assert both.token_mask.sum(dim=1).unique().numel() == 2  # otherwise nothing is padded
    for index in range(2):
        alone = model(images[index : index + 1], split_threshold=threshold)
        torch.testing.assert_close(both.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=1e-5)


@each_option
def test_gradients_reach_every_weight(name, images):
    model = make_model(QuadtreeViTForImageClassification, **OPTIONS[name]).train()
    model(images, labels=torch.tensor([0, 1]), num_tokens=31).loss.backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@torch.no_grad()
@each_option
def test_it_is_saved_and_reloaded(name, images, tmp_path):
    model = make_model(QuadtreeViTForImageClassification, **OPTIONS[name])
    model.save_pretrained(tmp_path)
    reloaded = QuadtreeViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reloaded(images, num_tokens=31).logits, model(images, num_tokens=31).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["embedding", "area", "aggregate", "merge_layer"])
def test_it_compiles_to_one_graph(name, images):
    model = make_model(QuadtreeViTForImageClassification, num_tokens=31, **OPTIONS[name])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


def test_antialiased_reduction_is_a_triangle_over_twice_the_cell():
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    expected = F.conv2d(image, (taps[:, None] * taps)[None, None], stride=2)  # the inner cells, 1 to 2
    actual = reduce_image(image, 2, "antialias")
    torch.testing.assert_close(
        actual[..., 1:3, 1:3], F.conv2d(image[..., 1:7, 1:7], (taps[:, None] * taps)[None, None], stride=2)
    )
    assert expected.shape[-1] == 3


def test_the_embedding_score_is_the_spread_of_the_four_parts(images):
    model = make_model(patch_scorer="embedding")
    scores = model(images, num_tokens=31, output_split_scores=True).split_scores
    projection = model.embeddings.patch_embeddings.projection
    for score, size in zip(scores, (16, 8), strict=True):
        parts_size = size // 2
        small = images if parts_size == 4 else reduce_image(images, parts_size // 4, "bilinear")
        embedded = projection(small)  # (batch, hidden, rows, columns)
        for row in range(score.shape[1]):
            for column in range(score.shape[2]):
                four = embedded[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(2)
                expected = four.var(dim=2, unbiased=False).sum(dim=1) * (size / 4)
                torch.testing.assert_close(score[:, row, column], expected.detach(), atol=1e-5, rtol=1e-4)
    assert EmbeddingPatchScorer(4, 16).config_fields() == {"patch_scorer": "embedding"}


@torch.no_grad()
def test_embeddings_of_the_pyramid_are_those_of_cut_patches(images):
    pixels, embeddings = make_model(patch_scorer="precomputed"), make_model(patch_scorer="embedding")
    chosen = embeddings(images, num_tokens=31, output_split_scores=True)
    cut = pixels(images, num_tokens=31, patch_scores=list(chosen.split_scores))
    torch.testing.assert_close(chosen.patch_centers, cut.patch_centers)
    torch.testing.assert_close(chosen.last_hidden_state, cut.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_the_entropy_is_that_of_a_histogram():
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (2, 1, 16, 16), generator=generator).float()
    grey[0, :, :8, :8] = 77
    scorer = EntropyPatchScorer(4, 16, image_mean=0.25, image_std=0.5)
    coarse, fine = scorer((grey / 255 - 0.25) / 0.5)
    assert coarse.shape == (2, 1, 1)
    assert fine.shape == (2, 2, 2)
    assert fine[0, 0, 0] == pytest.approx(0, abs=1e-5)
    for score, pixels in ((fine[1, 1, 0], grey[1, 0, 8:, :8]), (coarse[1, 0, 0], grey[1, 0])):
        counts = torch.bincount(pixels.flatten().long(), minlength=256)
        shares = counts[counts > 0] / counts.sum()
        assert float(score) == pytest.approx(-float((shares * shares.log2()).sum()), abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_large_patch_counts_as_its_small_ones_in_attention(images, attention):
    """With area_attention = 1, a key of area s weighs as s equal keys."""
    model = make_model(area_attention=1.0, num_hidden_layers=1, attn_implementation=attention)
    outputs = model(images, num_tokens=31)
    tokens = model.embeddings(images, 31)
    layer = model.layers[0]
    normed = layer.layernorm_before(tokens.embeddings)
    areas = (outputs.patch_sizes // 4) ** 2
    expected = []
    for index in range(2):
        repeats = torch.cat([torch.ones(1, dtype=torch.long), areas[index]])
        repeated = normed[index].repeat_interleave(repeats, dim=0)[None]
        query, key, value = (
            projection(source).unflatten(-1, (2, 8)).transpose(1, 2)
            for projection, source in (
                (layer.attention.q_proj, normed[index : index + 1]),
                (layer.attention.k_proj, repeated),
                (layer.attention.v_proj, repeated),
            )
        )
        weights = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(dim=-1)
        expected.append(layer.attention.o_proj((weights @ value).transpose(1, 2).flatten(2))[0])
    hidden = tokens.embeddings + torch.stack(expected)
    hidden = model.layernorm(hidden + layer.mlp(layer.layernorm_after(hidden)))
    torch.testing.assert_close(outputs.last_hidden_state, hidden, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_area_pooling_is_the_mean_of_the_dense_map(images):
    model = make_model(area_pooling=True)
    backbone = make_model(QuadtreeViTBackbone, out_indices=[-1])
    backbone.quadtree_vit.load_state_dict(model.state_dict())
    dense = backbone(images, num_tokens=31).feature_maps[0]
    torch.testing.assert_close(
        model(images, num_tokens=31).pooler_output, dense.mean(dim=(2, 3)), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("area_pooling", [False, True])
@pytest.mark.parametrize("area_attention", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pooling", ["mean", "cls_mean", "attention"])
def test_where_nothing_merges_areas_count_as_ever(images, pooling, area_attention, area_pooling):
    model = make_model(pooling=pooling, area_attention=area_attention, area_pooling=area_pooling)
    expected = model(images, num_tokens=31).pooler_output
    actual = model(images, num_tokens=31, merge_tokens_to=31).pooler_output
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_tokens_count_by_the_area_of_their_members(images):
    model = make_model(area_pooling=True, num_hidden_layers=1)
    layer = model.layers[0]
    for part in (layer.attention.o_proj, layer.mlp.fc2):
        part.weight.zero_()  # the layer does nothing but merge
        part.bias.zero_()
    model.layernorm = torch.nn.Identity()
    tokens = model.embeddings(images, 31)
    areas, patches = (tokens.patch_sizes // 4) ** 2, tokens.embeddings[:, 1:]
    keys = layer.attention.k_proj(layer.layernorm_before(patches)).unflatten(2, (2, 8)).mean(dim=2)
    merged, sizes = merge_tokens(patches, keys, 10)
    assert sizes.max() > 1
    members, _ = merge_tokens(torch.eye(31).expand(len(images), 31, 31), keys, 10)
    weights = (members > 0).float() @ areas.float()[..., None]
    expected = (merged * weights).sum(dim=1) / weights.sum(dim=1)
    actual = model(images, num_tokens=31, merge_tokens_to=21).pooler_output
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_aggregate_starts_at_nothing_and_adds_the_parts(images):
    plain = make_model()
    torch.manual_seed(0)
    fresh = QuadtreeViTModel(QuadtreeViTConfig(**SHAPE, large_patch_embedding="aggregate")).eval()
    fresh.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(images, num_tokens=31).last_hidden_state
    torch.testing.assert_close(fresh(images, num_tokens=31).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    aggregation = make_model(large_patch_embedding="aggregate").embeddings.aggregation
    maps = [torch.randn(1, side, side, 16) for side in (1, 2, 4)]
    coarse, middle, fine = aggregation(maps)
    assert fine is maps[2]
    once = aggregation.merge(maps[2].permute(0, 3, 1, 2))
    twice = aggregation.merge(once)
    torch.testing.assert_close(middle, maps[1] + aggregation.output(once.permute(0, 2, 3, 1)))
    torch.testing.assert_close(coarse, maps[0] + aggregation.output(twice.permute(0, 2, 3, 1)))


@torch.no_grad()
def test_merging_after_a_layer_is_written_out(images):
    model = make_model(merge_layer=1)
    outputs = model(images, num_tokens=31, output_split_scores=True)
    hidden = model.embeddings.all_smallest(images).embeddings
    hidden = model.layers[0](hidden)
    fine = hidden[:, 1:].unflatten(1, (8, 8))
    middle = fine.reshape(2, 4, 2, 4, 2, 16).mean(dim=(2, 4))
    coarse = middle.reshape(2, 2, 2, 2, 2, 16).mean(dim=(2, 4))
    scores = feature_scores([coarse, middle, fine])
    chosen = quadtree_tokens(scores, 31)
    table = [coarse, middle, fine]
    tokens = torch.stack(
        [
            torch.stack(
                [
                    table[int(level)][index, int(row), int(column)]
                    for level, row, column in zip(
                        chosen.level[index], chosen.row[index], chosen.column[index], strict=True
                    )
                ]
            )
            for index in range(2)
        ]
    )
    hidden = torch.cat([hidden[:, :1], tokens], dim=1)
    for layer in model.layers[1:]:
        hidden = layer(hidden)
    torch.testing.assert_close(outputs.last_hidden_state, model.layernorm(hidden), atol=1e-5, rtol=1e-5)
    assert [score.shape[1] for score in outputs.split_scores] == [2, 4]
    unlike = feature_scores([torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]]])])
    assert float(unlike[0]) == pytest.approx(1 - math.sqrt(0.5))


@torch.no_grad()
def test_similar_tokens_merge_to_an_exact_number(images):
    model = make_model(QuadtreeViTForImageClassification)
    whole = model(images, num_tokens=31)
    same = model(images, num_tokens=31, merge_tokens_to=31)
    torch.testing.assert_close(same.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert model.quadtree_vit(images, num_tokens=31, merge_tokens_to=10).last_hidden_state.shape[1] == 1 + 10
    early = make_model(QuadtreeViTForImageClassification, merge_layers=2).quadtree_vit
    states = early(images, num_tokens=31, merge_tokens_to=10, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [32, 21, 11, 11]
    with pytest.raises(ValueError, match="at least 8 for 31 tokens and 2 layers"):
        early(images, num_tokens=31, merge_tokens_to=7)
    model.config.merge_tokens_to = 10
    assert model.config.max_num_tokens_for(32, num_tokens=31) == 10
    assert model.config.num_tokens_for(32, num_tokens=31) == 10
    assert not torch.equal(model(images, num_tokens=31).logits, whole.logits)
    with pytest.raises(ValueError, match="cannot be used with `split_threshold`"):
        model(images, split_threshold=1.0)
    with pytest.raises(ValueError, match="at least 4 for 31 tokens and 3 layers"):
        model(images, num_tokens=31, merge_tokens_to=3)
    backbone = make_model(QuadtreeViTBackbone, merge_tokens_to=10)
    with pytest.raises(ValueError, match="must be None in a backbone, got 10"):
        backbone(images)
    backbone.config.merge_tokens_to = None
    with pytest.raises(ValueError, match="`merge_tokens_to` is no argument of QuadtreeViTBackbone: it merges no tok"):
        backbone(images, merge_tokens_to=10)


class CentrePatchScorer(PatchScorer):
    """Splits what is near the centre of the image."""

    def config_fields(self):
        return {"patch_scorer": "centre"}

    def score(self, pixel_values, patch_scores=None):
        scores = []
        for size in self.scored_patch_sizes:
            rows, columns = (side // size for side in pixel_values.shape[-2:])
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            distance = (y + 0.5 - rows / 2).square() + (x + 0.5 - columns / 2).square()
            scores.append((-distance * size**2).expand(len(pixel_values), -1, -1))
        return scores


@torch.no_grad()
def test_a_scorer_of_your_own_is_registered_saved_and_reloaded(images, tmp_path):
    with pytest.raises(ValueError, match=r"`patch_scorer` .*got 'centre': .*`polyscale.register_patch_scorer`"):
        QuadtreeViTConfig(**SHAPE, patch_scorer="centre")
    with pytest.raises(ValueError, match="'entropy' is a patch scorer of this library"):
        register_patch_scorer("entropy", CentrePatchScorer)
    with pytest.raises(ValueError, match="`name` must be a name, got 5"):
        register_patch_scorer(5, CentrePatchScorer)
    with pytest.raises(ValueError, match="`make` must be a function"):
        register_patch_scorer("centre", None)
    register_patch_scorer("centre", lambda config: CentrePatchScorer(config.min_patch_size, config.max_patch_size))
    try:
        model = make_model(QuadtreeViTForImageClassification, patch_scorer="centre")
        outputs = model(images, num_tokens=16)
        inner = outputs.patch_sizes == 8
        assert ((outputs.patch_centers[inner] - 16).abs() <= 12).all()
        model.save_pretrained(tmp_path)
        reloaded = QuadtreeViTForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(reloaded(images, num_tokens=16).logits, outputs.logits)
    finally:
        del PATCH_SCORERS["centre"]


def test_a_host_that_counts_beforehand_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match=r"`merge_tokens_to` must be None in a host model that .* got 10"):
        QuadtreeViTConfig(**SHAPE, num_tokens=31, merge_tokens_to=10).hosted()
    with pytest.raises(ValueError, match="`split_threshold` with `merge_layer=1`"):
        QuadtreeViTConfig(**SHAPE, split_threshold=1.0, merge_layer=1).hosted()


@torch.no_grad()
def test_the_extra_channel_of_kernels_without_bias_is_the_bias():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    bias = torch.randn(2, 9)
    scaling = 8**-0.5
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None, :], scale=scaling)
    inputs = with_key_bias(query, key, value, None, bias, scaling, "flash_attention_2")
    assert [tensor.shape[-1] for tensor in inputs[:3]] == [16, 16, 16]
    assert inputs[3] is None
    actual = F.scaled_dot_product_attention(*inputs[:3], scale=scaling)
    torch.testing.assert_close(actual[..., :8], expected, atol=1e-6, rtol=1e-5)
    assert not actual[..., 8:].any()
