"""Work folders: what is whole, locked, or may change on resume; and weights that resume under other names."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from polyscale import S2VisionConfig, S2VisionForImageClassification
from polyscale.training import (
    ImageClassificationTrainer,
    PatchSizeCallback,
    TrainingInterrupted,
    TrainingStopped,
    make_recipe,
    train,
)
from polyscale.training.data import load_image_dataset
from polyscale.training.recipe import as_recorded
from polyscale.training.resume import (
    RunFolder,
    check_unchanged,
    contents_digest,
    damage_of,
    data_digest,
    mark_whole,
)
from polyscale.utils.outputs import write_failure

from ..tiny_checkpoints import save_tiny_flexivit
from .kills import SHAPE, write_images


def recipe(**choices):
    defaults = {"epochs": 3, "batch_size": 4, "num_workers": 0, "save_steps": 2, "ema_decay": 0.5}
    return make_recipe(None, {**SHAPE, "train_patch_sizes": [2, 4]}, **{**defaults, **choices})


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def break_off(monkeypatch, data, output, step=7, **choices):
    with monkeypatch.context() as patch:
        patch.setattr(PatchSizeCallback, "on_step_end", StopAt(step).on_step_end, raising=False)
        with pytest.raises(TrainingInterrupted, match=r"Go on with: polyscale train .* --resume"):
            train(data, output, recipe(**choices), verbose=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "model"
    train(data, output, recipe(), verbose=False)
    return weights_of(output)


def weights_of(folder):
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


def assert_equal_weights(folder, expected):
    found = weights_of(folder)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_checkpoint_is_whole_or_says_what_is_wrong(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"12345")
    (tmp_path / "sub" / "b.bin").write_bytes(b"678")
    assert damage_of(tmp_path) == "it was not written to its end"
    mark_whole(tmp_path)
    assert damage_of(tmp_path) is None
    (tmp_path / "sub" / "b.bin").write_bytes(b"679")
    assert damage_of(tmp_path) == "sub/b.bin is damaged"
    (tmp_path / "a.bin").unlink()
    assert damage_of(tmp_path) == "a.bin is missing"
    (tmp_path / "whole.json").write_text("{")
    assert damage_of(tmp_path) == "it was not written to its end"


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "ema.safetensors", "whole.json"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    data, unbroken, tmp_path, monkeypatch, capsys, damaged
):
    break_off(monkeypatch, data, tmp_path / "model")
    file = tmp_path / "model.training" / "checkpoint-6" / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    train(data, tmp_path / "model", resume=True)
    said = capsys.readouterr().out
    assert "The checkpoint of step 6 is skipped: " in said
    assert "Resuming from checkpoint-4." in said
    assert_equal_weights(tmp_path / "model", unbroken)


@pytest.mark.slow
def test_resume_alone_goes_on_and_other_choices_are_refused(data, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "model"
    break_off(monkeypatch, data, output)
    with pytest.raises(ValueError, match="holds an unfinished run"):
        train(data, output, recipe(), verbose=False)
    with pytest.raises(ValueError, match="`epochs` was 3, now 4"):
        train(data, output, recipe(epochs=4), resume=True, verbose=False)
    with pytest.raises(ValueError, match=r"`learning_rate` was None, now 0\.1"):
        train(data, output, {"learning_rate": 0.1}, resume=True, verbose=False)
    other = tmp_path / "other"
    write_images(other)
    (other / "train" / "dark" / "5.png").unlink()
    with pytest.raises(ValueError, match="is not what the run was started with: splits were"):
        train(other, output, resume=True, verbose=False)
    train(data, output, {"epochs": 3}, resume=True, verbose=False)
    assert_equal_weights(output, unbroken)
    with pytest.raises(ValueError, match="exists already"):
        train(data, output, resume=True, verbose=False)


def _hold(output, ready, done):
    run = RunFolder(output)
    run.open(resume=False)
    ready.set()
    done.wait(60)
    run.release()


def test_one_output_has_one_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "model"), ready, done))
    process.start()
    assert ready.wait(120)
    try:
        with pytest.raises(ValueError, match="Another training works on"):
            RunFolder(tmp_path / "model").open(resume=False)
    finally:
        done.set()
        process.join()
    run = RunFolder(tmp_path / "model")
    run.open(resume=False)  # what a dead process leaves is no lock
    run.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(data, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "model"
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:  # in the third checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:677] . PytorchStreamWriter failed writing file")
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(TrainingStopped) as caught:
            train(data, output, recipe(), verbose=False)
    assert "\n" not in str(caught.value)
    assert "Nothing can be written to" in str(caught.value)
    assert "Step 4 is saved. Then go on with: polyscale train" in str(caught.value)
    train(data, output, resume=True, verbose=False)
    assert_equal_weights(output, unbroken)


def test_errors_that_say_that_nothing_can_be_written(tmp_path):
    import errno

    from safetensors import SafetensorError

    inside, outside = str(tmp_path / "x"), "/elsewhere"
    assert write_failure(OSError(errno.ENOSPC, "No space left on device"), tmp_path) == "No space left on device"
    assert write_failure(OSError(errno.EROFS, "Read-only file system", inside), tmp_path) == "Read-only file system"
    assert write_failure(OSError(errno.EACCES, "Permission denied", outside), tmp_path) is None
    assert "os error 28" in write_failure(SafetensorError("I/O error: No space left (os error 28)"), tmp_path)
    assert write_failure(RuntimeError("shapes differ"), tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("around", ["nothing", "s2"])
def test_weights_that_are_stored_under_other_names_resume(tmp_path, around):
    """transformers renames the weights of a ViT when it stores them; `Trainer` alone would leave them as they are."""
    vision = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    s2 = S2VisionConfig(vision_config={**vision.to_dict(), "image_size": 8}, scales=[1, 2], num_labels=2)
    make = {
        "nothing": lambda: ViTForImageClassification(vision),
        "s2": lambda: S2VisionForImageClassification(s2),
    }[around]

    def trainer(folder, steps):
        torch.manual_seed(len(str(folder)))
        pixels = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
        rows = [{"pixel_values": torch.from_numpy(image), "labels": index % 2} for index, image in enumerate(pixels)]
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
        )
        return ImageClassificationTrainer(model=make(), args=args, train_dataset=rows)

    first = trainer(tmp_path, 2)
    first.train()
    resumed = trainer(tmp_path / ".." / tmp_path.name, 2)  # other random weights
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = first.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_the_recipe_is_kept_with_the_run(tmp_path):
    run = RunFolder(tmp_path / "model")
    run.open(resume=False)
    run.record(given=recipe(image_size=(8, 16)).to_json())
    assert type(recipe()).from_json(run.read()["given"]) == recipe(image_size=(8, 16))
    assert json.loads((run.path / "run.json").read_text())["given"]["image_size"] == [8, 16]
    run.discard()


def test_choices_are_compared_with_those_of_the_run_whatever_their_form():
    given = {"init_from": Path("model"), "image_size": 8, "epochs": np.float32(3)}
    started = make_recipe(None, {"train_patch_sizes": [(2, 4), (4, 4)]}, **given)
    options = {"train_patch_sizes": [(2, 4), [4, 4]]}
    for choices in (given, {"init_from": "model", "image_size": [8, 8]}, {"model_options": options}):
        check_unchanged(started.to_json(), as_recorded(choices, started))
    with pytest.raises(ValueError, match=r"`image_size` was \[8, 8\], now \[8, 16\]"):
        check_unchanged(started.to_json(), as_recorded({"image_size": (8, 16)}, started))
    with pytest.raises(ValueError, match="`imagesize` is no field of a recipe; did you mean `image_size`"):
        as_recorded({"imagesize": None}, started)


@pytest.mark.parametrize("stored", ["files", "arrays", "parquet"])
def test_data_are_told_from_others_by_their_images(tmp_path, stored):
    def digests(name, change):
        folder = tmp_path / name
        images = [np.full((4, 4, 3), 20 * index, dtype=np.uint8) for index in range(3)]
        images[1][2, 2] += change
        for index, image in enumerate(images):
            file = folder / f"class{index}" / ("0.npy" if stored == "arrays" else "0.bmp")
            file.parent.mkdir(parents=True)
            np.save(file, image) if stored == "arrays" else Image.fromarray(image).save(file)
        if stored == "parquet":
            cells = [{"bytes": file.read_bytes(), "path": "0.bmp"} for file in sorted(folder.rglob("*.bmp"))]
            shutil.rmtree(folder)  # what is below it would count as images
            folder.mkdir()
            features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=3)})
            table = Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)
            table.to_parquet(folder / "train.parquet")
        data = load_image_dataset(folder)
        return data_digest(data, folder), contents_digest(data)

    plain, again, other = digests("plain", 0), digests("again", 0), digests("other", 5)
    assert plain == again
    assert plain[0] == other[0]  # the same names and labels
    assert plain[1] != other[1]


def test_data_are_the_same_however_their_place_is_spelled(tmp_path, monkeypatch):
    write_images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    spelled = ["data", tmp_path / "data", "data/../data", "../" + tmp_path.name + "/data"]
    digests = {data_digest(load_image_dataset(place), os.path.abspath(place)) for place in spelled}
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_that_met_a_damaged_image_goes_on_when_it_is_mended(tmp_path, monkeypatch, num_workers):
    data, output = tmp_path / "data", tmp_path / "model"
    write_images(data)
    damaged = data / "train" / "light" / "5.png"

    def damage(*_, **__):
        damaged.write_bytes(b"no image")

    said = r"Images cannot be read: .*5\.png: not a .* Mend it, then: .* --resume"
    with monkeypatch.context() as patch:
        patch.setattr(PatchSizeCallback, "on_step_end", damage, raising=False)
        with pytest.raises(TrainingStopped, match=said):
            train(data, output, recipe(num_workers=num_workers), verbose=False)
    Image.new("RGB", (8, 8), "white").save(damaged)
    assert train(data, output, resume=True, verbose=False)["budgets"]


@pytest.mark.slow
def test_another_teacher_than_that_of_the_run_is_refused(tmp_path, monkeypatch):
    data, output, teacher = tmp_path / "data", tmp_path / "model", tmp_path / "teacher"
    write_images(data)
    fields = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    save_tiny_flexivit(teacher, **fields)
    break_off(monkeypatch, data, output, step=3, teacher=str(teacher))
    shutil.move(teacher, tmp_path / "first")
    save_tiny_flexivit(teacher, initializer_range=0.1, **fields)
    with pytest.raises(ValueError, match="the teacher has other weights than when the run was started"):
        train(data, output, resume=True, verbose=False)
    shutil.rmtree(teacher)
    shutil.move(tmp_path / "first", teacher)
    assert train(data, output, resume=True, verbose=False)["budgets"]


def test_other_files_than_those_the_run_was_started_with_are_refused(tmp_path, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "model"
    write_images(data)
    break_off(monkeypatch, data, output)
    first = sorted((data / "train").rglob("*.png"))[0]
    moved = first.rename(first.with_name("zz.png"))
    with pytest.raises(ValueError, match="not what the run was started with: its files, or their labels, are other"):
        train(data, output, resume=True, verbose=False)
    moved.rename(first)
    content = first.read_bytes()
    Image.new("RGB", (8, 8), "white").save(first)
    with pytest.raises(ValueError, match="its files have the same names, but other images in them"):
        train(data, output, resume=True, verbose=False)
    first.write_bytes(content)
    data = data.rename(tmp_path / "elsewhere")  # the same files
    assert train(data, output, resume=True, verbose=False)["budgets"]
