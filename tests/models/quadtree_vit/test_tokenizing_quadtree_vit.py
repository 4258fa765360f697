"""Scorers and tokenizers against the published implementation's outputs."""

import numpy as np
import pytest
import torch
from quadtree_reference import bilinear_blur_scores, crop_by_crop_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyscale import (
    FeatureBasedPatchScorer,
    PixelBlurPatchScorer,
    PrecomputedPatchScorer,
    QuadtreeTokenizer,
    QuadtreeViTConfig,
    RandomPatchScorer,
    VanillaTokenizer,
    quadtree_tokens,
    reverse_quadtree,
)
from tests.golden import assert_golden


def select(pixels, num_tokens, min_patch_size=16, max_patch_size=64):
    """Rows (x, y, size id) of the selection, sorted by (size id, y, x); centres in units of the smallest patch."""
    scores = PixelBlurPatchScorer(min_patch_size, max_patch_size)(pixels)
    level, row, column = quadtree_tokens(scores, num_tokens)
    size_id = len(scores) - level
    rows = torch.stack([(column + 0.5) * 2**size_id, (row + 0.5) * 2**size_id, size_id.float()], dim=-1)
    return [sorted(picture, key=lambda r: (r[2], r[1], r[0])) for picture in rows.tolist()]


def golden_rows(meta):
    return [sorted(picture, key=lambda r: (r[2], r[1], r[0])) for picture in meta.tolist()]


@pytest.mark.parametrize("num_tokens", [16, 64, 100, 196, 256])
def test_golden_selections(golden, golden_pixels, num_tokens):
    assert select(golden_pixels, num_tokens) == golden_rows(golden[f"pixel_blur.tokens{num_tokens}.meta"])


def test_golden_selection_of_four_sizes(golden, golden_pixels):
    assert select(golden_pixels, 160, 8, 64) == golden_rows(golden["pixel_blur.min8max64.tokens160.meta"])


def test_golden_selection_at_320_pixels(golden):
    assert select(golden["size320.input"].float(), 175) == golden_rows(golden["size320.tokens175.meta"])


def test_golden_pixel_blur_scores(golden, golden_pixels):
    scores = PixelBlurPatchScorer(16, 64)(golden_pixels)
    for score, size in zip(scores, (64, 32), strict=True):
        assert_golden(score.flatten(1), -golden[f"pixel_blur.score.{size}"])


@pytest.mark.parametrize(("min_patch_size", "max_patch_size"), [(3, 24), (4, 8), (1, 8)])
def test_pixel_blur_scores_of_other_sizes(min_patch_size, max_patch_size):
    pixels = torch.randn(2, 2, 48, 24, generator=torch.Generator().manual_seed(0))
    scorer = PixelBlurPatchScorer(min_patch_size, max_patch_size)
    for score, size in zip(scorer(pixels), scorer.scored_patch_sizes, strict=True):
        for b in range(2):
            expected = bilinear_blur_scores(pixels[b].numpy(), min_patch_size, size)
            np.testing.assert_allclose(score[b].numpy(), expected, rtol=1e-5)


def golden_tokenizer(golden):
    config = QuadtreeViTConfig(hidden_size=32, num_attention_heads=2, num_tokens=100)
    tokenizer = QuadtreeTokenizer(config)
    tokenizer.load_state_dict(
        {
            "patch_embeddings.projection.weight": golden["tokenizer.proj.weight"],
            "patch_embeddings.projection.bias": golden["tokenizer.proj.bias"],
            "prefix_tokens.cls_token": golden["tokenizer.cls"][None, None],
        }
    )
    return tokenizer


def golden_order(golden, tokens, picture):
    """For each of our tokens its number in the golden order."""
    places = {tuple(row): number for number, row in enumerate(golden["tokenizer.meta"][picture].tolist())}
    rows = zip(tokens.patch_centers[picture].tolist(), tokens.patch_sizes[picture].tolist(), strict=True)
    return [places[x / 16, y / 16, float((size // 16).bit_length() - 1)] for (x, y), size in rows]


@torch.no_grad()
def test_golden_embeddings_and_dense_map(golden, golden_pixels):
    tokens = golden_tokenizer(golden)(golden_pixels)
    for b in range(2):
        expected = golden["tokenizer.embeddings"][b]
        order = [1 + number for number in golden_order(golden, tokens, b)]
        assert_golden(tokens.embeddings[b], expected[[0, *order]])
    dense = reverse_quadtree(tokens.embeddings[:, 1:], tokens.patch_centers, tokens.patch_sizes, 256, 16)
    assert_golden(dense, golden["reverse.features"])


def test_golden_patches(golden, golden_pixels):
    from polyscale.models.quadtree_vit.selection_quadtree_vit import decode_nodes, select_nodes

    tokenizer = golden_tokenizer(golden)
    nodes = select_nodes(tokenizer.patch_scorer(golden_pixels), 100).nodes
    patches = tokenizer.patches_of(golden_pixels, decode_nodes(nodes, 4, 4, levels=3), levels=3)
    tokens = tokenizer(golden_pixels)
    for b in range(2):
        ours = {
            (*c, s): p
            for c, s, p in zip(
                tokens.patch_centers[b].tolist(), tokens.patch_sizes[b].tolist(), patches[b], strict=True
            )
        }
        meta = golden["pixel_blur.tokens100.meta"][b].tolist()
        for (x, y, size_id), expected in zip(meta, golden["pixel_blur.tokens100.patches"][b], strict=True):
            assert_golden(ours[x * 16, y * 16, 16 << int(size_id)], expected)


@pytest.mark.parametrize("position_embedding", ["sinusoidal", "learned"])
@torch.no_grad()
def test_every_patch_split_equals_vanilla(make_config, images, position_embedding):
    config = make_config(position_embedding=position_embedding, prefix_positions="cls", num_register_tokens=2)
    quadtree, vanilla = QuadtreeTokenizer(config), VanillaTokenizer(config)
    for parameter in quadtree.parameters():
        torch.nn.init.normal_(parameter)
    vanilla.load_state_dict(quadtree.state_dict())
    ours, expected = quadtree(images, num_tokens=64), vanilla(images)
    torch.testing.assert_close(ours.embeddings, expected.embeddings)
    assert torch.equal(ours.patch_centers, expected.patch_centers)
    assert torch.equal(ours.patch_sizes, expected.patch_sizes)


def strided(images):
    return torch.nn.functional.pad(images, (3, 2, 1, 4))[..., 1:-4, 3:-2]


def channels_last(images):
    return images.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, strided])
@pytest.mark.parametrize(
    ("shape", "fields", "num_tokens"),
    [((2, 3, 32, 48), {}, 33), ((1, 1, 64, 64), {"num_channels": 1, "min_patch_size": 2, "max_patch_size": 32}, 100)],
)
def test_tokens_and_gradients_equal_crops(make_config, layout, shape, fields, num_tokens):
    torch.manual_seed(0)
    tokenizer = QuadtreeTokenizer(make_config(**{"patch_scorer": "random", "scorer_seed": 0, **fields}))
    torch.nn.init.normal_(tokenizer.prefix_tokens.cls_token)
    images = layout(torch.randn(shape)).requires_grad_()
    tokens = tokenizer(images, num_tokens=num_tokens)
    assert len(tokens.patch_sizes.unique()) == tokenizer.config.num_levels
    expected = crop_by_crop_tokens(tokenizer, images, tokens.patch_centers, tokens.patch_sizes)
    torch.testing.assert_close(tokens.embeddings, expected, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    inputs = [images, *tokenizer.parameters()]
    ours, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in (tokens.embeddings, expected))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [channels_last, strided])
def test_pixel_blur_scores_of_any_layout(images, layout):
    scorer = PixelBlurPatchScorer(4, 16)
    for score, expected in zip(scorer(layout(images)), scorer(images), strict=True):
        assert torch.equal(score, expected)


@torch.no_grad()
def test_autocast_keeps_tokens_in_float32(make_config, images):
    tokenizer = QuadtreeTokenizer(make_config())
    expected = tokenizer(images).embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = tokenizer(images).embeddings
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, expected, atol=0.05, rtol=0.05)


class StaysOnDevice(TorchDispatchMode):
    """Fails where a tensor on another device takes part: a value read back, or one sent from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", function
        return result


@pytest.mark.parametrize("split_threshold", [None, 0.5])
def test_a_budget_needs_no_word_from_the_device(make_config, split_threshold):
    tokenizer = QuadtreeTokenizer(make_config()).to("meta")  # which has no values: reading one is an error
    pixels = torch.empty(3, 3, 32, 48, device="meta")
    with StaysOnDevice():
        tokens = tokenizer(pixels, num_tokens=30, split_threshold=split_threshold)
    assert tokens.embeddings.shape == (3, 31, 32)
    with pytest.raises(RuntimeError, match="meta"):
        tokenizer(pixels, split_threshold=0.5)  # each picture its own length: the longest must be known


@torch.no_grad()
def test_learned_positions_are_sampled_at_the_centres(make_config, images):
    config = make_config(position_embedding="learned")
    tokenizer = QuadtreeTokenizer(config)
    torch.nn.init.normal_(tokenizer.position_embeddings)
    for parameter in tokenizer.patch_embeddings.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = tokenizer(images)
    grid = tokenizer.position_embeddings.view(1, 8, 8, 32).permute(0, 3, 1, 2).expand(3, -1, -1, -1)
    sampled = torch.nn.functional.grid_sample(
        grid, tokens.patch_centers[:, None] / 16 - 1, align_corners=False, mode="bilinear"
    )
    torch.testing.assert_close(tokens.embeddings[:, 1:], sampled[:, :, 0].transpose(1, 2))


def test_random_scores_depend_on_the_seed_alone(images):
    first, again = (RandomPatchScorer(4, 16, seed=7)(images) for _ in range(2))
    other = RandomPatchScorer(4, 16, seed=8)(images)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    everything = torch.cat([score.flatten() for score in RandomPatchScorer(2, 16, seed=1)(torch.zeros(64, 1, 64, 64))])
    assert everything.min() >= 0
    assert everything.max() < 1
    assert abs(everything.mean() - 0.5) < 0.01
    assert everything.unique().numel() > 0.99 * everything.numel()
    free = RandomPatchScorer(4, 16)
    assert not torch.equal(free(images)[0], free(images)[0])


def test_precomputed_scores(images):
    scorer = PrecomputedPatchScorer(4, 16)
    full = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    coarse, fine = scorer(images, full)
    torch.testing.assert_close(fine[1, 2, 3], full[1, 16:24, 24:32].mean())
    torch.testing.assert_close(coarse[2, 1, 0], full[2, 16:, :16].mean())
    assert all(torch.equal(a, b) for a, b in zip(scorer(images, [coarse, fine]), (coarse, fine), strict=True))
    for wrong in (None, [coarse], [fine, coarse], full[:2], full[:, :30]):
        with pytest.raises(ValueError, match="patch_scores"):
            scorer(images, wrong)


@pytest.mark.parametrize("error", ["mse", "cosine"])
def test_feature_scores(images, error):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 4, stride=4), torch.nn.ReLU(), torch.nn.BatchNorm2d(6))
    scorer = FeatureBasedPatchScorer(4, 16, network=network, error=error).train()
    assert not scorer.network.training
    assert not any(parameter.requires_grad for parameter in scorer.parameters())
    coarse, fine = scorer(images)
    small = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear")
    blurred = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    sharp, blurred = network(images), network(blurred)
    if error == "mse":
        expected = (sharp - blurred).square().mean(dim=1)
    else:
        expected = -torch.nn.functional.cosine_similarity(sharp, blurred, dim=1)
    torch.testing.assert_close(fine, torch.nn.functional.avg_pool2d(expected, 2))
    assert coarse.shape == (3, 2, 2)


def test_feature_scorer_of_the_paper():
    scorer = FeatureBasedPatchScorer(16, 64, pretrained=False)
    assert [tuple(score.shape) for score in scorer(torch.randn(1, 3, 128, 192))] == [(1, 2, 3), (1, 4, 6)]
    assert len(scorer.state_dict()) == len(FeatureBasedPatchScorer(16, 64, pretrained=False).state_dict())
    finer = FeatureBasedPatchScorer(8, 64, stride=16, pretrained=False)
    assert [tuple(score.shape) for score in finer(torch.randn(1, 3, 64, 64))] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    with pytest.raises(ValueError, match="stride"):
        FeatureBasedPatchScorer(8, 64, stride=32, pretrained=False)
    with pytest.raises(ValueError, match="stride"):
        FeatureBasedPatchScorer(16, 64, stride=8, pretrained=False)
    with pytest.raises(ValueError, match="stride"):
        FeatureBasedPatchScorer(4, 16, network=torch.nn.Conv2d(3, 2, 16, stride=16))(torch.randn(1, 3, 32, 32))


def test_feature_scorer_without_network_says_so(monkeypatch):
    from urllib.error import URLError

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(OSError, match="could not be downloaded"):
        FeatureBasedPatchScorer()


def test_scorers_refuse_what_they_cannot_cut():
    with pytest.raises(ValueError, match="192 and 256"):
        PixelBlurPatchScorer()(torch.zeros(1, 3, 224, 256))
    with pytest.raises(ValueError, match="channels"):
        PixelBlurPatchScorer()(torch.zeros(3, 256, 256))
    with pytest.raises(ValueError, match="power of two"):
        PixelBlurPatchScorer(16, 48)


def test_vanilla_bad_input(make_config, images):
    vanilla = VanillaTokenizer(make_config())
    assert vanilla(images, num_tokens=64).patch_sizes.tolist() == [[4] * 64] * 3
    with pytest.raises(ValueError, match="64"):
        vanilla(images, num_tokens=61)
    with pytest.raises(ValueError, match="28 and 32"):
        vanilla(images[..., :30])
