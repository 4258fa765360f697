"""What a person sees of a run while it lasts: the summary before it, progress, a line after each epoch."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers.token_budget import format_budget
from .interruption import TrainingStopped
from .trainer import BudgetTrainer, generators_kept, num_tokens_at


_MEASURED_IMAGES = 8  # of the batch that a step is timed with


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def describe_budget(argument: str | None, result: Mapping[str, Any]) -> str:
    """A budget and its tokens: "patch_size 8 (16 tokens)"."""
    tokens, budget = result.get("tokens"), format_budget(result.get("budget"))
    if argument is None and tokens is None:
        return "not adjustable"
    cost = "tokens vary" if tokens is None else f"{tokens} tokens"
    return f"{argument} {budget} ({cost})" if argument and budget else cost


def result_line(results: Sequence[Mapping[str, Any]], argument: str | None) -> str:
    """The main metric at each budget, a value of `argument`, in one line."""
    entries = []
    for result in results:
        name = next(name for name in ("top1", "agreement", "cosine", "loss") if name in result)
        value = f"{100 * result[name]:.1f} %" if name in ("top1", "agreement") else f"{result[name]:.4f}"
        budget = format_budget(result["budget"])
        tokens = "" if result["tokens"] is None else f"{result['tokens']} tokens"
        where = f"{budget} ({tokens})" if budget and tokens else budget or tokens
        entries.append(f"{where} {value}".strip())
    labels = {"top1": "top-1", "agreement": "agreement with the full budget", "cosine": "cosine to the full budget"}
    label = labels.get(name, name)
    by = f" by {argument}" if argument and len(results) > 1 else ""
    return f"{label}{by}: " + ", ".join(entries)


def time_of_step(trainer: Trainer, image_size: tuple[int, int], num_channels: int, num_labels: int) -> float:
    """About how many seconds an optimiser step takes: forward and backward of some images, scaled to the batch.

    The model and the generators are afterwards as they were.
    """
    model, args = trainer.model, trainer.args
    count = min(_MEASURED_IMAGES, args.per_device_train_batch_size)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    with generators_kept(args.device):
        inputs = {"pixel_values": torch.zeros(count, num_channels, *image_size, device=args.device)}
        inputs["labels"] = torch.arange(count, device=args.device) % max(num_labels, 1)
        model.train()
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            if args.device.type != "cpu":
                torch.accelerator.synchronize(args.device)
            seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return min(seconds) * args.per_device_train_batch_size / count * args.gradient_accumulation_steps


def summary_lines(
    trainer: BudgetTrainer,
    image_size: tuple[int, int],
    facts: Mapping[str, str],
    num_steps: int,
    seconds_per_step: float,
    notes: Sequence[str],
) -> list[str]:
    """The summary before a run: what is trained, on what, for how long."""
    model, args = trainer.model, trainer.args
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    budgets = [
        describe_budget(trainer.budget_argument, {"budget": budget, "tokens": trainer.tokens_of(image_size, budget)})
        for budget in trainer.budgets()
    ]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = {
        "family": f"{config.model_type}, {total:,} parameters{frozen}",
        "image": f"{image_size[0]} x {image_size[1]} pixels, channels: {config.num_channels}",
        "budgets": ", ".join(budgets),
        **facts,
        "device": f"{args.device}, {args.world_size} process{'es' if args.world_size > 1 else ''}",
        "batch": f"{batch} images per step",
        "steps": f"{num_steps} (epochs: {math.ceil(args.num_train_epochs)}), a step takes about "
        f"{duration(seconds_per_step)}, all of them {duration(num_steps * seconds_per_step)}",
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()] + [f"Note: {note}" for note in notes]


class Reporter(TrainerCallback):
    """Progress with loss and time left, and after each epoch the accuracy at each budget.

    A terminal gets a bar, a file a line for each log. The results of each epoch are kept in `state.log_history`, and
    with it in checkpoints.

    Args:
        trainer: whose `evaluate_budgets` is called.
        console: where to print; None for nowhere.
        averaged: gives the model to evaluate, where that is not the one that is trained.
    """

    def __init__(self, trainer: BudgetTrainer, console: Console | None, averaged: Callable[[], nn.Module] | None):
        self.trainer = trainer
        self.console = console
        self.averaged = averaged
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self.console is not None and self.trainer.is_world_process_zero():
            with suppress(SystemExit):  # rich would end a program whose output nobody reads on: a training goes on
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        if self.console is not None and self.console.is_terminal and self.trainer.is_world_process_zero():
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        rate = (time.perf_counter() - self._started) / max(done, 1)
        return duration(rate * (state.max_steps - state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"The loss is {loss} at step {state.global_step}: the weights diverge. Start again with a lower "
                "`learning_rate`, a longer `warmup` or without `bf16`."
            )
        text = f"loss {loss:.4f}, {self._left(state)} left"
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        else:
            self.say(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        is_whole = abs(state.epoch - round(state.epoch)) < 1e-6
        if is_whole or state.global_step >= state.max_steps:
            results = self.results(state)
            if results:
                epochs = math.ceil(args.num_train_epochs)
                self.say(
                    f"epoch {round(state.epoch, 2):g}/{epochs}  {result_line(results, self.trainer.budget_argument)}"
                )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def results(self, state: TrainerState) -> list[dict]:
        """The scores at each budget now; measured once per step, empty without evaluation images."""
        if self.trainer.eval_dataset is None:
            return []
        last = next((entry for entry in reversed(state.log_history) if "budgets" in entry), None)
        if last is None or last["step"] != state.global_step:
            model = self.averaged() if self.averaged is not None else None
            last = {
                "step": state.global_step,
                "epoch": state.epoch,
                "budgets": self.trainer.evaluate_budgets(model=model),
            }
            state.log_history.append(last)
        return last["budgets"]


def default_result(results: Sequence[Mapping[str, Any]], config: Any, image_size: tuple[int, int]) -> Mapping:
    """Of the results at several budgets, the one at the model's default budget."""
    tokens = num_tokens_at(config, image_size, None)
    return next((result for result in results if result["tokens"] == tokens), results[0])


def forward_arguments(call: Mapping[str, Any]) -> str:
    """How a call names a budget: ", patch_size=8"."""
    return "".join(f", {name}={value!r}" for name, value in call.items())


__all__ = [
    "Reporter",
    "default_result",
    "describe_budget",
    "duration",
    "forward_arguments",
    "result_line",
    "summary_lines",
    "time_of_step",
]
