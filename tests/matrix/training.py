"""One small training run, the same in this process and in every worker: crops of photographs, told apart."""

from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from .families import Family
from .pictures import CropDataset


class TokenCounter:
    """Keeps how many tokens the first layer of a model worked on in each training forward."""

    def __init__(self, model: nn.Module):
        self.counts: list[int] = []
        first = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        first.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            self.counts.append(args[0].shape[1])


def make_trainer(
    family: Family, folder: Path, callbacks: list[TrainerCallback] | None = None, **arguments
) -> tuple[Trainer, TokenCounter]:
    """A Trainer on a CPU in one thread; the same weights, data and draws whenever the arguments are the same."""
    torch.set_num_threads(1)
    model = family.make_model(**family.training_overrides)
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=CropDataset(family.input_shape),
        callbacks=[*family.make_callbacks(), *(callbacks or [])],
    )
    return trainer, TokenCounter(model)


__all__ = ["TokenCounter", "make_trainer"]
