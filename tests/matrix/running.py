"""Runs the modules in `workers/` in processes of their own, and reads back what they found.

One process answers many questions, because importing torch and transformers costs more than most answers. A worker has
functions `check_<name>(context)`; each is run, and what it raises is kept for the test of that name.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


_ROOT = Path(__file__).parents[__package__.count(".") + 1]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a worker: this package is importable, nothing is downloaded, one thread a process."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **variables}


def run_worker(
    name: str,
    folder: Path,
    context: dict[str, Any],
    launcher: Sequence[str] = (),
    timeout: int = 300,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Runs `workers/<name>.py` to its end. `folder` takes `context.json` and what the worker writes."""
    (folder / "context.json").write_text(json.dumps({**context, "folder": str(folder)}))
    command = [sys.executable, *launcher, "-m", f"{__package__}.workers.{name}", str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(**variables), cwd=folder
    )


class Report:
    """The answers of a worker: check -> what it raised, empty when it passed."""

    def __init__(self, answers: dict[str, str], output: str):
        self.answers = answers
        self.output = output

    def require(self, check: str) -> None:
        """Raises AssertionError if the check did not run, or failed."""
        if check not in self.answers:
            raise AssertionError(f"the worker never came to {check!r}; its output was:\n{self.output[-6000:]}")
        if self.answers[check]:
            raise AssertionError(self.answers[check])


def ask_worker(name: str, folder: Path, context: dict[str, Any], **kwargs) -> Report:
    """Runs a worker; of several processes the first that failed a check answers for it."""
    result = run_worker(name, folder, context, **kwargs)
    answers: dict[str, str] = {}
    for path in sorted(folder.glob("answers-*.json")):
        for check, raised in json.loads(path.read_text()).items():
            answers[check] = answers.get(check) or raised
    return Report(answers, result.stdout + result.stderr)


def answer_checks(checks: dict[str, Any], folder: Path, context: Any) -> None:
    """Called by a worker: runs its `check_*` functions in order and writes the answers after each."""
    path = folder / f"answers-{os.environ.get('RANK', '0')}.json"
    answers = {}
    for name, check in checks.items():
        if not name.startswith("check_"):
            continue
        try:
            check(context)
            answers[name.removeprefix("check_")] = ""
        except Exception:
            answers[name.removeprefix("check_")] = traceback.format_exc()
        path.write_text(json.dumps(answers))


__all__ = ["Report", "answer_checks", "ask_worker", "environment", "run_worker"]
