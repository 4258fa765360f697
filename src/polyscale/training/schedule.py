"""How many steps a run has, and the arguments of `Trainer` that follow from it."""

import math
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import DatasetDict
from transformers import TrainingArguments

from .recipe import TrainingRecipe


def steps_of(recipe: TrainingRecipe, num_images: int, num_processes: int) -> int:
    """Optimiser steps of a run."""
    batches = math.ceil(math.ceil(num_images / recipe.batch_size) / num_processes)
    return math.ceil(recipe.epochs * max(math.ceil(batches / recipe.gradient_accumulation_steps), 1))


def warmup_steps(recipe: TrainingRecipe, num_steps: int) -> int:
    """Steps in which the learning rate rises: none in runs so short that the first step, at rate 0, would matter, and
    a tenth where the warm-up asked for is longer than the run.
    """
    asked = math.ceil(num_steps * recipe.warmup) if recipe.warmup < 1 else round(recipe.warmup)
    if recipe.warmup >= 1 and asked >= num_steps:
        asked = num_steps // 10
    return asked if asked > 1 else 0


def schedule_notes(recipe: TrainingRecipe, args: TrainingArguments, num_steps: int) -> list[str]:
    """What is to be said of choices that do not fit the length of the run."""
    notes = []
    if recipe.warmup >= 1 and recipe.warmup >= num_steps > 0:
        notes.append(
            f"The warm-up of {recipe.warmup:g} steps is longer than the run of {num_steps}: it is shortened to "
            f"{int(args.warmup_steps)}."
        )
    if recipe.ema_decay is not None and recipe.ema_decay**num_steps > 0.1:
        share = 100 * recipe.ema_decay**num_steps
        notes.append(
            f"The average with a decay of {recipe.ema_decay} still holds {share:.0f} % of the first weights after "
            f"{num_steps} steps: take a smaller decay."
        )
    return notes


def training_arguments(recipe: TrainingRecipe, work_dir: Path, splits: DatasetDict) -> TrainingArguments:
    """Of `Trainer`, for a completed recipe."""
    num_steps = steps_of(recipe, len(splits["train"]), PartialState().num_processes)
    return TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps(recipe, num_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        activation_checkpointing=recipe.gradient_checkpointing,
        dataloader_num_workers=recipe.num_workers,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="no",
        save_strategy="epoch" if recipe.save_steps is None else "steps",
        save_steps=recipe.save_steps or 500,
        save_total_limit=2,
        logging_steps=min(max(num_steps // 20, 1), 50),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
    )


__all__ = ["schedule_notes", "steps_of", "training_arguments", "warmup_steps"]
