"""Trains until it is killed, without warning, in the middle of its fifth step."""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from ..families import family_named
from ..training import make_trainer


class _Killer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _context = json.loads((_folder / "context.json").read_text())
    _trainer, _ = make_trainer(family_named(_context["family"]), _folder / "run", [_Killer()], **_context["arguments"])
    _trainer.train()
