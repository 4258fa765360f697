"""A frozen budget: the same values from kept tensors, and nothing kept that could be wrong."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from polyscale import FlexiViTBackbone, FlexiViTForImageClassification


def frozen_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_buffers() if "frozen_" in name}


@pytest.fixture
def model(make_model):
    return make_model(num_labels=3, use_distillation_token=True, use_distillation_head=True)


@pytest.mark.parametrize("patch_size", [8, 4, (4, 16)])
def test_values_are_those_of_the_model(model, images, patch_size):
    with torch.inference_mode():
        expected = {size: model(images, patch_size=size) for size in (patch_size, 16)}
        states = model(images, patch_size=patch_size, output_hidden_states=True).hidden_states
        model.freeze_budget(image_size=32, patch_size=patch_size)
        assert len(frozen_tensors(model)) == 2 * 2 + 1 + (patch_size != 8)
        for size, outputs in expected.items():
            torch.testing.assert_close(model(images, patch_size=size).logits, outputs.logits, rtol=1e-5, atol=1e-5)
        actual = model(images, patch_size=patch_size, output_hidden_states=True).hidden_states
        torch.testing.assert_close(actual, states, rtol=1e-5, atol=1e-5)
        other = torch.randn(2, 3, 48, 20)
        frozen = model(other, patch_size=patch_size).logits
        model.unfreeze_budget()
        assert not frozen_tensors(model)
        torch.testing.assert_close(frozen, model(other, patch_size=patch_size).logits, rtol=1e-5, atol=1e-5)


def test_the_kept_tensors_are_what_a_call_reads(model, images):
    model.freeze_budget(image_size=32, patch_size=4)
    with torch.no_grad():
        before = model(images, patch_size=4).logits
        for name in ("frozen_kernel", "frozen_positions", "frozen_qkv_weight", "frozen_qkv_bias"):
            tensors = [tensor for key, tensor in model.named_buffers() if key.endswith(name)]
            assert tensors
            changed = [tensor.clone() for tensor in tensors]
            for tensor in tensors:
                tensor.add_(torch.randn_like(tensor))  # a shift of all channels is lost in a LayerNorm
            assert not torch.allclose(model(images, patch_size=4).logits, before)
            for tensor, kept in zip(tensors, changed, strict=True):
                tensor.copy_(kept)


def test_the_defaults_are_those_of_the_config(make_model, images):
    model = make_model(num_labels=3, patch_size=4)
    model.freeze_budget()
    assert model.get_input_embeddings().frozen_kernel.shape[-2:] == (4, 4)
    assert model.flexivit.embeddings.frozen_positions.shape[1] == 64


@pytest.mark.parametrize(
    "end",
    [
        lambda model: model.unfreeze_budget(),
        lambda model: model.train(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings())),
    ],
    ids=["unfreeze_budget", "train", "load_state_dict", "another module"],
)
def test_what_ends_it(model, images, end):
    model.freeze_budget(image_size=32, patch_size=4)
    end(model)
    assert "flexivit.embeddings.patch_embeddings.projection.frozen_kernel" not in frozen_tensors(model)
    assert model.flexivit.embeddings.patch_embeddings.projection.frozen_kernel is None


def test_weights_that_are_loaded_are_used(make_model, images):
    model, other = make_model(num_labels=3), make_model(num_labels=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
        model.freeze_budget(image_size=32, patch_size=4)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(images, patch_size=4).logits, other(images, patch_size=4).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [("resize_method", "interpolate"), ("kernel_interpolation", "bicubic"), ("position_interpolation", "bicubic")],
)
def test_a_config_that_changes_is_followed(model, images, field, value):
    with torch.no_grad():
        model.freeze_budget(image_size=32, patch_size=4)
        before = model(images, patch_size=4).logits
        assert getattr(model.config, field) != value
        setattr(model.config, field, value)
        after = model(images, patch_size=4).logits
        model.unfreeze_budget()
        torch.testing.assert_close(after, model(images, patch_size=4).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "position_embeddings"])
def test_a_new_parameter_is_used(model, images, name):
    embeddings = model.flexivit.embeddings
    owner = embeddings if name == "position_embeddings" else embeddings.patch_embeddings.projection
    model.freeze_budget(image_size=32, patch_size=4)
    with torch.no_grad():
        setattr(owner, name, torch.nn.Parameter(getattr(owner, name) * -3))
        found = model(images, patch_size=4).logits
        model.unfreeze_budget()
        torch.testing.assert_close(found, model(images, patch_size=4).logits, rtol=1e-5, atol=1e-5)


def test_it_is_in_no_checkpoint(model, images, tmp_path):
    names = set(model.state_dict())
    model.freeze_budget(image_size=32, patch_size=4)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = FlexiViTForImageClassification.from_pretrained(tmp_path)
    assert not frozen_tensors(loaded)
    with torch.no_grad():
        expected = model(images, patch_size=4).logits
        torch.testing.assert_close(loaded(images, patch_size=4).logits, expected, rtol=1e-5, atol=1e-5)


def test_it_follows_the_model(model, images):
    model.freeze_budget(image_size=32, patch_size=4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(frozen_tensors(copied)) == len(frozen_tensors(model))
        with torch.no_grad():
            assert torch.equal(copied(images, patch_size=4).logits, model(images, patch_size=4).logits)
    model.to(torch.float64)
    assert {tensor.dtype for tensor in frozen_tensors(model).values()} == {torch.float64}
    with torch.no_grad():
        assert model(images.double(), patch_size=4).logits.dtype == torch.float64


def test_gradients_reach_the_weights_also_when_frozen(model, images):
    model(images, patch_size=4).logits.sum().backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.freeze_budget(image_size=32, patch_size=4)
    model(images, patch_size=4).logits.sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


def test_frozen_in_inference_mode_it_differentiates_after_it(model, images):
    model.requires_grad_(False)
    plain, frozen = images.clone().requires_grad_(), images.clone().requires_grad_()
    model(plain, patch_size=4).logits.sum().backward()
    with torch.inference_mode():
        model.freeze_budget(image_size=32, patch_size=4)
    model(frozen, patch_size=4).logits.sum().backward()
    torch.testing.assert_close(frozen.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_and_a_budget_do_not_mix(make_model, images):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = make_model(num_labels=3)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    with pytest.raises(ValueError, match=r"without adapters.*q_proj"):
        adapted.freeze_budget(image_size=32, patch_size=4)
    merged = adapted.merge_and_unload()
    expected = merged(images, patch_size=4).logits
    merged.freeze_budget(image_size=32, patch_size=4)
    with torch.no_grad():
        torch.testing.assert_close(merged(images, patch_size=4).logits, expected, rtol=1e-5, atol=1e-5)

    model.freeze_budget(image_size=32, patch_size=4)  # adapters that come later are not passed over
    later = get_peft_model(model, config).eval()
    with torch.no_grad():
        wanted = later(pixel_values=images, patch_size=4).logits
        assert torch.equal(later.merge_and_unload()(images, patch_size=4).logits, model(images, patch_size=4).logits)
        torch.testing.assert_close(model(images, patch_size=4).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_frozen_model_compiles_and_exports(model, images):
    model.freeze_budget(image_size=32, patch_size=4)
    with torch.no_grad():
        expected = model(images, patch_size=4).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images, patch_size=4).logits, expected)
        exported = torch.export.export(model, (images,), {"patch_size": 4}).module()
        torch.testing.assert_close(exported(images, patch_size=4).logits, expected)


def test_a_backbone_has_it_too(make_model, images):
    backbone = FlexiViTBackbone(make_model().config).eval()
    with torch.no_grad():
        (expected,) = backbone(images, patch_size=4).feature_maps
        backbone.freeze_budget(image_size=32, patch_size=4)
        torch.testing.assert_close(backbone(images, patch_size=4).feature_maps[0], expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_frozen_is_refused(model):
    with pytest.raises(ValueError, match="larger than the image"):
        model.freeze_budget(image_size=32, patch_size=40)
    with pytest.raises(ValueError, match="training mode"):
        copy.deepcopy(model).train().freeze_budget()
    with pytest.raises(ValueError, match="ordinary tensors"):
        model.to("meta").freeze_budget()
