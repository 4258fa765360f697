"""Callbacks for `transformers.Trainer`; those of one family are in its folder, and registered with it."""

from collections.abc import Iterable

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.auto import family_of


def family_callbacks(model: nn.Module, present: Iterable[TrainerCallback] = ()) -> list[TrainerCallback]:
    """New callbacks of every family that a model or a part of it belongs to (an S2 holds a model of another family).

    Args:
        model (`nn.Module`): of any kind.
        present (iterable of `TrainerCallback`, *optional*): callbacks that are there already; no second one of a kind.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    types = {config.model_type for config in configs if isinstance(config, PreTrainedConfig)}
    kinds = {type(callback) for callback in present}
    callbacks = []
    for family in filter(None, map(family_of, sorted(types))):
        for callback in family.callbacks():
            if type(callback) not in kinds:
                kinds.add(type(callback))
                callbacks.append(callback)
    return callbacks


class DatasetEpochCallback(TrainerCallback):
    """Tells a data set the epoch, which accelerate leaves out with several processes and in a resumed epoch.

    Args:
        dataset: with `set_epoch`, such as `AugmentedImages`.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.dataset.set_epoch(int(state.epoch))


__all__ = ["DatasetEpochCallback", "family_callbacks"]
