"""Runs that end early: on a signal, or because nothing more can be written. Each says how to go on."""

import signal
import threading
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..utils.images import UnreadableImageError


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the run; the message says how to go on.

    Attributes:
        exit_code: what a command ends with, 128 and the signal.
    """

    def __init__(self, message: str = "", exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


class TrainingStopped(RuntimeError):
    """The run cannot go on as it is; the message says why, and how to go on.

    Attributes:
        exit_code: what a command ends with.
    """

    exit_code = 2


class Interruption(TrainerCallback):
    """Ends a run on SIGINT or SIGTERM: after the step it is in, with a checkpoint of it; a second signal ends it at
    once. To be added after the callback that marks checkpoints as whole.

    Before training, and with several processes (which would wait for each other), the first signal ends it at once.
    """

    def __init__(self):
        self.is_patient = False
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_patient or self.received is not None:
            raise TrainingInterrupted(exit_code=128 + number)
        self.received = number

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.is_patient = args.world_size == 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.received is not None:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.received is not None and state.global_step < state.max_steps:
            raise TrainingInterrupted(exit_code=128 + self.received)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.is_patient = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory for a batch."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def is_unreadable_image(error: BaseException) -> bool:
    """Whether an error, perhaps of a process that reads images, says that one of them is damaged."""
    return isinstance(error, UnreadableImageError) or (
        worker_failure(error) is not None and UnreadableImageError.__name__ in str(error)
    )


def worker_failure(error: BaseException) -> str | None:
    """The one line of what a process that reads images failed with; `None` for any other error."""
    text = str(error).strip()
    if "DataLoader worker" not in text:
        return None
    if "exited unexpectedly" in text or "is killed by signal" in text:
        return "a process that reads images died, perhaps for lack of memory: try fewer with `num_workers`"
    return text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]


__all__ = [
    "Interruption",
    "TrainingInterrupted",
    "TrainingStopped",
    "is_out_of_memory",
    "is_unreadable_image",
    "worker_failure",
]
