"""A classifier that pools prefix tokens computes only those that it reads in its last layer: same values, same
gradients.
"""

import pytest
import torch

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
DISTILLED = {"use_distillation_token": True, "use_distillation_head": True}


def tiny_flexivit(**options) -> FlexiViTForImageClassification:
    torch.manual_seed(0)
    config = FlexiViTConfig(**SHAPE, image_size=32, base_patch_size=8, num_labels=5, **options)
    return FlexiViTForImageClassification(config).eval()


def tiny_quadtree(**options) -> QuadtreeViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "min_patch_size": 4, "max_patch_size": 16}
    config = QuadtreeViTConfig(**{**SHAPE, **sizes, "num_tokens": 19, "num_labels": 5, **options})
    return QuadtreeViTForImageClassification(config).eval()


def logits_and_gradients(model, pixel_values):
    model.zero_grad()
    logits = model(pixel_values).logits
    (logits * torch.arange(1.0, 6.0)).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach(), gradients


def assert_same_without_the_shortcut(model, pixel_values):
    short = logits_and_gradients(model, pixel_values)
    model.config.keep_all_tokens = True
    whole = logits_and_gradients(model, pixel_values)
    torch.testing.assert_close(short[0], whole[0], rtol=1e-5, atol=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(
            short[1].get(name, torch.zeros_like(gradient)), gradient, rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "pooler", "num_register_tokens": 2},
        DISTILLED,
        {"pre_norm": True, "final_norm": False, "fc_norm": True, "layer_scale_init_value": 0.5},
        {"pooling": "mean"},
        {"pooling": "cls_mean", "mlp_type": "swiglu"},
    ],
)
def test_flexivit_gives_the_same(options, attention):
    model = tiny_flexivit(**options)
    model.set_attn_implementation(attention)
    assert_same_without_the_shortcut(model, torch.randn(3, 3, 32, 40))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [{}, {"num_tokens": None, "split_threshold": 0.2}])
@pytest.mark.parametrize("options", [{}, DISTILLED, {"pooling": "mean"}])
def test_quadtree_vit_gives_the_same(options, budget, attention):
    model = tiny_quadtree(**options, **budget)
    model.set_attn_implementation(attention)
    images = torch.randn(3, 3, 32, 32)
    images[0], images[1, :, :16] = 0, 0  # nothing to split in a flat area
    counts = model(images).token_mask.sum(dim=1)
    assert (len(counts.unique()) > 1) == bool(budget)
    assert_same_without_the_shortcut(model, images)


def last_layer_tokens(model, **kwargs) -> int:
    """Tokens that go into the second linear layer of the last MLP."""
    seen = []
    hook = model.base_model.layers[-1].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(torch.randn(1, 3, 32, 32), **kwargs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("make", "total"), [(tiny_flexivit, 17), (tiny_quadtree, 20)])
def test_only_what_is_read_is_computed(make, total):
    assert last_layer_tokens(make()) == 1
    assert last_layer_tokens(make(num_register_tokens=2)) == 1
    assert last_layer_tokens(make(**DISTILLED)) == 2
    assert last_layer_tokens(make(pooling="mean")) == total
    assert last_layer_tokens(make(keep_all_tokens=True)) == total
    base = make().base_model
    assert base(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, total, 32)
    assert base(torch.randn(1, 3, 32, 32), pooled_only=True).last_hidden_state.shape == (1, 1, 32)


@pytest.mark.parametrize(("make", "total"), [(tiny_flexivit, 17), (tiny_quadtree, 20)])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_whoever_asks_for_outputs_of_layers_gets_every_token_and_the_next_call_is_short_again(make, total, name):
    options = {"attn_implementation": "eager"}
    assert last_layer_tokens(make(**{name: True}, **options)) == total
    model = make(**options)
    assert last_layer_tokens(model, **{name: True}) == total
    assert last_layer_tokens(model) == 1
    outputs = model(torch.randn(1, 3, 32, 32), **{name: True})
    shape = {"output_hidden_states": (1, total, 32), "output_attentions": (1, 4, total, total)}[name]
    assert outputs[name.removeprefix("output_")][-1].shape == shape
    assert last_layer_tokens(model, output_hidden_states=False) == 1
