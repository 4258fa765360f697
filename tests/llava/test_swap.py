"""Every tower inside a tiny LLaVA: counts, values, saving, generation, budgets."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from polyscale.llava import BudgetLlavaProcessor, set_token_budget, swap_vision_tower
from polyscale.models.flexivit import FlexiViTForImageClassification
from polyscale.models.s2_vision import S2VisionWrapper

from .llava_tiny import PROMPTS, TOWERS, make_llava, make_photographs, make_tokenizer, make_tower


def image_tokens(inputs) -> list[int]:
    return (inputs["input_ids"] == 4).sum(dim=1).tolist()


def encode(processor):
    return processor(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt")


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower(name, tmp_path):
    model, processor = make_llava()
    tower = make_tower(name, model)
    new = swap_vision_tower(model, tower, processor)
    count = TOWERS[name][1]
    inputs = encode(new)
    assert type(new) is BudgetLlavaProcessor
    if count is None:
        assert len(set(image_tokens(inputs))) == 2
        bound = new._get_num_multimodal_tokens(image_sizes=[[10_000, 10_000]])["num_image_tokens"][0]
        assert bound >= max(image_tokens(inputs))
    else:
        assert image_tokens(inputs) == [count, count]
        assert new._get_num_multimodal_tokens(image_sizes=[[40, 90]])["num_image_tokens"] == [count]
    assert model.config.vision_config.hidden_size == model.model.multi_modal_projector.linear_1.in_features

    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    alone = new(images=make_photographs()[1], text=PROMPTS[1], return_tensors="pt")
    length = alone["input_ids"].shape[1]
    in_batch = outputs.logits[1][inputs["attention_mask"][1].bool()]
    torch.testing.assert_close(model(**alone).logits[0], in_batch[-length:], atol=1e-4, rtol=1e-3)

    model.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    reloaded, again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(again) is type(new)
    reloaded_inputs = encode(again)
    for key, value in inputs.items():
        assert torch.equal(reloaded_inputs[key], value)
    torch.testing.assert_close(reloaded(**reloaded_inputs).logits, outputs.logits, atol=1e-5, rtol=1e-4)

    answer = pipeline("image-text-to-text", model=str(tmp_path))(
        text=[
            {
                "role": "user",
                "content": [{"type": "image", "image": make_photographs()[0]}, {"type": "text", "text": "what"}],
            }
        ],
        max_new_tokens=2,
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
def test_s2_around_the_own_tower_changes_nothing_before_training(layer):
    """Given the largest-scale tensor, the first answer is the old model's on that tensor shrunk with antialias."""
    model, processor = make_llava(vision_feature_layer=layer)
    torch.manual_seed(3)
    large = torch.randn(2, 3, 96, 96)
    small = torch.nn.functional.interpolate(large, size=32, mode="bicubic", antialias=True)
    text = processor.tokenizer(["USER: " + "<image> " * 16 + "what"] * 2, return_tensors="pt")
    with torch.no_grad():
        expected = model(**text, pixel_values=small).logits
        tower = S2VisionWrapper.from_vision_model(model.model.vision_tower, scales=[1, 2, 3])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new = swap_vision_tower(model, tower, processor)
        torch.testing.assert_close(model(**text, pixel_values=large).logits, expected, atol=1e-4, rtol=1e-4)
    assert new.patch_size == 24
    assert dict(new.image_processor.crop_size)["height"] == 96
    assert new.image_processor.fit == "crop"
    width = model.model.multi_modal_projector.linear_1.in_features
    assert width == 48 * (1 if layer == -2 else 2)


def test_projectors_are_kept_or_replaced_with_a_warning():
    model, processor = make_llava()
    before = model.model.multi_modal_projector.linear_1.weight
    swap_vision_tower(model, make_tower("quadtree", model), processor, keep_projector=True)
    assert model.model.multi_modal_projector.linear_1.weight is before
    with pytest.warns(UserWarning, match="trained with another tower"):
        swap_vision_tower(model, make_tower("flexivit", model), processor)
    assert model.model.multi_modal_projector.linear_1.weight is not before

    from polyscale.models.flexivit import FlexiViTConfig, FlexiViTModel

    wide = FlexiViTModel(
        FlexiViTConfig(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=32, base_patch_size=8)
    )
    with pytest.warns(UserWarning, match="reads 16 channels and the new tower gives 20"):
        new = swap_vision_tower(model, wide, processor)
    assert model.model.multi_modal_projector.linear_1.weight.shape == (24, 20)
    assert torch.isfinite(model(**encode(new)).logits).all()


def test_swap_without_a_processor_and_into_half_precision():
    model, _ = make_llava()
    model.bfloat16()
    assert swap_vision_tower(model, make_tower("flexivit", model)) is None
    assert model.model.vision_tower.dtype == model.config.vision_config.dtype == torch.bfloat16


def test_models_that_do_not_fit_are_refused_and_nothing_changes():
    model, processor = make_llava()
    before = model.config.to_dict(), model.model.vision_tower
    head = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    tower = make_tower("flexivit", model)
    with pytest.raises(ValueError, match="a model without a head, got ViTForImageClassification"):
        swap_vision_tower(model, head, processor)
    with pytest.raises(ValueError, match="a model without a head"):
        swap_vision_tower(model, FlexiViTForImageClassification(tower.config), processor)
    with pytest.raises(ValueError, match="`llava_model` must be one of"):
        swap_vision_tower(tower, tower, processor)
    with pytest.raises(ValueError, match="`vision_feature_layer` 9"):
        swap_vision_tower(model, tower, processor, vision_feature_layer=9)
    other = LlavaProcessor(
        processor.image_processor, make_tokenizer(["<pad>", "<s>", "</s>", "<unk>", "a", "<image>"]), patch_size=8
    )
    with pytest.raises(ValueError, match="image token has the id 5, the model's is 4"):
        swap_vision_tower(model, tower, other)
    small = CLIPImageProcessor(crop_size={"height": 20, "width": 20})
    with pytest.raises(ValueError, match=r"gives images of \(20, 20\) pixels"):
        swap_vision_tower(model, tower, processor, image_processor=small)
    assert model.config.to_dict() == before[0]
    assert model.model.vision_tower is before[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vision_feature_layer": "last"},
            "`vision_feature_layer` must be an int, a list of .*, got 'last'",
        ),
        ({"vision_feature_layer": []}, r"`vision_feature_layer` must be .*, got \[\]"),
        ({"vision_feature_layer": True}, "`vision_feature_layer` must be .*, got True"),
        ({"vision_feature_layer": 1.5}, "`vision_feature_layer` must be .*, got 1.5"),
        ({"keep_projector": "yes"}, "`keep_projector` must be True or False, got 'yes'"),
        ({"image_processor": "clip"}, "`image_processor` must be an image processor or None, got 'clip'"),
    ],
)
def test_options_that_are_none(options, message):
    model, processor = make_llava()
    with pytest.raises(ValueError, match=message):
        swap_vision_tower(model, make_tower("flexivit", model), processor, **options)


def test_towers_and_models_that_are_none():
    model, processor = make_llava()
    for tower in (None, "openai/clip-vit-large-patch14"):
        with pytest.raises(ValueError, match="`tower` must be a vision model without a head, as `AutoModel"):
            swap_vision_tower(model, tower, processor)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="`tower` of type 'resnet' gives feature maps"):
        swap_vision_tower(model, resnet, processor)
    around = torch.nn.Sequential(model)  # as adapters and compilers are
    with pytest.raises(ValueError, match="got Sequential, with a LlavaForConditionalGeneration inside: give that one"):
        set_token_budget(around, processor, num_tokens=9)


@torch.no_grad()
def test_the_tower_of_another_swapped_model():
    first, first_processor = make_llava()
    first_processor = swap_vision_tower(first, make_tower("flexivit", first), first_processor)
    second, processor = make_llava()
    processor = swap_vision_tower(second, first.model.vision_tower, processor)
    assert second.model.vision_tower.tower is first.model.vision_tower.tower
    second.model.multi_modal_projector.load_state_dict(first.model.multi_modal_projector.state_dict())
    torch.testing.assert_close(second(**encode(processor)).logits, first(**encode(first_processor)).logits)
    own = second.model.multi_modal_projector
    processor = swap_vision_tower(second, second.model.vision_tower, processor, vision_feature_layer=(-1,))
    assert second.model.multi_modal_projector is own
    assert second.config.vision_feature_layer == [-1]
    second(**encode(processor))


def test_wrong_counts_are_an_error_of_the_processor():
    model, processor = make_llava()
    new = swap_vision_tower(model, make_tower("s2_dynamic", model), processor)
    inputs = encode(new)
    inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="`image_sizes` is required"):
        model(**inputs)


BUDGETS = [
    ("flexivit", {"patch_size": 8}, 36),
    ("flexivit", {"num_tokens": 9}, 9),
    ("flexivit", {"image_size": 96, "patch_size": 24}, 16),
    ("quadtree", {"num_tokens": 19}, 19),
    ("quadtree", {"image_size": 32, "num_tokens": 10}, 10),
    ("quadtree", {"split_threshold": 1.0}, None),
    ("quadtree_merging", {"num_tokens": 40}, 10),
    ("quadtree_threshold", {"split_threshold": 0.5}, None),
    ("quadtree_threshold", {"num_tokens": 22}, 22),
    ("s2", {"img_sizes": [32, 96]}, 16),
    ("s2", {"scales": [1, 3]}, 16),
    ("s2_dynamic", {"max_tiles": 8}, None),
    ("sparseformer", {"image_size": 32}, 5),
]


@pytest.mark.parametrize(("name", "knobs", "count"), BUDGETS)
def test_budgets_change_model_and_processor(name, knobs, count, tmp_path):
    model, processor = make_llava()
    processor = swap_vision_tower(model, make_tower(name, model), processor)
    before = image_tokens(encode(processor))
    changed = set_token_budget(model, processor, **knobs)
    inputs = encode(changed)
    if count is not None:
        assert image_tokens(inputs) == [count, count]
    elif name != "s2_dynamic":
        assert image_tokens(inputs) != before
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    changed.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = encode(AutoProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(reloaded(**again).logits, logits, atol=1e-5, rtol=1e-4)


REFUSED = [
    ("s2", {"scales": [1, 2, 3]}, "another number of scales needs new weights"),
    ("s2", {"num_tokens": 10}, "its tokens are those of the wrapped model at one scale"),
    ("s2", {"scales": [1, 2], "img_sizes": [32, 64]}, "not both"),
    ("sparseformer", {"num_tokens": 4}, "its tokens are weights"),
    ("flexivit", {"split_threshold": 1.0}, "cannot change in a model of type 'flexivit'"),
    ("flexivit", {"patch_size": 8, "num_tokens": 4}, "not both"),
    ("flexivit", {"patch_size": 99}, "larger than the image"),
    ("flexivit", {}, "Give at least one of `patch_size`"),
    ("quadtree", {"num_tokens": 20}, "19"),
    ("quadtree", {"image_size": 50}, "48"),
]


@pytest.mark.parametrize(("name", "knobs", "message"), REFUSED)
def test_what_cannot_change_is_refused_and_nothing_changes(name, knobs, message):
    model, processor = make_llava()
    processor = swap_vision_tower(model, make_tower(name, model), processor)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        set_token_budget(model, processor, **knobs)
    assert model.config.to_dict() == before
    model(**encode(processor))


def test_an_ordinary_llava_has_no_budget():
    model, processor = make_llava()
    with pytest.raises(ValueError, match="'clip_vision_model', which has no token budget"):
        set_token_budget(model, processor, num_tokens=4)


RELOAD = """
import sys
import polyscale.llava
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForImageTextToText, AutoProcessor))
print(type(model.model.vision_tower).__name__, type(processor).__name__, type(processor.image_processor).__name__)
"""


@pytest.mark.slow
def test_a_fresh_process_reloads_it(tmp_path):
    model, processor = make_llava()
    processor = swap_vision_tower(model, make_tower("s2_dynamic", model), processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split()[-3:] == ["PackedTower", "BudgetLlavaProcessor", "S2ImageProcessor"]
