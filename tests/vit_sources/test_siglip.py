"""SigLIP's vision part as FlexiViT and Quadtree ViT: equal outputs, and its zero-shot scores at any budget."""

import pytest
import torch
from transformers import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import polyscale
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def randomised(model):
    """Every weight away from its initial value: biases of zero would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_vision_model_is_the_same_with_its_attention_pooling(pixel_values, tmp_path):
    siglip = randomised(SiglipVisionModel(SiglipVisionConfig(**SHAPE)))
    siglip.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    expected = siglip(pixel_values)
    for source in (siglip, tmp_path):
        model = flexivit_from_source(load_flexivit_source(source))
        outputs = model(pixel_values)
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
        assert model(pixel_values, patch_size=16).pooler_output.shape == (2, 32)
    quadtree, _ = load_quadtree_vit(siglip, max_patch_size=16, num_tokens=16)
    torch.testing.assert_close(quadtree(pixel_values).pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_classifier_reads_the_mean_of_the_patches(pixel_values):
    siglip = randomised(SiglipForImageClassification(SiglipConfig(vision_config=SHAPE, num_labels=5)))
    model = flexivit_from_source(load_flexivit_source(siglip))
    torch.testing.assert_close(model(pixel_values).logits, siglip(pixel_values).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_not_pooled(pixel_values):
    siglip = randomised(SiglipVisionModel(SiglipVisionConfig(**SHAPE)))
    model, _ = load_quadtree_vit(siglip, max_patch_size=16, num_tokens=16)
    images = pixel_values * torch.tensor([1.0, 0.2])[:, None, None, None]
    scores = model(images, output_split_scores=True, num_tokens=7).split_scores[0]
    threshold = float(scores.flatten(1).amax(dim=1).mean())
    both = model(images, split_threshold=threshold)
    assert both.token_mask.sum(dim=1).unique().numel() == 2
    for index in range(2):
        alone = model(images[index : index + 1], split_threshold=threshold).pooler_output[0]
        torch.testing.assert_close(both.pooler_output[index], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_siglip_with_its_own_tower_scores_the_same_and_has_a_budget(pixel_values):
    text = {**SHAPE, "vocab_size": 99, "max_position_embeddings": 16}
    text = {name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
    siglip = randomised(SiglipModel(SiglipConfig(vision_config=SHAPE, text_config=text)))
    inputs = {"pixel_values": pixel_values, "input_ids": torch.randint(0, 99, (3, 7))}
    expected = siglip(**inputs, return_loss=False)
    tower = flexivit_from_source(load_flexivit_source(siglip.vision_model))
    swapped = polyscale.swap_vision_tower(siglip, tower)
    outputs = swapped(**inputs)
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-5)
    assert not torch.equal(swapped(**inputs, patch_size=16).logits_per_image, outputs.logits_per_image)
    pairs = {**inputs, "input_ids": inputs["input_ids"][:2]}
    torch.testing.assert_close(
        swapped(**pairs, return_loss=True).loss, siglip(**pairs, return_loss=True).loss, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_a_siglip_without_its_head_gives_the_same_tokens(pixel_values):
    """As in PaliGemma and Gemma 3, which pool nothing."""
    siglip = randomised(SiglipVisionModel(SiglipVisionConfig(**SHAPE, vision_use_head=False)))
    outputs = flexivit_from_source(load_flexivit_source(siglip))(pixel_values)
    expected = siglip(pixel_values).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, expected.mean(dim=1), atol=1e-5, rtol=1e-5)
