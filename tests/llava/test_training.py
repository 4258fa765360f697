"""LLaVA's recipe with S2 on a tiny model, by transformers' Trainer: the projector first, then all of it or LoRA.

This is the example that the README refers to; the same lines train a real model.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from polyscale.llava import ResumableCheckpoints, swap_vision_tower

from .llava_tiny import make_llava, make_photographs, make_tower, swapped


QUESTION, ANSWERS = "USER: <image> what is this ? ASSISTANT:", ("the cat </s>", "a dog </s>")


class Conversations(Dataset):
    """Two images with a question and an answer each; the loss counts the answer only."""

    def __init__(self, processor):
        self.processor = processor

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        image, answer = make_photographs()[index % 2], ANSWERS[index % 2]
        inputs = self.processor(images=image, text=f"{QUESTION} {answer}", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -len(answer.split())] = -100
        return {**{name: value[0] for name, value in inputs.items()}, "labels": labels[0]}


def train(model, processor, folder, learning_rate: float, steps: int) -> list[float]:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Conversations(processor))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model, before: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model whose weights changed."""
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    return {
        next(part for part in ("multi_modal_projector", "vision_tower", "language_model", "lm_head") if part in name)
        for name in changed
    }


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_projector_first_then_everything(tmp_path):
    model, processor = make_llava()
    processor = swap_vision_tower(model, make_tower("s2", model), processor)

    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = snapshot(model)
    first = train(model, processor, tmp_path, learning_rate=1e-2, steps=6)
    assert trained(model, before) == {"multi_modal_projector"}
    other_scale = model.model.multi_modal_projector.linear_1.weight[:, 16:]
    assert other_scale.abs().max() > 0  # the second scale's weights, zero after the swap, are learned

    model.requires_grad_(True)
    before = snapshot(model)
    second = train(model, processor, tmp_path, learning_rate=5e-3, steps=20)
    assert trained(model, before) == {"multi_modal_projector", "vision_tower", "language_model", "lm_head"}
    assert second[-1] < 0.7 * first[0]

    model.save_pretrained(tmp_path / "model")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    inputs = processor(images=make_photographs()[0], text=QUESTION, return_tensors="pt")
    torch.testing.assert_close(reloaded(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_lora_on_the_language_model(tmp_path):
    model, processor = make_llava()
    processor = swap_vision_tower(model, make_tower("s2", model), processor)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(model, lora)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = train(model, processor, tmp_path, learning_rate=1e-2, steps=10)
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")


def test_a_resumed_training_has_all_weights(tmp_path):
    model, processor = swapped("flexivit")
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=1
    )
    arguments.remove_unused_columns = False
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Conversations(processor), callbacks=[ResumableCheckpoints()]
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert not any(model.load_state_dict(saved, strict=False))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-1")
    torch.testing.assert_close(dict(reloaded.state_dict()), dict(model.state_dict()))
