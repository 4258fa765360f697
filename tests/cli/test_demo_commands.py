"""`polyscale classify`, `show` and `benchmark`, called as a user calls them."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from polyscale.assets import sample_photographs
from polyscale.classification import classify_images
from polyscale.cli import app

from ..tiny_checkpoints import save_tiny_flexivit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_flexivit(tmp_path_factory.mktemp("flexivit")))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_classify_prints_json_and_nothing_else(checkpoint):
    picture = sample_photographs()[0]
    done = run("classify", picture, "--model", checkpoint, "--budgets", "4", "8x16", "--json")
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    expected, _ = classify_images([picture], checkpoint, [4, (8, 16)])
    for got, record in zip(printed, expected, strict=True):
        assert got.pop("milliseconds") > 0
        del record["milliseconds"]
        assert got == pytest.approx(record) if isinstance(record["budget"], int) else got["budget"] == [8, 16]


def test_classify_without_files_takes_the_sample_photographs_and_draws_them(checkpoint, tmp_path):
    output = tmp_path / "new" / "demo.png"
    done = run("classify", "--model", checkpoint, "--output", output, "--repeats", 1)
    assert done.exit_code == 0
    for path in sample_photographs():
        assert path.name in done.stdout
    for header in ("patch size", "tokens", "label", "score", "ms"):
        assert header in done.stdout
    assert done.stdout.replace("\n", "").endswith(f"Wrote {output}")
    with Image.open(output) as picture:
        assert picture.format == "PNG"


def test_classify_reports_a_bad_file_goes_on_and_exits_with_1(checkpoint, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    output = tmp_path / "sheet.png"
    arguments = ("--model", checkpoint, "--budgets", "8", "--json", "--output", output)
    done = run("classify", tmp_path / "broken.png", tmp_path / "missing.png", sample_photographs()[0], *arguments)
    assert done.exit_code == 1
    assert [record["file"] for record in json.loads(done.stdout)] == [str(sample_photographs()[0])]
    assert f"{tmp_path / 'broken.png'}: not a readable picture" in done.stderr
    assert f"{tmp_path / 'missing.png'}: no such file" in done.stderr
    assert output.is_file()


def test_classify_with_bad_files_alone_writes_no_picture(checkpoint, tmp_path):
    output = tmp_path / "sheet.png"
    done = run("classify", tmp_path / "missing.png", "--model", checkpoint, "--json", "--output", output)
    assert (done.exit_code, json.loads(done.stdout)) == (1, [])
    assert not output.exists()


@pytest.mark.parametrize("command", ["classify", "show"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "40"], "`patch_size` must not be larger than the image"),
        (["--budgets", "0"], "`patch_size` must be at least 1"),
        (["--budgets", "large"], "large"),
        (["--model", "no/such/checkpoint"], "no/such/checkpoint"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(checkpoint, command, arguments, message, tmp_path):
    model = [] if "--model" in arguments else ["--model", checkpoint]
    done = run(command, sample_photographs()[0], *model, *arguments, "--output", tmp_path / "out.png")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_show_writes_a_picture(checkpoint, tmp_path):
    output = tmp_path / "show.png"
    done = run("show", sample_photographs()[1], "--model", checkpoint, "--budgets", "4,8", "--output", output)
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "") == f"Wrote {output}"
    with Image.open(output) as picture:
        assert picture.format == "PNG"


def test_benchmark_prints_a_row_a_budget(checkpoint):
    arguments = ("--batch-size", 1, "--rounds", 1, "--device", "cpu")
    done = run("benchmark", checkpoint, "--budgets", "4", "16", "--json", *arguments)
    assert done.exit_code == 0
    assert [(row["budget"], row["tokens"]) for row in json.loads(done.stdout)] == [(4, 64), (16, 4)]
    done = run("benchmark", checkpoint, *arguments)
    assert done.exit_code == 0
    assert "speed-up" in done.stdout
    done = run("benchmark", checkpoint, "--budgets", "99", *arguments)
    assert done.exit_code == 2
    assert "`patch_size` must not be larger" in done.stderr
