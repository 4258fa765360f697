"""Every family as the vision tower of a tiny LLaVA model: random weights, real processor, a tokenizer built here."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .families import Budget, Family, each_family
from .pictures import photographs


_COLUMN = "LLaVA tower at two budgets: forward, loss, generate, save, reload"
_TRAINING = "LLaVA tower: projector-only and full training"
_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "this", "a", "cat", "duck", "moose", "?"]
_TEXTS = ["<image> what is this ? a duck", "what is <image> ? a cat"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def make_llava(family: Family, budget: Budget, layer: int | list[int] = -1):
    """(model, processor) whose sides agree on the number of tokens that a image costs."""
    vision_config = family.make_config(**budget.knobs)
    text_config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=_WORDS.index("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=family.llava.strategy,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    return model, make_processor(family, budget)


def make_processor(family: Family, budget: Budget) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=family.make_processor(),
        tokenizer=make_tokenizer(),
        vision_feature_select_strategy=family.llava.strategy,
        **family.llava.processor_kwargs(family.make_config(), budget),
    )


def make_inputs(processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    inputs = processor(text=_TEXTS, images=list(photographs()[:2]), padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= _WORDS.index("<image>"), -100)
    return {**inputs, "labels": labels}


@each_family(_COLUMN)
def test_forward_at_two_budgets(family):
    """Both sides count alike, the image matters, and the loss is that of the logits."""
    for budget in family.llava_budgets:
        model, processor = make_llava(family, budget)
        assert type(model.model.vision_tower) is family.model
        inputs = make_inputs(processor)
        image_tokens = (inputs["input_ids"] == _WORDS.index("<image>")).sum(1)
        assert image_tokens.tolist() == [budget.num_tokens] * 2
        assert processor._get_num_multimodal_tokens([[480, 640]])["num_image_tokens"] == [budget.num_tokens]
        with torch.no_grad():
            outputs = model(**inputs)
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100))
            other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
        assert (other.logits - outputs.logits).abs().max() > 1e-3


@each_family(_COLUMN)
def test_budget_of_a_live_model(family):
    """The knobs change on a model in memory: in the tower's config, or per call through `get_image_features`."""
    if family.llava.fixed_budget:
        pytest.skip(family.llava.fixed_budget)
    first, second = family.llava_budgets
    model, _ = make_llava(family, first)
    expected_model, processor = make_llava(family, second)
    inputs = make_inputs(processor)
    with torch.no_grad():
        expected = expected_model(**inputs).logits
        features = model.get_image_features(inputs["pixel_values"], return_dict=True, **second.knobs)
        text = {key: value for key, value in inputs.items() if key != "pixel_values"}
        assert_close(model(**text, mm_encoder_outputs={"image": features}).logits, expected)
        for knob, value in second.knobs.items():
            setattr(model.model.vision_tower.config, knob, value)
            assert getattr(model.config.vision_config, knob) == value
        assert_close(model(**inputs).logits, expected)


@each_family(_COLUMN)
@pytest.mark.parametrize("layer", [-1, [-2, -1]], ids=["last layer", "two layers"])
def test_generate_save_reload(family, layer, tmp_path):
    model, processor = make_llava(family, family.llava_budgets[1], layer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(reloaded.model.vision_tower) is family.model
    for knob, value in family.llava_budgets[1].knobs.items():
        assert getattr(reloaded.config.vision_config, knob) == value
    other = AutoProcessor.from_pretrained(tmp_path)
    assert type(other.image_processor) is family.processor
    inputs, other_inputs = make_inputs(processor), make_inputs(other)
    assert_close(dict(other_inputs), dict(inputs))
    del inputs["labels"]
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert expected.shape == (2, inputs["input_ids"].shape[1] + 4)
        assert_close(reloaded.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None), expected)
        assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def _train(model: LlavaForConditionalGeneration, inputs: dict, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@each_family(_TRAINING)
def test_projector_only_training(family):
    """The first stage of LLaVA: everything frozen but the projector."""
    model, processor = make_llava(family, family.llava_budgets[0])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = _train(model, make_inputs(processor))
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("multi_modal_projector" in name), name


@each_family(_TRAINING)
def test_full_training(family):
    """The second stage: the loss reaches the tower's first weights, also with gradient checkpointing."""
    model, processor = make_llava(family, family.llava_budgets[0])
    inputs = make_inputs(processor)
    model.train()(**inputs).loss.backward()
    tower = dict(model.model.vision_tower.get_input_embeddings().named_parameters())
    assert tower
    gradients = {name: parameter.grad.clone() for name, parameter in tower.items()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()(**inputs).loss.backward()
    assert_close({name: parameter.grad for name, parameter in tower.items()}, gradients)
    model.zero_grad()
    losses = _train(model, inputs)
    assert losses[-1] < 0.7 * losses[0]
