"""A disk that takes no more: one line that says so, whole files or none, and what was there before is kept."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import transformers
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from polyscale.budget_policy import BudgetPolicy
from polyscale.cli import app

from ..tiny_checkpoints import save_tiny_flexivit


FAILURES = [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
every_failure = pytest.mark.parametrize(("number", "said"), FAILURES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(
        tmp_path_factory.mktemp("flexivit"), id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check(done, said):
    assert done.exit_code == 2
    assert f"cannot be written: {said}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output


def failing(number):
    """Writes a part of the file, then fails as a full disk does."""

    def write(*arguments, **_):
        for argument in arguments:
            if isinstance(argument, (str, Path)) and Path(argument).is_file():
                Path(argument).write_bytes(b"half")
                break
        raise OSError(number, os.strerror(number))

    return write


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@every_failure
@pytest.mark.parametrize(("place", "name"), [(Path, "write_text"), (Figure, "savefig")])
def test_evaluate(checkpoint, data, tmp_path, monkeypatch, place, name, number, said):
    out = tmp_path / "out"
    out.mkdir()
    for file in ("results.json", "accuracy.png"):
        (out / file).write_text("old")
    monkeypatch.setattr(place, name, failing(number))
    check(run("evaluate", checkpoint, data, "--budgets", "8", "--json", "--output", out), said)
    monkeypatch.undo()
    assert (out / "accuracy.png").read_text() == "old"
    if place is Path:
        assert contents(out) == ["accuracy.png", "results.json"]
        assert (out / "results.json").read_text() == "old"
    else:
        assert contents(out) == ["accuracy.png", "results.csv", "results.json"]
        assert json.loads((out / "results.json").read_text())[0]["images"] == 4


@every_failure
def test_classify(checkpoint, data, tmp_path, monkeypatch, number, said):
    (tmp_path / "sheet.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", failing(number))
    arguments = ["--model", checkpoint, "--budgets", "8", "--json", "--output", tmp_path / "sheet.png"]
    done = run("classify", data / "test" / "a" / "0.png", *arguments)
    check(done, said)
    assert len(json.loads(done.stdout)) == 1  # the result is not lost
    assert contents(tmp_path) == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_text() == "old"


@every_failure
@pytest.mark.parametrize(
    ("place", "name", "left"),
    [(Path, "write_text", []), (pyarrow.parquet, "write_table", ["embedding.json", "part-00000.parquet"])],
)
def test_embed(checkpoint, data, tmp_path, monkeypatch, place, name, left, number, said):
    out, arguments = tmp_path / "out", ["--model", checkpoint, "--shard-size", 3]
    if left:
        assert run("embed", data, out, *arguments).exit_code == 0
        for number_of_shard in (1, 2):
            (out / f"part-{number_of_shard:05d}.parquet").unlink()
    monkeypatch.setattr(place, name, failing(number))
    check(run("embed", data, out, *arguments), said)
    assert contents(out) == left
    monkeypatch.undo()
    done = run("embed", data, out, *arguments)  # goes on
    assert done.exit_code == 0
    assert f"Embedded {5 if left else 8} images" in done.stdout
    assert sum(pyarrow.parquet.read_metadata(file).num_rows for file in out.glob("*.parquet")) == 8


@every_failure
def test_policies(checkpoint, data, tmp_path, monkeypatch, number, said):
    policy, file = BudgetPolicy([16, 4], [0.5], "patch_size"), tmp_path / "policy.json"
    policy.save(file)
    monkeypatch.setattr(Path, "write_text", failing(number))
    with pytest.raises(ValueError, match=f"cannot be written: {said}"):
        BudgetPolicy([8, 4], [0.1], "patch_size").save(file)
    check(run("calibrate", data, "--output", file, "--model", checkpoint, "--budgets", "16,8"), said)
    monkeypatch.undo()
    assert contents(tmp_path) == ["policy.json"]
    assert BudgetPolicy.load(file) == policy


@every_failure
@pytest.mark.parametrize("place", [transformers.PreTrainedModel, Figure])
def test_the_last_write_of_a_training(checkpoint, data, tmp_path, monkeypatch, place, number, said):
    out = tmp_path / "out"
    arguments = ["--init-from", checkpoint, "--epochs", 1, "--batch-size", 2, "--num-workers", 0]
    name, write = ("savefig", Figure.savefig) if place is Figure else ("save_pretrained", place.save_pretrained)

    def fail_at_the_end(self, file, *more, **options):
        if "final" in str(file):
            raise OSError(number, os.strerror(number))
        return write(self, file, *more, **options)

    monkeypatch.setattr(place, name, fail_at_the_end)
    done = run("train", data, out, *arguments)
    assert done.exit_code == 2
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert "--resume" in last
    assert "Traceback" not in done.output
    assert contents(tmp_path)[0] == "out.training"
    assert not out.exists()
    monkeypatch.undo()
    assert run("train", data, out, "--resume").exit_code == 0
    assert json.loads((out / "training.json").read_text())["steps"] == 2
    assert contents(tmp_path)[0] == "out"
