"""Checkpoints with damaged parts, and arguments that are none: one error, which names them."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyscale.loading import load_base_model, load_classifier

from .tiny_checkpoints import save_tiny_flexivit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(tmp_path_factory.mktemp("flexivit"))


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_weights(folder, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def leave_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))


def spoil(weights):
    name = "flexivit.layernorm.weight"
    return {**weights, name: torch.full_like(weights[name], float("nan"))}


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
DAMAGES = {
    "config text": (lambda folder: (folder / CONFIG).write_text("{"), "not a valid JSON file"),
    "config list": (lambda folder: (folder / CONFIG).write_text("[]"), "Unrecognized model"),
    "config deep": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "RecursionError"),
    "type": (lambda folder: edit(folder / CONFIG, model_type=5), "does not recognize this architecture"),
    "field": (lambda folder: edit(folder / CONFIG, image_size="x"), "image_size must be an int or a pair"),
    "labels": (lambda folder: edit(folder / CONFIG, id2label=["a"]), "id2label must be a dict"),
    "layers": (lambda folder: edit(folder / CONFIG, num_hidden_layers=3), "16 tensors are missing"),
    "shape": (
        lambda folder: change_weights(folder, lambda weights: {**weights, "flexivit.layernorm.weight": torch.ones(3)}),
        "have another shape, such as .*layernorm.weight'",
    ),
    "more": (
        lambda folder: change_weights(folder, lambda weights: {**weights, "flexivit.foo": torch.ones(3)}),
        "has 1 tensors that its",
    ),
    "numbers": (lambda folder: change_weights(folder, spoil), "its tensor .*layernorm.weight' holds NaN or infinite"),
    "cut": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is not a readable safetensors file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is not a readable"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "shard": (lose_a_shard, "'model-00002-of-00002.safetensors' is not there"),
    "pickle": (leave_a_pickle, "a pickle that holds more than tensors"),
    "no processor": (lambda folder: (folder / PROCESSOR).unlink(), "Can't load image processor"),
    "processor": (lambda folder: (folder / PROCESSOR).write_text("[]"), "damaged or of another kind"),
    "std": (lambda folder: edit(folder / PROCESSOR, image_std=[0, 0, 0]), "image_std must be above 0"),
    "mean": (lambda folder: edit(folder / PROCESSOR, image_mean="x"), "image_mean must be a number"),
    "rescale": (lambda folder: edit(folder / PROCESSOR, rescale_factor=0), "rescale_factor must be finite and not 0"),
    "size": (
        lambda folder: edit(folder / PROCESSOR, size={"height": 0, "width": 8}),
        r"size\['height'\] must be from",
    ),
    "huge": (lambda folder: edit(folder / PROCESSOR, size={"height": 10**9, "width": 8}), "must be from 1 to 65536"),
    "resample": (lambda folder: edit(folder / PROCESSOR, resample=99), "resample must be a filter of Pillow"),
}


@pytest.mark.parametrize("load", [load_classifier, load_base_model])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named(checkpoint, load, damage, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"`model` {str(folder)!r}")
    assert "\n" not in text
    assert len(text) < 900


def test_a_value_that_the_caller_sets_is_no_fault_of_the_checkpoint(checkpoint):
    with pytest.raises(ValueError, match=r"^`resize_method` must be one of 'pi', 'interpolate', got 'PI'"):
        load_classifier(checkpoint, resize_method="PI")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": "false"}, "`trust_remote_code` must be True or False, got 'false'"),
        ({"convert": 1}, "`convert` must be True or False, got 1"),
        ({"dtype": "bf16"}, "`dtype` must be a floating-point type such as torch.bfloat16, got 'bf16'"),
        ({"dtype": torch.int8}, "`dtype` must be a floating-point type"),
        ({"device": []}, r"`device` must be one of cpu.*, got \[\]"),
        ({"device": True}, "`device` must be one of cpu.*, got True"),
        ({"image_size": [32]}, r"`image_size` must be an int or a pair .*, got \[32\]"),
    ],
)
def test_arguments_that_are_none(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(checkpoint, **options)
