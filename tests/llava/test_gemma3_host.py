"""What is of Gemma 3 alone: tokens that are averaged, and how many of them."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from polyscale.llava import set_token_budget

from .llava_tiny import PROMPTS, make_photographs, swapped
from .test_gemma_hosts import encode, image_tokens


@torch.no_grad()
def test_gemma_3_averages_any_grid():
    model, processor = swapped("flexivit", "gemma3")
    projector = model.model.multi_modal_projector
    for patch_size, side in ((8, 6), (12, 4), (16, 3), (24, 2)):
        inputs = encode(processor, patch_size=patch_size)
        images = inputs["pixel_values"][:, :, -48:]
        tokens = model.model.vision_tower.tower(images, patch_size=patch_size).last_hidden_state[:, 1:]
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))
        half = -(-side // 2)  # where the grid is odd, the row in the middle counts on both sides
        rows = (maps[:, :, :half].mean(dim=2), maps[:, :, -half:].mean(dim=2))
        cells = [cell for row in rows for cell in (row[..., :half].mean(dim=2), row[..., -half:].mean(dim=2))]
        pooled = projector.mm_soft_emb_norm(torch.stack(cells, dim=1))
        expected = pooled @ projector.mm_input_projection_weight
        assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output, expected, atol=1e-5, rtol=1e-4)
    assert projector.kernel_size == 1


@torch.no_grad()
def test_gemma_3_gets_other_numbers_of_tokens(tmp_path):
    model, processor = swapped("flexivit", "gemma3")
    assert set_token_budget(model, processor, mm_tokens_per_image=16) is processor
    assert model.config.mm_tokens_per_image == 16
    inputs = encode(processor)
    assert image_tokens(model, inputs) == [16, 16]
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert_close(reloaded.eval()(**encode(again)).logits, logits, atol=1e-5, rtol=1e-4)
    set_token_budget(model, processor, patch_size=16, mm_tokens_per_image=1)
    assert image_tokens(model, encode(processor)) == [1, 1]
    set_token_budget(model, processor, patch_size=12, mm_tokens_per_image=16)
    assert_close(model(**encode(processor)).logits, logits, atol=1e-5, rtol=1e-4)
    for words, message in (
        ({"mm_tokens_per_image": 8}, "must be a square number such as 64 or 256, got 8"),
        ({"mm_tokens_per_image": 25}, "grid of 4 x 4 tokens, which cannot be averaged to 5 x 5.*at most 16"),
        ({"num_tokens": 9}, "grid of 3 x 3 tokens, which cannot be averaged to 4 x 4.*at least 16 tokens"),
        ({"mm_tokens": 4}, "`mm_tokens` cannot change"),
    ):
        before = model.config.to_dict()
        with pytest.raises(ValueError, match=message):
            set_token_budget(model, processor, **words)
        assert model.config.to_dict() == before
    with pytest.raises(ValueError, match="grid of 3 x 3 tokens, which cannot be averaged to 4 x 4"):
        encode(processor, num_tokens=9)
    with pytest.raises(ValueError, match=r"`mm_tokens_per_image` cannot be given to a call.*set_token_budget"):
        encode(processor, mm_tokens_per_image=4)


@torch.no_grad()
def test_budgets_mix_in_one_batch_of_gemma_3():
    model, processor = swapped("flexivit", "gemma3")
    budgets = [{"num_tokens": 36}, {"num_tokens": 9}]
    batch = encode(processor, image_budgets=budgets)
    logits = model(**batch).logits
    for index, (image, prompt, words) in enumerate(zip(make_photographs(), PROMPTS, budgets, strict=True)):
        alone = processor(images=image, text=prompt, return_tensors="pt", **words)
        own = logits[index][batch["attention_mask"][index].bool()]
        assert_close(own, model(**alone).logits[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_crops_of_gemma_3_have_the_budget_of_their_image():
    model, processor = swapped("flexivit", "gemma3")
    images = [Image.new("RGB", (300, 100), "red"), make_photographs()[1]]
    cut = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 40, "pan_and_scan_max_num_crops": 3}
    cut["pan_and_scan_min_ratio_to_activate"] = 1.2
    inputs = processor(
        images=[[image] for image in images], text=PROMPTS, padding=True, return_tensors="pt", patch_size=8, **cut
    )
    assert len(inputs["pixel_values"]) == 5
    assert image_tokens(model, inputs) == [16, 4]
    logits = model(**inputs).logits
    set_token_budget(model, processor, patch_size=8)
    expected = processor(images=[[image] for image in images], text=PROMPTS, padding=True, return_tensors="pt", **cut)
    assert_close(model(**expected).logits, logits, atol=1e-5, rtol=1e-4)
