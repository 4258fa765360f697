"""The work folder of a run: its recipe, its lock, and which of its checkpoints are whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.types as pa_types
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from filelock import FileLock, SoftFileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..utils.identity import digest_of, file_digest, image_digest
from .recipe import TrainingRecipe


RUN_FILE = "run.json"
RECORD_FILE = "training.json"  # of a finished run, in its output
LOCK_FILE = "lock"
WHOLE_FILE = "whole.json"
_IMAGES_TO_READ = 1000  # of a split, to tell its images from others


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != WHOLE_FILE)


def mark_whole(folder: Path) -> None:
    """Writes down what a checkpoint consists of, as the last step of saving it."""
    files = {str(file.relative_to(folder)): [file.stat().st_size, file_digest(file)] for file in _files_of(folder)}
    write_json(folder / WHOLE_FILE, files)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if it is whole."""
    try:
        files = json.loads((folder / WHOLE_FILE).read_text())
        for name, (size, digest) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or file_digest(file) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError, TypeError):
        return "it was not written to its end"
    return None


def write_json(path: Path, content: object) -> None:
    """Writes JSON beside its place, then moves it there: a reader finds all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


class WholeCheckpointCallback(TrainerCallback):
    """Marks each checkpoint as whole once all processes have written their part of it. To be added last."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class RunFolder:
    """Where a run keeps what it needs to go on: `<output_dir>.training`, beside the output.

    Args:
        output_dir: where the trained model goes.

    Attributes:
        path: the work folder.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.output_dir = Path(os.path.abspath(Path(output_dir).expanduser()))
        self.path = self.output_dir.with_name(self.output_dir.name + ".training")
        self._lock = None
        self._is_new = False

    def open(self, resume: bool) -> None:
        """Takes the lock, for this process alone.

        Raises:
            ValueError: if another process has it, or there is nothing (or something) to go on with.
        """
        if resume and not self.has_run() and (self.output_dir / RECORD_FILE).is_file():
            raise ValueError(
                f"`output_dir` {self.output_dir} exists already: its run is finished, and `resume` has nothing to do."
            )
        if os.path.lexists(self.output_dir) and not (resume and self.has_run()):
            raise ValueError(f"`output_dir` {self.output_dir} exists already. Name another, or remove it first.")
        if resume and not self.has_run():
            raise ValueError(f"`resume`: there is no checkpoint in {self.path}. Start without `resume`.")
        self._is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise ValueError(f"`output_dir` {self.output_dir} cannot be made: {error.strerror or error}.") from error
        if not resume and self.has_run():
            self.release()
            raise ValueError(f"{self.path} holds an unfinished run. Resume it (`--resume`), or remove that folder.")
        if not resume and any(not path.name.startswith((LOCK_FILE, RUN_FILE)) for path in self.path.iterdir()):
            self.release()
            raise ValueError(f"{self.path} exists already and is no work folder of a run. Remove it first.")

    def _acquire(self) -> None:
        path = self.path / LOCK_FILE
        lock = FileLock(path, timeout=0)
        try:
            try:
                lock.acquire()
            except NotImplementedError:  # a file system without locks
                lock = SoftFileLock(path, timeout=0)
                lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another training works on {self.output_dir} (it holds {path}). Wait for it, or name another output."
            ) from None
        self._lock = lock

    def release(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None

    def has_run(self) -> bool:
        """Whether a run began here."""
        return (self.path / RUN_FILE).is_file()

    def record(self, **facts) -> None:
        """Keeps what a run is made of."""
        write_json(self.path / RUN_FILE, facts)

    def read(self) -> dict:
        """What `record` kept.

        Raises:
            ValueError: for a damaged file.
        """
        try:
            facts = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError(f"it holds a {type(facts).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.path / RUN_FILE} cannot be read ({error}): remove {self.path}.") from error
        return facts

    def expect_mended_images(self) -> None:
        """Forgets what was in the images, so that the run goes on when the damaged one is replaced."""
        facts = self.read()
        facts["data"].pop("contents", None)
        self.record(**facts)

    def discard(self) -> None:
        """Removes the folder; what tells that there is a run goes last, so that a killed removal can go on."""
        self.release()
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != RUN_FILE:
                entry.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def discard_if_new(self) -> None:
        """Removes the folder if this process made it and no training began in it."""
        if self._is_new and not self.has_run():
            self.discard()

    def steps(self) -> list[int]:
        """The steps of the checkpoints, whole or not."""
        return [_step_of(path) for path in sort_checkpoints(str(self.path))]

    def last_whole_step(self) -> int | None:
        """The step of the last whole checkpoint."""
        return next((step for step in reversed(self.steps()) if damage_of(self._checkpoint(step)) is None), None)

    def _checkpoint(self, step: int) -> Path:
        return self.path / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The last whole checkpoint, or `None`, and what is to be said of those after it, which are removed.

        They would else be kept by `Trainer` in place of whole ones.
        """
        said = []
        for step in reversed(self.steps()):
            damage = damage_of(self._checkpoint(step))
            if damage is None:
                return self._checkpoint(step), said
            said.append(f"The checkpoint of step {step} is skipped: {damage}.")
            shutil.rmtree(self._checkpoint(step), ignore_errors=True)
        return None, said


def _step_of(path: str) -> int:
    return int(Path(path).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def check_unchanged(recorded: dict, given: dict, ignored: Sequence[str] = ()) -> None:
    """Refuses choices that differ from those that a run was started with.

    Args:
        recorded: fields of the recipe that the run has.
        given: fields that are given on resume, as `TrainingRecipe.to_json` writes them.
        ignored: fields that may differ.

    Raises:
        ValueError: naming each difference.
    """
    changed = [name for name, value in given.items() if name not in ignored and recorded.get(name) != value]
    if changed:
        listing = "; ".join(f"`{name}` was {recorded.get(name)!r}, now {given[name]!r}" for name in changed)
        raise ValueError(
            f"`resume` goes on with the recipe that the run was started with, and cannot change it: {listing}. Leave "
            "these options out, or start a new run."
        )


def check_same_data(recorded: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuses data other than those that a run was started with.

    Args:
        recorded: what the run says of its data; runs of older versions say less.
        data: the same of what is there now.

    Raises:
        ValueError: naming what differs.
    """
    changed = [
        f"{name} were {recorded[name]}, now {data[name]}"
        for name in ("splits", "classes")
        if recorded[name] != data[name]
    ]
    if not changed and recorded.get("digest", data["digest"]) != data["digest"]:
        changed = ["its files, or their labels, are others"]
    if not changed and recorded.get("contents", data["contents"]) != data["contents"]:
        changed = ["its files have the same names, but other images in them"]
    if changed:
        raise ValueError(f"`dataset` is not what the run was started with: {'; '.join(changed)[:1000]}.")


def check_same_teacher(recorded: str | None, now: str | None) -> None:
    """Refuses a teacher with other weights than a run was started with.

    Args:
        recorded: `weights_digest` of the teacher; `None` for a run of an older version.
        now: the same of the one that was loaded; `None` without a teacher.

    Raises:
        ValueError: where they differ.
    """
    if recorded is not None and recorded != now:
        raise ValueError(
            "`resume`: the teacher has other weights than when the run was started, so that its checkpoint was "
            "replaced. Put the first one back, or start a new run."
        )


def contents_digest(splits: DatasetDict) -> str:
    """Tells images from others under the same names: by the size of each, and by what is in some of each split."""
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(digest_of(map(str, _sizes_of(split))).encode())
        stored = split.with_format(None)
        for row in np.unique(np.linspace(0, len(split) - 1, min(len(split), _IMAGES_TO_READ)).astype(int)):
            digest.update(image_digest(stored[int(row)]["image"]).encode())
    return digest.hexdigest()[:16]


def _sizes_of(split: Dataset) -> Iterator[int]:
    """Bytes of each image; none where they are arrays in a table, which are all alike."""
    images = split.data.column("image")
    if pa_types.is_struct(images.type):
        lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        for path, length in zip(pc.struct_field(images, "path").to_pylist(), lengths, strict=True):
            yield length if length is not None else os.path.getsize(path) if path and os.path.isfile(path) else -1


def data_digest(splits: DatasetDict, source: str | os.PathLike) -> str:
    """Tells a data set from another of as many images: by the names of its files below `source`, and its labels."""
    texts = []
    for name, split in splits.items():
        texts.append(name)
        images = split.data.column("image")
        if pa_types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path").to_pylist()
            are_files = pc.is_null(pc.struct_field(images, "bytes")).to_pylist()
            for path, is_file in zip(paths, are_files, strict=True):
                texts.append(os.path.relpath(os.path.abspath(path), source) if path and is_file else str(path))
        if "label" in split.column_names:
            texts += map(str, split.data.column("label").to_pylist())
    return digest_of(texts)


def recipe_of(recorded: dict) -> TrainingRecipe:
    """The completed recipe in what `RunFolder.record` kept."""
    return TrainingRecipe.from_json(recorded["recipe"])


__all__ = [
    "RunFolder",
    "WholeCheckpointCallback",
    "check_same_data",
    "check_same_teacher",
    "check_unchanged",
    "contents_digest",
    "data_digest",
    "damage_of",
    "mark_whole",
    "recipe_of",
    "write_json",
]
