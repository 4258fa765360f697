"""S2 models around tiny towers."""

import re

import pytest
import torch
from s2_tiny import BASES, make_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from polyscale.models.quadtree_vit import QuadtreeViTConfig, QuadtreeViTModel
from polyscale.models.s2_vision import (
    S2VisionBackbone,
    S2VisionConfig,
    S2VisionForImageClassification,
    S2VisionWrapper,
    multiscale_forward,
)


PREFIX = {"clip": 1, "siglip": 0, "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 3, "convnext": 0}


@pytest.mark.parametrize("name", BASES)
def test_equals_the_function_and_reloads(name, tmp_path):
    base = make_base(name)
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2]).eval()
    assert model.vision_model is base
    assert model.config.num_prefix_tokens == PREFIX.get(
        name, base.config.num_prefix_tokens if name == "flexivit" else 0
    )
    size = base.config.image_size
    images = torch.randn(2, 3, size, size)
    shape = "bchw" if name == "convnext" else "bnc"
    expected = multiscale_forward(
        base, images, scales=[1, 2], num_prefix_token=model.config.num_prefix_tokens, output_shape=shape
    )
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected)
    assert outputs.last_hidden_state.shape[1 if name == "convnext" else 2] == model.config.hidden_size
    assert outputs.pooler_output.shape == (2, model.config.pooled_size)

    model.save_pretrained(tmp_path)
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(reloaded) is S2VisionWrapper
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(images)[0], expected, atol=1e-5, rtol=1e-4)


def test_images_at_the_largest_scale(clip):
    """Scales are multiples of the tile: the size of the image does not change them."""
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    large = torch.randn(1, 3, 64, 64)
    expected = multiscale_forward(clip, large, img_sizes=[32, 64], max_split_size=32, num_prefix_token=1)
    torch.testing.assert_close(model(large)[0], expected)
    halves = S2VisionWrapper.from_vision_model(clip, scales=[0.5, 1])
    torch.testing.assert_close(halves(large)[0], expected)
    sizes = S2VisionWrapper.from_vision_model(clip, img_sizes=[32, 64])
    torch.testing.assert_close(sizes(large)[0], expected)
    torch.testing.assert_close(model(large, img_sizes=[32, 64])[0], expected)
    torch.testing.assert_close(
        model(large, scales=[1, 3])[0],
        multiscale_forward(clip, large, img_sizes=[32, 96], max_split_size=32, num_prefix_token=1),
    )


def test_images_that_are_not_square_keep_their_aspect_ratio(clip):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    wide = torch.randn(1, 3, 64, 128)
    expected = multiscale_forward(clip, wide, img_sizes=[(32, 64), (64, 128)], max_split_size=32, num_prefix_token=1)
    assert expected.shape == (1, 1 + 4 * 8, 32)
    torch.testing.assert_close(model(wide)[0], expected)
    assert model.config.num_tokens_for((64, 128)) == 32


def test_pooler_is_the_mean_over_tiles_of_each_scale(clip, images):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    small = torch.nn.functional.interpolate(images, size=32, mode="bicubic")
    tiles = [images[:, :, row : row + 32, column : column + 32] for row in (0, 32) for column in (0, 32)]
    expected = torch.cat(
        [clip(small).pooler_output, torch.stack([clip(tile).pooler_output for tile in tiles]).mean(dim=0)], dim=1
    )
    torch.testing.assert_close(model(images).pooler_output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (4, r"indices from -4 to 3 of the 4 hidden states .* got \[4\]"),
        ([0, -5], r"indices from -4 to 3 of the 4 hidden states .* got \[0, -5\]"),
        ("last", "`output_hidden_states` must be an int, got 'last'"),
        ([1.0], "`output_hidden_states` must be an int, got 1.0"),
    ],
)
def test_layers_that_there_are_not_are_refused(clip, images, wanted, message):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    with pytest.raises(ValueError, match=message):
        model(images, output_hidden_states=wanted)


@pytest.mark.parametrize("wanted", [True, -2, [1], [0, -1], 3, 0])
def test_hidden_states_of_the_layers_asked_for(clip, images, wanted):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    states = model(images, output_hidden_states=wanted).hidden_states
    layers = (
        set(range(4)) if wanted is True else {layer % 4 for layer in ([wanted] if isinstance(wanted, int) else wanted)}
    )
    assert {index for index, state in enumerate(states) if state is not None} == layers
    for layer in layers:
        expected = multiscale_forward(
            lambda x, layer=layer: clip(x, output_hidden_states=True).hidden_states[layer],
            images,
            img_sizes=[32, 64],
            max_split_size=32,
            num_prefix_token=1,
        )
        torch.testing.assert_close(states[layer], expected)
    assert model(images).hidden_states is None


def test_attentions_have_the_tiles_of_a_image_together(clip, images):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    model.set_attn_implementation("eager")
    attentions = model(images, output_attentions=True).attentions
    assert len(attentions) == 3
    assert attentions[0].shape == (2, 5, 2, 17, 17)
    tile = clip(images[1:, :, :32, 32:], output_attentions=True).attentions[0]
    torch.testing.assert_close(attentions[0][1, 2], tile[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"split_forward": True}, {"tiles_per_forward": 3}])
def test_chunks_give_the_same(clip, images, options):
    expected = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])(images, output_hidden_states=True)
    outputs = S2VisionWrapper.from_vision_model(clip, scales=[1, 2], **options)(images, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-4)
    for state, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-4)


def test_plain_checkpoints_load(clip, images, tmp_path):
    clip.save_pretrained(tmp_path / "vision")
    model = S2VisionWrapper.from_vision_pretrained(tmp_path / "vision", scales=[1, 2]).eval()
    expected = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])(images)[0]
    torch.testing.assert_close(model(images)[0], expected)
    half = S2VisionForImageClassification.from_vision_pretrained(
        tmp_path / "vision", scales=[1, 2], num_labels=5, model_kwargs={"dtype": torch.bfloat16}
    )
    assert half.dtype == torch.bfloat16
    assert half(images.bfloat16()).logits.shape == (2, 5)

    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=clip.config.to_dict(), text_config=text, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path / "clip")
    model = S2VisionWrapper.from_vision_pretrained(tmp_path / "clip", scales=[1, 2]).eval()
    expected = S2VisionWrapper.from_vision_model(whole.vision_model, scales=[1, 2])(images)[0]
    torch.testing.assert_close(model(images)[0], expected)


def test_checkpoints_that_lack_weights_are_refused(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    clip.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"it lacks 1 weights, .*q_proj\.weight"):
        S2VisionWrapper.from_vision_pretrained(tmp_path, scales=[1, 2])


def test_wrapping_keeps_weights_dtype_mode_and_attention(clip):
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    clip.set_attn_implementation("eager")
    clip.train()
    model = S2VisionForImageClassification.from_vision_model(clip, scales=[1, 2], num_labels=3)
    assert model.s2_vision.vision_model is clip
    assert model.training
    assert clip.config._attn_implementation == "eager"
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.set_attn_implementation("sdpa")
    assert clip.config._attn_implementation == "sdpa"


def test_attention_implementations_agree(clip, images):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        results.append(model(images)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_classifier(clip, images, pooling, tmp_path):
    model = S2VisionForImageClassification.from_vision_model(clip, scales=[1, 2], num_labels=3, pooling=pooling).eval()
    outputs = model(images, labels=torch.tensor([0, 2]))
    features = model.s2_vision(images)
    pooled = features.pooler_output if pooling == "pooler" else features.last_hidden_state[:, 1:].mean(dim=1)
    logits = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(outputs.logits, logits)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reloaded(images).logits, logits, atol=1e-5, rtol=1e-4)
    headless = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(headless(images)[0], features[0], atol=1e-5, rtol=1e-4)


def test_checkpoints_with_the_old_name_of_the_head_load(clip, tmp_path):
    model = S2VisionForImageClassification.from_vision_model(clip, scales=[1, 2], num_labels=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name for name in tensors if not name.startswith("s2_vision.")} == {"head.weight", "head.bias"}
    old = {re.sub(r"^head\.", "classifier.", name): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for folder in (tmp_path, tmp_path / "again"):
        loaded, info = S2VisionForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()


def test_freezing_and_gradient_checkpointing(clip, images):
    model = S2VisionForImageClassification.from_vision_model(clip, scales=[1, 2], num_labels=3).train()
    labels = torch.tensor([0, 2])
    model(images, labels=labels).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("q_proj" in name for name in plain)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(images, labels=labels).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    model.s2_vision.freeze_base()
    model.zero_grad()
    model(images, labels=labels).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(clip, images, dtype):
    model = S2VisionForImageClassification.from_vision_model(clip, scales=[1, 2], num_labels=3)
    expected = model(images).logits
    logits = model.to(dtype)(images.to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


def test_backbone(images):
    model = S2VisionBackbone.from_vision_model(make_base("clip"), scales=[1, 2], out_indices=[1, -1]).eval()
    maps = model(images).feature_maps
    states = model.s2_vision(images, output_hidden_states=True).hidden_states
    assert model.channels == [32, 32]
    for part, layer in zip(maps, (1, 3), strict=True):
        torch.testing.assert_close(part, states[layer][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    wide = model(torch.randn(1, 3, 32, 64)).feature_maps[0]
    assert wide.shape == (1, 32, 4, 8)
    convnet = S2VisionBackbone.from_vision_model(
        make_base("convnext"), scales=[1, 2], out_features=["stage2", "stage4"]
    )
    assert [tuple(part.shape) for part in convnet(torch.randn(1, 3, 64, 64)).feature_maps] == [
        (1, 16, 8, 8),
        (1, 32, 2, 2),
    ]


def test_around_a_flexivit_at_another_patch_size(images):
    base = make_base("flexivit")
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2])
    expected = multiscale_forward(
        lambda x: base(x, patch_size=4).last_hidden_state,
        images,
        img_sizes=[32, 64],
        max_split_size=32,
        num_prefix_token=1,
    )
    torch.testing.assert_close(model(images, patch_size=4)[0], expected)


def test_around_a_quadtree_vit(images):
    """Its tokens are put on the grid of its smallest patches."""
    torch.manual_seed(0)
    config = QuadtreeViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        min_patch_size=8,
        max_patch_size=16,
        num_tokens=16,
    )
    base = QuadtreeViTModel(config).eval()
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2])
    outputs = model(images, num_tokens=16)
    assert outputs.last_hidden_state.shape == (2, 1 + 16, 32)
    # with every patch at the smallest size, the tokens are a grid in another order
    assert model(images, num_tokens=7, output_hidden_states=-1).last_hidden_state.shape == (2, 17, 32)
    assert torch.isfinite(outputs.last_hidden_state).all()


def test_models_with_a_head_are_refused():
    with pytest.raises(ValueError, match="must be ViTModel"):
        S2VisionWrapper.from_vision_model(
            ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
            scales=[1, 2],
        )


BAD_CONFIGS = [
    ({"scales": [1, 2], "img_sizes": [32, 64]}, "not both"),
    ({}, "got neither"),
    ({"scales": [1, -1]}, "positive"),
    ({"scales": [1, 2], "resize_output_to_idx": 2}, "`resize_output_to_idx`"),
    ({"scales": [1, 2], "uneven": "no"}, "`uneven`"),
    ({"scales": [1, 2], "pooling": "cls"}, "`pooling`"),
    ({"scales": [1, 2], "num_prefix_tokens": -1}, "`num_prefix_tokens`"),
    ({"scales": [1, 1.5], "dynamic": True}, "whole multiples"),
    ({"scales": [1, 2], "dynamic": True, "max_tiles": 3}, "`max_tiles` must be at least 4"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S2VisionConfig(vision_config=BASES["clip"](), **options)


def test_bad_calls_are_refused(clip, images):
    model = S2VisionWrapper.from_vision_model(clip, scales=[1, 2])
    with pytest.raises(ValueError, match="Give 2 `scales`, as many as configured"):
        model(images, scales=[1, 2, 3])
    with pytest.raises(ValueError, match="not both"):
        model(images, scales=[1, 2], img_sizes=[32, 64])
    with pytest.raises(ValueError, match="3 channels"):
        model(images[:, :2])
    with pytest.raises(ValueError, match=r"belongs to `config.dynamic=True`"):
        model(images, image_sizes=torch.tensor([[64, 64]]))
    wrong = S2VisionWrapper.from_vision_model(clip, scales=[1, 2], num_prefix_tokens=0)
    with pytest.raises(ValueError, match="num_prefix_token"):
        wrong(images)


def test_config_properties_and_round_trip(tmp_path):
    config = S2VisionConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=1024, num_attention_heads=16),
        scales=[1, 2, 3],
    )
    assert (config.hidden_size, config.image_size, config.patch_size, config.num_tokens) == (3072, 1008, 42, 576)
    config.save_pretrained(tmp_path)
    reloaded = S2VisionConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert type(reloaded.vision_config) is CLIPVisionConfig
    assert S2VisionConfig().num_scales == 2


@pytest.mark.parametrize("scale", [1e-5, 1e-313])
def test_a_scale_too_small_for_any_image_is_refused(scale):
    config = S2VisionConfig(scales=[1, 2])
    with pytest.raises(ValueError, match="leaves an empty tile"):
        config.num_tokens_for(64, scales=[1, scale])
    with pytest.raises(ValueError, match="leaves an empty tile"):
        config.num_tokens_for(64, scales=[scale, scale])
