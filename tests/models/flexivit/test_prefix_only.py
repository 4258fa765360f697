"""A classifier that pools prefix tokens computes only those in its last layer: same logits, same gradients."""

import pytest
import torch

from polyscale import FlexiViTConfig, FlexiViTForImageClassification


def tiny_classifier(**options) -> FlexiViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    return FlexiViTForImageClassification(
        FlexiViTConfig(**shape, image_size=32, base_patch_size=8, num_labels=5, **options)
    ).eval()


def logits_and_gradients(model, pixel_values, **kwargs):
    model.zero_grad()
    logits = model(pixel_values, **kwargs).logits
    (logits * torch.arange(1.0, 6.0)).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "pooler", "num_register_tokens": 2},
        {"use_distillation_token": True, "use_distillation_head": True},
        {"pre_norm": True, "final_norm": False, "fc_norm": True, "layer_scale_init_value": 0.5},
        {"pooling": "mean"},
        {"pooling": "cls_mean", "mlp_type": "swiglu"},
    ],
)
def test_logits_and_gradients_are_those_of_the_whole_layer(options, attention):
    model = tiny_classifier(**options)
    model.set_attn_implementation(attention)
    pixel_values = torch.randn(3, 3, 32, 40)
    short = logits_and_gradients(model, pixel_values)
    model.reads_prefix_only = lambda *args, **kwargs: False
    whole = logits_and_gradients(model, pixel_values)
    torch.testing.assert_close(short[0], whole[0], rtol=1e-5, atol=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(
            short[1].get(name, torch.zeros_like(gradient)), gradient, rtol=1e-4, atol=1e-4, msg=name
        )


def last_layer_tokens(model, **kwargs) -> int:
    """Tokens that go into the second linear layer of the last MLP."""
    seen = []
    fc2 = model.flexivit.layers[-1].mlp.fc2
    original = fc2.forward
    fc2.forward = lambda tokens: seen.append(tokens.shape[1]) or original(tokens)
    model(torch.randn(1, 3, 32, 32), **kwargs)
    fc2.forward = original
    return seen[0]


def test_only_what_is_read_is_computed():
    assert last_layer_tokens(tiny_classifier()) == 1
    assert last_layer_tokens(tiny_classifier(num_register_tokens=2)) == 3
    assert last_layer_tokens(tiny_classifier(pooling="mean")) == 17


def test_whoever_looks_at_the_last_layer_sees_every_token():
    assert last_layer_tokens(tiny_classifier(), output_hidden_states=True) == 17
    assert last_layer_tokens(tiny_classifier(output_hidden_states=True)) == 17
    model = tiny_classifier()
    seen = []
    model.flexivit.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 17, 32)]
    model = tiny_classifier()
    model.flexivit.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen[1] == (1, 17, 32)
    assert tiny_classifier().flexivit(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 32)
