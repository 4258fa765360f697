"""Trainer callback of SparseFormer."""

from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .modeling_sparseformer import SparseFormerPreTrainedModel


class LossScaleCallback(TrainerCallback):
    """Hands the factor of a `GradScaler` to SparseFormers that clamp the gradient of their sampling points.

    Args:
        accelerator: the trainer's (`trainer.accelerator`).
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        scaler = self.accelerator.scaler
        for module in model.modules():
            if isinstance(module, SparseFormerPreTrainedModel):
                module.set_loss_scale(1.0 if scaler is None else scaler.get_scale())


__all__ = ["LossScaleCallback"]
