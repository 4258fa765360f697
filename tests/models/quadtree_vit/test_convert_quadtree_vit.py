"""Plain ViTs as Quadtree ViT: where every patch is split, the logits are the source's."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from polyscale import (
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    QuadtreeViTModelWithProjection,
    convert_checkpoint,
)
from polyscale.models.quadtree_vit.convert_quadtree_vit import convert_quadtree_vit, load_quadtree_vit


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTForImageClassification(ViTConfig(**SIZES, num_labels=5)),
        lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=5)),
    ],
    ids=["vit", "dinov2"],
)
@torch.no_grad()
def test_logits_equal_the_source(make, images):
    source = randomised(make())
    model, _ = load_quadtree_vit(source)
    assert (model.config.min_patch_size, model.config.max_patch_size) == (4, 16)
    assert model.config.position_embedding == "learned"
    torch.testing.assert_close(model(images, num_tokens=64).logits, source(images).logits, atol=1e-4, rtol=1e-4)
    assert model(images, num_tokens=31).logits.isfinite().all()


@torch.no_grad()
def test_clip_tokens_equal_the_source(images):
    source = randomised(CLIPVisionModel(CLIPVisionConfig(**SIZES)))
    model, _ = load_quadtree_vit(source, max_patch_size=8)
    ours, expected = model(images, num_tokens=64), source(images)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clips_projection_is_kept(tmp_path, images):
    source = randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=24)))
    convert_checkpoint(source, tmp_path / "out", to="quadtree_vit", max_patch_size=8, num_tokens=64)
    model = QuadtreeViTModelWithProjection.from_pretrained(tmp_path / "out").eval()
    outputs = model(images, output_split_scores=True)
    torch.testing.assert_close(outputs.image_embeds, source(images).image_embeds, atol=1e-5, rtol=1e-5)
    assert (outputs.image_embeds.shape, len(outputs.split_scores)) == ((3, 24), 1)
    few = model(images, num_tokens=31)
    torch.testing.assert_close(few.image_embeds, model.projection(few.pooler_output), atol=0, rtol=0)
    assert few.patch_sizes.shape == (3, 31)


@torch.no_grad()
def test_timm_logits_equal_the_source(images):
    timm = pytest.importorskip("timm")
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    source = randomised(timm.create_model("vit_tiny_patch16_224", **shape))
    model, _ = load_quadtree_vit(source)
    torch.testing.assert_close(model(images, num_tokens=64).logits, source(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_folder_to_folder(tmp_path, images):
    source = randomised(ViTForImageClassification(ViTConfig(**SIZES, id2label={0: "cat", 1: "cup"})))
    source.save_pretrained(tmp_path / "source")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "source")
    convert_quadtree_vit(tmp_path / "source", tmp_path / "out", num_tokens=31, patch_scorer="random", scorer_seed=1)
    model = QuadtreeViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "cup"}
    assert model(images).patch_sizes.shape == (3, 31)
    torch.testing.assert_close(model(images, num_tokens=64).logits, source(images).logits, atol=1e-4, rtol=1e-4)
    processor = QuadtreeViTImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.max_patch_size, dict(processor.size)) == (16, {"height": 32, "width": 32})
    assert tuple(processor.image_mean) == (0.5, 0.5, 0.5)


def test_other_patch_size_and_errors(tmp_path, images):
    source = ViTForImageClassification(ViTConfig(**SIZES))
    model, _ = load_quadtree_vit(source, min_patch_size=8)
    assert (model.config.max_patch_size, model.config.position_grid) == (32, [8, 8])
    assert model(images, num_tokens=16).logits.isfinite().all()
    with pytest.raises(ValueError, match="speed"):
        load_quadtree_vit(source, speed=1)
    with pytest.raises(ValueError, match="power of two"):
        load_quadtree_vit(source, max_patch_size=12)
    assert callable(convert_checkpoint)
