"""timm's models as FlexiViT: equal logits at their own size, and where timm itself has resized the weights."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from polyscale import FlexiViTForImageClassification, FlexiViTModelWithProjection
from polyscale.conversion import convert_checkpoint
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.vit_sources import transformers_vit


timm = pytest.importorskip("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}

# what is special about it -> (architecture, arguments)
MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "headless": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "no pooling": ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": ""}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "registers with positions": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "registers without positions": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
    "mean with fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "mean without fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "mean without CLS": ("vit_tiny_patch16_224", NO_CLASS_TOKEN),
    "mean over registers left out": ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2}),
    "gray": ("vit_tiny_patch16_224", {"in_chans": 1}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (64, 96), "patch_size": (8, 16)}),
    "tanh GELU": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit distilled, headless": ("deit_tiny_distilled_patch16_224", {"num_classes": 0}),
    "deit3": ("deit3_small_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip with quick GELU": ("vit_base_patch16_clip_quickgelu_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2 giant, packed SwiGLU": ("vit_giant_patch14_dinov2", {"img_size": 56, "mlp_ratio": 2.0}),
    "SwiGLU": ("vit_tiny_patch16_224", {"mlp_layer": "SwiGLU", "act_layer": "silu"}),
    "gap with registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "flexivit": ("flexivit_small", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip headless": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "siglip 2": ("vit_giantopt_patch16_siglip_256", {}),
    "siglip, another MLP": ("vit_so400m_patch14_siglip_224", {"img_size": 56, "num_heads": 2}),
    "siglip gap": ("vit_base_patch16_siglip_gap_224", {}),
    "map over CLS too": ("vit_tiny_patch16_224", {"global_pool": "map", "pool_include_prefix": True}),
}


def create(architecture, randomise, **kwargs):
    if kwargs.get("mlp_layer") == "SwiGLU":
        kwargs["mlp_layer"] = timm.layers.SwiGLU
    torch.manual_seed(0)
    return randomise(timm.create_model(architecture, pretrained=False, **{"img_size": 64, **SMALL, **kwargs}))


def logits_of(model, images, **kwargs):
    """Logits, or the pooled output of a model without classifier."""
    with torch.no_grad():
        output = model(images, **kwargs)
    return output.logits if isinstance(model, FlexiViTForImageClassification) else output.pooler_output


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_timms(randomise, name):
    architecture, kwargs = MODELS[name]
    source = create(architecture, randomise, **kwargs)
    images = torch.randn(2, kwargs.get("in_chans", 3), *source.patch_embed.img_size)
    with torch.no_grad():
        expected = source(images)
        if source.num_classes == 0 and "distilled" in name:
            expected = source.forward_features(images)[:, 0]  # FlexiViT pools CLS; timm means both tokens here
        elif source.global_pool == "":
            expected = expected[:, 0]
    model = flexivit_from_source(load_flexivit_source(source))
    torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_clip_keeps_its_projection_and_goes_back(randomise, tmp_path):
    """timm calls CLIP's projection a head of 512 classes, bias zero; lists of classes stay heads."""
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 512}
    source, images = create("vit_base_patch16_clip_224", randomise, **shape), torch.randn(2, 3, 64, 64)
    source.head.bias.zero_()
    model = flexivit_from_source(load_flexivit_source(source))
    assert (type(model), model.projection.bias) == (FlexiViTModelWithProjection, None)
    torch.testing.assert_close(model(images).image_embeds, source(images), atol=1e-5, rtol=1e-4)
    convert_checkpoint(model, tmp_path / "timm", to="timm")
    again = flexivit_from_source(load_flexivit_source(tmp_path / "timm"))
    torch.testing.assert_close(again(images).image_embeds, source(images), atol=1e-5, rtol=1e-4)
    for num_classes in (7, 1000):
        tuned = create("vit_base_patch16_clip_224", randomise, **{**shape, "num_classes": num_classes})
        assert isinstance(flexivit_from_source(load_flexivit_source(tuned)), FlexiViTForImageClassification)


@pytest.mark.parametrize("architecture", ["flexivit_small", pytest.param("flexivit_base", marks=pytest.mark.slow)])
def test_published_sizes_equal_timm_at_patch_16(architecture):
    torch.manual_seed(0)
    source = timm.create_model(architecture, pretrained=False).eval()
    with torch.no_grad():
        source.head.weight.normal_(std=0.02)  # zero otherwise, and so would be the logits
    converted = load_flexivit_source(source)
    assert (converted.config.kernel_interpolation, converted.config.kernel_antialias) == ("bilinear", False)
    model, images = flexivit_from_source(converted), torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        expected = source(images)
        actual = model(images, patch_size=16).logits
    assert expected.abs().max() > 0.1
    assert (actual - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("patch_size", [8, 12, 20, 24, 30])
@pytest.mark.parametrize("architecture", ["flexivit_small", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_other_patch_sizes_equal_timms_resampling(randomise, architecture, patch_size):
    """timm resamples kernel and positions when it loads weights into a model of another patch size."""
    source = create(architecture, randomise, img_size=240)
    target = create(architecture, randomise, img_size=240, patch_size=patch_size)
    is_flexivit = architecture.startswith("flexivit")
    resampling = {"interpolation": "bilinear", "antialias": False} if is_flexivit else {}
    target.load_state_dict(vision_transformer.checkpoint_filter_fn(source.state_dict(), target, **resampling))
    model, images = flexivit_from_source(load_flexivit_source(source)), torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        difference = model(images, patch_size=patch_size).logits - target.eval()(images)
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("architecture", ["flexivit_small", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("size", [(224, 320), (320, 224), (112, 112)])
def test_other_image_sizes_equal_timms_dynamic_img_size(randomise, architecture, size):
    source = create(architecture, randomise, img_size=240, dynamic_img_size=True)
    model, images = flexivit_from_source(load_flexivit_source(source)), torch.randn(1, 3, *size)
    with torch.no_grad():
        difference = model(images).logits - source(images)
    assert difference.abs().max() <= 1e-4


def test_padding_equals_timms_dynamic_img_pad(randomise):
    source = create("vit_tiny_patch16_224", randomise, dynamic_img_size=True, dynamic_img_pad=True)
    model, images = flexivit_from_source(load_flexivit_source(source)), torch.randn(1, 3, 70, 90)
    assert model.config.remainder == "pad"
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, source(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "kwargs", "message"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, "qk_norm"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "scale_attn_norm"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, "scale_mlp_norm"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "proj_bias"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "attention pooling that leaves prefix tokens out"),
        ("vit_tiny_patch16_224", {"global_pool": "prr"}, "AttentionPoolPrr"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "global_pool=''"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "pos_embed"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "RmsNorm"),
        ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}, "embed_norm_layer"),
        ("vit_tiny_patch16_224", {"act_layer": "hard_swish"}, "activation"),
        ("vit_tiny_patch16_224", {"block_fn": vision_transformer.ResPostBlock}, "ResPostBlock"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "DiffAttention"),
        ("eva02_tiny_patch14_224", {"img_size": 56}, r"Eva; rotary positions \(RoPE\)"),
        ("vit_small_patch16_dinov3", {}, r"rotary positions \(RoPE\)"),
        ("beit_base_patch16_224", {}, "Beit; a relative position bias"),
        ("vit_relpos_small_patch16_224", {}, "a relative position bias"),
    ],
)
def test_parts_that_flexivit_lacks_are_refused_by_name(randomise, architecture, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_flexivit_source(create(architecture, randomise, **kwargs))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_file_needs_the_architecture(randomise, tmp_path, suffix):
    source, path = (
        create("vit_tiny_patch16_224", randomise, img_size=(96, 96), depth=12),
        tmp_path / f"weights{suffix}",
    )
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 9}, path)
    else:
        save_file(source.state_dict(), path)
    with pytest.raises(ValueError, match="architecture"):
        load_flexivit_source(path)
    with pytest.raises(ValueError, match="vit_minuscule"):
        load_flexivit_source(path, architecture="vit_minuscule")
    with pytest.raises(ValueError, match="do not fit"):
        load_flexivit_source(path, architecture="vit_tiny_patch16_224")
    arguments = {"embed_dim": 24, "num_heads": 2}
    model = flexivit_from_source(load_flexivit_source(path, architecture="vit_tiny_patch16_224", model_args=arguments))
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(logits_of(model, images), source(images).detach(), atol=1e-5, rtol=1e-4)


def test_folder_of_timm(randomise, tmp_path):
    names = [f"class {index}" for index in range(7)]
    source = create("vit_tiny_patch16_224", randomise, global_pool="avg")
    record = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "global_pool": "avg",
        "model_args": {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64},
        "label_names": names,
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "crop_pct": 0.8,
            "crop_mode": "squash",
            "interpolation": "bilinear",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_flexivit_source(tmp_path)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    converted = load_flexivit_source(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    expected = source(images).detach()
    torch.testing.assert_close(logits_of(flexivit_from_source(converted), images), expected, atol=1e-5, rtol=1e-4)
    assert [converted.config.id2label[index] for index in range(7)] == names
    processor = converted.image_processor
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(processor.image_std) == [0.4, 0.5, 0.6]
    assert (processor.size["height"], processor.size["width"], processor.crop_size["height"]) == (80, 80, 64)
    assert processor.resample == Image.Resampling.BILINEAR


@pytest.mark.parametrize("architecture", ["flexivit_small", "vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_image_processor_equals_timms_evaluation(randomise, architecture):
    source = create(architecture, randomise, img_size=96)
    cfg = source.pretrained_cfg
    transform = timm.data.create_transform(
        input_size=(3, 96, 96),
        crop_pct=cfg["crop_pct"],
        interpolation=cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
    )
    picture = Image.effect_noise((40, 30), 90).convert("RGB").resize((200, 150), Image.Resampling.BICUBIC)
    actual = load_flexivit_source(source).image_processor(picture, return_tensors="pt").pixel_values[0]
    difference = (actual - transform(picture)) * torch.tensor(cfg["std"])[:, None, None] * 255
    assert difference.abs().max() < 2.01


def test_thousand_classes_are_imagenets(randomise):
    config = load_flexivit_source(create("vit_tiny_patch16_224", randomise, num_classes=1000)).config
    assert (config.num_labels, config.id2label[0], config.id2label[281]) == (
        1000,
        "tench, Tinca tinca",
        "tabby, tabby cat",
    )
    assert load_flexivit_source(create("vit_tiny_patch16_224", randomise)).config.num_labels == 7


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("flexivit_small.1200ep_in1k", "flexivit_small.1200ep_in1k"),
        ("timm:flexivit_small", "flexivit_small"),
        ("timm/flexivit_small.1200ep_in1k", "hf-hub:timm/flexivit_small.1200ep_in1k"),
        ("hf-hub:someone/model", "hf-hub:someone/model"),
    ],
)
def test_names_without_a_network_say_so(monkeypatch, name, asked):
    def create_model(model_name, pretrained):
        assert (model_name, pretrained) == (asked, True)
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConnectionError, match=r"no route to host.*network"):
        load_flexivit_source(name)


def test_repositories_of_timm_on_the_hub_are_recognised(monkeypatch, randomise):
    source = create("vit_tiny_patch16_224", randomise)
    monkeypatch.setattr(
        transformers_vit.AutoConfig, "from_pretrained", lambda *_, **__: transformers.TimmWrapperConfig()
    )
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: {"hf-hub:someone/model": source}[name])
    assert load_flexivit_source("someone/model").config.hidden_size == 24


def test_names_with_random_weights():
    source = load_flexivit_source("timm:vit_tiny_patch16_224", pretrained=False)
    assert source.config.hidden_size == 192
    assert source.state_dict["flexivit.embeddings.position_embeddings"].std() > 0.01


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "may not name `checkpoint_path`"),
        ({"model_args": {"pretrained_cfg": {"file": "/etc/passwd"}}}, "may not name `pretrained_cfg`"),
        ({"model_args": {"weight_init": "x"}}, "may not name `weight_init`"),
        ({"model_args": {"embed_dim": 10**9}}, "`embed_dim`.* must be a number or a word"),
        ({"model_args": {"depth": 5000}}, "`depth` 5000 is more than the"),
        ({"model_args": {"embed_dim": 60000, "num_heads": 2, "depth": 2}}, "do not fit"),
        ({"model_args": {"num_heads": 7}}, "cannot be made"),
        ({"model_args": {"norm_layer": "os.system"}}, "must be a number or a word"),
        ({"model_args": [1]}, "must be a dict"),
        ({"pretrained_cfg": [1]}, "must be a dict"),
        ({"architecture": "local-dir:/somewhere"}, "a name that timm knows"),
        ({"architecture": "hf-hub:timm/vit_tiny_patch16_224"}, "a name that timm knows"),
        ({"architecture": "vit_tiny_patch16_224./../x"}, "a name that timm knows"),
        ({"architecture": 3}, "a name that timm knows"),
    ],
)
def test_a_folder_names_no_files_and_no_code(tmp_path, randomise, record, message):
    model = create("vit_tiny_patch16_224", randomise)
    own = {"architecture": "vit_tiny_patch16_224", "model_args": {**SMALL, "img_size": 64}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps({**own, **record}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_flexivit_source(tmp_path)
