"""`train` and `polyscale train` with `bootstrap_from`: a SparseFormer from a ViT, on pictures without labels."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from typer.testing import CliRunner

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTImageProcessor, SparseFormerModel
from polyscale.cli import app
from polyscale.training import make_recipe, train
from polyscale.training.bootstrapping import load_teacher
from polyscale.training.data import load_image_dataset
from polyscale.training.transforms import AugmentedImages, TrainingTransform, collate_images

from .conftest import make_picture, make_split


STUDENT = {"feature_width": 8, "num_sampling_points": 4, "generator_width": 16, "num_latent_tokens": 4}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def flexivit(tmp_path_factory) -> Path:
    """A classifier without CLS, as the bundled one."""
    folder = tmp_path_factory.mktemp("flexivit")
    torch.manual_seed(0)
    config = FlexiViTConfig(**SHAPE, image_size=16, base_patch_size=8, use_cls_token=False, pooling="mean")
    FlexiViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    stats = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    FlexiViTImageProcessor(size=size, crop_size=size, **stats).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unlabelled_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(24):
        make_picture(index % 3, index).save(folder / f"{index}.png")
    return folder


def small_recipe(vit: Path, **choices):
    defaults = {"batch_size": 8, "epochs": 2, "num_workers": 0, "learning_rate": 3e-3}
    return make_recipe(None, STUDENT, bootstrap_from=str(vit), **{**defaults, **choices})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def test_a_teacher_saved_with_its_classifier_has_no_pooler(tmp_path):
    config = ViTConfig(**SHAPE, image_size=16, patch_size=8)
    classifier = ViTForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    for name, tensor in classifier.vit.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor)


def test_pictures_need_no_labels(unlabelled_folder, tmp_path):
    make_split(2).remove_columns("label").rename_column("image", "picture").to_parquet(tmp_path / "x.parquet")
    make_split(2).to_parquet(tmp_path / "labelled.parquet")
    for source, count in ((unlabelled_folder, 24), (tmp_path / "x.parquet", 6), (tmp_path / "labelled.parquet", 6)):
        split = load_image_dataset(source, labelled=False)["train"]
        assert split.column_names == ["image"]
        rows = AugmentedImages(split, TrainingTransform("none", (8, 8), [0.5] * 3, [0.5] * 3))
        assert collate_images([rows[0], rows[1]])["pixel_values"].shape == (2, 3, 8, 8)
        assert len(rows) == count


@pytest.mark.slow
def test_the_command_bootstraps_on_a_folder_of_pictures(flexivit, unlabelled_folder, tmp_path):
    output = tmp_path / "student"
    settings = [argument for name, value in STUDENT.items() for argument in ("--set", f"{name}={value}")]
    arguments = ["train", str(unlabelled_folder), str(output), "--bootstrap-from", str(flexivit), *settings]
    arguments += ["--epochs", "2", "--batch-size", "8", "--limit", "16", "--num-workers", "0", "--ema-decay", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--save-dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}" in result.output

    student = AutoModel.from_pretrained(output)
    assert isinstance(student, SparseFormerModel)
    assert (student.config.pooling, student.config.num_latent_tokens) == ("mean", 4)
    processor = AutoImageProcessor.from_pretrained(output)
    assert list(processor.image_mean) == [0.4] * 3
    pictures = processor([make_picture(0, 0)], return_tensors="pt")
    assert pictures["pixel_values"].shape == (1, 3, 16, 16)
    assert student(**pictures).pooler_output.shape == (1, 32)

    teacher = AutoModel.from_pretrained(flexivit)
    stored = teacher.layers[2].mlp.fc1.weight.bfloat16().float()
    assert torch.equal(student.layers[3].mlp.fc1.weight, stored)
    assert not torch.equal(student.layers[2].mlp.fc1.weight, teacher.layers[1].mlp.fc1.weight.bfloat16().float())


@pytest.mark.slow
def test_training_brings_the_student_nearer_to_its_teacher(flexivit, parquet_folder, tmp_path):
    start = train(parquet_folder, tmp_path / "start", small_recipe(flexivit, epochs=0))
    end = train(parquet_folder, tmp_path / "end", small_recipe(flexivit, epochs=6))
    assert end["eval_loss"] < 0.5 * start["eval_loss"]
    teacher = AutoModel.from_pretrained(flexivit).state_dict()
    before, after = weights_of(tmp_path / "start"), weights_of(tmp_path / "end")
    for layer in (2, 3):
        name = "mlp.fc1.weight"
        assert torch.equal(before[f"layers.{layer}.{name}"], teacher[f"layers.{layer - 1}.{name}"])
        assert torch.equal(after[f"layers.{layer}.{name}"], before[f"layers.{layer}.{name}"]) == (layer == 3)
    name = "layers.0.mixing.o_proj.weight"
    assert not torch.equal(after[name], before[name])


@pytest.mark.slow
def test_a_vit_of_transformers_with_other_pictures(unlabelled_folder, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, intermediate_size=64, image_size=24, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vit")
    recipe = small_recipe(tmp_path / "vit", image_size=16, image_mean=(0.4,) * 3, num_blocks=1, frozen_share=0)
    train(unlabelled_folder, tmp_path / "student", recipe)
    student = AutoModel.from_pretrained(tmp_path / "student")
    assert student.config.pooling == "cls"
    assert len(student.config.widths) == 3
    vit = ViTModel.from_pretrained(tmp_path / "vit").state_dict()
    assert not torch.equal(student.layernorm.weight, vit["layernorm.weight"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "student").size.height == 16


class StopAfter(TrainerCallback):
    """Ends the process's work in the middle of a run, as a lost machine would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_weights(flexivit, unlabelled_folder, tmp_path, monkeypatch):
    recipe = small_recipe(flexivit, epochs=2, save_steps=2, ema_decay=0.9)
    train(unlabelled_folder, tmp_path / "whole", recipe)

    from polyscale.models.sparseformer import callbacks_sparseformer

    with monkeypatch.context() as patch:
        patch.setattr(callbacks_sparseformer.LossScaleCallback, "on_step_end", StopAfter(5).on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(unlabelled_folder, tmp_path / "broken", recipe)
    train(unlabelled_folder, tmp_path / "broken", recipe, resume=True)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"teacher": "x"}, "`bootstrap_from` and `teacher` exclude each other: the ViT is the teacher"),
        ({"preset": "sparseformer_v1_tiny"}, "`bootstrap_from` and `preset` exclude each other"),
        ({"init_from": "x"}, "`bootstrap_from` and `init_from` exclude each other"),
        ({"mixup": 0.2}, "`bootstrap_from` and `mixup` exclude each other: there are no labels to mix"),
        ({"cutmix": 1.0}, "`bootstrap_from` and `cutmix` exclude each other"),
        ({"label_smoothing": 0.1}, "`bootstrap_from` and `label_smoothing` exclude each other"),
        ({"temperature": 2.0}, "`bootstrap_from` and `temperature` exclude each other"),
        ({"family": "flexivit"}, "`family` must be left out, got 'flexivit'"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"bootstrap_from": None, "num_blocks": 2}, "`num_blocks` goes with `bootstrap_from`"),
        ({"bootstrap_from": None, "epochs": 0}, "`epochs` must be above 0"),
    ],
)
def test_choices_that_do_not_fit_together(choices, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(None, **{"bootstrap_from": "x", **choices})


def test_refusals_leave_nothing_behind(flexivit, unlabelled_folder, tmp_path):
    for recipe, message in (
        (make_recipe(None, {"train_patch_sizes": [4, 8]}, bootstrap_from=str(flexivit)), "'train_patch_sizes'"),
        (small_recipe(flexivit, num_blocks=9), "`num_blocks` must be between 1 and the teacher's 3, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            train(unlabelled_folder, tmp_path / "student", recipe)
    result = CliRunner().invoke(
        app, ["train", str(unlabelled_folder), str(tmp_path / "student"), "--bootstrap-from", "x", "--mixup", "0.2"]
    )
    assert result.exit_code == 2
    assert "exclude each other" in result.output
    assert list(tmp_path.iterdir()) == []
