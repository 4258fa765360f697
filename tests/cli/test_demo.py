"""`polyscale demo`, and the default of every command's model."""

import inspect
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from polyscale.assets import photograph_class, sample_photographs
from polyscale.budget_policy import calibrate_policy, classify_with_policy
from polyscale.checkpoints import DEFAULT_CHECKPOINT, available_checkpoints
from polyscale.classification import classify_images
from polyscale.cli import app
from polyscale.demonstration import demonstration_checkpoints
from polyscale.embedding import embed_images
from polyscale.utils.images import open_pixels
from polyscale_cli.arguments import DEFAULT_MODEL

from ..test_demonstration import TINY200, save_one_answer
from ..tiny_checkpoints import TINY_IMAGENET_LABELS, save_tiny_flexivit


PHOTOGRAPHS = sample_photographs(TINY_IMAGENET_LABELS)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def koalas(tmp_path_factory):
    return save_one_answer(tmp_path_factory.mktemp("koalas"), "koala", train_patch_sizes=[16, 8])


def test_demo_prints_labels_and_counts_and_draws_them(koalas, tmp_path):
    tabbies = save_one_answer(tmp_path / "tabbies", "tabby", train_patch_sizes=[8])
    output = tmp_path / "new" / "demo.png"
    done = run("demo", "--model", koalas, "--model", tabbies, "--output", output, "--device", "cpu")
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert printed.count("1 of 12") == 3
    assert printed.count("✓ koala 100%") == 2
    assert printed.count("✗ koala 100%") == 22
    assert printed.count("✓ tabby 100%") == 1
    assert printed.count("✗ tabby 100%") == 11
    for file in PHOTOGRAPHS:
        assert photograph_class(file) in printed
    for head in ("patch size 16", "patch size 8", "4 tokens", "16 tokens"):
        assert head in printed
    assert done.stdout.replace("\n", "").endswith(f"Wrote {output}")
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.width > 600


def test_demo_prints_json_and_nothing_else(koalas, tmp_path):
    done = run("demo", "--model", koalas, "--json", "--output", tmp_path / "demo.png", "--device", "cpu")
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert [record["class"] for record in records[::2]] == [photograph_class(file) for file in PHOTOGRAPHS]
    assert {record["label"] for record in records} == {"koala"}
    assert [record["budget"] for record in records if record["right"]] == [16, 8]
    assert set(records[0]) == {
        *("model", "file", "class", "budget", "tokens", "label", "score", "milliseconds", "right")
    }


def test_demo_without_a_model_asks_those_that_ship():
    done = run("demo", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert list(dict.fromkeys(record["model"] for record in records)) == demonstration_checkpoints()
    for record in records:
        assert record["class"] == photograph_class(record["file"])
        assert record["right"] == (record["label"] == record["class"])
    assert any(record["right"] for record in records)  # they are trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/checkpoint"], "no/such/checkpoint"),
        (["--output", "sheet.xyz"], "`--output` sheet.xyz must end in one of"),
        (["--device", "gpu"], "`--device` must be one of cpu"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(arguments, message):
    done = run("demo", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_models_of_other_classes_are_one_line(koalas, tmp_path):
    cifar = save_tiny_flexivit(tmp_path / "cifar")
    done = run("demo", "--model", koalas, "--model", cifar, "--output", tmp_path / "demo.png")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "`--model`" in done.stderr
    assert "has no label 'alp'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "demo.png").exists()


# the default model


def test_every_function_and_command_has_one_default_model():
    assert DEFAULT_CHECKPOINT in available_checkpoints()
    assert DEFAULT_MODEL == DEFAULT_CHECKPOINT
    for function in (classify_images, calibrate_policy, classify_with_policy, embed_images):
        assert inspect.signature(function).parameters["model"].default == DEFAULT_CHECKPOINT
    for command in app.registered_commands:
        parameter = inspect.signature(command.callback).parameters.get("model")
        if parameter is not None and isinstance(parameter.default, str):
            assert parameter.default == DEFAULT_CHECKPOINT, command.callback.__name__


@pytest.mark.parametrize("command", ["classify", "show"])
def test_photographs_follow_the_model(command, tmp_path, monkeypatch):
    seen = []
    for module in ("classification", "figures"):
        monkeypatch.setattr(
            f"polyscale.{module}.open_pixels", lambda file: seen.append(str(file)) or open_pixels(file)
        )
    model = save_tiny_flexivit(tmp_path / "model", train_patch_sizes=[16], **TINY200)
    done = run(command, "--model", model, "--output", tmp_path / "drawn.png", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert set(seen) == {str(file) for file in (PHOTOGRAPHS if command == "classify" else PHOTOGRAPHS[:1])}
