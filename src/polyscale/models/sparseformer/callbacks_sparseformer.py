"""Trainer callback of SparseFormer."""

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .modeling_sparseformer import SparseFormerModel


class LossScaleCallback(TrainerCallback):
    """Hands the factor of a `GradScaler` to SparseFormers that clamp the gradient of their sampling points.

    The scaler is that of the trainer's optimizer, as accelerate wraps it; without one the factor is 1.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs,
    ) -> None:
        clamping = [
            module
            for module in model.modules()
            if isinstance(module, SparseFormerModel) and module.loss_scale is not None
        ]
        if not clamping:  # reading the factor waits for the device
            return
        scaler = getattr(optimizer, "scaler", None)
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        for module in clamping:
            module.set_loss_scale(loss_scale)


__all__ = ["LossScaleCallback"]
