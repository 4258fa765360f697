"""A token budget in each call of the processor of a LLaVA model; the tower follows."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from polyscale.llava import set_token_budget

from .llava_tiny import PROMPTS, make_photographs, swapped


def encode(processor, **options):
    return processor(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt", **options)


def image_tokens(inputs) -> list[int]:
    return (inputs["input_ids"] == 4).sum(dim=1).tolist()


# tower; words of a call; tokens of each image, or None where the images decide
CALLS = [
    ("flexivit", {"patch_size": 8}, 36),
    ("flexivit", {"patch_size": (8, 16)}, 18),
    ("flexivit", {"num_tokens": 9}, 9),
    ("flexivit", {"image_size": 96, "patch_size": 24}, 16),
    ("flexivit_registers", {"num_tokens": 16}, 16),
    ("quadtree", {"num_tokens": 19}, 19),
    ("quadtree", {"split_threshold": 1.0}, None),
    ("quadtree_threshold", {"split_threshold": 0.5}, None),
    ("quadtree_threshold", {"num_tokens": 22}, 22),
    ("s2", {"scales": [1, 3]}, 16),
    ("s2", {"img_sizes": [32, 96]}, 16),
    ("s2", {"num_tiles": 2}, 16),
    ("s2_dynamic", {"max_tiles": 8}, None),
    ("sparseformer", {"image_size": 32}, 5),
]


@pytest.mark.parametrize(("name", "words", "count"), CALLS)
def test_a_call_equals_a_model_set_to_that_budget(name, words, count):
    model, processor = swapped(name)
    before = model.config.to_dict(), processor.to_dict()
    inputs = encode(processor, **words)
    if count is not None:
        assert image_tokens(inputs) == [count, count]
        bound = processor._get_num_multimodal_tokens(image_sizes=[[40, 90]], **words)
        assert bound["num_image_tokens"] == [count]
    with torch.no_grad():
        logits = model(**inputs).logits
        usual = model(**encode(processor)).logits
    assert model.config.to_dict() == before[0]
    assert processor.to_dict() == before[1]

    set_token_budget(model, processor, **words)
    expected = encode(processor)
    assert image_tokens(expected) == image_tokens(inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**expected).logits, logits, atol=1e-5, rtol=1e-4)
    assert usual.shape != logits.shape or (usual - logits).abs().max() > 1e-6


MIXED = [
    ("flexivit", [{"num_tokens": 36}, {"num_tokens": 9}]),
    ("flexivit", [{"patch_size": 8}, {}]),
    ("quadtree", [{"num_tokens": 64}, {"num_tokens": 16}]),
    ("quadtree", [{"split_threshold": 1.0}, {"num_tokens": 19}]),
    ("quadtree_threshold", [{}, {"split_threshold": 0.2}]),
    ("s2", [{"num_tiles": 1}, {}]),
]


@pytest.mark.parametrize(("name", "budgets"), MIXED)
def test_budgets_mix_in_one_batch_and_each_image_is_as_alone(name, budgets):
    model, processor = swapped(name)
    batch = encode(processor, image_budgets=budgets)
    with torch.no_grad():
        features = model.get_image_features(
            batch["pixel_values"], image_sizes=batch["image_sizes"], return_dict=True
        ).pooler_output
        logits = model(**batch).logits
        for index, (image, prompt, words) in enumerate(zip(make_photographs(), PROMPTS, budgets, strict=True)):
            alone = processor(images=image, text=prompt, return_tensors="pt", **words)
            own = model.get_image_features(
                alone["pixel_values"], image_sizes=alone["image_sizes"], return_dict=True
            ).pooler_output[0]
            torch.testing.assert_close(features[index], own, atol=1e-5, rtol=1e-5)
            assert len(own) == int((alone["input_ids"] == 4).sum())
            in_batch = logits[index][batch["attention_mask"][index].bool()]
            torch.testing.assert_close(in_batch, model(**alone).logits[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "budgets"), MIXED[:5])
@torch.no_grad()
def test_mixed_budgets_take_one_forward_of_each_layer(name, budgets):
    model, processor = swapped(name)
    batch, calls = encode(processor, image_budgets=budgets), []
    tower = model.model.vision_tower.tower
    modules = [tower, tower.embeddings, *tower.layers]
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"])
    assert len(set(image_tokens(batch))) == 2
    assert calls == modules


def test_all_tiles_can_be_asked_for_in_a_call():
    model, processor = swapped("s2")
    set_token_budget(model, processor, num_tiles=1)
    with torch.no_grad():
        few, all_tiles = model(**encode(processor)).logits, model(**encode(processor, num_tiles=None)).logits
        set_token_budget(model, processor, num_tiles=None)
        torch.testing.assert_close(model(**encode(processor)).logits, all_tiles, atol=1e-5, rtol=1e-4)
    assert (few - all_tiles).abs().max() > 1e-6


def test_without_image_sizes_the_budget_is_that_of_the_config():
    model, processor = swapped("flexivit")
    inputs = encode(processor)
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs.pop("image_sizes")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


REFUSED = [
    ("flexivit", {"num_token": 9}, "`num_token` is no argument of this processor. Did you mean `num_tokens`"),
    ("flexivit", {"split_threshold": 1.0}, "`split_threshold` is no argument of this processor"),
    ("flexivit", {"patch_size": 99}, "larger than the image"),
    ("flexivit", {"patch_size": 8, "num_tokens": 9}, "not both"),
    ("quadtree", {"num_tokens": 20}, "19"),
    ("s2", {"num_tokens": 9}, "its tokens are those of the wrapped model"),
    ("s2", {"num_tiles": 7}, "between 0 and 4"),
    ("s2", {"image_budgets": [{"scales": [1, 3]}, {}]}, r"images of one size, .*\[\(96, 96\), \(64, 64\)\]"),
    ("sparseformer", {"num_tokens": 4}, "its tokens are weights"),
    ("flexivit", {"image_budgets": [{"num_tokens": 9}]}, "for each of 2 images, got 1"),
    ("flexivit", {"image_budgets": [{"banana": 9}, {}]}, "`banana` is no argument"),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_unknown_words_and_illegal_budgets_are_refused(name, words, message):
    _, processor = swapped(name)
    with pytest.raises(ValueError, match=message):
        encode(processor, **words)


def test_words_of_transformers_still_pass():
    _, processor = swapped("flexivit")
    inputs = encode(processor, text_kwargs={"add_special_tokens": False}, do_rescale=True, num_tokens=9)
    assert image_tokens(inputs) == [9, 9]
    with pytest.raises(ValueError, match="`patch_sizes` is no argument"):
        encode(processor, patch_sizes=8)


def test_foreign_image_sizes_are_refused():
    model, processor = swapped("flexivit")
    inputs = encode(processor)
    with pytest.raises(ValueError, match="is no token budget"):
        model(**{**inputs, "image_sizes": torch.tensor([[40, 90], [90, 30]])})


def test_generation_with_a_budget_and_a_reloaded_processor(tmp_path):
    model, processor = swapped("quadtree")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs, same = encode(processor, num_tokens=22), encode(again, num_tokens=22)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(reloaded.eval().generate(**same, **options), expected)
    beams = model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert beams.shape[0] == 2


def test_a_chat_template_passes_budgets_on():
    _, processor = swapped("flexivit")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": make_photographs()[0]}, {"type": "text", "text": "what"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"num_tokens": 9}
    )
    assert image_tokens(inputs) == [9]


def test_a_swapped_model_trains_at_mixed_budgets():
    model, processor = swapped("flexivit")
    inputs = encode(processor, image_budgets=[{"num_tokens": 36}, {"num_tokens": 4}])
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    weight = model.model.vision_tower.tower.embeddings.patch_embeddings.projection.weight
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        ("quadtree_merging", [{"num_tokens": 16}, {"num_tokens": 40}]),
        ("flexivit_merging", [{"patch_size": 16}, {"patch_size": 8}]),
    ],
)
@torch.no_grad()
def test_budgets_of_one_batch_where_tokens_are_merged(name, budgets):
    model, processor = swapped(name)
    batch = encode(processor, image_budgets=budgets)
    features = model.model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    for image, prompt, budget, expected in zip(make_photographs(), PROMPTS, budgets, features, strict=True):
        alone = processor(images=image, text=prompt, return_tensors="pt", **budget)
        own = model.model.get_image_features(alone["pixel_values"], image_sizes=alone["image_sizes"]).pooler_output
        torch.testing.assert_close(expected, own[0], atol=1e-5, rtol=1e-4)


def test_more_tokens_than_the_layers_can_merge_are_refused_by_the_processor():
    _, processor = swapped("flexivit_merging")
    with pytest.raises(ValueError, match="`merge_tokens_to` must be at least 36 for 144 tokens and 2 layers"):
        encode(processor, patch_size=4)


@pytest.mark.parametrize("host", ["llava", "vipllava", "paligemma"])
@torch.no_grad()
def test_a_text_without_an_image_in_a_batch(host):
    model, processor = swapped("flexivit", host)
    photograph = make_photographs()[0]
    batch = processor(images=[[], [photograph]], text=["the cat", PROMPTS[0]], padding=True, return_tensors="pt")
    assert image_tokens(batch) == [0, 16]
    alone = processor(images=photograph, text=PROMPTS[0], return_tensors="pt")
    names = [name for name in ("pixel_values", "image_sizes") if name in batch]
    features, expected = (
        model.model.get_image_features(**{name: inputs[name] for name in names}) for inputs in (batch, alone)
    )
    torch.testing.assert_close(features.pooler_output, expected.pooler_output)
    model.generate(**batch, max_new_tokens=1)


def test_no_image_in_any_text():
    _, processor = swapped("flexivit")
    assert "pixel_values" not in processor(text=["the cat"], num_tokens=9, return_tensors="pt")
    with pytest.raises(ValueError, match="`images` holds no image: leave it out"):
        processor(images=[], text=["the cat"], return_tensors="pt")


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"num_tokens": 9}, r"must be a list with one dict .*, got \{'num_tokens': 9\}"),
        ([9, 9], r"must be a list with one dict .*, got \[9, 9\]"),
        ([None, None], r"must be a list with one dict .*, got \[None, None\]"),
        ([{}], "one dict of budget words for each of 2 images, got 1"),
        ([{}, {"padding": True}], "`image_budgets` holds `padding`, which is no budget"),
        ([{}, {"num_tokns": 9}], r"Did you mean `num_tokens`\?"),
    ],
)
@pytest.mark.parametrize("host", ["llava", "gemma3"])
def test_budgets_of_images_that_are_none(host, budgets, message):
    _, processor = swapped("flexivit_no_cls", host)
    images = [[image] for image in make_photographs()]
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=PROMPTS, image_budgets=budgets)
