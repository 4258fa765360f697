"""`polyscale evaluate`: what it prints, writes and refuses."""

import csv
import json
import shutil

import pytest
from PIL import Image as PILImage
from typer.testing import CliRunner

from polyscale import FlexiViTForImageClassification
from polyscale.cli import app
from polyscale.evaluation import evaluate_checkpoints

from .tiny_data import NAMES, save_checkpoint


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_says_what_it_measured_everywhere(split, checkpoint, tmp_path):
    (tmp_path / "data").mkdir()
    split.to_parquet(tmp_path / "data" / "test.parquet")
    output = tmp_path / "out"
    done = run(checkpoint, tmp_path / "data", "--budgets", "4", "8x4", "--limit", 5, "--output", output, "--per-class")
    assert done.exit_code == 0, done.output
    expected = evaluate_checkpoints([checkpoint], tmp_path / "data", limit=5, budget_words={"budgets": ["4", "8x4"]})
    records = json.loads((output / "results.json").read_text())
    assert [(record["budget"], record["tokens"]) for record in records] == [(4, 16), ([8, 4], 8)]
    for record, result in zip(records, expected[0].results, strict=True):
        assert record["top1"] == pytest.approx(result.top1)
        assert (record["top1_low"], record["top1_high"]) == pytest.approx(result.top1_interval)
        assert (record["model"], record["data"]) == (str(checkpoint), str(tmp_path / "data"))
        assert (record["split"], record["images"], record["image_size"]) == ("test", 5, [16, 16])
        assert {"polyscale", "torch", "transformers"} <= set(record["versions"])
        assert set(record["per_class"]) <= set(NAMES)
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["budget"], row["image_size"], row["split"]) for row in rows] == [
        ("4", "16x16", "test"),
        ("8x4", "16x16", "test"),
    ]
    assert float(rows[0]["top1"]) == records[0]["top1"]
    with PILImage.open(output / "accuracy.png") as picture:
        assert picture.size == (1050, 675)
    assert sorted(path.name for path in output.iterdir()) == ["accuracy.png", "results.csv", "results.json"]
    for said in ("8x4", "split test, 5 images", "95 %", "by class"):
        assert said in " ".join(done.output.split())
    assert "top-5" not in done.output  # of three classes


def test_several_models_are_measured_on_the_same_images(split, checkpoint, tmp_path):
    split.to_parquet(tmp_path / "train.parquet")
    other = save_checkpoint(tmp_path / "_$odd$ [/red]", train_patch_sizes=[2, 4])
    done = run(checkpoint, other, tmp_path / "train.parquet", "--json", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert [(record["model"], record["budget"]) for record in records] == [
        (str(checkpoint), 4),
        (str(other), 4),
        (str(other), 2),
    ]
    assert "no validation or test split: scored on 'train'" in done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())[1]["model"] == str(other)
    table = run(other, tmp_path / "train.parquet")
    assert table.exit_code == 0
    assert "[/red]" in table.output


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_of_other_classes_is_refused_before_any_is_scored(split, checkpoint, tmp_path, monkeypatch, place):
    split.to_parquet(tmp_path / "test.parquet")
    other = save_checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "z"}, "label2id": {"a": 0, "b": 1, "z": 2}}
    (other / "config.json").write_text(json.dumps(config))

    images = count_images(monkeypatch)
    models = [checkpoint, other] if place else [other, checkpoint]
    done = run(*models, tmp_path / "test.parquet", "--output", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"`MODEL` {other}: 1 of the data's 3 classes are none of the model's 3: 'c'." in done.stderr
    assert "Of the model: 'a', 'b', 'z'." in done.stderr
    assert set(images) <= {1}
    assert not (tmp_path / "out").exists()


def count_images(monkeypatch) -> list[int]:
    """How many images each forward pass of a FlexiViT has, from now on."""
    images, forward = [], FlexiViTForImageClassification.forward

    def counted(self, pixel_values, *args, **kwargs):
        images.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(FlexiViTForImageClassification, "forward", counted)
    return images


def test_a_budget_that_one_model_cannot_take_is_refused_before_any_is_scored(split, checkpoint, tmp_path, monkeypatch):
    split.to_parquet(tmp_path / "test.parquet")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    config |= {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    images = count_images(monkeypatch)
    done = run(checkpoint, other, tmp_path / "test.parquet", "--budgets", "8", "16")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"`MODEL` {other}: `--budgets` 16: `patch_size` must not be larger than the image" in done.stderr
    assert set(images) == {1}


def test_missing_models_are_named_as_every_command_names_them(split, checkpoint, tmp_path):
    split.to_parquet(tmp_path / "test.parquet")
    for models in (["nowhere"], ["some/where"], [tmp_path / "nowhere"], [checkpoint, "nowhere"]):
        done = run(*models, tmp_path / "test.parquet")
        assert done.exit_code == 2
        assert f"`MODEL` '{models[-1]}' cannot be loaded: it is neither a bundled checkpoint" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "mars"], "`--mean` must be one of"),
        (["--num-tokens", "16"], "`--num-tokens` does not fit a model of type 'flexivit'"),
        (["--budgets", "big"], "got 'big'"),
        (["--device", "tpu9"], "`--device`"),
        (["--split", "nonsense"], "nonsense"),
        (["--label-map", "a=z"], "no class of the model"),
        (["--label-map", "nowhere.json"], "must be NAME=NAME or a JSON file"),
    ],
)
def test_a_bad_word_is_one_line_and_exit_code_2(split, checkpoint, tmp_path, arguments, message):
    split.to_parquet(tmp_path / "test.parquet")
    done = run(checkpoint, tmp_path / "test.parquet", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_work(split, checkpoint, tmp_path):
    split.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run(checkpoint, tmp_path / "test.parquet", "--output", place)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "`--output`" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert run(checkpoint).exit_code == 2
