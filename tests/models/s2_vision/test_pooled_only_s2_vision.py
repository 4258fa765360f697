"""A classifier around a model of this library has it compute the pooled vector alone."""

import pytest
import torch
from s2_tiny import make_base

from polyscale import S2VisionForImageClassification


def make_classifier(name: str, **fields) -> S2VisionForImageClassification:
    torch.manual_seed(0)
    base = make_base(name)
    return S2VisionForImageClassification.from_vision_model(base, scales=[1, 2], num_labels=3, **fields).eval()


def last_layer_tokens(model, **kwargs) -> set[int]:
    seen = set()
    fc2 = model.s2_vision.vision_model.layers[-1].mlp.fc2
    hook = fc2.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]))
    outputs = model(torch.randn(2, 3, 64, 64), **kwargs)
    hook.remove()
    assert outputs.logits.shape == (2, 3)
    return seen


@pytest.mark.parametrize(("name", "total"), [("flexivit", 17), ("quadtree_vit", 41)])
def test_only_the_pooled_vector_is_computed(name, total):
    model, images = make_classifier(name), torch.randn(2, 3, 64, 64)
    assert last_layer_tokens(model) == {1}
    assert last_layer_tokens(model, output_hidden_states=True) == {total}
    assert last_layer_tokens(model) == {1}
    assert last_layer_tokens(make_classifier(name, pooling="mean")) == {total}
    assert total in last_layer_tokens(make_classifier(name, num_tiles=2))  # beside others, of enlarged tiles
    with torch.no_grad():
        short = model(images).logits
        model.config.keep_all_tokens = True
        assert last_layer_tokens(model) == {total}
        torch.testing.assert_close(short, model(images).logits, rtol=1e-5, atol=1e-5)


def test_other_models_are_asked_for_everything():
    model, images = make_classifier("clip").s2_vision, torch.randn(2, 3, 64, 64)
    outputs = model(images, pooled_only=True)
    assert torch.equal(outputs.last_hidden_state, model(images).last_hidden_state)
