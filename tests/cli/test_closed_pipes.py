"""Whoever reads what a command prints may stop at any line (`| head`): the files that it was asked for are written."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from polyscale.cli import app

from ..tiny_checkpoints import save_tiny_flexivit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    save_tiny_flexivit(folder / "model", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    for name in ("a", "b"):
        (folder / "data" / "test" / name).mkdir(parents=True)
        pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "test" / name / "0.png")
    return folder


@pytest.fixture(params=["table", "json"])
def closed(request, monkeypatch):
    """The options of a command, of whose output nothing is read."""

    def table(*_, **__):
        raise SystemExit(1)  # as rich ends a program

    def echo(*_, **__):
        raise BrokenPipeError

    if request.param == "table":
        monkeypatch.setattr("rich.console.Console.print", table)
    else:
        monkeypatch.setattr("typer.echo", echo)
    return ["--json"] if request.param == "json" else []


def test_an_evaluation_is_written(place, closed, tmp_path):
    words = ["evaluate", place / "model", place / "data", "--budgets", "8", "--output", tmp_path / "out", *closed]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 1
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["images"], record["budget"]) == (2, 8)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "results.csv", "accuracy.png"}


def test_a_drawing_is_written(place, closed, tmp_path):
    words = ["classify", place / "data", "--model", place / "model", "--output", tmp_path / "out.png", *closed]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 1
    assert Image.open(tmp_path / "out.png").width > 100
