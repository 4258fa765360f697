"""Config, model, classifier and backbone: budgets, thresholds, layouts, errors."""

import pytest
import torch

from polyscale import (
    FeatureBasedPatchScorer,
    FlexiViTConfig,
    FlexiViTModel,
    PixelBlurPatchScorer,
    QuadtreeViTBackbone,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTModel,
    RandomPatchScorer,
    reverse_quadtree,
)
from polyscale.models.quadtree_vit import EntropyPatchScorer


def make(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


def test_config_defaults_and_budgets():
    config = QuadtreeViTConfig()
    assert (config.num_tokens, config.num_levels, config.num_tokens_range()) == (196, 3, (16, 256))
    assert config.patch_grid_for((128, 192)) == (2, 3)
    assert config.num_tokens_for((128, 192), 96) == 96
    assert QuadtreeViTConfig(split_threshold=0.5).num_tokens is None
    assert QuadtreeViTConfig(split_threshold=0.5).num_tokens_for() is None
    assert QuadtreeViTConfig(image_size=64, max_patch_size=32).num_tokens == 10
    assert QuadtreeViTConfig(round_num_tokens=True).num_tokens_for(256, 200) == 199
    assert QuadtreeViTConfig(round_num_tokens=True).num_tokens_for(256, 999) == 256
    assert QuadtreeViTConfig.preset("quadtree_vit_small").hidden_size == 384


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 224}, "192 and 256"),
        ({"max_patch_size": 48}, "power of two.*32 or 64"),
        ({"max_patch_size": 8}, "power of two"),
        ({"min_patch_size": 0}, "min_patch_size"),
        ({"patch_scorer": "edges"}, "'pixel_blur', 'feature', 'random', 'precomputed'"),
        ({"position_embedding": "rotary"}, "position_embedding"),
        ({"hidden_size": 30, "num_attention_heads": 2}, "multiple of 4"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"scorer_error": "l1"}, "scorer_error"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        QuadtreeViTConfig(**fields)


@torch.no_grad()
def test_output_describes_a_tiling(make_config, images):
    model = make(QuadtreeViTModel, make_config(num_register_tokens=2))
    outputs = model(images, num_tokens=31, output_split_scores=True)
    assert outputs.last_hidden_state.shape == (3, 3 + 31, 32)
    assert (outputs.patch_sizes**2).sum(dim=1).tolist() == [32 * 32] * 3
    assert outputs.token_mask.all()
    dense = reverse_quadtree(outputs.patch_sizes[..., None].float(), outputs.patch_centers, outputs.patch_sizes, 32, 4)
    assert dense.min() >= 4
    assert (outputs.patch_sizes.diff(dim=1) <= 0).all()
    assert [tuple(score.shape) for score in outputs.split_scores] == [(3, 2, 2), (3, 4, 4)]
    assert model(images).split_scores is None
    given = model(images, num_tokens=31, patch_scores=list(outputs.split_scores))
    torch.testing.assert_close(given.last_hidden_state, outputs.last_hidden_state)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "pooler"])
@torch.no_grad()
def test_padded_pictures_equal_unpadded_ones(make_config, images, pooling):
    images = images * torch.tensor([0.55, 0.65, 0.6])[:, None, None, None]
    model = make(QuadtreeViTForImageClassification, make_config(pooling=pooling))
    scores = model(images, output_split_scores=True).split_scores
    threshold = scores[1].median().item()
    together = model(images, split_threshold=threshold)
    counts = together.token_mask.sum(dim=1)
    assert len(set(counts.tolist())) == 3
    assert together.token_mask.shape[1] == counts.max()
    fixed = model(images, split_threshold=threshold, num_tokens=64)
    assert fixed.token_mask.shape[1] == 64
    torch.testing.assert_close(fixed.logits, together.logits)
    for index, count in enumerate(counts.tolist()):
        alone = model(images[index : index + 1], num_tokens=count)
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-5, rtol=1e-5)
        threshold_alone = model(images[index : index + 1], split_threshold=threshold)
        assert threshold_alone.token_mask.shape[1] == count
        assert together.patch_sizes[index, count:].eq(0).all()


@torch.no_grad()
def test_call_goes_before_config(make_config, images):
    model = make(QuadtreeViTModel, make_config(num_tokens=None, split_threshold=0.0))
    assert model(images).token_mask.shape[1] == 64
    assert model(images, num_tokens=7).last_hidden_state.shape[1] == 8
    model.config.num_tokens = 13
    assert model(images).token_mask.shape[1] == 13


@torch.no_grad()
def test_implementations_agree(make_config, images):
    config = make_config()
    eager = make(QuadtreeViTModel, config)
    eager.set_attn_implementation("eager")
    sdpa = make(QuadtreeViTModel, make_config())
    sdpa.set_attn_implementation("sdpa")
    for knobs in ({"num_tokens": 31}, {"split_threshold": 1.0}):
        torch.testing.assert_close(
            eager(images, **knobs).last_hidden_state, sdpa(images, **knobs).last_hidden_state, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_one_size_of_patches_equals_flexivit(make_config, images):
    config = make_config(max_patch_size=4, num_tokens=None, position_embedding="learned")
    model = make(QuadtreeViTModel, config)
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
    flexivit = FlexiViTModel(FlexiViTConfig(base_patch_size=4, **{name: getattr(config, name) for name in shared}))
    flexivit.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        model(images).last_hidden_state, flexivit.eval()(images).last_hidden_state, atol=1e-5, rtol=1e-5
    )


def test_hidden_states_of_every_kind(make_config, images):
    model = make(QuadtreeViTModel, make_config())
    every = model(images, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in every] == [(3, 20, 32)] * 3
    torch.testing.assert_close(model(images, output_hidden_states=-2).hidden_states[1], every[1])
    chosen = model(images, output_hidden_states=[0, 2]).hidden_states
    assert chosen[1] is None
    torch.testing.assert_close(chosen[2], every[2])
    model.set_attn_implementation("eager")
    assert model(images, output_attentions=True).attentions[0].shape == (3, 2, 20, 20)


def test_gradients_equal_with_checkpointing(make_config, images):
    model = make(QuadtreeViTForImageClassification, make_config(position_embedding="learned")).train()
    labels = torch.tensor([0, 1, 2])
    model(images, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for name, grad in expected.items() if "k_proj.bias" not in name)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(images, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_selects_the_same(make_config, images, dtype):
    model = make(QuadtreeViTModel, make_config())
    expected = model(images)
    half = model.to(dtype)(images)
    assert half.last_hidden_state.dtype == dtype
    assert half.last_hidden_state.isfinite().all()
    assert torch.equal(half.patch_centers, expected.patch_centers)


@torch.no_grad()
def test_backbone_maps_are_the_tokens_laid_out(make_config, images):
    config = make_config(out_features=["stage1", "stage2"])
    backbone = make(QuadtreeViTBackbone, config)
    outputs = backbone(images, num_tokens=31)
    assert [tuple(feature.shape) for feature in outputs.feature_maps] == [(3, 32, 8, 8)] * 2
    inner = backbone.quadtree_vit(images, num_tokens=31)
    expected = reverse_quadtree(inner.last_hidden_state[:, 1:], inner.patch_centers, inner.patch_sizes, 32, 4)
    torch.testing.assert_close(outputs.feature_maps[1], expected)


@torch.no_grad()
def test_other_sizes_and_shapes(make_config):
    for fields in ({}, {"position_embedding": "learned"}):
        model = make(QuadtreeViTModel, make_config(**fields))
        outputs = model(torch.randn(2, 3, 48, 16), num_tokens=12)
        assert outputs.patch_centers[..., 0].max() < 16
        assert (outputs.patch_sizes**2).sum(dim=1).tolist() == [48 * 16] * 2


@pytest.mark.parametrize("scorer", ["network", "random"])
@torch.no_grad()
def test_scorer_travels_with_the_checkpoint(make_config, tmp_path, scorer):
    model = make(QuadtreeViTForImageClassification, make_config(min_patch_size=16, max_patch_size=32, num_tokens=1))
    if scorer == "network":
        new = FeatureBasedPatchScorer(16, 32, pretrained=False)
        for parameter in new.parameters():
            parameter.mul_(1.5)
    else:
        new = RandomPatchScorer(16, 32, seed=3)
    model.set_patch_scorer(new)
    model.save_pretrained(tmp_path)
    loaded = QuadtreeViTForImageClassification.from_pretrained(tmp_path)
    pictures = torch.randn(2, 3, 64, 64)
    ours = model(pictures, num_tokens=7, output_split_scores=True)
    theirs = loaded(pictures, num_tokens=7, output_split_scores=True)
    for a, b in zip(ours.split_scores, theirs.split_scores, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.logits, theirs.logits)


def test_scorer_from_a_transformers_backbone(make_config, tmp_path):
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = make(QuadtreeViTModel, make_config(min_patch_size=8, max_patch_size=16, num_tokens=4))
    model.set_patch_scorer(FeatureBasedPatchScorer(8, 16, network=ResNetBackbone(config)))
    model.save_pretrained(tmp_path)
    loaded = QuadtreeViTModel.from_pretrained(tmp_path)
    pictures = torch.randn(2, 3, 32, 32)
    ours = model(pictures, output_split_scores=True).split_scores
    torch.testing.assert_close(loaded(pictures, output_split_scores=True).split_scores, ours)
    assert not any(p.requires_grad for p in loaded.embeddings.patch_scorer.parameters())
    with pytest.raises(ValueError, match="rebuilt"):
        model.set_patch_scorer(FeatureBasedPatchScorer(8, 16, network=torch.nn.Conv2d(3, 4, 8, stride=8)))
    with pytest.raises(ValueError, match="patches"):
        model.set_patch_scorer(RandomPatchScorer(4, 16))


@torch.no_grad()
def test_a_scorer_reduces_images_as_the_model_does(make_config, images, tmp_path):
    model = make(QuadtreeViTModel, make_config(reduction="antialias"))
    with pytest.raises(ValueError, match=r"by 'bilinear', and the model by 'antialias'.*`reduction='antialias'`"):
        model.set_patch_scorer(PixelBlurPatchScorer(4, 16))
    model.set_patch_scorer(PixelBlurPatchScorer(4, 16, reduction="antialias"))
    model.save_pretrained(tmp_path)
    loaded = QuadtreeViTModel.from_pretrained(tmp_path)
    ours, theirs = (each(images, output_split_scores=True).split_scores for each in (model, loaded))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_scorer_that_the_config_refuses_changes_nothing(make_config, images):
    model = make(QuadtreeViTModel, make_config())
    before = model(images).last_hidden_state
    with pytest.raises(ValueError, match="`scorer_image_mean` must be a plain value"):
        model.set_patch_scorer(EntropyPatchScorer(4, 16, image_mean=torch.tensor(0.5)))
    assert model.config.patch_scorer == "pixel_blur"
    torch.testing.assert_close(model(images).last_hidden_state, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("reduction", "antialias"), ("patch_scorer", "entropy"), ("max_patch_size", 8), ("scorer_seed", 3)],
)
def test_fields_that_a_scorer_was_made_of_do_not_change_under_it(make_config, images, tmp_path, field, value):
    model = make(QuadtreeViTModel, make_config())
    old = getattr(model.config, field)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"`config.{field}` was {old!r} when .* and is {value!r} now"):
        model(images)
    model.save_pretrained(tmp_path)  # a checkpoint is made with the new value
    assert QuadtreeViTModel.from_pretrained(tmp_path)(images).last_hidden_state.shape[0] == 3
    setattr(model.config, field, old)
    assert model(images).last_hidden_state.shape[0] == 3


@pytest.mark.parametrize(
    ("pixels", "knobs", "message"),
    [
        ((1, 3, 40, 32), {}, "32 and 48"),
        ((1, 1, 32, 32), {}, "channels"),
        ((3, 32, 32), {}, "batch"),
        ((0, 3, 32, 32), {}, "empty"),
        ((1, 3, 32, 32), {"num_tokens": 20}, "19 and 22"),
        ((1, 3, 32, 32), {"num_tokens": 1}, "4 and 7"),
        ((1, 3, 32, 32), {"num_tokens": 100}, "61 and 64"),
        ((1, 3, 32, 32), {"num_tokens": True}, "int"),
        ((1, 3, 32, 32), {"patch_scores": [torch.zeros(1, 2, 2)]}, "patch_scores"),
        ((1, 3, 32, 32), {"patch_scores": 0}, "patch_scores.*got int"),
        ((1, 3, 32, 32), {"patch_scores": [[[0.0]], None]}, "patch_scores.*'list', 'NoneType'"),
        ((1, 3, 32, 32), {"patch_scores": [torch.full((1, 2, 2), torch.nan), torch.zeros(1, 4, 4)]}, "NaN"),
    ],
)
def test_bad_input(make_config, pixels, knobs, message):
    model = make(QuadtreeViTForImageClassification, make_config())
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(pixels), **knobs)


def test_rounded_budget_and_missing_scores(make_config, images):
    rounding = make(QuadtreeViTModel, make_config(round_num_tokens=True))
    assert rounding(images, num_tokens=20).patch_sizes.shape == (3, 19)
    precomputed = make(QuadtreeViTModel, make_config(patch_scorer="precomputed"))
    with pytest.raises(ValueError, match="patch_scores"):
        precomputed(images)


@torch.no_grad()
def test_a_threshold_exports_with_a_maximum_alone(make_config, images):
    model = make(QuadtreeViTModel, make_config(num_tokens=None, split_threshold=1.0))
    with pytest.raises(ValueError, match="cannot be exported: give `num_tokens` besides `split_threshold`"):
        torch.export.export(model, (images,))
    exported = torch.export.export(model, (images,), {"num_tokens": 31, "split_threshold": 1.0}).module()
    expected = model(images, num_tokens=31, split_threshold=1.0)
    actual = exported(images, num_tokens=31, split_threshold=1.0)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
