"""`convert_checkpoint` and `convert_patch_embed`: whole outputs or none, safe inputs, the command line."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

import polyscale
from polyscale.cli import app
from polyscale.conversion import convert_patch_embed
from polyscale.utils.outputs import only_writer

from .tiny_checkpoints import save_tiny_flexivit, save_tiny_s2


SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def vit(tmp_path):
    """A folder with a tiny ViT classifier and its image processor, and the model."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, num_labels=3)).eval()
    model.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_a_complete_folder(vit, tmp_path):
    folder, model = vit
    out = polyscale.convert_checkpoint(folder, tmp_path / "new" / "out", to="flexivit", patch_size=16)
    assert out == tmp_path / "new" / "out"
    assert contents(out) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert contents(tmp_path / "new") == ["out"]
    loaded = AutoModelForImageClassification.from_pretrained(out)
    assert loaded.config.patch_size == 16
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images, patch_size=8).logits, model(images).logits)


def test_live_models_convert(vit, tmp_path):
    out = polyscale.convert_checkpoint(vit[1], tmp_path / "out")
    assert contents(out) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("to", ["s2_vision", "sparseformer", "sparseformer_video", "llava"])
def test_live_models_where_checkpoints_alone_are_read(vit, tmp_path, to):
    with pytest.raises(ValueError, match=f"`source` of a conversion to '{to}' must be a path or a name, got a ViTFor"):
        polyscale.convert_checkpoint(vit[1], tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept_unless_told_otherwise(vit, tmp_path):
    folder, _ = vit
    out = tmp_path / "out"
    out.mkdir()
    polyscale.convert_checkpoint(folder, out)  # an empty folder is nobody's work
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"`out`.*exists already"):
        polyscale.convert_checkpoint(folder, out)
    assert contents(out) == before
    polyscale.convert_checkpoint(folder, out, overwrite=True)
    assert contents(out) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        polyscale.convert_checkpoint(folder, tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists already"):
        polyscale.convert_checkpoint(folder, tmp_path / "link")
    with pytest.raises(ValueError, match=r"`out` .*link is a link to nothing"):
        polyscale.convert_checkpoint(folder, tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("breaking", ["source", "saving"])
def test_a_failed_conversion_leaves_nothing_behind(vit, tmp_path, monkeypatch, breaking):
    folder, _ = vit
    if breaking == "source":
        (folder / "model.safetensors").write_bytes(b"broken")
    else:
        monkeypatch.setattr(polyscale.FlexiViTImageProcessor, "save_pretrained", lambda *_: 1 / 0)
    before = contents(tmp_path)
    with pytest.raises((ValueError, ZeroDivisionError)):
        polyscale.convert_checkpoint(folder, tmp_path / "a" / "b" / "out")
    assert contents(tmp_path) == before

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises((ValueError, ZeroDivisionError)):
        polyscale.convert_checkpoint(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert contents(tmp_path) == sorted([*before, "out"])


def test_unknown_model_types_and_sources_are_refused(vit, tmp_path):
    with pytest.raises(ValueError, match=r"`to` must be one of .*'flexivit'"):
        polyscale.convert_checkpoint(vit[0], tmp_path / "out", to="resnet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        polyscale.convert_checkpoint(tmp_path / "folder", tmp_path / "out")
    (tmp_path / "folder" / "config.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="unknown layout"):
        polyscale.convert_checkpoint(tmp_path / "folder", tmp_path / "out")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        polyscale.convert_checkpoint(tmp_path / "folder", tmp_path / "out")
    for absent in (tmp_path / "absent", tmp_path / "absent.npz", "./absent"):
        with pytest.raises(FileNotFoundError, match="absent"):
            polyscale.convert_checkpoint(absent, tmp_path / "out")
    with pytest.raises(OSError, match="nobody/nothing"):
        polyscale.convert_checkpoint("nobody/nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.bin", "evil.npz", "evil.safetensors"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, name, writer):
    marker, path = tmp_path / "pwned", tmp_path / name
    content = {"state_dict": {"pos_embed": torch.zeros(1, 5, 4)}, "args": Malicious(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    result = run("convert", path, tmp_path / "out", "--architecture", "vit_tiny_patch16_224")
    assert result.exit_code == 2
    assert "evil" in result.output
    assert contents(tmp_path) == [name]


def test_a_malicious_pickle_inside_a_folder_is_refused(vit, tmp_path):
    folder, model = vit
    marker = tmp_path / "pwned"
    (folder / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "hook": Malicious(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused"):
        polyscale.convert_checkpoint(folder, tmp_path / "out")
    assert contents(tmp_path) == ["vit"]


def test_convert_command(vit, tmp_path):
    out = tmp_path / "out"
    result = run("convert", vit[0], out, "--to", "flexivit", "--set", "patch_size=[4, 8]", "--set", "remainder=pad")
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    config = polyscale.FlexiViTConfig.from_pretrained(out)
    assert (config.resolve_patch_size(), config.remainder) == ((4, 8), "pad")
    result = run("convert", vit[0], out)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert run("convert", vit[0], out, "--overwrite").exit_code == 0
    assert run("convert", vit[0], tmp_path / "other", "--set", "patch_size").exit_code == 2
    assert run("convert", vit[0], tmp_path / "other", "--set", "patch_sise=4").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_overwriting_replaces_checkpoints_alone_and_never_the_source(vit, tmp_path):
    folder, _ = vit
    for out in (tmp_path, folder):
        with pytest.raises(ValueError, match=r"`out` .* holds the source"):
            polyscale.convert_checkpoint(folder, out, overwrite=True)
    thesis = tmp_path / "thesis"
    (thesis / "runs").mkdir(parents=True)
    (thesis / "runs" / "log.txt").write_text("mine")
    (thesis / "chapter.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is no checkpoint"):
        polyscale.convert_checkpoint(folder, thesis, overwrite=True)
    (thesis / "config.json").write_text('{"model_type": "vit"}')  # beside folders of somebody's work
    with pytest.raises(ValueError, match="it is no checkpoint"):
        polyscale.convert_checkpoint(folder, thesis, overwrite=True)
    assert (thesis / "runs" / "log.txt").read_text() == "mine"
    assert contents(folder) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    weights = tmp_path / "in.pt"
    torch.save({"patch_embed.proj.weight": torch.zeros(1, 3, 8, 8)}, weights)
    with pytest.raises(ValueError, match="holds the source"):
        convert_patch_embed(weights, weights, patch_size=4, overwrite=True)


def test_two_conversions_to_one_place_do_not_meet(vit, tmp_path):
    folder, _ = vit
    out, other = tmp_path / "out", tmp_path / "other"
    with only_writer(out, "out", "conversion"):
        with pytest.raises(ValueError, match="being written by another conversion"):
            polyscale.convert_checkpoint(folder, out)
        polyscale.convert_checkpoint(folder, other)
    assert contents(tmp_path) == ["other", "vit"]
    polyscale.convert_checkpoint(folder, out)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_no_more_is_said_to_be_that(vit, tmp_path, monkeypatch, number, said):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    result = run("convert", vit[0], tmp_path / "out", "--to", "quadtree_vit", "--set", "max_patch_size=16")
    assert result.exit_code == 2
    assert f"`OUT` {tmp_path / 'out'} cannot be written: {said}" in result.stderr.replace("\n", " ")
    assert contents(tmp_path) == ["vit"]


@pytest.mark.parametrize("name", ["source", "out", "to", "overwrite"])
def test_arguments_of_the_conversion_are_no_fields(vit, tmp_path, name):
    result = run("convert", vit[0], tmp_path / "out", "--set", f"{name}=1")
    assert result.exit_code == 2
    assert f"{name} is no field" in result.stderr


def test_a_name_that_the_hub_cannot_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`source` 'timm/' is no path, and no name"):
        polyscale.convert_checkpoint("timm/", tmp_path / "out")


def test_bundled_names_convert(tmp_path):
    out = polyscale.convert_checkpoint("flexivit-cifar10", tmp_path / "out", patch_size=8)
    bundled = polyscale.bundled_checkpoint("flexivit-cifar10")
    old, new = (load_file(folder / "model.safetensors") for folder in (bundled, out))
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor.to(new[name].dtype), new[name]) for name, tensor in old.items())
    assert polyscale.FlexiViTConfig.from_pretrained(out).patch_size == 8


def test_unknown_options_are_refused_by_name(vit, tmp_path):
    with pytest.raises(ValueError, match=r"no field `patch_sise`. Did you mean `patch_size`\?"):
        polyscale.convert_checkpoint(vit[0], tmp_path / "out", patch_sise=4)
    with pytest.raises(ValueError, match=r"no option `replicate`. Did you mean `replicates`\?"):
        polyscale.convert_checkpoint(vit[0], tmp_path / "out", to="sparseformer_video", replicate=4)
    with pytest.raises(ValueError, match=r"`source` must be a path, a name or a model, got a int"):
        polyscale.convert_checkpoint(3, tmp_path / "out")


@pytest.mark.parametrize("to", ["flexivit", "quadtree_vit", "s2_vision"])
@pytest.mark.parametrize("name", ["torch_dtype", "model_type", "architectures", "transformers_version"])
def test_what_follows_from_the_weights_is_no_option(vit, tmp_path, to, name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be chosen: it follows from the weights"):
        polyscale.convert_checkpoint(vit[0], tmp_path / "out", to=to, **{name: "float16"})
    assert not (tmp_path / "out").exists()
    if to != "s2_vision":  # whose converter can cast
        with pytest.raises(ValueError, match="`dtype` cannot be chosen"):
            polyscale.convert_checkpoint(vit[0], tmp_path / "out", to=to, dtype="float16")


@pytest.mark.parametrize("to", ["vit", "timm"])
def test_the_way_between_is_named(vit, tmp_path, to):
    quadtree = polyscale.convert_checkpoint(vit[0], tmp_path / "quadtree", to="quadtree_vit")
    with pytest.raises(ValueError, match=rf"'quadtree_vit' becomes a '{to}' by way of 'flexivit'.*`--to flexivit`"):
        polyscale.convert_checkpoint(quadtree, tmp_path / "out", to=to)
    between = polyscale.convert_checkpoint(quadtree, tmp_path / "flexivit", to="flexivit")
    assert polyscale.FlexiViTConfig.from_pretrained(between).model_type == "flexivit"


def test_both_maps_of_the_classes_follow_either(vit, tmp_path):
    count = polyscale.FlexiViTConfig.from_pretrained(polyscale.convert_checkpoint(vit[0], tmp_path / "own")).num_labels
    names = [f"class {index}" for index in range(count)]
    by_index, by_name = {str(i): name for i, name in enumerate(names)}, {name: i for i, name in enumerate(names)}
    for number, options in enumerate(({"id2label": by_index}, {"label2id": by_name})):
        out = polyscale.convert_checkpoint(vit[0], tmp_path / f"out{number}", **options)
        config = polyscale.FlexiViTConfig.from_pretrained(out)
        assert (config.id2label, config.label2id) == (dict(enumerate(names)), by_name)


@pytest.mark.parametrize("to", ["flexivit", "quadtree_vit", "s2_vision"])
def test_damaged_weights_and_shards_elsewhere_are_one_line(vit, tmp_path, to):
    folder, _ = vit
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    result = run("convert", folder, tmp_path / "out", "--to", to, *(["--set", "scales=[1,2]"] if to[0] == "s" else []))
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    weights.rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    record = {"metadata": {}, "weight_map": {"vit.embeddings.cls_token": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    result = run("convert", folder, tmp_path / "out", "--to", to)
    assert result.exit_code == 2
    assert "no file beside it" in result.output


NAME = "patch_embed.proj.weight"


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {NAME: torch.randn(4, 3, 8, 8), "head.weight": torch.randn(2, 4), "other.kernel": torch.randn(1, 1, 2, 2)}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize(("arguments", "size"), [(["10"], 10), (["10", "15"], (10, 15)), (["10,15"], (10, 15))])
def test_patch_kernel_is_resized_and_all_else_stays(tmp_path, tensors, suffix, arguments, size):
    source, out = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, source, metadata={"format": "pt", "note": "kept"})
    else:
        torch.save({"state_dict": tensors, "epoch": 3}, source)
    result = run("convert-patch-embed", source, out, "--name", NAME, "--patch-size", *arguments)
    assert result.exit_code == 0, result.output

    if suffix == "safetensors":
        converted = load_file(out)
        with safe_open(out, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
    else:
        checkpoint = torch.load(out, weights_only=True)
        assert checkpoint["epoch"] == 3
        converted = checkpoint["state_dict"]
    expected = polyscale.pi_resize_patch_embed(tensors[NAME], size)
    assert converted.keys() == tensors.keys()
    torch.testing.assert_close(converted[NAME], expected)
    assert torch.equal(converted["head.weight"], tensors["head.weight"])
    assert contents(tmp_path) == [source.name, out.name]


def test_patch_kernel_by_other_interpolation(tmp_path, tensors):
    torch.save(tensors, tmp_path / "in.pt")
    shapes = convert_patch_embed(
        tmp_path / "in.pt", tmp_path / "out.pt", patch_size=12, interpolation="bilinear", antialias=False
    )
    assert shapes == ((4, 3, 8, 8), (4, 3, 12, 12))
    expected = polyscale.pi_resize_patch_embed(tensors[NAME], 12, "bilinear", False)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True)[NAME], expected)


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("out.pt", ["--patch-size", "10", "--name", "nope"], "other.kernel"),
        ("out.pt", ["--patch-size", "10", "--name", "head.weight"], "patch_embed"),
        ("out.pt", ["--patch-size", "0"], "--patch-size"),
        ("out.pt", ["--patch-size", "1", "2", "3"], "--patch-size"),
        ("out.pt", ["--patch-size", "ten"], "ten"),
        ("out.pt", ["--patch-size", "10", "--interpolation", "area"], "interpolation"),
        ("out.safetensors", ["--patch-size", "10"], "must both be"),
        ("in.pt", ["--patch-size", "10"], "exists already"),
    ],
)
def test_bad_patch_kernels_are_refused(tmp_path, tensors, output, arguments, message):
    torch.save(tensors, tmp_path / "in.pt")
    before = (tmp_path / "in.pt").read_bytes()
    result = run("convert-patch-embed", tmp_path / "in.pt", tmp_path / output, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert contents(tmp_path) == ["in.pt"]
    assert (tmp_path / "in.pt").read_bytes() == before


def test_patch_kernel_of_a_malicious_pickle(tmp_path):
    torch.save({NAME: torch.zeros(1, 3, 8, 8), "hook": Malicious(tmp_path / "pwned")}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match="refused"):
        convert_patch_embed(tmp_path / "in.pt", tmp_path / "out.pt", patch_size=10)
    assert contents(tmp_path) == ["in.pt"]


def test_several_scales_of_several_scales_are_refused(tmp_path):
    source = save_tiny_s2(tmp_path / "s2")
    with pytest.raises(ValueError, match="s2 is an S2 model, which has several scales already"):
        polyscale.convert_checkpoint(source, tmp_path / "out", to="s2_vision")
    assert contents(tmp_path) == ["s2"]


@pytest.mark.parametrize(
    ("damage", "message"), [("nan", "holds NaN or infinite values"), ("std", "image_std must be above 0")]
)
def test_what_no_model_could_use_is_not_converted(tmp_path, damage, message):
    source = save_tiny_flexivit(tmp_path / "source")
    if damage == "nan":
        weights = load_file(source / "model.safetensors")
        weights["head.classifier.bias"][0] = float("nan")
        save_file(weights, source / "model.safetensors", {"format": "pt"})
    else:
        file = source / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "image_std": [0, 0, 0]}))
    with pytest.raises(ValueError, match=f"`source` .*source cannot be converted: .*{message}"):
        polyscale.convert_checkpoint(source, tmp_path / "out", to="quadtree_vit")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m", 5), "`out` must be a path or a name, got 5"),
        (("m", None), "`out` must be a path or a name, got None"),
        (([], "out"), "`source` must be a path, a name or a model, got a list"),
    ],
)
def test_places_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        polyscale.convert_checkpoint(*arguments)
    with pytest.raises(ValueError, match="`overwrite` must be True or False, got 'no'"):
        polyscale.convert_checkpoint("m", "out", overwrite="no")
    with pytest.raises(ValueError, match="`input` must be a path or a name, got 5"):
        convert_patch_embed(5, "out.pt")
