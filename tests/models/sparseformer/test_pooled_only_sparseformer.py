"""What a classifier leaves out of its last layer changes neither values nor gradients."""

import pytest
import torch
from sparseformer_reference import make_classifier, tiny_config, values_and_gradients, watch


KINDS = ["v1", "bootstrapped", "video"]


def assert_same(actual, expected):
    # Encodings of RoIs, of frequencies up to 128 * pi, multiply differences in rounding.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_computes_only_what_its_head_pools(monkeypatch, kind, training):
    model, pixels = make_classifier(kind, drop_path_rate=0.3)
    model.train(training)
    shapes = watch(model.sparseformer.layers[-1].mlp.fc2)
    short = values_and_gradients(model, pixels)
    whole = values_and_gradients(model, pixels, output_hidden_states=True)
    again = values_and_gradients(model, pixels)
    num_tokens = model.config.num_tokens + model.config.num_prefix_tokens
    assert shapes == [(2, 1, 32), (2, num_tokens, 32), (2, 1, 32)]
    assert_same(short, whole)
    torch.testing.assert_close(again, short, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_can_ask_for_all_tokens(kind):
    model, pixels = make_classifier(kind)
    with torch.no_grad():
        short = model(pixels).logits
        shapes = watch(model.sparseformer.layers[-1].mlp.fc2)
        model.config.keep_all_tokens = True
        whole = model(pixels).logits
    assert shapes == [(2, model.config.num_tokens + model.config.num_prefix_tokens, 32)]
    assert_same(short, whole)


def test_the_model_gives_all_tokens_unless_told_otherwise():
    model, pixels = make_classifier("v1")
    model = model.sparseformer
    with torch.no_grad():
        whole, short = model(pixels), model(pixels, pooled_only=True)
    assert whole.last_hidden_state.shape == (2, 5, 32)
    assert short.last_hidden_state is None
    torch.testing.assert_close(short.pooler_output, whole.pooler_output)
    assert torch.equal(short.rois, whole.rois)


@pytest.mark.parametrize(
    ("name", "in_config"),
    [
        ("hidden_states", False),
        ("hidden_states", True),
        ("attentions", False),
        ("attentions", True),
        ("all_rois", False),
        ("sampling_points", False),
    ],
)
def test_a_classifier_that_is_asked_for_more_computes_all(name, in_config):
    options = {f"output_{name}": True} if in_config else {}
    model, pixels = make_classifier("bootstrapped", attn_implementation="eager", **options)
    with torch.no_grad():
        outputs = model(pixels, **({} if in_config else {f"output_{name}": True}))
    if name == "hidden_states":
        assert outputs.hidden_states[-1].shape == (2, 6, 32)
    if name == "attentions":
        assert outputs.attentions[-1].shape[2:] == (6, 6)
    assert outputs[name] is not None


@pytest.mark.parametrize("operations", [["attn", "mlp", "roi_adj"], ["mlp", "attn"], ["attn"]])
def test_a_last_layer_of_another_kind_computes_all(operations):
    config = {"operations": [*tiny_config("bootstrapped").operations[:-1], operations]}
    model, pixels = make_classifier("bootstrapped", **config)
    with torch.no_grad():
        short, whole = (model.sparseformer(pixels, pooled_only=value) for value in (True, False))
    torch.testing.assert_close(short.pooler_output, whole.pooler_output)
    assert torch.equal(short.rois, whole.rois)
