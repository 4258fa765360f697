"""Token merging in transformers' own models: against a forward pass written out, and what must stay as it was."""

import copy
import inspect

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from polyscale import FlexiViTBackbone, FlexiViTConfig, S2VisionWrapper, apply_token_merging, remove_token_merging
from polyscale.layers.token_merging import merge_schedule, merge_tokens

from .tiny_models import pixels_shape, tiny_classifier


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}
MODELS = {
    "vit": (ViTModel, ViTConfig, 1),
    "deit": (DeiTModel, DeiTConfig, 2),
    "dinov2": (Dinov2Model, Dinov2Config, 1),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, 5),
    "clip": (CLIPVisionModelWithProjection, CLIPVisionConfig, 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 0),
}
each_model = pytest.mark.parametrize("name", MODELS)


def make_model(name: str, **options):
    model_class, config_class, num_prefix_tokens = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**SHAPE, **options)).eval(), num_prefix_tokens


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit_by_hand(model: ViTModel, pixel_values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    hidden = model.embeddings(pixel_values)
    sizes = torch.ones(hidden.shape[:2])
    schedule = merge_schedule(hidden.shape[1] - 1, num_tokens, len(model.layers))
    for layer, num_merged in zip(model.layers, schedule, strict=True):
        attention, normed = layer.attention, layer.layernorm_before(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = query @ key.transpose(2, 3) / 8**0.5
        weights = weights.exp() * sizes[:, None, None, :]  # the softmax over sizes[k] copies of each key
        weights = weights / weights.sum(dim=-1, keepdim=True)
        hidden = hidden + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
        hidden, sizes = merge_tokens(hidden, key.mean(dim=1), num_merged, sizes, 1)
    return model.layernorm(hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_tokens", [20, 45, 64])
def test_it_is_the_forward_written_out_with_its_gradients(pixel_values, num_tokens, attention):
    model, _ = make_model("vit", attn_implementation=attention)
    expected = vit_by_hand(model, pixel_values, num_tokens)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(model.layers.parameters()))
    apply_token_merging(model, num_tokens=num_tokens)
    actual = model(pixel_values).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((actual * weights).sum(), list(model.layers.parameters()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@each_model
def test_the_number_is_exact_and_all_of_them_change_nothing(name, pixel_values):
    model, num_prefix_tokens = make_model(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(pixel_values)[0]
        apply_token_merging(model, num_tokens=64)
        torch.testing.assert_close(model(pixel_values)[0], before, atol=0, rtol=0)
        apply_token_merging(model, num_tokens=20)
        outputs = model(pixel_values, output_hidden_states=True)
        assert outputs.last_hidden_state.shape[1] == num_prefix_tokens + 20
        counts = [states.shape[1] - num_prefix_tokens for states in outputs.hidden_states]
        assert counts[:2] == [64, 64]
        assert counts == sorted(counts, reverse=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=0, rtol=0)


@each_model
def test_it_can_be_taken_back(name, pixel_values, tmp_path):
    model, _ = make_model(name)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(pixel_values)[0]
        apply_token_merging(model, num_tokens=20)
        assert (model(pixel_values)[0].shape != before.shape) or not torch.equal(model(pixel_values)[0], before)
        remove_token_merging(model)
        torch.testing.assert_close(model(pixel_values)[0], before, atol=0, rtol=0)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"
    remove_token_merging(model)  # a second time is harmless


def test_a_saved_model_is_an_ordinary_one(pixel_values, tmp_path):
    model, _ = make_model("vit")
    with torch.no_grad():
        before = model(pixel_values)[0]
        apply_token_merging(model, num_tokens=20).save_pretrained(tmp_path)
        torch.testing.assert_close(ViTModel.from_pretrained(tmp_path)(pixel_values)[0], before)


def test_gradient_checkpointing_gives_the_same_gradients(pixel_values):
    model, _ = make_model("vit")
    apply_token_merging(model, num_tokens=20)
    copied = copy.deepcopy(model)
    model.train()(pixel_values).last_hidden_state.square().sum().backward()
    copied.activation_checkpointing_enable() if hasattr(copied, "activation_checkpointing_enable") else None
    copied.train()(pixel_values).last_hidden_state.square().sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_copy_has_a_number_of_its_own(pixel_values):
    model, _ = make_model("vit")
    apply_token_merging(model, num_tokens=20)
    copied = copy.deepcopy(model)
    apply_token_merging(copied, num_tokens=30)
    with torch.no_grad():
        assert model(pixel_values).last_hidden_state.shape[1] == 21
        assert copied(pixel_values).last_hidden_state.shape[1] == 31


@torch.no_grad()
def test_a_stored_model_merges_as_before(pixel_values, tmp_path):
    model, _ = make_model("vit")
    whole = model(pixel_values).last_hidden_state
    merged = apply_token_merging(model, num_tokens=20)(pixel_values).last_hidden_state
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(pixel_values).last_hidden_state, merged)
    assert torch.equal(remove_token_merging(loaded)(pixel_values).last_hidden_state, whole)
    assert torch.equal(model(pixel_values).last_hidden_state, merged)  # the other is as it was


@torch.no_grad()
def test_twice_is_once_and_numbers_above_the_tokens_change_nothing(pixel_values):
    model, _ = make_model("vit")
    whole = model(pixel_values).last_hidden_state
    once = apply_token_merging(model, num_tokens=20)(pixel_values).last_hidden_state
    assert torch.equal(apply_token_merging(model, num_tokens=20)(pixel_values).last_hidden_state, once)
    for number in (64, 65, 1 << 70):
        assert torch.equal(apply_token_merging(model, num_tokens=number)(pixel_values).last_hidden_state, whole)
    for number in (0, -1, True, 2.0, float("nan"), "4", None, [4]):
        with pytest.raises(ValueError, match="`num_tokens` must be an int of at least 1"):
            apply_token_merging(model, num_tokens=number)
    for _ in range(2):
        assert torch.equal(remove_token_merging(model)(pixel_values).last_hidden_state, whole)
    assert model.config._attn_implementation == "sdpa"


def test_it_compiles_to_one_graph(pixel_values):
    model, _ = make_model("vit")
    apply_token_merging(model, num_tokens=20)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_and_the_vision_part_of_clip(pixel_values):
    torch.manual_seed(0)
    classifier = ViTForImageClassification(ViTConfig(**SHAPE, num_labels=5)).eval()
    clip = CLIPModel(CLIPConfig(vision_config=SHAPE, text_config={"hidden_size": 32, "num_hidden_layers": 1})).eval()
    with torch.no_grad():
        expected = classifier.classifier(vit_by_hand(classifier.vit, pixel_values, 20)[:, 0])
        torch.testing.assert_close(apply_token_merging(classifier, num_tokens=20)(pixel_values).logits, expected)
        whole = clip.get_image_features(pixel_values)
        apply_token_merging(clip.vision_model, num_tokens=20)
        assert clip.vision_model(pixel_values).last_hidden_state.shape[1] == 21
        merged = clip.get_image_features(pixel_values)
        merged, whole = (getattr(output, "pooler_output", output) for output in (merged, whole))
        assert merged.shape == whole.shape
        assert not torch.equal(merged, whole)


def test_what_cannot_be_merged_is_refused(pixel_values):
    model, _ = make_model("vit")
    with pytest.raises(ValueError, match="`num_tokens` must be an int of at least 1, got 0"):
        apply_token_merging(model, num_tokens=0)
    with pytest.raises(ValueError, match=r"`model` must be a Vision Transformer.*ResNetModel has 0"):
        apply_token_merging(ResNetModel(ResNetConfig()), num_tokens=10)
    with pytest.raises(ValueError, match="`model` must be a vision model of transformers, got Linear"):
        apply_token_merging(torch.nn.Linear(2, 2), num_tokens=10)
    text_too = CLIPModel(CLIPConfig(vision_config=SHAPE, text_config={"hidden_size": 32, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"CLIPModel has 2.*`vision_model`"):
        apply_token_merging(text_too, num_tokens=10)
    apply_token_merging(model, num_tokens=4)
    with pytest.raises(ValueError, match=r"at least 8 for 64 tokens and 3 layers.*got 4"):
        model(pixel_values)


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields", "problem"),
    [
        (DINOv3ViTModel, DINOv3ViTConfig, {}, "its layers rotate queries and keys"),
        (BeitModel, BeitConfig, {"use_relative_position_bias": True}, "its layers add a bias for the relative pos"),
        (BeitModel, BeitConfig, {"use_shared_relative_position_bias": True}, "its layers add a bias for the relative"),
        (InternVLVisionModel, InternVLVisionConfig, {"image_size": [32, 32], "patch_size": [4, 4]}, "take no mask"),
        (CLIPTextModel, CLIPTextConfig, {}, "it takes `input_ids`, not images"),
    ],
)
def test_models_whose_layers_know_the_patches_are_refused(model_class, config_class, fields, problem):
    names = set(inspect.signature(config_class).parameters)
    model = model_class(config_class(**{name: value for name, value in {**SHAPE, **fields}.items() if name in names}))
    with pytest.raises(ValueError, match=problem):
        apply_token_merging(model, num_tokens=20)


@torch.no_grad()
@pytest.mark.parametrize(("family", "count"), [("flexivit", 6), ("quadtree_vit", 13)])
def test_models_of_this_library_merge_by_their_config(family, count):
    model, pixels = tiny_classifier(family).eval(), torch.randn(pixels_shape(family))
    plain, expected = model(pixels).logits, model(pixels, merge_tokens_to=count).logits
    assert apply_token_merging(model, num_tokens=count) is model
    assert model.config.merge_tokens_to == model.num_tokens_for(pixels.shape[-2:]) == count
    torch.testing.assert_close(model(pixels).logits, expected)
    remove_token_merging(model)
    torch.testing.assert_close(model(pixels).logits, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("family", "count"), [("flexivit", 6), ("quadtree_vit", 13)])
def test_models_of_this_library_take_gradient_checkpointing(family, count, use_reentrant):
    torch.manual_seed(0)
    pixel_values = torch.randn(pixels_shape(family))
    model = tiny_classifier(family, num_hidden_layers=3, pooling="mean")
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model(pixel_values, merge_tokens_to=count, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_lays_tokens_out_as_maps_is_refused():
    small = {name: value for name, value in SHAPE.items() if name != "patch_size"}
    for model in (
        FlexiViTBackbone(FlexiViTConfig(**small, base_patch_size=4)),
        Dinov2Backbone(Dinov2Config(**SHAPE)),
        S2VisionWrapper.from_vision_model(make_model("vit")[0], scales=[1, 2]),
    ):
        with pytest.raises(ValueError, match=f"`model` must give tokens: {type(model).__name__} lays them out"):
            apply_token_merging(model, num_tokens=6)
