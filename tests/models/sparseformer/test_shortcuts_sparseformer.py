"""What is left out or computed once gives the values and gradients of the whole."""

import pytest
import torch
from polyscale.models.sparseformer.modules_sparseformer import SparseFormerLayer
from sparseformer_reference import make_model, tiny_config

from polyscale.models.sparseformer import (
    SparseFormerForImageClassification,
    SparseFormerForVideoClassification,
    SparseFormerModel,
    modules_sparseformer,
)


KINDS = ["v1", "bootstrapped", "video"]


def make_classifier(kind: str, **overrides):
    """A classifier and two of its inputs."""
    model_class = SparseFormerForVideoClassification if kind == "video" else SparseFormerForImageClassification
    shape = (2, 3, 3, 24, 20) if kind == "video" else (2, 3, 24, 20)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return make_model(model_class, tiny_config(kind, **overrides)), pixels


def values_and_gradients(model, pixels, **options):
    model.zero_grad()
    torch.manual_seed(2)  # of the stochastic depth
    outputs = model(pixels, **options)
    outputs.logits.square().sum().backward()
    return outputs.logits, outputs.rois, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual, expected):
    # Encodings of RoIs, of frequencies up to 128 * pi, multiply differences in rounding.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def watch(module) -> list[tuple[int, ...]]:
    """The shapes that a module gives from now on."""
    shapes = []
    module.register_forward_hook(
        lambda module, inputs, outputs: shapes.append(tuple((outputs[0] if type(outputs) is tuple else outputs).shape))
    )
    return shapes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_computes_only_what_its_head_pools(monkeypatch, kind, training):
    model, pixels = make_classifier(kind, drop_path_rate=0.3)
    model.train(training)
    pool, pooled = SparseFormerLayer.pool, []
    monkeypatch.setattr(
        SparseFormerLayer, "pool", lambda *inputs, **kwargs: pooled.append(pool(*inputs, **kwargs)) or pooled[-1]
    )
    short = values_and_gradients(model, pixels)
    assert [tuple(tokens.shape) for tokens in pooled] == [(2, 1, 32)]
    whole = values_and_gradients(model, pixels, output_hidden_states=True)
    assert len(pooled) == 1
    assert_same(short, whole)


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


@pytest.mark.parametrize("name", ["hidden_states", "attentions", "all_rois", "sampling_points"])
@pytest.mark.parametrize("in_config", [False, True])
def test_a_classifier_that_is_asked_for_more_computes_all(name, in_config):
    model, pixels = make_classifier("bootstrapped", **({f"output_{name}": True} if in_config else {}))
    model.set_attn_implementation("eager")
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


def start_apart(model) -> None:
    """Gives each picture tokens and RoIs of its own, equal though they are."""
    model.embeddings.register_forward_hook(
        lambda module, inputs, outputs: tuple(
            tensor.clone(memory_format=torch.contiguous_format) for tensor in outputs
        )
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_until_the_first_look_one_picture_stands_for_all(kind, training):
    # A scale of the loss at which the gradients of points are clamped, picture by picture.
    model, pixels = make_classifier(kind, restrict_grad_norm=True)
    model.train(training)
    generated = watch(model.sparseformer.layers[0].mixing.generator_in)
    together = values_and_gradients(model, pixels)
    start_apart(model.sparseformer)
    apart = values_and_gradients(model, pixels)
    num_tokens = model.config.num_tokens
    assert [shape[0] for shape in generated] == [1, 2, 2, 2]  # two repeats, twice
    assert together[1].shape == (2, num_tokens, 6 if kind == "video" else 4)
    assert_same(together, apart)


def test_stochastic_depth_keeps_pictures_apart():
    model, pixels = make_classifier("v1", drop_path_rate=0.3)
    model.sparseformer.layers[0].drop_paths[0].rate = 0.3
    attended = watch(model.sparseformer.layers[0].attention)
    model.train()(pixels)
    model.eval()(pixels)
    assert [shape[0] for shape in attended] == [2, 2, 1, 2]


def test_recorded_shapes_have_the_batch():
    for kind in ("v1", "bootstrapped"):
        model = make_model(SparseFormerModel, tiny_config(kind))
        flags = ("hidden_states", "all_rois", "sampling_points", "sampling_rois")
        with torch.no_grad():
            outputs = model(torch.randn(3, 3, 16, 16), **{f"output_{flag}": True for flag in flags})
        assert all(len(tensor) == 3 for flag in flags for tensor in outputs[flag])


def test_a_first_layer_that_does_not_look_gives_tokens_to_every_picture():
    operations = [["attn", "mlp"], ["sampling_m", "roi_adj"], ["attn", "mlp"]]
    model, pixels = make_classifier("v1", operations=operations)
    together = values_and_gradients(model, pixels)
    start_apart(model.sparseformer)
    assert_same(together, values_and_gradients(model, pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_equal_the_whole(monkeypatch, kind):
    model, pixels = make_classifier(kind)
    expected = model(pixels).logits.detach()  # with gradients: not in parts
    generated = watch(model.sparseformer.layers[1].mixing.generator_out)
    encode, encoded = modules_sparseformer.SparseFormerFeatures.encode, []
    monkeypatch.setattr(
        modules_sparseformer.SparseFormerFeatures,
        "encode",
        lambda module, part: encoded.append(len(part)) or encode(module, part),
    )
    monkeypatch.setattr(modules_sparseformer, "_VALUES", 400)
    with torch.no_grad():
        logits = model(pixels).logits
    assert encoded == [1] * (6 if kind == "video" else 2)
    assert sum(rows for rows, _ in generated) == 2 * model.config.num_tokens
    assert len(generated) > 2
    assert_same(logits, expected)
