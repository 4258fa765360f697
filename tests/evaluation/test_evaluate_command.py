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

from ..tiny_checkpoints import CIFAR10_LABELS, save_tiny_flexivit, save_tiny_quadtree_vit, save_tiny_sparseformer
from .tiny_data import NAMES, make_split, save_checkpoint


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


def smaller_copy(checkpoint, folder, side):
    """The same model, whose images are smaller."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_a_budget_that_one_model_cannot_take_is_left_out_of_its_rows(split, checkpoint, tmp_path):
    split.to_parquet(tmp_path / "test.parquet")
    other = smaller_copy(checkpoint, tmp_path / "other", 8)
    done = run(checkpoint, other, tmp_path / "test.parquet", "--budgets", "8", "16", "--json", "--split", "train")
    assert done.exit_code == 0, done.stderr
    rows = [(record["model"], record["budget"], record["tokens"]) for record in json.loads(done.stdout)]
    assert rows == [(str(checkpoint), 8, 4), (str(checkpoint), 16, 1), (str(other), 8, 1)]
    (line,) = done.stderr.splitlines()
    assert line == (
        f"polyscale evaluate: `MODEL` {other}: left out `--budgets` 16: `patch_size` must not be larger than the "
        "image: got (16, 16) for an image of (8, 8) pixels (height, width)."
    )


def test_what_one_of_several_models_cannot_take_is_said_before_any_is_scored(split, checkpoint, tmp_path, monkeypatch):
    split.to_parquet(tmp_path / "test.parquet")
    other = smaller_copy(checkpoint, tmp_path / "other", 12)  # 9 tokens
    images, said = count_images(monkeypatch), []
    evaluations = evaluate_checkpoints(
        [checkpoint, other],
        tmp_path / "test.parquet",
        device="cpu",
        merge_to=[12, 8, 3],
        shrink_to=[3, 8],
        note=lambda text: said.append((text, set(images))),
    )
    rows = [[(r.way, r.merge_to, r.tokens) for r in evaluation.results] for evaluation in evaluations]
    merging, smaller = "token merging", "smaller images"
    assert rows == [
        [("budget", None, 16), (merging, 12, 12), (merging, 8, 8), (smaller, None, 4)],
        [("budget", None, 9), (merging, 8, 8), (merging, 3, 3), (smaller, None, 4)],
    ]
    no_patch = (
        "`patch_size` must not be larger than the image: got (4, 4) for an image of (3, 3) pixels (height, width)."
    )
    reach = (
        "`merge_tokens_to` must be at least 4 for 16 tokens and 2 layers, each of which can merge at most half of its "
        "tokens; got 3."
    )
    assert said == [
        (f"`model` {checkpoint}: left out `shrink_to` 3: {no_patch}", {1}),
        (f"`model` {checkpoint}: left out `merge_to` 3: {reach}", {1}),
        (f"`model` {other}: left out `merge_to` 12: it has no more than 9 tokens at its own budget.", {1}),
        (f"`model` {other}: left out `shrink_to` 3: {no_patch}", {1}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge-to", "2"], "`--merge-to`: no model can have a row for it."),
        (["--shrink-to", "3"], "`--shrink-to`: no model can have a row for it."),
        (["--image-sizes", "3"], "`--image-sizes`: no model can have a row for it."),
        (["--budgets", "17"], "`--budgets`: no model can have a row for it."),
        (
            ["--budgets", "8", "--budgets", "big"],
            "`--budgets` 'big' is a budget of no model: `--budgets` of a FlexiViT must be",
        ),
    ],
)
def test_what_no_model_can_take_is_an_error_that_says_why_of_each(split, checkpoint, tmp_path, arguments, message):
    split.to_parquet(tmp_path / "test.parquet")
    other = smaller_copy(checkpoint, tmp_path / "other", 12)
    done = run(checkpoint, other, tmp_path / "test.parquet", *arguments)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr
    if len(arguments) == 2:
        assert f"{checkpoint}: `{arguments[0]}` {arguments[1]}: " in done.stderr
        assert f"{other}: `{arguments[0]}` {arguments[1]}: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge-to", "8", "3"], "`--merge-to` 3: `--merge-to` must be at least 4 for 16 tokens and 2 layers"),
        (["--shrink-to", "8", "3"], "`--shrink-to` 3: `patch_size` must not be larger"),
        (["--image-sizes", "16", "3"], "`--image-sizes` 3: `patch_size` must not be larger"),
        (["--budgets", "8", "17"], "`--budgets` 17: `patch_size` must not be larger"),
    ],
)
def test_what_the_one_model_cannot_take_is_an_error(split, checkpoint, tmp_path, monkeypatch, arguments, message):
    split.to_parquet(tmp_path / "test.parquet")
    images = count_images(monkeypatch)
    done = run(checkpoint, tmp_path / "test.parquet", *arguments)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr
    assert set(images) <= {1}


def test_a_model_without_a_row_is_left_out_and_one_without_budgets_runs_at_its_own(tmp_path):
    flexible, sparse = save_tiny_flexivit(tmp_path / "flexivit"), save_tiny_sparseformer(tmp_path / "sparse")
    quadtree = save_tiny_quadtree_vit(tmp_path / "quadtree")
    make_split(CIFAR10_LABELS, 4).to_parquet(tmp_path / "test.parquet")
    models = [flexible, quadtree, sparse]
    arguments = [
        *models,
        tmp_path / "test.parquet",
        "--split",
        "train",
        "--budgets",
        "8",
        "--output",
        tmp_path / "out",
    ]
    done = run(*arguments, "--speed")
    assert done.exit_code == 0, done.stderr
    rows = [(row["model"], row["budget"]) for row in json.loads((tmp_path / "out" / "results.json").read_text())]
    assert rows == [(str(flexible), 8), (str(sparse), None)]
    quadtree_line, sparse_line = done.stderr.splitlines()
    assert f"`MODEL` {quadtree}: left out `--budgets` 8: `num_tokens` must be 4 + 3 k" in quadtree_line
    assert f"`MODEL` {sparse}: left out `--budgets` 8: a model of type 'sparseformer' has no budget" in sparse_line
    # a model may have nothing but merged rows
    done = run(*arguments, "--merge-to", "6")
    assert done.exit_code == 0, done.stderr
    rows = [(row["model"], row["merge_to"]) for row in json.loads((tmp_path / "out" / "results.json").read_text())]
    assert rows == [(str(flexible), None), (str(flexible), 6), (str(quadtree), 6), (str(sparse), None)]


def test_a_ladder_that_images_do_not_allow_is_run_as_far_as_they_do(tmp_path):
    model = save_tiny_flexivit(tmp_path / "model")
    make_split(CIFAR10_LABELS, 4).to_parquet(tmp_path / "test.parquet")
    done = run(model, tmp_path / "test.parquet", "--split", "train", "--image-sizes", "12", "32", "--json")
    assert done.exit_code == 0, done.stderr
    rows = [(row["image_size"][0], row["budget"]) for row in json.loads(done.stdout)]
    assert rows == [(12, 8), (12, 4), (32, 16), (32, 8), (32, 4)]
    (line,) = done.stderr.splitlines()
    assert "left out its own budgets 16 at `--image-sizes` 12: `patch_size` must not be larger" in line


def test_a_sample_does_not_change_the_classes_of_the_data(tmp_path):
    model = save_tiny_flexivit(tmp_path / "model")
    make_split(CIFAR10_LABELS, 40).to_parquet(tmp_path / "test.parquet")
    done = run(model, tmp_path / "test.parquet", "--limit", 2)
    assert "2 images, 10 classes" in " ".join(done.output.split())
    assert "top-5" in done.output


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
