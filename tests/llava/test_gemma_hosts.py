"""Towers inside tiny PaliGemma and Gemma 3 models: equal logits, budgets of a call and for good, what is refused."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import polyscale
from polyscale.llava import PackedTower, set_token_budget, swap_vision_tower
from polyscale.models.flexivit import FlexiViTConfig, FlexiViTModel

from .llava_tiny import CLIP, ENCODER, HOSTS, PROMPTS, TOWERS, make_photographs, make_tower, swapped


GEMMAS = ("paligemma", "gemma3")
GRIDS = ("s2", "flexivit", "flexivit_registers", "flexivit_no_cls")
VARYING = ("s2_dynamic", "quadtree_threshold")
PAIRS = [("paligemma", name) for name in TOWERS if name not in VARYING] + [("gemma3", name) for name in GRIDS]


def encode(processor, **options):
    images = [[image] for image in make_photographs()]
    return processor(images=images, text=PROMPTS, padding=True, return_tensors="pt", **options)


def image_tokens(model, inputs) -> list[int]:
    return (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()


def own_tower_converted(model, folder, to="flexivit", **options):
    with torch.no_grad():  # position embeddings and biases that a mistake would show in
        for parameter in model.model.vision_tower.parameters():
            parameter.normal_(std=0.2)
    polyscale.convert_checkpoint(model.model.vision_tower, folder, to=to, **options)
    return AutoModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("host", GEMMAS)
@torch.no_grad()
def test_a_conversion_of_the_own_tower_answers_as_before(host, tmp_path):
    model, processor = HOSTS[host]()
    tower = own_tower_converted(model, tmp_path / "tower")
    inputs = encode(processor)
    expected = model(**inputs).logits
    projector = model.model.multi_modal_projector
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = swap_vision_tower(model, tower, processor, image_processor=processor.image_processor)
    assert model.model.multi_modal_projector is projector
    assert type(model.model.vision_tower) is PackedTower
    own = encode(new)
    assert own.keys() == inputs.keys()
    for name, value in inputs.items():
        assert torch.equal(own[name], value)
    assert_close(model(**own).logits, expected, atol=1e-4, rtol=1e-4)
    assert_close(model(**encode(new, patch_size=8)).logits, expected, atol=1e-4, rtol=1e-4)
    coarse = model(**encode(new, patch_size=16)).logits
    assert coarse.shape != expected.shape or (coarse - expected).abs().max() > 1e-4


@pytest.mark.parametrize(("host", "name"), PAIRS)
def test_every_tower(host, name, tmp_path):
    model, processor = swapped(name, host)
    inputs = encode(processor)
    count = TOWERS[name][1] if host == "paligemma" else 4
    assert image_tokens(model, inputs) == [count, count]
    labels = inputs.pop("labels", inputs["input_ids"])
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    assert sum(p.grad.abs().sum() for p in model.model.vision_tower.parameters() if p.grad is not None) > 0

    alone = processor(images=make_photographs()[1], text=PROMPTS[1], return_tensors="pt")
    in_batch = outputs.logits[1][inputs["attention_mask"][1].bool()]
    assert_close(model(**alone).logits[0], in_batch, atol=1e-4, rtol=1e-3)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    same = encode(again)
    for key, value in inputs.items():
        assert torch.equal(same[key], value)
    assert_close(reloaded(**inputs).logits, outputs.logits, atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False}
    ids = model.generate(**inputs, **options)
    assert torch.equal(reloaded.generate(**inputs, **options), ids)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


# host, tower; words of a call; tokens of the tower
CALLS = [
    ("paligemma", "flexivit", {"patch_size": 8}, 36),
    ("paligemma", "flexivit", {"patch_size": (8, 16)}, 18),
    ("paligemma", "flexivit", {"num_tokens": 9}, 9),
    ("paligemma", "flexivit", {"image_size": 96, "patch_size": 24}, 16),
    ("paligemma", "flexivit_merging", {"patch_size": 16}, 9),
    ("paligemma", "quadtree", {"num_tokens": 19}, 19),
    ("paligemma", "quadtree_merging", {"num_tokens": 40}, 10),
    ("paligemma", "s2", {"scales": [1, 3]}, 16),
    ("paligemma", "s2", {"num_tiles": 2}, 16),
    ("paligemma", "sparseformer", {"image_size": 32}, 5),
    ("gemma3", "flexivit", {"patch_size": 8}, 36),
    ("gemma3", "flexivit", {"patch_size": (8, 16)}, 18),
    ("gemma3", "flexivit", {"num_tokens": 9}, 9),
    ("gemma3", "flexivit", {"image_size": 96, "patch_size": 16}, 36),
    ("gemma3", "s2", {"scales": [1, 3]}, 16),
    ("gemma3", "s2", {"num_tiles": 2}, 16),
]


@pytest.mark.parametrize(("host", "name", "words", "count"), CALLS)
@torch.no_grad()
def test_a_call_equals_a_model_set_to_that_budget(host, name, words, count, tmp_path):
    model, processor = swapped(name, host)
    before = model.config.to_dict(), processor.to_dict()
    inputs = encode(processor, **words)
    expected_tokens = count if host == "paligemma" else 4
    assert image_tokens(model, inputs) == [expected_tokens] * 2
    assert processor._get_num_multimodal_tokens(image_sizes=[[40, 90]], **words)["num_image_tokens"] == [
        expected_tokens
    ]
    logits, usual = model(**inputs).logits, model(**encode(processor)).logits
    assert model.config.to_dict() == before[0]
    assert processor.to_dict() == before[1]

    assert set_token_budget(model, processor, **words) is processor
    assert model.config.vision_config.vision_config.max_num_tokens_for() == count
    expected = encode(processor)
    assert torch.equal(expected["input_ids"], inputs["input_ids"])
    assert_close(model(**expected).logits, logits, atol=1e-5, rtol=1e-4)
    assert usual.shape != logits.shape or (usual - logits).abs().max() > 1e-6
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert_close(reloaded(**encode(AutoProcessor.from_pretrained(tmp_path))).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("host", GEMMAS)
def test_generation_at_the_budget_of_a_call(host):
    model, processor = swapped("flexivit", host)
    inputs = encode(processor, num_tokens=9)
    options = {"max_new_tokens": 3, "do_sample": False}
    ids, beams = model.generate(**inputs, **options), model.generate(**inputs, **options, num_beams=2)
    set_token_budget(model, processor, num_tokens=9)
    inputs = encode(processor)
    assert torch.equal(model.generate(**inputs, **options), ids)
    assert torch.equal(model.generate(**inputs, **options, num_beams=2), beams)


@pytest.mark.parametrize("host", GEMMAS)
def test_a_chat_template_passes_budgets_on(host):
    model, processor = swapped("flexivit", host)
    content = [{"type": "image", "image": make_photographs()[0]}, {"type": "text", "text": "what"}]
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"num_tokens": 9}}
    inputs = processor.apply_chat_template(messages, **options)
    assert image_tokens(model, inputs) == [9 if host == "paligemma" else 4]
    assert inputs["pixel_values"].shape[-2:] == (49, 48)


@pytest.mark.parametrize("host", GEMMAS)
@torch.no_grad()
def test_the_prefix_follows_the_count(host):
    """Logits are those of the features put into the embeddings by hand, with the token types of the processor."""
    model, processor = swapped("flexivit", host)
    inputs = encode(processor, patch_size=8)
    types, is_image = inputs["token_type_ids"], inputs["input_ids"] == model.config.image_token_id
    if host == "paligemma":
        assert not types.any()
    else:
        assert torch.equal(types == 1, is_image)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[is_image] = features.flatten(0, 1)
    text = {"attention_mask": inputs["attention_mask"], "token_type_ids": types}
    expected = model(inputs_embeds=embeddings, **text).logits
    assert_close(model(**inputs).logits, expected)
    # the mask has two directions: without types it has one, and the first image token sees no other
    causal = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    first = is_image.int().argmax(dim=1)
    rows = torch.arange(2)
    assert (causal[rows, first] - expected[rows, first]).abs().max() > 1e-5


REFUSED_CALLS = [
    ("paligemma", "flexivit", {"nim_tokens": 9}, r"`nim_tokens` is no argument.*Did you mean `num_tokens`"),
    ("paligemma", "flexivit", {"split_threshold": 1.0}, "`split_threshold` is no argument"),
    ("paligemma", "flexivit", {"patch_size": 99}, "larger than the image"),
    ("paligemma", "flexivit", {"image_size": (48, 64)}, "`image_size` must be a square for a budget of a call"),
    ("paligemma", "quadtree", {"num_tokens": 20}, "19"),
    ("gemma3", "flexivit", {"nim_tokens": 9}, r"`nim_tokens` is no argument.*Did you mean `num_tokens`"),
    ("gemma3", "flexivit", {"image_budgets": [{"num_tokens": 9}]}, "for each of 2 images, got 1"),
    ("gemma3", "flexivit", {"num_tokens": 1}, "grid of 1 x 1 tokens, which cannot be averaged to 2 x 2"),
]


@pytest.mark.parametrize(("host", "name", "words", "message"), REFUSED_CALLS)
def test_unknown_words_and_illegal_budgets_are_refused(host, name, words, message):
    _, processor = swapped(name, host)
    with pytest.raises(ValueError, match=message):
        encode(processor, **words)


@pytest.mark.parametrize(
    ("host", "name"), [(host, name) for host in GEMMAS for name in TOWERS if (host, name) not in PAIRS]
)
def test_other_towers_are_refused(host, name):
    with pytest.raises(ValueError, match=r"cannot be in a (PaliGemma|Gemma 3) model.*LlavaForConditionalGeneration"):
        swapped(name, host)


@pytest.mark.parametrize("host", GEMMAS)
def test_a_failing_swap_changes_nothing(host):
    model, processor = HOSTS[host]()
    tower = make_tower("flexivit", model)
    before = model.config.to_dict(), tower.config.to_dict(), model.model.vision_tower
    narrow = FlexiViTModel(FlexiViTConfig(**{**ENCODER, "hidden_size": 8}, image_size=48, base_patch_size=8))
    for other, options, message in (
        (tower, {"vision_feature_layer": -2}, "`vision_feature_layer` must be None for a"),
        (tower, {"fit": "banana"}, "`fit` must be None"),
        (make_tower("quadtree_threshold", model), {}, "cannot be in a"),
        (narrow, {"keep_projector": True}, "reads 16 channels and the new tower gives 8"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_vision_tower(model, other, processor, **options)
        assert model.config.to_dict() == before[0]
        assert tower.config.to_dict() == before[1]
        assert model.model.vision_tower is before[2]
    model(**encode(processor))


@torch.no_grad()
def test_plain_towers():
    """A CLIP in a PaliGemma, with its CLS token; a SigLIP of another size in a Gemma 3, which divides its grid."""
    model, processor = HOSTS["paligemma"]()
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    with pytest.warns(UserWarning, match="trained with another tower"):
        processor = swap_vision_tower(model, clip, processor)
    inputs = encode(processor)
    assert image_tokens(model, inputs) == [17, 17]
    assert torch.isfinite(model(**inputs).logits).all()

    model, processor = HOSTS["gemma3"]()
    large = SiglipVisionModel(SiglipVisionConfig(**{**CLIP, "image_size": 48})).eval()
    new = swap_vision_tower(model, large, processor, keep_projector=True)
    assert model.model.multi_modal_projector.kernel_size == 3
    inputs = encode(new)
    assert image_tokens(model, inputs) == [4, 4]
    tokens = large(inputs["pixel_values"]).last_hidden_state
    corner = tokens.unflatten(1, (6, 6))[:, :3, :3].mean(dim=(1, 2))
    projector = model.model.multi_modal_projector
    expected = projector.mm_soft_emb_norm(corner) @ projector.mm_input_projection_weight
    assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output[:, 0], expected)
    odd = SiglipVisionModel(SiglipVisionConfig(**{**CLIP, "image_size": 24})).eval()
    with pytest.raises(ValueError, match=r"grid of 3 x 3 tokens.*cannot average to 2 x 2.*one of \[1, 9\]"):
        swap_vision_tower(model, odd, new)
    with pytest.raises(ValueError, match=r"cannot be in a Gemma 3 model.*1 prefix tokens"):
        swap_vision_tower(model, clip, new)
    with pytest.raises(ValueError, match="`image_processor` must be a Gemma3ImageProcessor"):
        swap_vision_tower(model, large, new, image_processor=CLIPImageProcessor(crop_size={"height": 48, "width": 48}))


@pytest.mark.parametrize("host", GEMMAS)
@torch.no_grad()
def test_bfloat16_and_hidden_states(host):
    model, processor = swapped("flexivit", host)
    inputs = encode(processor, num_tokens=9)
    tower, logits = model.model.vision_tower, model(**inputs).logits
    states = tower(inputs["pixel_values"], output_hidden_states=True)
    assert len(states.hidden_states) == 4
    assert {state.shape for state in states.hidden_states} == {states.last_hidden_state.shape}
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    assert_close(model(**inputs).logits, logits, rtol=0, atol=0)

    plain, plain_processor = HOSTS[host]()
    reference = _error_in_bfloat16(plain, encode(plain_processor))
    assert _error_in_bfloat16(model, inputs) < 4 * reference


def _error_in_bfloat16(model, inputs) -> float:
    expected = model(**inputs).logits
    logits = model.bfloat16()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert logits.dtype == torch.bfloat16
    return ((logits.float() - expected).norm() / expected.norm()).item()


RELOAD = """
import sys
import torch
import polyscale.llava
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForImageTextToText, AutoProcessor))
    saved = torch.load(f"{folder}/inputs.pt")
    expected = saved.pop("logits")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**saved).logits, expected, atol=1e-5, rtol=1e-4)
    print(type(processor).__name__)
"""


@pytest.mark.slow
def test_a_fresh_process_reloads_them(tmp_path):
    for host in GEMMAS:
        model, processor = swapped("flexivit", host)
        inputs = encode(processor, num_tokens=9)
        with torch.no_grad():
            logits = model(**inputs).logits
        model.save_pretrained(tmp_path / host)
        processor.save_pretrained(tmp_path / host)
        torch.save({**inputs, "logits": logits}, tmp_path / host / "inputs.pt")
    command = [sys.executable, "-c", RELOAD, *(str(tmp_path / host) for host in GEMMAS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["BudgetPaliGemmaProcessor", "BudgetGemma3Processor"]
