"""An exponential moving average of the weights during training."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


class EMACallback(TrainerCallback):
    """Keeps `average = decay * average + (1 - decay) * weights` after each optimiser step, in float32.

    The average is saved in every checkpoint (`ema.safetensors`) and read back on resume.

    Args:
        decay: of the average, between 0 and 1.
    """

    file_name = "ema.safetensors"

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        last = get_last_checkpoint(args.output_dir) if state.global_step > 0 else None
        if last is not None:
            self.average = load_file(Path(last) / self.file_name)
        else:
            self.average = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        for name, weight in model.named_parameters():
            self.average[name] = self.average[name].to(weight.device)
            self.average[name].lerp_(weight.detach().float(), 1 - self.decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(self.average, folder / self.file_name)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Puts the average into the model, in place."""
        for name, weight in model.named_parameters():
            weight.copy_(self.average[name])


__all__ = ["EMACallback"]
