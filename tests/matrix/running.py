"""Runs the modules in `workers/` in processes of their own, and reads back what they found.

One process answers many questions about all families, because importing torch and transformers costs more than most
answers. A worker has functions `check_<name>(context)`; each runs for each family, and what it raises is kept for the
test of that name.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


_ROOT = Path(__file__).parents[__package__.count(".") + 1]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a worker: this package is importable, nothing is downloaded, one thread a process."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **variables}


def run_forked(function: Callable[..., None], *arguments) -> int:
    """Runs a function in a process of its own that has the imports behind it; its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["polyscale.training", "transformers.trainer", function.__module__])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


class Report:
    """The answers of a worker: (family, check) -> what it raised, empty when it passed."""

    def __init__(self, answers: dict[str, str], output: str):
        self.answers = answers
        self.output = output

    def require(self, family: str, check: str) -> None:
        """Raises AssertionError if the check did not run, or failed."""
        key = f"{family}-{check}"
        if key not in self.answers:
            raise AssertionError(f"the worker never came to {key!r}; its output was:\n{self.output[-6000:]}")
        if self.answers[key]:
            raise AssertionError(self.answers[key])


def ask_worker(
    name: str,
    folder: Path,
    facts: dict[str, dict[str, Any]],
    launcher: Sequence[str] = (),
    timeout: int = 900,
    **variables: str,
) -> Report:
    """Runs `workers/<name>.py` to its end; of several processes the first that failed a check answers for it.

    `facts` are those of each family, for `answer_checks`; `folder` takes them and what the worker writes.
    """
    (folder / "context.json").write_text(json.dumps(facts))
    command = [sys.executable, *launcher, "-m", f"{__package__}.workers.{name}", str(folder)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(**variables), cwd=folder
    )
    answers: dict[str, str] = {}
    for path in sorted(folder.glob("answers-*.json")):
        for check, raised in json.loads(path.read_text()).items():
            answers[check] = answers.get(check) or raised
    return Report(answers, result.stdout + result.stderr)


def answer_checks(checks: dict[str, Any], folder: Path, make_context: Callable[[str, Path, dict], Any]) -> None:
    """Called by a worker: runs its `check_*` functions in order for each family and writes the answers after each.

    `make_context(family, folder of that family, facts)` is what the checks are given; the facts come from the test.
    """
    path = folder / f"answers-{os.environ.get('RANK', '0')}.json"
    answers = {}
    for family, facts in json.loads((folder / "context.json").read_text()).items():
        context = make_context(family, folder / family, facts)
        for name, check in checks.items():
            if not name.startswith("check_"):
                continue
            key = f"{family}-{name.removeprefix('check_')}"
            try:
                check(context)
                answers[key] = ""
            except Exception:
                answers[key] = traceback.format_exc()
            path.write_text(json.dumps(answers))


__all__ = ["Report", "answer_checks", "ask_worker", "environment", "run_forked"]
