"""Training on `transformers.Trainer`, of an image classifier of any family, by bootstrapping or by budget tuning: the
function behind `polyscale train`.
"""

import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..utils.identity import weights_digest
from ..utils.outputs import write_failure
from ..utils.validation import check_flag, check_path, shown
from ..utils.weight_files import is_finite
from .callbacks import DatasetEpochCallback
from .data import evaluation_split, load_image_dataset
from .ema import EMACallback
from .interruption import (
    Interruption,
    TrainingInterrupted,
    TrainingStopped,
    is_out_of_memory,
    is_unreadable_image,
    worker_failure,
)
from .outputs import draw_curve, versions, write_card, write_record
from .plans import Plan, make_plan, splits_for
from .recipe import TrainingRecipe, as_recorded, make_recipe
from .report import Reporter, default_result, result_line, summary_lines, time_of_step
from .resume import (
    RECORD_FILE,
    RunFolder,
    WholeCheckpointCallback,
    check_same_data,
    check_same_teacher,
    check_unchanged,
    contents_digest,
    data_digest,
)
from .schedule import schedule_notes, steps_of, training_arguments
from .trainer import BudgetTrainer
from .tuning_watch import TuningWatch


def train(
    dataset: str | os.PathLike,
    output_dir: str | os.PathLike,
    recipe: TrainingRecipe | Mapping[str, Any] | None = None,
    resume: bool = False,
    *,
    verbose: bool = True,
) -> dict:
    """Trains an image classifier, a SparseFormer by bootstrapping, or a model for smaller budgets, and writes it, with
    its image processor, a model card and the record of the run, to `output_dir`.

    Checkpoints go to `<output_dir>.training` beside it while the run lasts; `output_dir` appears when training is
    done, whole, and that folder goes. Runs unchanged under `accelerate launch`.

    Args:
        dataset (`str` or `os.PathLike`): see `load_image_dataset`; its `train` split is learned, `validation` or
            `test` is scored after each epoch. Where there is neither, a tenth of 50 or more images is kept back for
            that. With `recipe.bootstrap_from` or `recipe.tune_budgets` it needs no labels.
        output_dir (`str` or `os.PathLike`): must not exist.
        recipe (`TrainingRecipe` or `dict`, *optional*): the choices of the run. With `resume` it may be left out, or
            be a dict of some choices: they must be those that the run was started with.
        resume (`bool`, *optional*, defaults to `False`): go on with the run of the same `output_dir`, from its last
            whole checkpoint.
        verbose (`bool`, *optional*, defaults to `True`): print summary, progress and the results of each epoch.

    Returns:
        `dict`: "train_loss", "train_seconds", "budgets" (a list of the results at each budget), and for the model's
        default budget "eval_top1" and "eval_loss" (or what else is measured). With `recipe.tune_budgets` also
        "tuning": "loss_before" and "loss_after" on the same "images", the interval of the "loss_change", and whether
        they were "held_out".

    Raises:
        ValueError: if `output_dir` exists, the data or a checkpoint cannot be used, choices do not fit together, or
            there is nothing to resume.
        TrainingStopped: if the run cannot go on: no memory, no space, weights that diverge.
        TrainingInterrupted: a `KeyboardInterrupt`, on SIGINT or SIGTERM. Both messages say how to go on.
    """
    dataset = check_path("dataset", dataset)
    check_flag("resume", resume)
    check_flag("verbose", verbose)
    if not isinstance(recipe, TrainingRecipe | Mapping | None):
        raise ValueError(f"`recipe` must be a TrainingRecipe or a dict of its fields, got {shown(recipe)}.")
    run = RunFolder(check_path("output_dir", output_dir))
    check_outside(dataset, run.output_dir)
    again = f"polyscale train {shlex.quote(str(dataset))} {shlex.quote(str(output_dir))} --resume"
    # initialises torch's processes before anything asks which one this is
    state = PartialState() if torch.accelerator.is_available() else PartialState(cpu=True)
    with Interruption() as interruption, _without_bars():
        _on_main_process(state, lambda: run.open(resume))
        try:
            return _run(dataset, run, recipe, resume, interruption, Console() if verbose else None, state)
        except (KeyboardInterrupt, Exception) as error:
            raise _explained(error, run, again) from error
        finally:
            if state.is_main_process:
                run.discard_if_new()
            run.release()


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar for each file that it reads or writes, in the middle of ours."""
    was_active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            logging.enable_progress_bar()


def check_outside(dataset: str | os.PathLike, output_dir: Path) -> None:
    """Refuses an output inside the data: it would be taken for images of the next run, and the other way round."""
    source = Path(dataset).expanduser()
    if source.is_dir():
        source = source.resolve()
        output = output_dir.resolve()
        if source == output or source in output.parents:
            raise ValueError(f"`output_dir` {output_dir} lies inside the data {dataset}: name a place outside of it.")


def _on_main_process(state: PartialState, action: Callable[[], Any]) -> Any:
    """What `action` gives on the main process, on all of them; its `ValueError`s too."""
    outcome: list = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _explained(error: BaseException, run: RunFolder, again: str) -> BaseException:
    """The error that the caller sees: with the way to go on, where there is one."""
    if not run.has_run():
        if isinstance(error, TrainingInterrupted):
            return TrainingInterrupted("Interrupted before training began: start it again.", error.exit_code)
        if reason := write_failure(error, run.path):
            return TrainingStopped(f"Nothing can be written to {run.path}: {reason}.")
        if is_out_of_memory(error):
            return TrainingStopped("There is not enough memory for a step: take a smaller `batch_size` or model.")
        return error
    step = run.last_whole_step()
    done = "There is no whole checkpoint yet: the run starts anew." if step is None else f"Step {step} is saved."
    if isinstance(error, KeyboardInterrupt):
        code = getattr(error, "exit_code", 130)
        return TrainingInterrupted(f"Interrupted. {done} Go on with: {again}", code)
    if reason := write_failure(error, run.path):
        return TrainingStopped(f"Nothing can be written to {run.path}: {reason}. {done} Then go on with: {again}")
    if is_out_of_memory(error):
        return TrainingStopped(
            "There is not enough memory for a step: start again with a smaller `batch_size` and as many more "
            f"`gradient_accumulation_steps`, after removing {run.path}."
        )
    if is_unreadable_image(error):
        run.expect_mended_images()
    if reason := worker_failure(error) or (is_unreadable_image(error) and str(error)):
        return TrainingStopped(f"Images cannot be read: {reason.rstrip('.')}. {done} Mend it, then: {again}")
    return error


@dataclass
class _Start:
    """What a run begins with, or goes on from."""

    recipe: TrainingRecipe
    recorded: dict | None
    checkpoint: Path | None
    notes: list[str]


def _start(run: RunFolder, given: TrainingRecipe | Mapping | None, resume: bool, state: PartialState) -> _Start:
    if not resume:
        if not isinstance(given, TrainingRecipe):
            given = make_recipe(**(given or {}))
        return _Start(given, None, None, [])
    recorded = run.read()
    lacking = [name for name in ("id", "given", "recipe", "data") if name not in recorded]
    if lacking:
        raise ValueError(f"What {run.path} says of its run lacks {lacking[0]!r}: remove that folder.")
    recipe = TrainingRecipe.from_json(recorded["given"])
    if given is not None:
        fields = given.to_json() if isinstance(given, TrainingRecipe) else as_recorded(given, recipe)
        check_unchanged(recorded["given"], fields)
    checkpoint, notes = _on_main_process(state, run.whole_checkpoint)
    notes.append(
        f"Resuming from {checkpoint.name}." if checkpoint else "There is no whole checkpoint: the run starts anew."
    )
    return _Start(recipe, recorded, checkpoint, notes)


def _run(
    dataset: str | os.PathLike,
    run: RunFolder,
    given: TrainingRecipe | Mapping | None,
    resume: bool,
    interruption: Interruption,
    console: Console | None,
    state: PartialState,
) -> dict:
    if resume and run.output_dir.exists():
        return _finished(run)
    start = _start(run, given, resume, state)
    loaded = load_image_dataset(dataset, labelled=start.recipe.needs_labels)
    splits, notes = splits_for(loaded, start.recipe)
    data = {
        "source": str(dataset),
        "digest": data_digest(loaded, os.path.abspath(dataset)),
        "contents": contents_digest(loaded),
        "splits": {name: len(split) for name, split in splits.items()},
        "classes": splits["train"].features["label"].names if start.recipe.needs_labels else [],
        "evaluated": evaluation_split(splits),
    }
    if start.recorded is not None:
        check_same_data(start.recorded["data"], data)
    set_seed(start.recipe.seed)
    plan = make_plan(start.recipe, splits, lambda recipe: training_arguments(recipe, run.path, splits))
    trainer, recipe = plan.trainer, plan.recipe
    teacher = getattr(trainer, "teacher", None)
    teacher = None if teacher is None else weights_digest(teacher)
    if start.recorded is not None:
        check_same_teacher(start.recorded.get("teacher"), teacher)
    notes = [*start.notes, *notes, *plan.notes]
    num_steps = steps_of(recipe, len(trainer.train_dataset), trainer.args.world_size)
    notes += schedule_notes(recipe, trainer.args, num_steps)
    ema = EMACallback(recipe.ema_decay, start.checkpoint) if recipe.ema_decay is not None else None
    averaged = (lambda: ema.average.module) if ema else None
    reporter = Reporter(trainer, console, averaged)
    watch = TuningWatch(trainer, reporter, averaged) if recipe.tune_budgets is not None else None
    epochs = DatasetEpochCallback(trainer.train_dataset)
    callbacks = (epochs, ema, reporter, watch, WholeCheckpointCallback(), interruption)
    trainer.remove_callback(PrinterCallback)
    for callback in filter(None, callbacks):
        trainer.add_callback(callback)
    seconds_per_step = time_of_step(trainer, recipe.image_size, recipe.num_channels, len(data["classes"]))
    for line in summary_lines(trainer, recipe.image_size, _data_rows(data), num_steps, seconds_per_step, notes):
        reporter.say(line)

    recorded = start.recorded or {
        "id": uuid.uuid4().hex,
        "given": start.recipe.to_json(),
        "recipe": recipe.to_json(),
        "data": data,
        "teacher": teacher,
        "command": shlex.join(["polyscale", *sys.argv[1:]]) if "polyscale" in sys.argv[0] else shlex.join(sys.argv),
        "versions": versions(),
        "seconds": 0.0,
    }
    if start.recorded is None:
        _on_main_process(state, lambda: run.record(**recorded))
    began = time.perf_counter()
    metrics: dict[str, Any] = {}
    try:
        if recipe.epochs > 0:
            output = trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
            metrics["train_loss"] = output.training_loss
            if ema:
                ema.copy_to(trainer.accelerator.unwrap_model(trainer.model))
    finally:
        reporter.close()
    metrics["train_seconds"] = time.perf_counter() - began
    check_finite(trainer.accelerator.unwrap_model(trainer.model))
    if watch:
        metrics["tuning"] = watch.verdict(trainer.accelerator.unwrap_model(trainer.model))
    results = reporter.results(trainer.state)
    metrics["budgets"] = results
    if results:
        chosen = default_result(results, trainer.model.config, recipe.image_size)
        metrics |= {f"eval_{name}": chosen[name] for name in trainer.metrics}
    facts = {
        **recorded,
        "name": run.output_dir.name,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "image_size": list(recipe.image_size),
        "device": str(trainer.args.device),
        "precision": "bfloat16 autocast" if recipe.bf16 else "float32",
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch or 0.0,
        "seconds": metrics["train_seconds"],
        "budget_argument": trainer.budget_argument,
        "cheapest_call": trainer.call_of(trainer.budgets()[0]) if results else {},
        "results": results,
        "metrics": metrics,
        "history": trainer.state.log_history,
    }
    publish(plan, plan.processor, run, facts)
    if results:
        reporter.say(result_line(results, trainer.budget_argument))
    return metrics


def _finished(run: RunFolder) -> dict:
    """The metrics of a run that ended after its result was in place; only its work folder was left."""
    record = run.output_dir / RECORD_FILE
    facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if facts.get("id") != run.read()["id"]:
        raise ValueError(f"`output_dir` {run.output_dir} exists already. Name another, or remove it first.")
    run.discard()
    return facts["metrics"]


def _data_rows(data: Mapping[str, Any]) -> dict[str, str]:
    rows = {"data": ", ".join(f"{split}: {count:,} images" for split, count in data["splits"].items())}
    if data["classes"]:
        shown = ", ".join(data["classes"][:10])
        rows["classes"] = f"{len(data['classes'])} ({shown}{', ...' if len(data['classes']) > 10 else ''})"
    rows["evaluated"] = f"on {data['evaluated']}" if data["evaluated"] else "on nothing: there is no such split"
    return rows


def check_finite(model: nn.Module) -> None:
    """Refuses weights that are not numbers.

    Raises:
        TrainingStopped: naming a tensor.
    """
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise TrainingStopped(f"The weights diverged: {name} holds NaN or infinity. Lower the `learning_rate`.")


def store_weights_as(folder: str | Path, dtype: str) -> None:
    """Casts the weights of a checkpoint's `model.safetensors`; what it loads as, which the config says, stays. A
    tensor with values beyond the dtype's range stays as it is too.

    Args:
        folder: a checkpoint with one weights file.
        dtype: "float16" or "bfloat16".
    """
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        stored = weight.to(getattr(torch, dtype))
        if weight.is_floating_point() and is_finite(stored):
            weights[name] = stored
    save_file(weights, path, metadata={"format": "pt"})


def publish(plan: Plan, processor: BaseImageProcessor, run: RunFolder, facts: dict[str, Any]) -> None:
    """Writes the model and what belongs to it beside the checkpoints, then moves the folder to its place."""
    trainer: BudgetTrainer = plan.trainer
    final = run.path / "final"
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(str(final))
    state.wait_for_everyone()
    if state.is_main_process:
        processor.save_pretrained(final)
        if plan.recipe.save_dtype is not None:
            store_weights_as(final, plan.recipe.save_dtype)
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to a reader
        config = trainer.model.config
        facts["has_curve"] = draw_curve(final / "curve.png", facts["history"], facts["budget_argument"])
        write_record(final / RECORD_FILE, facts)
        write_card(final / "README.md", facts, config, plan.is_classifier)
        for file in final.iterdir():  # safetensors makes files that nobody else can read
            file.chmod((final / "config.json").stat().st_mode)
        os.replace(final, run.output_dir)
        run.discard()
    state.wait_for_everyone()


__all__ = ["store_weights_as", "train"]
