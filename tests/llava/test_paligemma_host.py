"""What is of PaliGemma alone: one tensor of tokens, suffixes, sliding windows."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from polyscale.llava import swap_vision_tower
from polyscale.models.s2_vision import S2VisionWrapper

from .llava_tiny import CLIP, HOSTS, PROMPTS, TEXT, make_photographs, make_tower, swapped
from .test_gemma_hosts import encode, image_tokens, own_tower_converted


@torch.no_grad()
def test_a_quadtree_of_the_own_tower_gives_paligemma_the_same_tokens(tmp_path):
    """All of the smallest patches, in another order."""
    model, processor = HOSTS["paligemma"]()
    tower = own_tower_converted(
        model, tmp_path / "tower", to="quadtree_vit", max_patch_size=16, num_tokens=16, image_size=32
    )
    inputs = encode(processor)
    expected = model.get_image_features(inputs["pixel_values"]).pooler_output
    swap_vision_tower(model, tower, processor)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(features.sum(dim=1), expected.sum(dim=1), atol=1e-4, rtol=1e-4)
    distance = torch.cdist(features, expected)
    assert distance.amin(dim=2).max() < 1e-3


@torch.no_grad()
def test_s2_around_the_own_tower_changes_nothing_in_paligemma_before_training():
    model, processor = HOSTS["paligemma"]()
    torch.manual_seed(3)
    large = torch.randn(2, 3, 64, 64)
    small = torch.nn.functional.interpolate(large, size=32, mode="bicubic", antialias=True)
    expected = model.get_image_features(small).pooler_output
    swap_vision_tower(model, S2VisionWrapper.from_vision_model(model.model.vision_tower, scales=[1, 2]), processor)
    assert model.model.multi_modal_projector.linear.in_features == 32
    assert_close(model.get_image_features(large).pooler_output, expected, atol=1e-5, rtol=1e-4)


def test_suffixes_are_labels_behind_any_number_of_tokens():
    model, processor = swapped("flexivit", "paligemma")
    for words, count in (({}, 16), ({"num_tokens": 4}, 4)):
        inputs = encode(processor, suffix=["a cat", "a dog"], **words)
        assert image_tokens(model, inputs) == [count, count]
        answers = [row[row != -100].tolist() for row in inputs["labels"]]
        assert answers == [[8, 9, 2], [8, 10, 2]]
        assert torch.equal(inputs["labels"] != -100, inputs["token_type_ids"] == 1)
        assert torch.isfinite(model(**inputs).loss)


@torch.no_grad()
def test_budgets_of_one_paligemma_batch_give_the_same_number_of_tokens():
    model, processor = swapped("s2", "paligemma")
    batch = encode(processor, image_budgets=[{"num_tiles": 1}, {}])
    alone = processor(images=make_photographs()[0], text=PROMPTS[0], return_tensors="pt", num_tiles=1)
    own = model(**batch).logits[0][batch["attention_mask"][0].bool()]
    assert_close(own, model(**alone).logits[0], atol=1e-4, rtol=1e-3)

    model, processor = swapped("flexivit", "paligemma")
    with pytest.raises(ValueError, match=r"the images of one call \[36, 9\] tokens.*calls of their own"):
        encode(processor, image_budgets=[{"num_tokens": 36}, {"num_tokens": 9}])
    few, many = (encode(processor, num_tokens=count)["pixel_values"] for count in (9, 36))
    with pytest.raises(ValueError, match=r"same number of tokens in this host.*\[9, 36\]"):
        model.get_image_features(torch.cat([few, many]))
    with pytest.raises(ValueError, match="with a token budget and images without"):
        model.get_image_features(torch.cat([few, torch.zeros_like(few)]))


@torch.no_grad()
def test_paligemma_2_with_sliding_windows():
    torch.manual_seed(0)
    _, processor = HOSTS["paligemma"]()
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=Gemma2Config(**TEXT, head_dim=12, query_pre_attn_scalar=12, sliding_window=64),
        image_token_index=4,
        projection_dim=24,
        hidden_size=24,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    processor = swap_vision_tower(model, make_tower("flexivit", model), processor, keep_projector=True)
    inputs = encode(processor, num_tokens=9)
    assert torch.isfinite(model(**inputs).logits).all()
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
