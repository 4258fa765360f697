"""Packed batches against the plain way: padding to the longest with a mask. Values and gradients."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    FlexiViTModel,
    QuadtreeViTBackbone,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTModel,
)
from polyscale.layers.encoder import make_encoder_layers
from polyscale.layers.encoder_config import EncoderConfig
from polyscale.layers.encoding import run_layers
from polyscale.layers.packing import PACK_BELOW, Packing, Padding, choose_packing, packing_pays


LENGTHS = [5, 9, 3, 5, 9, 1]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2}


def make_layers(attention="sdpa", **fields):
    torch.manual_seed(0)
    config = EncoderConfig(**SHAPE, **fields)
    config._attn_implementation = attention
    layers = make_encoder_layers(config)
    for weight in layers.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return layers.eval(), config


def make_padding(lengths=LENGTHS):
    return Padding(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], list(lengths))


def run(layers, config, tokens, mode, dtype=torch.float32, **arguments):
    """Output at real tokens, and gradients of the tokens and of all weights."""
    config.pack_tokens = mode
    layers.zero_grad()
    tokens = tokens.detach().clone().requires_grad_()
    torch.manual_seed(1)
    padding = make_padding()
    output = run_layers(layers, tokens, config, padding=padding, **arguments)
    assert output.dtype == dtype
    mask = padding.mask[:, : output.shape[1]] if output.shape[1] > 2 else torch.ones(output.shape[:2], dtype=bool)
    real = output[mask]
    (real * torch.linspace(-1, 1, real.numel(), dtype=dtype).view_as(real)).sum().backward()
    assert not (tokens.grad[~padding.mask] != 0).any()
    return real.detach(), tokens.grad, [weight.grad.clone() for weight in layers.parameters()]


def assert_packed_equals_padded(layers, config, tokens, atol=1e-5, **arguments):
    padded = run(layers, config, tokens, False, **arguments)
    packed = run(layers, config, tokens, True, **arguments)
    torch.testing.assert_close(packed[0], padded[0], atol=atol, rtol=1e-5)
    torch.testing.assert_close(packed[1], padded[1], atol=atol, rtol=1e-4)
    for ours, expected in zip(packed[2], padded[2], strict=True):
        torch.testing.assert_close(ours, expected, atol=atol * max(1, expected.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize(("lengths", "pays"), [([8, 8], False), ([8, 7], True), ([100, 96], False), ([8, 0], True)])
def test_the_share_of_real_tokens_decides(lengths, pays):
    assert packing_pays(lengths, max(lengths)) == pays == (sum(lengths) / (2 * max(lengths)) < PACK_BELOW)


def test_tokens_go_to_their_places_and_back():
    packing = Packing.of([2, 0, 1], [1, 2, 2], padded_length=3, device=torch.device("cpu"))
    tokens = torch.arange(9.0).view(3, 3, 1)
    assert packing.pack(tokens).flatten().tolist() == [6, 0, 1, 3, 4]
    assert packing.images.tolist() == [2, 0, 0, 1, 1]
    assert packing.bounds.tolist() == [0, 1, 3, 5]
    assert packing.groups() == [(1, 1), (2, 2)]
    assert packing.unpack(packing.pack(tokens)).flatten().tolist() == [0, 1, 0, 3, 4, 0, 6, 0, 0]
    assert packing.take_first(packing.pack(tokens), 1).flatten().tolist() == [6, 0, 3]
    assert packing.of_first(1).unpack(packing.take_first(packing.pack(tokens), 1)).flatten().tolist() == [0, 3, 6]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("fields", [{}, {"mlp_type": "swiglu", "layer_scale_init_value": 0.5, "qkv_bias": False}])
def test_values_and_gradients_are_those_of_padding(fields, has_bias, num_queries, attention):
    layers, config = make_layers(attention, **fields)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), 16)
    bias = torch.randn(tokens.shape[:2]) if has_bias else None
    assert_packed_equals_padded(layers, config, tokens, num_queries=num_queries, key_bias=bias)


def test_each_image_is_as_alone_also_where_two_tokens_are_read():
    layers, config = make_layers()
    config.pack_tokens = True
    tokens, lengths = torch.randn(3, 7, 16), [4, 7, 2]
    with torch.no_grad():
        read = run_layers(layers, tokens, config, padding=make_padding(lengths), num_queries=2)
        assert read.shape == (3, 2, 16)
        whole = run_layers(layers, tokens, config, padding=make_padding(lengths))
        for image, length in enumerate(lengths):
            alone = run_layers(layers, tokens[image : image + 1, :length], config)[0]
            torch.testing.assert_close(read[image], alone[:2], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(whole[image, :length], alone, atol=1e-5, rtol=1e-5)
            assert not whole[image, length:].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_drops_the_same_images(checkpointing):
    layers, config = make_layers(drop_path_rate=0.5)
    layers.train()
    for layer in layers:
        layer.gradient_checkpointing = checkpointing
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), 16)
    assert_packed_equals_padded(layers, config, tokens)
    assert_packed_equals_padded(layers, config, tokens, num_queries=1)
    dropped = run(layers, config, tokens, True)[0]
    assert (dropped - run(layers.eval(), config, tokens, True)[0]).abs().max() > 0.1


def test_bfloat16_loses_no_more_than_padding_does():
    layers, config = make_layers()
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), 16)
    exact = run(layers, config, tokens, False)[0]
    layers.bfloat16()
    padded, packed = (run(layers, config, tokens.bfloat16(), mode, torch.bfloat16)[0] for mode in (False, True))
    error = (padded.float() - exact).abs().max()
    assert (packed.float() - exact).abs().max() <= 1.5 * error
    assert error > 0


def varlen_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What flash attention does with bounds of sequences."""
    assert attention_mask is None
    assert query.shape[0] == key.shape[0] == 1
    outputs = []
    bounds_q, bounds_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert kwargs["max_length_q"] == bounds_q.diff().max()
    assert kwargs["max_length_k"] == bounds_k.diff().max()
    for image in range(len(bounds_k) - 1):
        own_query = query[:, :, bounds_q[image] : bounds_q[image + 1]]
        own_key, own_value = (part[:, :, bounds_k[image] : bounds_k[image + 1]] for part in (key, value))
        weights = (own_query @ own_key.transpose(2, 3) * scaling).softmax(dim=-1)
        outputs.append((weights @ own_value).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


@pytest.mark.parametrize("num_queries", [None, 1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_flash_attention_gets_the_bounds_of_the_images(monkeypatch, has_bias, num_queries):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen_attention)
    layers, config = make_layers("flash_attention_2")
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), 16)
    arguments = {"num_queries": num_queries, "key_bias": torch.randn(tokens.shape[:2]) if has_bias else None}
    ours = run(layers, config, tokens, True, **arguments)
    config._attn_implementation = "sdpa"
    expected = run(layers, config, tokens, True, **arguments)
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "lengths", "attention", "outputs", "is_packed"),
    [
        ("auto", [9, 2], "sdpa", {}, True),
        ("auto", [9, 9], "sdpa", {}, False),
        (True, [9, 9], "sdpa", {}, True),
        (False, [9, 2], "sdpa", {}, False),
        (True, [9, 2], "flex_attention", {}, False),
        (True, [9, 2], "sdpa", {"output_attentions": True}, False),
        ("auto", [9, 2], "sdpa", {"output_attentions": False, "output_hidden_states": [-2]}, True),
    ],
)
def test_who_is_packed(mode, lengths, attention, outputs, is_packed):
    config = EncoderConfig(**SHAPE, pack_tokens=mode)
    config._attn_implementation = attention
    tokens, padding = torch.zeros(2, 9, 16), make_padding(lengths)
    packing = choose_packing(config, tokens, padding, outputs)
    assert (packing is not None) == is_packed
    if is_packed:
        assert packing.keeps_layout == ("output_hidden_states" in outputs)
        unread = choose_packing(config, tokens, padding._replace(lengths=None), outputs)
        assert unread.lengths == packing.lengths == tuple(sorted(lengths))


def test_lengths_are_not_asked_of_a_device_unless_it_must_be():
    config = EncoderConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    tokens = torch.zeros(2, 9, 16, device="meta")
    padding = Padding(torch.ones(2, 9, dtype=torch.bool, device="meta"), None)
    assert choose_packing(config, tokens, padding, {}) is None


@pytest.mark.parametrize("value", ["always", None, 2])
def test_another_word_is_refused(value):
    with pytest.raises(ValueError, match="pack_tokens"):
        EncoderConfig(**SHAPE, pack_tokens=value)


QUADTREE = {"image_size": 32, "min_patch_size": 4, "max_patch_size": 16, "num_tokens": 19, "num_labels": 5}


def make_quadtree(model_class=QuadtreeViTModel, **options):
    torch.manual_seed(0)
    return model_class(QuadtreeViTConfig(**{**SHAPE, **QUADTREE, **options})).eval()


@pytest.fixture
def images():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images[0], images[1, :, :16] = 0, 0  # nothing to split in a flat area
    return images


def median_score(model, images) -> float:
    """A threshold that cuts images of different contents into different numbers of patches."""
    with torch.no_grad():
        return model(images, num_tokens=64, output_split_scores=True).split_scores[1].median().item()


def in_both_ways(model, call):
    """What `call` gives packed and padded."""
    results = []
    for mode in (True, False):
        model.config.pack_tokens = mode
        results.append(call())
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "mean", "area_attention": 0.7, "area_pooling": True},
        {"pooling": "attention", "num_register_tokens": 2},
        {"merge_layer": 1},
        {"use_distillation_token": True, "use_distillation_head": True},
    ],
)
@pytest.mark.parametrize("budget", [{}, {"num_tokens": 40}])
def test_quadtree_vit_gives_the_same_with_gradients(images, options, budget):
    model = make_quadtree(QuadtreeViTForImageClassification, **options)
    budget = {**budget, "split_threshold": median_score(model, images)}

    def call():
        model.zero_grad()
        outputs = model(images, labels=torch.arange(4), **budget)
        outputs.loss.backward()
        return outputs, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    (packed, our_gradients), (padded, gradients) = in_both_ways(model, call)
    assert len(packed.token_mask.sum(dim=1).unique()) > 1
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("merge_layer", [0, 1])
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_padding(images, merge_layer):
    model = make_quadtree(merge_layer=merge_layer)
    threshold = median_score(model, images)
    packed, padded = in_both_ways(model, lambda: model(images, split_threshold=threshold, output_hidden_states=True))
    assert len(packed.token_mask.sum(dim=1).unique()) > 1
    real = torch.nn.functional.pad(packed.token_mask, (1, 0), value=True)
    assert len(packed.hidden_states) == len(padded.hidden_states) == 4
    for ours, expected in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert ours.shape == expected.shape
        mask = real if ours.shape[:2] == real.shape else torch.ones(ours.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(ours[mask], expected[mask], atol=1e-5, rtol=1e-5)
    packed, padded = in_both_ways(model, lambda: model(images, split_threshold=threshold, output_hidden_states=2))
    assert packed.hidden_states[1] is None
    torch.testing.assert_close(packed.hidden_states[2][real], padded.hidden_states[2][real], atol=1e-5, rtol=1e-5)

    model.set_attn_implementation("eager")
    packed, padded = in_both_ways(model, lambda: model(images, split_threshold=threshold, output_attentions=True))
    assert len(packed.attentions) == len(padded.attentions) == 3
    assert all(torch.equal(*both) for both in zip(packed.attentions, padded.attentions, strict=True))


@pytest.mark.parametrize("merge_layer", [0, 2])
@torch.no_grad()
def test_feature_maps_of_a_backbone_are_those_of_each_image_alone(images, merge_layer):
    model = make_quadtree(QuadtreeViTBackbone, out_indices=[1, 3], merge_layer=merge_layer)
    budgets = [4, 25, 64, 31]  # padded to as many tokens as there are smallest patches
    packed, padded = in_both_ways(model, lambda: model(images, num_tokens=budgets).feature_maps)
    for index, budget in enumerate(budgets):
        alone = model(images[index : index + 1], num_tokens=budget).feature_maps
        for ours, expected, own in zip(packed, padded, alone, strict=True):
            torch.testing.assert_close(ours[index], own[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(expected[index], own[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_compiled_stays_padded(images):
    model = make_quadtree(pack_tokens=True)
    expected = model(images, split_threshold=0.2, num_tokens=40).pooler_output
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, split_threshold=0.2, num_tokens=40).pooler_output, expected)


@pytest.mark.parametrize("mode", [True, False, "auto"])
@torch.no_grad()
def test_a_quadtree_budget_for_each_image_is_as_alone(images, mode):
    model = make_quadtree(pack_tokens=mode, pooling="cls_mean")
    budgets = [4, 25, 64, 25]
    together = model(images, num_tokens=budgets)
    assert together.token_mask.sum(dim=1).tolist() == budgets
    for index, budget in enumerate(budgets):
        alone = model(images[index : index + 1], num_tokens=budget)
        torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
        ours = together.last_hidden_state[index, : 1 + budget]
        torch.testing.assert_close(ours, alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        assert together.patch_sizes[index, :budget].equal(alone.patch_sizes[0])
        assert together.patch_sizes[index, budget:].eq(0).all()
    capped = model(images, num_tokens=budgets, split_threshold=0.2)
    lengths = model(images, split_threshold=0.2).token_mask.sum(dim=1)
    assert capped.token_mask.sum(dim=1).tolist() == lengths.minimum(torch.tensor(budgets)).tolist()


@pytest.mark.parametrize("budgets", [[4, 25, 64], [4, 25, 64, 26]])
def test_a_list_that_does_not_fit_is_refused(images, budgets):
    with pytest.raises(ValueError, match="num_tokens"):
        make_quadtree()(images, num_tokens=budgets)


def make_flexivit(model_class=FlexiViTModel, **options):
    torch.manual_seed(0)
    return model_class(FlexiViTConfig(**SHAPE, image_size=32, base_patch_size=8, num_labels=5, **options)).eval()


SIZES = [(8, 8), (4, 4), [8, 16], (8, 8)]


@pytest.mark.parametrize("mode", [True, False, "auto"])
@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "num_register_tokens": 1}, {"use_cls_token": False}])
def test_a_patch_size_for_each_image_is_as_alone_with_gradients(images, mode, options):
    options = {"pooling": "attention", **options} if options.get("use_cls_token") is False else options
    model = make_flexivit(pack_tokens=mode, **options)
    alone = copy.deepcopy(model)
    together = model(images, patch_size=SIZES, output_hidden_states=True)
    prefix = model.config.num_prefix_tokens
    assert together.token_mask.sum(dim=1).tolist() == [16, 64, 8, 16]
    (together.pooler_output * torch.linspace(-1, 1, 16)).sum().backward()
    for index, size in enumerate(SIZES):
        own = alone(images[index : index + 1], patch_size=size, output_hidden_states=True)
        (own.pooler_output * torch.linspace(-1, 1, 16)).sum().backward()
        count = own.last_hidden_state.shape[1]
        assert count == prefix + together.token_mask[index].sum()
        torch.testing.assert_close(together.pooler_output[index], own.pooler_output[0], atol=1e-5, rtol=1e-5)
        for ours, expected in zip(together.hidden_states, own.hidden_states, strict=True):
            torch.testing.assert_close(ours[index, :count], expected[0], atol=1e-5, rtol=1e-5)
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_patch_sizes_that_are_all_the_same_need_no_mask(images):
    model = make_flexivit(FlexiViTForImageClassification)
    outputs = model.flexivit(images, patch_size=[(4, 4)] * 4)
    assert outputs.token_mask is None
    torch.testing.assert_close(outputs.last_hidden_state, model.flexivit(images, patch_size=4).last_hidden_state)
    logits = model(images, patch_size=SIZES).logits
    for index, size in enumerate(SIZES):
        torch.testing.assert_close(logits[index], model(images[index : index + 1], patch_size=size).logits[0])


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (SIZES[:3], {}, "4 images, got 3"),
        ([8, 4, 8, 8], {}, r"got \[8, 4, 8, 8\]: give \[\(8, 8\), \(4, 4\)"),
        ([(8, 8), (4, 4), (64, 64), (8, 8)], {}, "larger than the image"),
        ([(8, 8), (4, 4), (0, 8), (8, 8)], {}, "at least 1 pixel"),
        (SIZES, {"merge_tokens_to": 4}, "padding would be merged"),
    ],
)
def test_patch_sizes_that_do_not_fit_are_refused(images, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        make_flexivit()(images, patch_size=sizes, **options)


@pytest.mark.parametrize("mode", [True, False])
@torch.no_grad()
def test_every_layer_runs_once(images, mode):
    model, calls = make_flexivit(pack_tokens=mode), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:2]))
    model(images, patch_size=SIZES)
    assert calls == [(1, 4 + 16 + 64 + 8 + 16) if mode else (4, 65)] * 3
