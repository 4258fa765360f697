"""Trains until it is killed, without warning, in the middle of its fifth step."""

import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..families import family_named
from ..training import make_trainer


class _Killer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(family: str, folder: Path, arguments: dict[str, Any]) -> None:
    trainer, _ = make_trainer(family_named(family), folder, [_Killer()], **arguments)
    trainer.train()


__all__ = ["train_until_killed"]
