"""Callbacks for `transformers.Trainer`; those of one family are in its folder."""

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.flexivit.callbacks_flexivit import PatchSizeCallback
from ..models.sparseformer.callbacks_sparseformer import LossScaleCallback


class DatasetEpochCallback(TrainerCallback):
    """Tells a data set the epoch, which accelerate leaves out with several processes and in a resumed epoch.

    Args:
        dataset: with `set_epoch`, such as `AugmentedImages`.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.dataset.set_epoch(int(state.epoch))


__all__ = ["DatasetEpochCallback", "LossScaleCallback", "PatchSizeCallback"]
