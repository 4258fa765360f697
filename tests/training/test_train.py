import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, pipeline
from typer.testing import CliRunner

from polyscale.cli import app
from polyscale.training import RECIPES, PatchSizeCallback, make_recipe, train
from polyscale.training.train import store_weights_as

from .conftest import LABELS, make_picture


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "base_patch_size": 8, "position_grid": 4}


def small_recipe(**choices):
    options = {**SHAPE, "train_patch_sizes": [4, 8]}
    defaults = {"image_size": 16, "batch_size": 8, "epochs": 4, "num_workers": 0, "learning_rate": 3e-3}
    return make_recipe(None, options, **{**defaults, "augmentation": "none", **choices})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def trained(parquet_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "model"
    return output, train(parquet_folder, output, small_recipe(ema_decay=0.9))


@pytest.mark.slow
def test_a_trained_model_knows_its_classes_through_the_pipeline(trained):
    output, metrics = trained
    assert metrics["eval_top1"] >= 0.9
    assert not output.with_name("model.training").exists()
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "config.json",
        "curve.png",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    ]
    classifier = pipeline("image-classification", model=str(output))
    for label, name in enumerate(LABELS):
        assert classifier(make_picture(label, 5000))[0]["label"] == name


@pytest.mark.slow
def test_fine_tuning_starts_from_the_checkpoint_with_a_new_head(trained, image_folder, tmp_path):
    recipe = make_recipe(None, init_from=str(trained[0]), image_size=16, epochs=1, batch_size=4, num_workers=0)
    before = weights_of(trained[0])
    train(image_folder, tmp_path / "tuned", recipe)
    after = weights_of(tmp_path / "tuned")
    name = "flexivit.layers.0.mlp.fc1.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.nn.functional.cosine_similarity(before[name].flatten(), after[name].flatten(), dim=0) > 0.9
    assert AutoImageProcessor.from_pretrained(tmp_path / "tuned").size.height == 16


class StopAfter(TrainerCallback):
    """Ends the process's work in the middle of a run, as a lost machine would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_weights(parquet_folder, tmp_path, monkeypatch):
    recipe = small_recipe(epochs=2, save_steps=4, ema_decay=0.9, augmentation="crop")
    train(parquet_folder, tmp_path / "whole", recipe)

    with monkeypatch.context() as patch:
        patch.setattr(PatchSizeCallback, "on_step_end", StopAfter(7).on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(parquet_folder, tmp_path / "broken", recipe)
    assert not (tmp_path / "broken").exists()
    with pytest.raises(ValueError, match="unfinished run"):
        train(parquet_folder, tmp_path / "broken", recipe)
    train(parquet_folder, tmp_path / "broken", recipe, resume=True)

    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_distillation_from_a_checkpoint(trained, parquet_folder, tmp_path):
    recipe = small_recipe(teacher=str(trained[0]), epochs=1, temperature=2.0, save_dtype="float16")
    metrics = train(parquet_folder, tmp_path / "student", recipe)
    assert metrics["train_loss"] < 2.0
    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    for name, weight in weights_of(tmp_path / "student").items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name].float())


@pytest.mark.slow
def test_other_families_train_and_every_picture_is_scored(parquet_folder, tmp_path):
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options |= {"min_patch_size": 4, "max_patch_size": 8, "num_tokens": 10}
    recipe = make_recipe(None, options, family="quadtree_vit", image_size=16, epochs=3, batch_size=7, num_workers=0)
    metrics = train(parquet_folder, tmp_path / "model", recipe)
    assert metrics["eval_top1"] * 24 == pytest.approx(round(metrics["eval_top1"] * 24))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "quadtree_vit"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    inputs = processor([make_picture(0, 0), make_picture(1, 0)], return_tensors="pt")
    assert model(**inputs).logits.shape == (2, 3)


def test_bad_choices_are_refused_before_anything_is_written(parquet_folder, trained, tmp_path):
    output = tmp_path / "out"
    for choices, message in (
        ({"augmentation": "magic"}, "`augmentation` must be one of"),
        ({"epochs": 0}, "`epochs` must be above 0"),
        ({"family": "nonsense"}, "`family` must be a model type"),
        ({"ema_decay": 1.5}, "`ema_decay` must be between 0 and 1"),
        ({"preset": "flexivit_tiny", "init_from": str(trained[0])}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            train(parquet_folder, output, small_recipe(**choices))
    with pytest.raises(ValueError, match="`recipe` must be one of"):
        make_recipe("nonsense")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        train(parquet_folder, output, small_recipe(), resume=True)
    output.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        train(parquet_folder, output, small_recipe())
    assert list(tmp_path.iterdir()) == [output]
    output.rmdir()
    output.symlink_to(tmp_path / "nowhere")  # in whose place nothing could be put at the end
    with pytest.raises(ValueError, match="exists already"):
        train(parquet_folder, output, small_recipe())


def test_published_recipes_take_changes():
    recipe = make_recipe("flexivit", {"hidden_size": 192}, epochs=2)
    assert recipe.epochs == 2
    assert recipe.learning_rate == RECIPES["flexivit"]["learning_rate"]
    assert recipe.model_options["train_patch_sizes"][-1] == 48
    assert recipe.model_options["hidden_size"] == 192
    assert "hidden_size" not in RECIPES["flexivit"]["model_options"]


@pytest.mark.slow
def test_the_command_trains(image_folder, tmp_path):
    output = tmp_path / "model"
    settings = [argument for name, value in SHAPE.items() for argument in ("--set", f"{name}={json.dumps(value)}")]
    arguments = ["train", str(image_folder), str(output), *settings, "--image-size", "16", "--epochs", "1"]
    arguments += [
        "--patch-sizes",
        "4",
        "8x4",
        "--patch-size-probs",
        "0.5,0.5",
        "--batch-size",
        "4",
        "--num-workers",
        "0",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}" in result.output
    config = json.loads((output / "config.json").read_text())
    assert config["train_patch_sizes"] == [4, [8, 4]]
    assert config["train_patch_size_probs"] == [0.5, 0.5]

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_weights_beyond_the_range_of_a_dtype_stay_as_they_are(tmp_path):
    weights = {"large": torch.tensor([1e6, 1.0]), "small": torch.tensor([0.5, 1.0]), "count": torch.tensor([70000])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store_weights_as(tmp_path, "float16")
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "large": torch.float32,
        "small": torch.float16,
        "count": torch.int64,
    }
    for name, tensor in weights.items():
        assert torch.equal(stored[name].to(tensor.dtype), tensor)


def test_a_training_whose_output_nobody_reads_goes_on(image_folder, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise SystemExit(1)  # as rich ends a program at a closed pipe

    monkeypatch.setattr("rich.console.Console.print", closed)
    metrics = train(image_folder, tmp_path / "model", small_recipe(epochs=1))
    assert [result["budget"] for result in metrics["budgets"]] == [4, 8]
    assert (tmp_path / "model" / "model.safetensors").is_file()
