"""A Quadtree ViT as a FlexiViT: the outputs of all smallest patches."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import polyscale
from polyscale import (
    FlexiViTForImageClassification,
    FlexiViTModel,
    FlexiViTModelWithProjection,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    QuadtreeViTModel,
    QuadtreeViTModelWithProjection,
)
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit
from polyscale.models.quadtree_vit.export_quadtree_vit import flexivit_source_of


LEARNED = {"position_embedding": "learned", "prefix_positions": "cls"}
VARIANTS = {
    "sinusoids": {},
    "learned": LEARNED,
    "registers and mean": {"pooling": "mean", "num_register_tokens": 2, "area_attention": 1.0, "area_pooling": True},
    "merged inside": {**LEARNED, "merge_layer": 1, "patch_scorer": "embedding"},
    "one size": {"max_patch_size": 4, "num_tokens": 64},
    "an untrained branch": {"large_patch_embedding": "aggregate"},
    "attention": {**LEARNED, "pooling": "attention", "hidden_act": "quick_gelu"},
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "aggregation.output" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_all_smallest_patches(make_config, images, name):
    quadtree = randomised(QuadtreeViTForImageClassification(make_config(**VARIANTS[name])))
    model = flexivit_from_source(flexivit_source_of(quadtree))
    assert type(model) is FlexiViTForImageClassification
    torch.testing.assert_close(model(images).logits, quadtree(images, num_tokens=64).logits, atol=1e-5, rtol=1e-5)
    assert model.config.base_patch_size == 4
    assert not torch.allclose(model(images, patch_size=8).logits, model(images).logits)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(QuadtreeViTModel, FlexiViTModel), (QuadtreeViTModelWithProjection, FlexiViTModelWithProjection)],
)
@torch.no_grad()
def test_models_without_a_classifier(make_config, images, ours, theirs):
    quadtree = randomised(ours(make_config(**LEARNED, projection_dim=12, projection_bias=True)))
    model = flexivit_from_source(flexivit_source_of(quadtree, patch_size=8))
    assert (type(model), model.config.patch_size) == (theirs, 8)
    outputs, expected = model(images, patch_size=4), quadtree(images, num_tokens=64)
    for name in set(outputs) & set(expected):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-5)
    tall = torch.randn(1, 3, 48, 32)
    expected = quadtree(tall, num_tokens=96).last_hidden_state
    torch.testing.assert_close(model(tall, patch_size=4).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folder_to_folder_and_back(make_config, tmp_path, images):
    labels = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
    quadtree = randomised(QuadtreeViTForImageClassification(make_config(**LEARNED, **labels)))
    quadtree.save_pretrained(tmp_path / "quadtree")
    fields = {"size": {"height": 32, "width": 32}, "max_patch_size": 16, "image_mean": [0.1, 0.2, 0.3]}
    theirs = QuadtreeViTImageProcessor(**fields)
    theirs.save_pretrained(tmp_path / "quadtree")
    polyscale.convert_checkpoint(tmp_path / "quadtree", tmp_path / "flexivit", to="flexivit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "flexivit").eval()
    assert (type(model), model.config.id2label) == (FlexiViTForImageClassification, labels["id2label"])
    expected = quadtree(images, num_tokens=64).logits
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    photograph = polyscale.sample_photographs()[0]
    image = Image.open(photograph).convert("RGB")
    ours = AutoImageProcessor.from_pretrained(tmp_path / "flexivit")
    torch.testing.assert_close(
        ours(image, return_tensors="pt").pixel_values, theirs(image, return_tensors="pt").pixel_values
    )
    again, _ = load_quadtree_vit(model, max_patch_size=16)
    torch.testing.assert_close(again(images, num_tokens=64).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_a_flexivit_cannot_say_is_refused_by_name(make_config, tmp_path):
    quadtree = randomised(QuadtreeViTForImageClassification(make_config(large_patch_embedding="aggregate")))
    with torch.no_grad():
        quadtree.quadtree_vit.embeddings.aggregation.output.weight.add_(0.1)
    with pytest.raises(ValueError, match="large_patch_embedding='aggregate'"):
        polyscale.convert_checkpoint(quadtree, tmp_path / "out", to="flexivit")
    assert not (tmp_path / "out").exists()
    backbone = polyscale.QuadtreeViTBackbone(make_config())
    with pytest.raises(ValueError, match="QuadtreeViTBackbone cannot become a FlexiViT"):
        flexivit_source_of(backbone)
    backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="is a QuadtreeViTBackbone"):
        polyscale.convert_checkpoint(tmp_path / "backbone", tmp_path / "out", to="flexivit")
    QuadtreeViTModel(make_config()).save_pretrained(tmp_path / "damaged")
    record = json.loads((tmp_path / "damaged" / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="do not fit its config"):
        polyscale.convert_checkpoint(tmp_path / "damaged", tmp_path / "out", to="flexivit")
