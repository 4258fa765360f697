"""A run that is killed at any moment goes on from its last whole checkpoint, and ends with the weights of an unbroken
run. `POLYSCALE_KILLS` says how often it is killed.
"""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyscale.training import train

from .kills import run_until, write_images


KILLS = int(os.environ.get("POLYSCALE_KILLS", "10"))


class Runs:
    """Starts runs in processes that have everything imported already."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        self.events = folder / "events"
        write_images(self.data)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["polyscale.training", "matplotlib.figure", "tests.training.kills"])

    def start(self, name: str, kill_at: int | None = None, resume: bool = False) -> int:
        """The exit code of a run; negative for a signal."""
        arguments = (kill_at, str(self.data), str(self.folder / name), resume, str(self.events))
        process = self.context.Process(target=run_until, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("kills"))
    assert runs.start("unbroken") == 0
    return runs


@pytest.mark.slow
def test_no_kill_costs_more_than_the_steps_since_the_last_checkpoint(runs):
    accesses = int(runs.events.read_text())
    assert accesses > 50
    expected = runs.weights("unbroken")
    kills, finished = 0, 0
    while kills < KILLS or finished == 0:
        name = f"run{finished}"
        work = runs.folder / f"{name}.training"
        # spread over the run by a step that has no factor in common with its length
        kill_at = 1 + (kills * 7919) % accesses if kills < KILLS else None
        if (runs.folder / name).exists() and not (work / "run.json").is_file():
            # killed after its end, when all but the lock of the work folder was removed
            assert not work.exists() or {path.name for path in work.iterdir()} <= {"lock"}
            with pytest.raises(ValueError, match="is finished"):
                train(runs.data, runs.folder / name, resume=True, verbose=False)
            assert all(torch.equal(weight, expected[key]) for key, weight in runs.weights(name).items())
            finished += 1
            continue
        code = runs.start(name, kill_at, resume=(work / "run.json").is_file())
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0
        for key, weight in runs.weights(name).items():
            assert torch.equal(weight, expected[key]), f"{name}: {key}"
        if work.exists():  # killed after its end, before the work folder was removed
            train(runs.data, runs.folder / name, resume=True, verbose=False)
        assert not work.exists()
        assert sorted(path.name for path in (runs.folder / name).iterdir()) == sorted(
            path.name for path in (runs.folder / "unbroken").iterdir()
        )
        finished += 1
