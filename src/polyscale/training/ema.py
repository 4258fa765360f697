"""An exponential moving average of the weights during training."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class EMACallback(TrainerCallback):
    """Keeps `average = decay * average + (1 - decay) * weights` after each optimiser step; buffers are the model's.

    The average is saved in every checkpoint (`ema.safetensors`) and read back from the one that is resumed from.

    Args:
        decay: of the average, between 0 and 1.
        checkpoint: the folder that the run goes on from; `None` for a new run.
    """

    file_name = "ema.safetensors"

    def __init__(self, decay: float, checkpoint: str | Path | None = None):
        self.decay = decay
        self.checkpoint = checkpoint
        self.average: AveragedModel | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.average.n_averaged.fill_(1)  # the copy counts as the first weights, which the next ones are averaged with
        if self.checkpoint is not None:
            self.average.module.load_state_dict(load_file(Path(self.checkpoint) / self.file_name))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self.average.update_parameters(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            weights = {name: weight.clone() for name, weight in self.average.module.state_dict().items()}
            save_file(weights, folder / self.file_name)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Puts the average into the model, in place."""
        model.load_state_dict(self.average.module.state_dict())


__all__ = ["EMACallback"]
