"""Whether budget tuning helps: the loss of the tuned weights beside that of the weights they started from, on the same
images.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .report import Reporter
from .tuning import BudgetTuningTrainer


logger = logging.get_logger(__name__)
_PARTS = 4  # of a run; the loss is measured after each
_ROUNDING = 1e-3  # share of the loss by which that of the same weights may differ


class TuningWatch(TrainerCallback):
    """Measures the loss after each quarter of the steps and at the end, and says when it is above that of the start.

    Args:
        trainer: of the run.
        reporter: says it; where it has no console, a warning of the log does.
        averaged: gives the model to measure, where that is not the one that is trained.
    """

    def __init__(
        self, trainer: BudgetTuningTrainer, reporter: Reporter, averaged: Callable[[], nn.Module] | None = None
    ):
        self.trainer = trainer
        self.reporter = reporter
        self.averaged = averaged

    @cached_property
    def _before(self) -> torch.Tensor:
        """The losses of the weights that the run started from, which the teacher keeps."""
        return self.trainer.kept_losses(self.trainer.teacher)

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """ "loss_before" tuning and "loss_after", that of `model`; "loss_change", the 95 % interval of the difference,
        paired by image; the number of "images", and whether they are "held_out" or trained on.
        """
        after = self.trainer.kept_losses(model)
        change = after - self._before
        margin = 1.96 * change.std().item() / len(change) ** 0.5 if len(change) > 1 else 0.0
        return {
            "loss_before": self._before.mean().item(),
            "loss_after": after.mean().item(),
            "loss_change": [change.mean().item() - margin, change.mean().item() + margin],
            "images": len(change),
            "held_out": self.trainer.eval_dataset is not None,
        }

    def verdict(self, model: nn.Module) -> dict[str, Any]:
        """What `compare` gives for the weights that are to be written; a warning where they are worse."""
        return self._told(
            model, "", "The tuned weights are worse than those that they were made from: keep those, and tune again"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step in {round(state.max_steps * part / _PARTS) for part in range(1, _PARTS)}:
            model = self.averaged() if self.averaged is not None else self.trainer.model
            self._told(
                self.trainer.accelerator.unwrap_model(model),
                f"step {state.global_step}/{state.max_steps}  ",
                "So far the weights are worse than those that they were made from: if they stay so, tune again",
            )

    def _told(self, model: nn.Module, where: str, worse: str) -> dict[str, Any]:
        """What `compare` gives, said; where the weights are worse, with that and a lower learning rate."""
        compared = self.compare(model)
        text = f"{where}{comparison_text(compared)}"
        if not is_worse(compared):
            self.reporter.say(text)
            return compared
        rate = f"{self.trainer.args.learning_rate / 10:.1g}"
        text = f"{text}. {worse} with a lower `learning_rate` (`--learning-rate`), such as {rate}."
        if self.reporter.console is not None:
            self.reporter.say(f"Warning: {text}")
        elif self.trainer.is_world_process_zero():
            logger.warning(text)
        return compared


def is_worse(compared: Mapping[str, Any]) -> bool:
    """Whether the loss has risen for certain and by more than rounding, or is no number."""
    return not compared["loss_change"][0] <= compared["loss_before"] * _ROUNDING + 1e-6


def comparison_text(compared: Mapping[str, Any]) -> str:
    """ "loss on 32 held-out images, against the full budget: 0.02 before tuning, 0.018 after (-0.003 to -0.001)"."""
    images = f"{compared['images']} {'held-out' if compared['held_out'] else 'training'} images"
    low, high = compared["loss_change"]
    values = f"{compared['loss_before']:.3g} before tuning, {compared['loss_after']:.3g} after"
    unsure = ", which may be chance" if low <= 0 <= high else ""
    return f"loss on {images}, against the full budget: {values} ({low:+.2g} to {high:+.2g}{unsure})"


__all__ = ["TuningWatch", "comparison_text", "is_worse"]
