"""`polyscale classify`, `show` and `benchmark`, called as a user calls them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

from polyscale.assets import sample_photographs
from polyscale.classification import classify_images
from polyscale.cli import app

from ..tiny_checkpoints import save_tiny_flexivit, save_tiny_s2, save_tiny_sparseformer


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
    assert f"{tmp_path / 'broken.png'}: not a readable image" in done.stderr
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


def test_classify_at_another_image_size(checkpoint):
    photograph = sample_photographs()[0]
    done = run("classify", photograph, "--model", checkpoint, "--budgets", "8", "--image-size", "48x64", "--json")
    assert done.exit_code == 0, done.output
    (record,) = json.loads(done.stdout)
    processor = AutoImageProcessor.from_pretrained(checkpoint, size={"height": 48, "width": 64})
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad(), Image.open(photograph) as image:
        scores = model(**processor(image, return_tensors="pt"), patch_size=8).logits[0].softmax(0)
    assert record["tokens"] == 6 * 8
    assert record["label"] == model.config.id2label[scores.argmax().item()]
    assert record["score"] == pytest.approx(scores.max().item(), abs=2e-6)
    own = json.loads(run("classify", photograph, "--model", checkpoint, "--budgets", "8", "--json").stdout)[0]
    assert own["tokens"] == 16
    assert own["score"] != pytest.approx(record["score"], abs=2e-5)


def test_show_at_another_image_size(checkpoint, tmp_path):
    """The same drawing as of a checkpoint whose processor makes images of that size."""
    larger = save_tiny_flexivit(tmp_path / "larger")
    AutoImageProcessor.from_pretrained(larger, size={"height": 64, "width": 64}).save_pretrained(larger)

    def drawn(model, *arguments):
        output = tmp_path / "show.png"
        arguments = ("--model", model, "--budgets", "8", "--output", output, *arguments)
        assert run("show", sample_photographs()[0], *arguments).exit_code == 0
        with Image.open(output) as image:
            return np.asarray(image.convert("RGB"))

    changed = drawn(checkpoint, "--image-size", "64")
    np.testing.assert_array_equal(changed, drawn(larger))
    own = drawn(checkpoint)
    assert own.shape != changed.shape or (own != changed).mean() > 0.01


@pytest.mark.parametrize("command", ["classify", "show"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("big", "got 'big'"),
        ("1x2x3", "got '1x2x3'"),
        ("0", "at least 1"),
        ("-8", "at least 1"),
        ("99999999", "at most"),
    ],
)
def test_an_image_size_that_is_none(checkpoint, command, size, message, tmp_path):
    output = tmp_path / "out.png"
    done = run(command, sample_photographs()[0], "--model", checkpoint, f"--image-size={size}", "--output", output)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not output.exists()


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


def test_labels_and_names_are_no_markup_and_no_formulas(tmp_path):
    labels = ["[/red] $\\frac{$", "[bold]b", "\x1b[31mc"]
    checkpoint = save_tiny_flexivit(
        tmp_path / "model", id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )
    file = tmp_path / "$x_[bold].png"
    Image.new("RGB", (32, 32)).save(file)
    done = run("classify", file, "--model", checkpoint, "--budgets", 8, "--output", tmp_path / "sheet.png")
    assert done.exit_code == 0, done.output
    assert file.name in done.output
    assert any(label.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in done.output for label in labels)
    assert (tmp_path / "sheet.png").is_file()


def test_a_folder_of_many_gets_a_row_an_image_and_a_summary(checkpoint, tmp_path):
    for index in range(15):
        Image.new("RGB", (32, 32), (index * 17, 0, 0)).save(tmp_path / f"{index:02}.png")
    done = run("classify", tmp_path, "--model", checkpoint, "--budgets", "4", "16", "--batch-size", 4)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if ".png" in line]
    assert len(lines) == 15
    records, _ = classify_images([tmp_path], checkpoint, [4, 16])
    by_budget = {budget: [r["label"] for r in records if r["budget"] == budget] for budget in (4, 16)}
    same = sum(fine == coarse for fine, coarse in zip(by_budget[4], by_budget[16], strict=True)) / 15
    summary = " ".join(done.output.split())
    assert f"{same:.1%}" in summary
    assert "100.0%" in summary


@pytest.mark.parametrize(
    ("save", "budgets", "expected"),
    [(save_tiny_s2, ["--budgets", "1+2", "2+3"], [16, 64]), (save_tiny_sparseformer, [], [9])],
)
def test_every_family_goes_through_every_command(save, budgets, expected, tmp_path):
    model = save(tmp_path / "model")
    photograph = sample_photographs()[0]
    done = run("classify", photograph, "--model", model, "--json", *budgets)
    assert done.exit_code == 0, done.output
    assert [record["tokens"] for record in json.loads(done.stdout)] == expected
    done = run("benchmark", model, "--json", "--rounds", 1, "--batch-size", 1, *budgets)
    assert done.exit_code == 0, done.output
    assert [row["tokens"] for row in json.loads(done.stdout)] == expected
    done = run("show", photograph, "--model", model, "--output", tmp_path / "show.png", *budgets)
    assert done.exit_code == 0, done.output
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.open(photograph).save(tmp_path / "data" / name / "a.png")
    done = run("evaluate", model, tmp_path / "data", "--json", *budgets)
    assert done.exit_code == 0, done.output
    assert [(record["tokens"], record["images"]) for record in json.loads(done.stdout)] == [
        (tokens, 2) for tokens in expected
    ]


@pytest.mark.parametrize("command", ["classify", "show"])
@pytest.mark.parametrize("place", ["folder.png", "file/below.png", "sheet.xyz"])
def test_an_output_that_cannot_be_is_refused_before_the_work(checkpoint, command, place, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    done = run(command, sample_photographs()[0], "--model", checkpoint, "--output", tmp_path / place)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "`--output`" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_failed_drawing_leaves_no_file(checkpoint, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    (tmp_path / "sheet.png").write_bytes(b"old")
    done = run("classify", sample_photographs()[0], "--model", checkpoint, "--output", tmp_path / "sheet.png")
    assert done.exit_code == 2
    assert "cannot be written: No space left on device" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_bytes() == b"old"
