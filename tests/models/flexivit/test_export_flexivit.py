"""A FlexiViT at one budget as a plain ViT of transformers or timm: equal outputs, or a refusal that says why."""

import pytest
import timm
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

from polyscale import FlexiViTImageProcessor, convert_checkpoint
from polyscale.cli import app


LABELS = {"id2label": {0: "crane", 1: "owl", 2: "crane"}, "label2id": {"crane": 0, "owl": 1}}
DISTILLED = {"use_distillation_token": True, "use_distillation_head": True}
CLIP = {"pre_norm": True, "final_norm": False, "fc_norm": True}


def save(model, folder) -> str:
    model.save_pretrained(folder)
    processor = FlexiViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("budget", [(32, 8), (48, 4), (30, 7), ((32, 48), (8, 4))])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("vit", {}),
        ("vit", {"prefix_positions": "cls", "qkv_bias": False, "patch_bias": False, "hidden_act": "quick_gelu"}),
        ("dinov2", {"pooling": "mean", "intermediate_size": 32}),
        ("dinov2", {"pooling": "cls_mean", "layer_scale_init_value": 0.3, "intermediate_size": 64}),
        ("dinov2", {"mlp_type": "swiglu", "hidden_act": "silu", "intermediate_size": 48, "patch_bias": False}),
        ("dinov2_with_registers", {"num_register_tokens": 2, "prefix_positions": "all", "intermediate_size": 64}),
        ("dinov2_with_registers", {"use_distillation_token": True, "pooling": "mean", "intermediate_size": 64}),
    ],
)
def test_transformers_gives_equal_logits(make_model, tmp_path, kind, fields, budget):
    image_size, patch_size = budget
    model = make_model(**LABELS, num_labels=3, **fields)
    source = save(model, tmp_path / "flexivit")
    if kind != "vit" and image_size == (32, 48):
        with pytest.raises(ValueError, match="no square"):
            convert_checkpoint(source, tmp_path / "out", "vit", image_size=image_size, patch_size=patch_size)
        return
    out = convert_checkpoint(source, tmp_path / "out", "vit", image_size=image_size, patch_size=patch_size)
    plain = AutoModelForImageClassification.from_pretrained(out).eval()
    assert plain.config.model_type == kind
    assert plain.config.id2label == LABELS["id2label"]
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images, patch_size=patch_size).logits
        torch.testing.assert_close(plain(images).logits, expected, rtol=1e-5, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor(torch.zeros(3, 50, 60), return_tensors="pt").pixel_values.shape[-2:] == size


@pytest.mark.parametrize("budget", [(32, 8), (30, 7), ((32, 48), (8, 4))])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prefix_positions": "all", "num_register_tokens": 2, "layer_scale_init_value": 0.3},
        {"pooling": "mean", "use_cls_token": False, "intermediate_size": 37, "hidden_act": "gelu_pytorch_tanh"},
        {"pooling": "mean", "final_norm": False, "fc_norm": True, "use_distillation_token": True},
        {**CLIP, "prefix_positions": "cls", "hidden_act": "quick_gelu"},
        {"mlp_type": "swiglu", "patch_bias": False},
        {**DISTILLED, "prefix_positions": "all"},
        {"pooling": "attention", "use_cls_token": False},
        {"pooling": "attention", "num_register_tokens": 1, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_timm_gives_equal_logits(make_model, tmp_path, fields, budget):
    image_size, patch_size = budget
    model = make_model(**LABELS, num_labels=3, **fields)
    source = save(model, tmp_path / "flexivit")
    out = convert_checkpoint(source, tmp_path / "out", "timm", image_size=image_size, patch_size=patch_size)
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images, patch_size=patch_size).logits
        torch.testing.assert_close(plain(images), expected, rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(plain)
    assert data["input_size"] == (3, *size)
    assert list(data["mean"]) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("to", ["vit", "timm"])
def test_a_model_without_a_classifier_gives_equal_tokens(make_model, tmp_path, to):
    fields = {"pooling": "pooler"} if to == "vit" else {}
    model, images = make_model(**fields), torch.randn(2, 3, 32, 32)
    out = convert_checkpoint(save(model, tmp_path / "flexivit"), tmp_path / "out", to, patch_size=4)
    with torch.no_grad():
        expected = model(images, patch_size=4)
        if to == "timm":
            plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            tokens = plain.forward_features(images)
        else:
            outputs = AutoModel.from_pretrained(out).eval()(images)
            tokens = outputs.last_hidden_state
            torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "fields", "image_size", "message"),
    [
        ("vit", CLIP, 32, r"ViT.*pre_norm.*fc_norm.*DINOv2.*pre_norm.*convert to 'timm'"),
        ("vit", {"use_cls_token": False, "pooling": "mean"}, 32, "no CLS token"),
        ("vit", DISTILLED, 32, "use_distillation_head"),
        ("vit", {"pooling": "pooler"}, 32, r"pooling='pooler'"),
        ("vit", {"remainder": "pad"}, 30, r"remainder='pad'"),
        ("timm", {"remainder": "pad"}, 30, r"remainder='pad'"),
        ("timm", {"pooling": "cls_mean"}, 32, "cls_mean"),
        ("timm", {"pooling": "pooler"}, 32, r"pooling='pooler'"),
        ("timm", {"hidden_act": "gelu_10"}, 32, "gelu_10"),
        ("timm", {"layer_norm_eps": 1e-4}, 32, "layer_norm_eps=0.0001"),
        ("vit", {"pooling": "attention"}, 32, r"pooling='attention'.*timm has all of it"),
        ("timm", {"pooling": "attention", "mlp_type": "swiglu"}, 32, "among gated MLPs"),
        ("timm", {"fc_norm": True}, 32, "before and after pooling"),
    ],
)
def test_what_none_can_say_is_refused_by_name(make_model, tmp_path, to, fields, image_size, message):
    source = save(make_model(num_labels=3, **fields), tmp_path / "flexivit")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out", to, image_size=image_size, patch_size=8)
    assert not (tmp_path / "out").exists()


def test_what_does_not_exist_is_refused(make_model, tmp_path):
    source = save(make_model(num_labels=3), tmp_path / "flexivit")
    with pytest.raises(ValueError, match=r"`to` must be one of.*'timm'"):
        convert_checkpoint(source, tmp_path / "out", "vits")
    with pytest.raises(ValueError, match=r"no option `num_tokens`"):
        convert_checkpoint(source, tmp_path / "out", "vit", num_tokens=4)
    with pytest.raises(ValueError, match="larger than the image"):
        convert_checkpoint(source, tmp_path / "out", "vit", image_size=32, patch_size=40)


def test_the_command_exports(make_model, tmp_path):
    model, images = make_model(num_labels=3), torch.randn(1, 3, 24, 48)
    source, out = save(model, tmp_path / "flexivit"), tmp_path / "out"
    arguments = ["convert", source, str(out), "--to", "vit", "--image-size", "24x48", "--patch-size", "12"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plain = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images).logits, model(images, patch_size=12).logits, rtol=1e-5, atol=1e-5)


def test_a_half_precision_model_stays_one(make_model, tmp_path):
    model = make_model(num_labels=3).to(torch.bfloat16)
    out = convert_checkpoint(save(model, tmp_path / "flexivit"), tmp_path / "out", "vit", image_size=32, patch_size=4)
    assert AutoModelForImageClassification.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
