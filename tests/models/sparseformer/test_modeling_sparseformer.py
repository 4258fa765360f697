import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sparseformer_reference import golden_model, make_model, tiny_config
from torch import nn
from transformers import AutoBackbone

from polyscale.models.sparseformer import (
    SparseFormerForImageClassification,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerOpenCLIPVisual,
    modeling_sparseformer,
)
from polyscale.models.sparseformer.geometry_sparseformer import initial_rois


KINDS = ["v1", "bootstrapped"]


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_on_request(kind):
    config = tiny_config(kind)
    model = make_model(SparseFormerModel, config)
    flags = ("hidden_states", "all_rois", "sampling_points", "sampling_rois")
    with torch.no_grad():
        plain = model(pixels(2, 3, 20, 36))
        outputs = model(pixels(2, 3, 20, 36), **{f"output_{flag}": True for flag in flags})
    assert next(iter(plain)) == "last_hidden_state"
    assert all(flag not in plain for flag in flags)
    assert torch.equal(outputs.last_hidden_state, plain.last_hidden_state)
    num_tokens = config.num_tokens + config.num_prefix_tokens
    assert outputs.last_hidden_state.shape == (2, num_tokens, 32)
    assert [states.shape[-1] for states in outputs.hidden_states] == [16, 16, 32, 32]
    torch.testing.assert_close(model.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert len(outputs.all_rois) == 3
    assert torch.equal(outputs.all_rois[-1], outputs.rois)
    assert len(outputs.sampling_points) == len(outputs.sampling_rois) == 3  # two repeats, one layer
    for points, rois in zip(outputs.sampling_points, outputs.sampling_rois, strict=True):
        assert points.shape == (2, 5, 4, 2)
        torch.testing.assert_close(points.mean(dim=2), (rois[..., :2] + rois[..., 2:]) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_asks_for_a_gradient_where_none_is_recorded(kind):
    model = make_model(SparseFormerModel, tiny_config(kind))
    flags = ("hidden_states", "all_rois", "sampling_points", "sampling_rois")
    with torch.no_grad():
        outputs = model(pixels(1, 3, 16, 16), **{f"output_{flag}": True for flag in flags})
    kept = [outputs.rois, *(tensor for flag in flags for tensor in outputs[flag])]
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("selection", [-1, [0, -1], 2])
def test_hidden_states_by_index(selection):
    model = make_model(SparseFormerModel, tiny_config())
    with torch.no_grad():
        every = model(pixels(1, 3, 16, 16), output_hidden_states=True).hidden_states
        some = model(pixels(1, 3, 16, 16), output_hidden_states=selection).hidden_states
    assert len(some) == len(every) == 4
    for index in [selection] if isinstance(selection, int) else selection:
        assert torch.equal(some[index], every[index])


def test_attentions_of_every_repeat():
    model = make_model(SparseFormerModel, tiny_config())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(pixels(1, 3, 16, 16), output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(1, 4, 5, 5)] * 4
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_equals_eager(kind):
    model = make_model(SparseFormerForImageClassification, tiny_config(kind))
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = model(pixels(2, 3, 24, 24)).logits
    # Encodings of RoIs, of frequencies up to 128 * pi, multiply differences in rounding.
    torch.testing.assert_close(results["sdpa"], results["eager"], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (33, 18), (64, 64)])
def test_any_size_and_channels(size):
    model = make_model(SparseFormerForImageClassification, tiny_config(num_channels=5))
    with torch.no_grad():
        logits = model(pixels(2, 5, *size)).logits
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()


def test_features_equal_the_published_order_of_operations():
    model = make_model(SparseFormerModel, tiny_config())
    images = pixels(2, 3, 21, 30)
    convolved = F.relu(F.conv2d(images, model.features.convolution.weight, model.features.convolution.bias, 2, 3))
    pooled = F.max_pool2d(convolved, 3, 2, 1)
    mean, variance = pooled.mean(1, keepdim=True), pooled.var(1, correction=0, keepdim=True)
    expected = ((pooled - mean) / (variance + 1e-5).sqrt()).permute(0, 2, 3, 1)
    actual = model.features(images)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    parameters = list(model.features.parameters())
    for ours, plain in zip(
        torch.autograd.grad((actual * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
def test_mixing_equals_matrix_products_token_by_token(has_bias):
    model = make_model(SparseFormerModel, tiny_config(mixing_bias=has_bias, num_sampling_points=5))
    mixing = model.layers[0].mixing
    tokens, sampled = pixels(2, 3, 16, seed=1), pixels(2, 3, 5, 8, seed=2)
    expected = torch.empty(2, 3, 16)
    for batch in range(2):
        for token in range(3):
            parameters = mixing.generator_out(mixing.generator_in(mixing.layernorm(tokens[batch, token])))
            channel, spatial = parameters[:64].view(8, 8), parameters[64:].view(32, 5)
            mixed = sampled[batch, token] @ channel
            mixed = spatial @ (F.gelu(mixed + mixing.channel_bias) if has_bias else mixed)
            mixed = mixed + mixing.spatial_bias[:, None] if has_bias else mixed
            expected[batch, token] = mixing.o_proj(F.gelu(mixed).flatten())
    torch.testing.assert_close(mixing(tokens, sampled), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights():
    config = tiny_config("bootstrapped", feature_width=16, num_latent_tokens=10)
    torch.manual_seed(0)
    model = SparseFormerModel(config)
    assert torch.equal(model.embeddings.rois, initial_rois(10))
    layer = model.layers[0]
    for norm in (layer.mixing.layernorm, layer.sampling.layernorm, layer.roi_adjustment.layernorm):
        torch.testing.assert_close(norm.weight, torch.full((16,), 0.25))
    assert not layer.mixing.generator_out.weight.any()
    assert not layer.sampling.offsets.weight.any()
    assert not layer.roi_adjustment.deltas.weight.any()
    bias = layer.mixing.generator_out.bias
    channel, spatial = bias[:256], bias[256:]
    assert channel.abs().max() <= (6 / 32) ** 0.5 < 1.2 * channel.abs().max()  # xavier of (16, 16)
    assert spatial.abs().max() <= (6 / 36) ** 0.5 < 1.2 * spatial.abs().max()  # xavier of (32, 4)
    offsets = layer.sampling.offset_bias.view(4, 2)
    torch.testing.assert_close(offsets, torch.tensor([[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]]))
    assert 0.15 < layer.mlp.fc1.weight.std() < 0.25  # initializer_range 0.2
    assert 0.5 < model.embeddings.tokens.std() < 1.5


def test_initial_weights_of_a_loaded_model_are_the_stored_ones(tmp_path):
    model = make_model(SparseFormerForImageClassification, tiny_config("bootstrapped"))
    model.save_pretrained(tmp_path)
    again, info = SparseFormerForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(pixels(1, 3, 16, 16)).logits, model(pixels(1, 3, 16, 16)).logits)


def test_other_numbers_of_latent_tokens(tmp_path, caplog):
    model = make_model(SparseFormerForImageClassification, tiny_config("bootstrapped"))
    model.save_pretrained(tmp_path)
    model.config.image_size = 48  # what is stored, not the class's default, holds for the rest
    model.config.save_pretrained(tmp_path)
    again = SparseFormerForImageClassification.from_pretrained(tmp_path, num_latent_tokens=10)
    assert again.config.image_size == 48
    assert again(pixels(1, 3, 16, 16), output_hidden_states=[-1]).hidden_states[-1].shape == (1, 11, 32)
    assert torch.equal(again.sparseformer.embeddings.rois, initial_rois(10))
    for name, tensor in model.state_dict().items():
        if not name.endswith("rois"):
            assert torch.equal(again.state_dict()[name], tensor), name


def test_other_numbers_of_tokens_warn(tmp_path, monkeypatch):
    make_model(SparseFormerModel, tiny_config("bootstrapped")).save_pretrained(tmp_path)
    messages = []
    # not a handler: other libraries' tests may have disabled loggers that exist
    monkeypatch.setattr(modeling_sparseformer.logger, "warning", messages.append)
    SparseFormerModel.from_pretrained(tmp_path, num_latent_tokens=7)
    assert any("start anew" in message for message in messages)


def test_tokens_with_their_own_embedding_keep_their_number(tmp_path):
    make_model(SparseFormerModel, tiny_config("v1")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_latent_tokens` = 7 does not fit the checkpoint, whose 5 tokens"):
        SparseFormerModel.from_pretrained(tmp_path, num_latent_tokens=7)


def test_another_variant_is_no_matter_of_tokens(tmp_path):
    make_model(SparseFormerModel, tiny_config("bootstrapped")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The checkpoint does not fit the model"):
        SparseFormerModel.from_pretrained(tmp_path, num_latent_tokens=7, feature_width=4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 16, 16), "must have the shape"),
        ((3, 16, 16), "must have the shape"),
        ((2, 1, 16, 16), "must have 3 channels"),
        ((0, 3, 16, 16), "empty batch"),
    ],
)
def test_wrong_pixels_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        SparseFormerModel(tiny_config())(torch.zeros(shape))


def test_missing_pixels_are_refused():
    with pytest.raises(ValueError, match="`pixel_values` is required"):
        SparseFormerModel(tiny_config())()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan(kind, dtype):
    model = make_model(SparseFormerForImageClassification, tiny_config(kind))
    reference = model(pixels(2, 3, 32, 32)).logits
    half = copy.deepcopy(model).to(dtype)(pixels(2, 3, 32, 32))
    assert half.logits.dtype == dtype
    assert half.rois.dtype == torch.float32
    assert torch.isfinite(half.logits).all()
    if dtype == torch.float16:
        torch.testing.assert_close(half.logits.float(), reference, atol=0.15, rtol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(pixels(2, 3, 32, 32), labels=torch.tensor([0, 2]))
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def _train_step(model, images, loss_scale=1.0):
    model.zero_grad()
    model.set_loss_scale(loss_scale)
    (model(images).logits.square().sum() * loss_scale).backward()
    return {name: parameter.grad.clone() / loss_scale for name, parameter in model.named_parameters()}


def test_the_clamp_acts_and_follows_the_loss_scale():
    free = make_model(SparseFormerForImageClassification, tiny_config())
    clamped = SparseFormerForImageClassification(tiny_config(restrict_grad_norm=True))
    clamped.load_state_dict(free.state_dict())
    images = pixels(2, 3, 32, 32) * 4
    gradients = _train_step(clamped.eval(), images)
    assert not torch.equal(
        gradients["sparseformer.layers.0.sampling.offset_bias"],
        _train_step(free, images)["sparseformer.layers.0.sampling.offset_bias"],
    )
    scaled = _train_step(clamped, images, loss_scale=1024.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(scaled[name], gradient, atol=1e-5, rtol=1e-4)
    wrong = clamped(images, loss_scale=torch.tensor(1.0))
    clamped.zero_grad()
    (wrong.logits.square().sum() * 1024).backward()  # a bound without the scale clamps what it should not
    name = "sparseformer.layers.0.sampling.offset_bias"
    assert not torch.allclose(clamped.get_parameter(name).grad / 1024, gradients[name], rtol=1e-3)


def test_the_loss_scale_survives_loading(tmp_path):
    make_model(SparseFormerModel, tiny_config(restrict_grad_norm=True)).save_pretrained(tmp_path)
    assert SparseFormerModel.from_pretrained(tmp_path).loss_scale.item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    config = tiny_config(kind, restrict_grad_norm=True)
    model = make_model(SparseFormerForImageClassification, config).train()
    images = pixels(2, 3, 32, 32)
    expected = _train_step(model, images, 8.0)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = _train_step(model, images, 8.0)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_stochastic_depth_trains():
    model = make_model(SparseFormerForImageClassification, tiny_config(drop_path_rate=0.5)).train()
    images = pixels(4, 3, 16, 16)
    torch.manual_seed(0)
    first, second = model(images).logits, model(images).logits
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(images).logits, model(images).logits)


def test_projection_and_zero_shot_classification():
    model, images, tensors = golden_model("btsp_clip")
    with torch.no_grad():
        embeds = F.normalize(model(images).image_embeds, dim=-1)
    texts = F.normalize(torch.stack([tensors["logits"][1], tensors["logits"][0], torch.ones(11)]), dim=-1)
    probabilities = (100 * embeds @ texts.T).softmax(dim=-1)
    assert probabilities.argmax(dim=-1).tolist() == [1, 0]


def test_as_visual_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    clip = open_clip.model.CLIP(
        embed_dim=12,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    ).eval()
    model = make_model(SparseFormerModelWithProjection, tiny_config("bootstrapped", hidden_act="quick_gelu"))
    clip.visual = SparseFormerOpenCLIPVisual(model)
    images, texts = pixels(2, 3, 32, 32), torch.randint(1, 50, (3, 8))
    with torch.no_grad():
        image_features = clip.encode_image(images, normalize=True)
        outputs = clip(images, texts)
        text_features = clip.encode_text(texts, normalize=True)
    torch.testing.assert_close(image_features, F.normalize(model(images).image_embeds.detach(), dim=-1))
    torch.testing.assert_close(outputs[0], image_features)
    assert (image_features @ text_features.T).shape == (2, 3)
    clip.set_grad_checkpointing()
    assert model.is_activation_checkpointing


def test_a_classifier_without_labels_gives_pooled_tokens():
    model = SparseFormerForImageClassification(tiny_config(num_labels=0)).eval()
    assert isinstance(model.head, nn.Identity)
    outputs = model.sparseformer(pixels(1, 3, 16, 16))
    torch.testing.assert_close(model(pixels(1, 3, 16, 16)).logits, outputs.pooler_output)


def test_checkpoints_with_the_old_name_of_the_head_load(tmp_path):
    model = make_model(SparseFormerForImageClassification, tiny_config())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name for name in tensors if not name.startswith("sparseformer.")} == {"head.weight", "head.bias"}
    old = {re.sub(r"^head\.", "classifier.", name): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for folder in (tmp_path, tmp_path / "again"):
        loaded, info = SparseFormerForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        loaded.save_pretrained(tmp_path / "again")


def test_pooling_by_a_cls_token_that_there_is_not_is_refused():
    model = make_model(SparseFormerModel, tiny_config("v1"))
    model.config.pooling = "cls"
    with pytest.raises(ValueError, match=r"`config\.pooling='cls'` needs a CLS token, which this model has not"):
        model(torch.randn(1, 3, 32, 32))


def test_there_is_no_backbone():
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*SparseFormerConfig.*AutoBackbone"):
        AutoBackbone.from_config(tiny_config())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_on_the_convolution_acts_as_its_merged_weights_do():
    peft = pytest.importorskip("peft")
    model = make_model(SparseFormerForImageClassification, tiny_config())
    images = pixels(2, 3, 24, 24)
    plain = model(images).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["convolution"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    active = adapted.eval()(images).logits
    active.square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in adapted.named_parameters() if "lora_" in name)
    assert (active - plain).abs().max() > 1e-2
    torch.testing.assert_close(adapted.merge_and_unload()(images).logits, active, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_loses_no_more_than_plain_bfloat16(kind):
    model = make_model(SparseFormerForImageClassification, tiny_config(kind))
    images = pixels(64, 3, 32, 32)
    errors = {}
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double()).logits
        half = model.bfloat16()
        for cpu_kernels in (True, False):
            half.config.cpu_kernels = cpu_kernels
            errors[cpu_kernels] = (half(images.bfloat16()).logits - exact).square().mean().sqrt().item()
    assert errors[True] < 1.25 * errors[False]
