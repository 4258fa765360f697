import pickle
import re

import pytest
import torch
from sparseformer_reference import golden_config, golden_model, load_golden, make_model, tiny_config

from polyscale.models.sparseformer import (
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerForVideoClassification,
    SparseFormerImageProcessor,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerVideoProcessor,
)
from polyscale.models.sparseformer.configuration_sparseformer import PRESETS
from polyscale.models.sparseformer.convert_sparseformer import (
    convert_sparseformer,
    infer_preset,
    load_official,
    preset_image_processor,
    released_file,
    rename_raw,
)
from polyscale.models.sparseformer.convert_sparseformer_video import convert_sparseformer_video, inflate_sparseformer
from polyscale.models.sparseformer.convert_sparseformer_vit import load_vit_weights
from tests.golden import assert_golden, rounding_sensitivity


def golden_state(name: str) -> tuple[SparseFormerConfig, dict[str, torch.Tensor]]:
    meta, tensors = load_golden(name)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return golden_config(name, meta), state


def to_raw(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A released state dict under the names of the training code."""
    rules = [
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("norm1.", "ln_attn."),
        ("norm2.", "ffn.0."),
        ("mlp.fc1.", "ffn.1."),
        ("mlp.fc2.", "ffn.3."),
        ("adaptive_mixing.out_proj", "adaptive_mixing.tuo_proj"),
        ("initial_embedding.weight", "token_embedding.weight"),
        ("cls_embedding", "global_embedding"),
    ]
    raw = {}
    for key, value in state.items():
        if key.startswith("layers.4.") and name == "btsp":  # the last layer comes from the ViT's blocks
            raw[key.replace("layers.4.", "blocks.0.")] = value
            continue
        for new, old in rules:
            key = key.replace(new, old)
        if key == "initial_roi.weight":
            if name == "v1":
                raw["token_roi.weight"] = value
            else:
                raw["token_roi_cc.weight"] = (value[:, :2] + value[:, 2:]) / 2
                raw["token_roi_wh.weight"] = value[:, 2:] - value[:, :2]
            continue
        head = {"norm.": "head.norm.", "proj.": "head.classifier."} if name == "v1" else {"norm.": "ln_post."}
        head |= {} if name == "v1" else {"proj.": "cls_head."}
        for new, old in head.items():
            key = re.sub("^" + re.escape(new), old, key)
        raw[key] = value
    if name == "v1":
        raw["layers.0.stage_embedding.weight"] = torch.ones(3, 64)
    raw["global_roi.weight"] = torch.ones(1, 4)
    return raw


@pytest.mark.parametrize("name", ["v1", "btsp"])
def test_raw_checkpoints(name):
    _, state = golden_state(name)
    converted = rename_raw(to_raw(state, name))
    assert converted.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(converted[key], value, atol=1e-6, rtol=0)
    assert ("layers.0.stage_embedding.weight" in converted) == (name == "btsp")


@pytest.mark.parametrize("wrapped", [True, False])
def test_files_with_and_without_a_wrapper(tmp_path, wrapped):
    config, state = golden_state("btsp_clip")
    torch.save({"model": state} if wrapped else state, tmp_path / "tiny_converted.pth")
    source = load_official(tmp_path / "tiny_converted.pth", config)
    assert source.model_class is SparseFormerModelWithProjection
    assert (source.config.projection_dim, source.config.projection_bias) == (11, False)
    model, pixels, tensors = golden_model("btsp_clip")
    model.load_state_dict(source.state_dict)
    (sensitivity,) = rounding_sensitivity(lambda images: [model(images).image_embeds], pixels)
    assert_golden(model(pixels).image_embeds, tensors["logits"], sensitivity)


def test_pickles_of_objects_are_refused(tmp_path):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model": slice(1)}, file)
    with pytest.raises(ValueError, match=r"refused|not a readable"):
        load_official(tmp_path / "evil.pth")


def test_missing_and_extra_keys_are_errors_unless_allowed_by_name():
    config, state = golden_state("v1")
    short = {key: value for key, value in state.items() if key != "norm.bias"}
    with pytest.raises(ValueError, match=r"missing: sparseformer\.layernorm\.bias"):
        load_official(short, config)
    source = load_official(short, config, allow_missing=["sparseformer.layernorm.bias"])
    assert torch.equal(source.state_dict["sparseformer.layernorm.bias"], torch.zeros(128))
    long = {**state, "something.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"something\.weight"):
        load_official(long, config)
    assert load_official(long, config, allow_extra=["something.weight"]).state_dict.keys() == (
        load_official(state, config).state_dict.keys()
    )


def test_checkpoints_of_another_variant_are_refused():
    config, _ = golden_state("btsp")
    _, state = golden_state("v1")
    with pytest.raises(ValueError, match=r"do not fit|unknown layout"):
        load_official(state, config)
    with pytest.raises(ValueError, match="fits none of the published variants"):
        load_official(state)
    with pytest.raises(ValueError, match="video checkpoint"):
        load_official(golden_state("video")[1], golden_state("v1")[0])


def test_published_variants_are_found_by_their_shapes(monkeypatch):
    """With tiny presets among the published ones: what is asked is how one of them is chosen."""
    for name in ("v1", "btsp"):
        config, state = golden_state(name)
        fields = {key: getattr(config, key) for key in config.to_diff_dict() if hasattr(type(config), key)}
        presets = {**PRESETS, "other": {**fields, "num_latent_tokens": 4}, "right": fields}
        monkeypatch.setattr("polyscale.models.sparseformer.convert_sparseformer.PRESETS", presets)
        monkeypatch.setattr("polyscale.models.sparseformer.configuration_sparseformer.PRESETS", presets)
        assert infer_preset(state) == "right"
        monkeypatch.undo()


def test_processors_of_presets():
    assert list(preset_image_processor("sparseformer_v1_tiny").image_mean) == [0.485, 0.456, 0.406]
    assert list(preset_image_processor("sparseformer_btsp_augreg_base").image_std) == [0.5, 0.5, 0.5]
    assert preset_image_processor("sparseformer_btsp_openai_clip_base").image_mean[0] == pytest.approx(0.48145466)


def test_a_published_name_without_a_network_says_so(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ConnectionError, match=r"`sparseformer_v1_tiny` is a released .* cannot be downloaded"):
        released_file("sparseformer_v1_tiny")
    with pytest.raises(ValueError, match="must be a file or one of"):
        released_file("sparseformer_v3")


@pytest.mark.parametrize("kind", ["v1", "bootstrapped"])
@torch.no_grad()
def test_an_inflated_video_of_one_frame_equals_the_image_model(kind, tmp_path):
    model = make_model(SparseFormerForImageClassification, tiny_config(kind))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    expected = model(images, output_all_rois=True)
    source = inflate_sparseformer(tmp_path, replicates=1, num_frames=4)
    assert source.model_class is SparseFormerForVideoClassification
    assert source.config.num_frames == 4
    video = source.model_class(source.config).eval()
    video.load_state_dict(source.state_dict)
    actual = video(images[:, None], output_all_rois=True)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for rois, plane in zip(actual.all_rois, expected.all_rois, strict=True):
        torch.testing.assert_close(rois[..., [0, 1, 3, 4]], plane, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rois[..., [2, 5]], torch.tensor([0.0, 1.0]).expand(2, 5, 2))


def test_folders_of_converted_and_inflated_checkpoints(tmp_path):
    config, state = golden_state("btsp")
    torch.save(state, tmp_path / "tiny.pth")
    convert_sparseformer(tmp_path / "tiny.pth", tmp_path / "image", config)
    _, pixels, tensors = golden_model("btsp")
    again = SparseFormerForImageClassification.from_pretrained(tmp_path / "image").eval()
    (sensitivity,) = rounding_sensitivity(lambda images: [again(images).logits], pixels)
    assert_golden(again(pixels).logits, tensors["logits"], sensitivity)
    processor = SparseFormerImageProcessor.from_pretrained(tmp_path / "image")
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "image")
    convert_sparseformer_video(tmp_path / "image", tmp_path / "video", replicates=2, num_frames=3)
    video = SparseFormerForVideoClassification.from_pretrained(tmp_path / "video")
    assert (video.config.num_tokens, video.config.num_frames) == (18, 3)
    assert list(SparseFormerVideoProcessor.from_pretrained(tmp_path / "video").image_mean) == [0.1, 0.2, 0.3]


def test_only_images_can_be_inflated():
    video = SparseFormerForVideoClassification(tiny_config("video"))
    with pytest.raises(ValueError, match="Only image models can be inflated"):
        inflate_sparseformer(video)


def _vit(kind: str):
    if kind == "timm":
        timm = pytest.importorskip("timm")
        return timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5
        )
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    classes = {
        "vit": (ViTConfig, ViTModel),
        "dinov2": (Dinov2Config, Dinov2Model),
        "clip": (CLIPVisionConfig, CLIPVisionModel),
    }
    config_class, model_class = classes[kind]
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    if kind != "dinov2":
        fields["intermediate_size"] = 128
    return model_class(config_class(**fields))


@pytest.mark.parametrize("kind", ["timm", "vit", "dinov2", "clip"])
@torch.no_grad()
def test_blocks_of_a_vit_compute_the_same_here(kind):
    torch.manual_seed(0)
    vit = _vit(kind).eval()
    for parameter in vit.parameters():
        parameter.normal_(std=0.2)
    config = tiny_config(
        "bootstrapped",
        hidden_act="quick_gelu" if kind == "clip" else "gelu",
        layer_norm_eps=1e-12 if kind == "vit" else 1e-5 if kind == "clip" else 1e-6,
    )
    model = SparseFormerModelWithProjection(config).eval()
    report = load_vit_weights(model, vit, layers=[2], blocks=[1])
    tokens = torch.randn(1, 6, 32)
    block = {"timm": lambda: vit.blocks[1], "vit": lambda: vit.layers[1]}.get(kind)
    block = block() if block else (vit.encoder.layer if kind == "dinov2" else vit.encoder.layers)[1]
    expected = block(tokens, attention_mask=None) if kind == "clip" else block(tokens)
    expected = expected[0] if isinstance(expected, tuple) else expected
    actual, _ = model.sparseformer.layers[2](tokens, torch.zeros(1, 5, 4), torch.zeros(1, 2, 2, 8))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert "sparseformer.layers.2.attention.qkv.weight" in report.loaded
    assert "sparseformer.layernorm.weight" in report.loaded
    assert "sparseformer.layers.0.mixing.o_proj.weight" in report.new
    assert "projection.weight" in report.new
    assert "layers.0.mlp.fc1.weight" in report.unused  # block 0 was not asked for
    assert not any(name.startswith(("layers.1.", "layernorm.")) for name in report.unused)
    assert len(report.loaded) + len(report.new) == len(list(model.parameters()))
    assert "tensors loaded" in str(report)


def test_vits_that_do_not_fit_are_refused():
    model = SparseFormerModel(tiny_config("bootstrapped"))
    with pytest.raises(ValueError, match="must be a model of transformers or timm, got a Linear"):
        load_vit_weights(model, torch.nn.Linear(1, 1))
    vit = _vit("vit")
    with pytest.raises(ValueError, match="must name one of the ViT's 3 blocks"):
        load_vit_weights(model, vit, layers=[0, 2], blocks=[1, 3])
    with pytest.raises(ValueError, match="Layer 0 has the width 16 and 64 in its MLP, the ViT 32 and 128"):
        load_vit_weights(model, vit, layers=[0])
    with pytest.raises(ValueError, match="Layer 1 has no place for a block"):
        load_vit_weights(model, vit, layers=[1])
    model = SparseFormerModel(tiny_config("bootstrapped", attention_head_width=16))
    with pytest.raises(ValueError, match="Layer 2 has 2 attention heads, the ViT has 4"):
        load_vit_weights(model, vit, layers=[2])


def test_a_folder_is_told_how_to_become_one(tmp_path):
    with pytest.raises(ValueError, match="by training on images: `polyscale train IMAGES OUT --bootstrap-from"):
        load_official(tmp_path)
