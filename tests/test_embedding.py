"""Embeddings of many images: the same as one by one, sharded, resumable, damaged images listed."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from typer.testing import CliRunner

from polyscale.embedding import embed_images
from polyscale.loading import load_base_model
from polyscale.searching import search_embeddings
from polyscale.utils.images import open_image
from polyscale.utils.outputs import only_writer
from polyscale_cli import app

from .tiny_checkpoints import save_tiny_flexivit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(tmp_path_factory.mktemp("flexivit"))


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for index in range(7):
        pixels = generator.integers(0, 255, (30 + index, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(images / ("deeper" if index % 2 else ".") / f"{index}.png")
    return images


def read(out):
    tables = [pq.read_table(file) for file in sorted(out.glob("part-*.parquet"))]
    names = [name for table in tables for name in table["file"].to_pylist()]
    return names, [row for table in tables for row in table["embedding"].to_pylist()]


@torch.no_grad()
def expected(checkpoint, file, **budget):
    loaded = load_base_model(checkpoint)
    inputs = loaded.image_processor(open_image(file), return_tensors="pt")
    return loaded.model(**inputs, **budget)


def test_each_embedding_is_that_of_the_image_alone(checkpoint, folder, tmp_path):
    seen = []
    summary = embed_images(
        folder, tmp_path / "out", checkpoint, 8, batch_size=3, shard_size=4, progress=lambda *done: seen.append(done)
    )
    assert (summary.written, summary.found, summary.damaged) == (7, 0, [])
    assert seen[-1] == (7, 7)
    names, rows = read(tmp_path / "out")
    assert names == sorted(str(file) for file in folder.rglob("*.png"))
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 2
    for name, row in zip(names, rows, strict=True):
        alone = expected(checkpoint, name, patch_size=8).pooler_output[0]
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5, rtol=1e-5)


def test_tokens_of_each_image(checkpoint, folder, tmp_path):
    embed_images(folder, tmp_path / "out", checkpoint, 8, tokens=True)
    names, rows = read(tmp_path / "out")
    outputs = expected(checkpoint, names[3], patch_size=8)
    prefix = load_base_model(checkpoint).model.config.num_prefix_tokens
    np.testing.assert_allclose(rows[3], outputs.last_hidden_state[0, prefix:].numpy(), atol=1e-5, rtol=1e-5)


def _vision_models(folder):
    """Models of transformers alone, the patches of a 32 px image in each, and the tokens in front of them."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    plain = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, "vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    clip = CLIPConfig(vision_config=plain, text_config=text, projection_dim=8)
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    dino = Dinov2WithRegistersConfig(**{**plain, "num_register_tokens": 4})
    models = {
        "vit": (ViTModel(ViTConfig(**plain)), 16, 1),
        "clip": (CLIPModel(clip), 16, 1),
        "dino": (Dinov2WithRegistersModel(dino), 16, 5),
        "swin": (SwinModel(swin), 16, 0),
        "resnet": (ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])), 16, 0),
    }
    for name, (model, patches, prefix) in models.items():
        model.eval().save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
        yield folder / name, patches, prefix


@torch.no_grad()
def test_tokens_and_vectors_of_other_models(folder, tmp_path):
    first = sorted(folder.rglob("*.png"))[0]
    for checkpoint, patches, prefix in _vision_models(tmp_path):
        loaded = load_base_model(checkpoint)
        inputs = loaded.image_processor(open_image(first), return_tensors="pt")
        call = getattr(loaded.model, "get_image_features", loaded.model)
        outputs = call(**inputs)
        out, vectors = tmp_path / f"{checkpoint.name}-tokens", tmp_path / f"{checkpoint.name}-vectors"
        embed_images(folder, out, checkpoint, tokens=True)
        tokens = np.array(read(out)[1][0], dtype=np.float32)
        hidden = outputs.last_hidden_state
        hidden = hidden.flatten(2).mT if hidden.ndim == 4 else hidden
        assert tokens.shape == (patches, hidden.shape[-1]), checkpoint.name
        np.testing.assert_allclose(tokens, hidden[0, prefix:].numpy(), atol=1e-4)
        embed_images(folder, vectors, checkpoint)
        np.testing.assert_allclose(read(vectors)[1][0], outputs.pooler_output.flatten(), atol=1e-4)
        found = search_embeddings(vectors, first, top=1)
        assert found[0].file == str(first)
        assert found[0].score == pytest.approx(1, abs=1e-4)


def test_a_killed_run_goes_on_where_it_was(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    embed_images(folder, out, checkpoint, shard_size=3)
    before = read(out)
    second = out / "part-00001.parquet"
    kept = (out / "part-00000.parquet").stat().st_mtime_ns
    second.unlink()  # as a kill during the second shard leaves it
    summary = embed_images(folder, out, checkpoint, shard_size=3)
    assert (summary.written, summary.found) == (3, 4)
    assert read(out) == before
    assert (out / "part-00000.parquet").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="holds embeddings of something else: budget was None and is 8"):
        embed_images(folder, out, checkpoint, 8, shard_size=3)
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_damaged_images_are_listed_and_the_others_embedded(checkpoint, folder, tmp_path):
    (folder / "2.png").write_bytes(b"no image")
    summary = embed_images(folder, tmp_path / "out", checkpoint)
    assert summary.written == 6
    (damaged,) = summary.damaged
    assert damaged["file"] == str(folder / "2.png")
    assert json.loads((tmp_path / "out" / "damaged-00000.json").read_text()) == [damaged]
    assert embed_images(folder, tmp_path / "out", checkpoint).damaged == [damaged]


def test_images_that_were_replaced_are_embedded_again(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    (folder / "2.png").write_bytes(b"no image")
    embed_images(folder, out, checkpoint, shard_size=3)
    before = dict(zip(*read(out), strict=True))
    files = sorted(folder.rglob("*.png"))
    os.utime(files[1], (1, 1))  # a file that was copied is no other image
    assert embed_images(folder, out, checkpoint, shard_size=3)[:2] == (0, 6)

    other = Image.fromarray(np.random.default_rng(9).integers(0, 255, (30, 40, 3)).astype(np.uint8))
    other.save(files[-1])
    assert embed_images(folder, out, checkpoint, shard_size=3)[:2] == (1, 5)
    after = dict(zip(*read(out), strict=True))
    alone = expected(checkpoint, files[-1]).pooler_output[0].numpy()
    np.testing.assert_allclose(after[str(files[-1])], alone, atol=1e-5, rtol=1e-5)
    assert [name for name in before if before[name] != after[name]] == [str(files[-1])]

    other.save(folder / "2.png")  # mended
    summary = embed_images(folder, out, checkpoint, shard_size=3)
    assert (summary.written, summary.found, summary.damaged) == (3, 4, [])
    assert not list(out.glob("damaged-*"))
    assert embed_images(folder, out, checkpoint, shard_size=3) == (0, 7, [])


def test_rows_that_were_replaced_are_embedded_again(checkpoint, folder, tmp_path):
    table, out = tmp_path / "data.parquet", tmp_path / "out"
    contents = [file.read_bytes() for file in sorted(folder.rglob("*.png"))]

    def write(contents):
        cells = [{"bytes": content, "path": None} for content in contents]
        Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()})).to_parquet(table)

    write(contents)
    embed_images(table, out, checkpoint, shard_size=4)
    write(contents)
    assert embed_images(table, out, checkpoint, shard_size=4)[:2] == (0, 7)
    before = read(out)[1]
    write([contents[0], contents[0], *contents[2:]])
    assert embed_images(table, out, checkpoint, shard_size=4)[:2] == (4, 3)
    after = read(out)[1]
    np.testing.assert_allclose(after[1], after[0], rtol=1e-5, atol=1e-5)
    assert after[2:] == before[2:]


def test_what_an_older_version_embedded_is_kept(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    embed_images(folder, out, checkpoint)
    (file,) = out.glob("part-*.parquet")
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    assert embed_images(folder, out, checkpoint)[:2] == (0, 7)


def test_budgets_of_numpy_and_torch_are_recorded_as_numbers(checkpoint, folder, tmp_path):
    for number, (budget, recorded) in enumerate(
        [(np.int64(8), 8), (torch.tensor(8), 8), ((np.int64(8), 16), [8, 16]), ([8, 16], [8, 16])]
    ):
        out = tmp_path / f"out{number}"
        assert embed_images(folder, out, checkpoint, budget).written == 7
        assert json.loads((out / "embedding.json").read_text())["budget"] == recorded


def test_parquet_files_are_a_source_too(checkpoint, folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    data = Dataset.from_dict({"image": [str(file) for file in files]}, features=Features({"image": ImageFeature()}))
    data.to_parquet(tmp_path / "data.parquet")
    embed_images(tmp_path / "data.parquet", tmp_path / "out", checkpoint)
    _, rows = read(tmp_path / "out")
    np.testing.assert_allclose(rows[0], expected(checkpoint, files[0]).pooler_output[0].numpy(), atol=1e-5, rtol=1e-5)
    (tmp_path / "hub" / "data").mkdir(parents=True)  # as data sets of the hub lie
    shutil.move(tmp_path / "data.parquet", tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    embed_images(tmp_path / "hub", tmp_path / "deeper", checkpoint)
    assert read(tmp_path / "deeper") == ([f"train/{row}" for row in range(7)], rows)


def test_the_command(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["embed", str(folder), str(out), "--model", str(checkpoint), "--budget", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Embedded 7 images" in result.output
    again = CliRunner().invoke(app, arguments)
    assert "7 were there already" in again.output
    for wrong, message in (
        (["embed", str(tmp_path / "none"), str(out)], "none"),
        ([*arguments[:-1], "nine"], "`--budget` of a FlexiViT must be patch sizes such as 16 or 10x15, got 'nine'"),
        ([*arguments[:2], str(folder / "0.png"), *arguments[3:]], "0.png"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output


def test_a_folder_of_other_files_is_left_alone(checkpoint, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("kept")
    result = CliRunner().invoke(app, ["embed", str(folder), str(tmp_path / "out"), "--model", str(checkpoint)])
    assert result.exit_code == 2
    assert "holds other files, such as thesis.txt: name a new or empty folder" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_command_fails_where_nothing_could_be_read(checkpoint, folder, tmp_path):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    command = ["embed", str(folder), str(tmp_path / "out"), "--model", str(checkpoint)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "Embedded 0 images" in result.output
    assert "7 could not be read" in result.output
    assert read(tmp_path / "out") == ([], [])
    assert len(json.loads((tmp_path / "out" / "damaged-00000.json").read_text())) == 7


def test_an_array_of_other_channels_is_listed_and_the_others_embedded(checkpoint, folder, tmp_path):
    np.save(folder / "odd.npy", np.zeros((8, 8, 7), np.uint8))
    result = CliRunner().invoke(app, ["embed", str(folder), str(tmp_path / "out"), "--model", str(checkpoint)])
    assert result.exit_code == 0, result.output
    assert "Embedded 7 images" in result.stdout
    assert "odd.npy" in result.stderr
    names, rows = read(tmp_path / "out")
    assert names == sorted(str(file) for file in folder.rglob("*.png"))
    np.testing.assert_allclose(rows[2], expected(checkpoint, names[2]).pooler_output[0].numpy(), atol=1e-5, rtol=1e-5)
    (listed,) = json.loads((tmp_path / "out" / "damaged-00000.json").read_text())
    assert listed["file"] == str(folder / "odd.npy")


def test_a_run_that_came_to_nothing_binds_nobody(checkpoint, folder, tmp_path):
    with pytest.raises(ValueError, match="`patch_size` must not be larger"):
        embed_images(folder, tmp_path / "out", checkpoint, 40)
    assert embed_images(folder, tmp_path / "out", checkpoint, 8).written == 7
    assert json.loads((tmp_path / "out" / "embedding.json").read_text())["budget"] == 8


def test_damaged_outputs_are_named(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    embed_images(folder, out, checkpoint, shard_size=4)
    (out / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-00001\.parquet is damaged .*: remove it, and embed the images again"):
        embed_images(folder, out, checkpoint, shard_size=4)
    with pytest.raises(ValueError, match=r"part-00001\.parquet is damaged"):
        search_embeddings(out, folder / "0.png")
    (out / "part-00001.parquet").unlink()
    assert embed_images(folder, out, checkpoint, shard_size=4).written == 3
    for text in ("", "{", "[]", "null", "{}", '{"tokens": false}', "[" * 100_000):
        (out / "embedding.json").write_text(text)
        for call in (
            lambda: embed_images(folder, out, checkpoint, shard_size=4),
            lambda: search_embeddings(out, folder / "0.png"),
        ):
            with pytest.raises(ValueError, match=r"`out` .* holds a damaged embedding\.json"):
                call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 5}, "`source` must be a path or a name, got 5"),
        ({"source": ""}, "`source` must be a path or a name, got ''"),
        ({"source": None}, "`source` must be a path or a name, got None"),
        ({"source": b"images"}, "`source` must be a path or a name, got b'images'"),
        ({"out": 5}, "`out` must be a path or a name, got 5"),
        ({"model": 5}, "`model` must be a path or a name, got 5"),
        ({"model": ""}, "`model` must be a path or a name, got ''"),
        ({"budget": True}, "`patch_size` must be an int or a pair .*, got True"),
        ({"budget": float("nan")}, "`patch_size` must be an int or a pair .*, got nan"),
        ({"budget": -3}, "`patch_size` must be at least 1"),
        ({"budget": [4, 8, 8]}, "`patch_size` must be an int or a pair"),
        ({"tokens": "no"}, "`tokens` must be True or False, got 'no'"),
        ({"batch_size": True}, "`batch_size` must be an int of at least 1, got True"),
        ({"shard_size": 0}, "`shard_size` must be an int of at least 1, got 0"),
        ({"num_workers": 1.5}, "`num_workers` must be an int of at least 1, got 1.5"),
    ],
)
def test_arguments_that_are_none(checkpoint, folder, tmp_path, change, message):
    arguments = {"source": folder, "out": tmp_path / "out", "model": checkpoint} | change
    with pytest.raises(ValueError, match=message):
        embed_images(**arguments)


@pytest.mark.slow
def test_two_processes_share_the_images(checkpoint, folder, tmp_path):
    embed_images(folder, tmp_path / "alone", checkpoint, shard_size=2)
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "polyscale", "embed", str(folder)]
    options = [str(tmp_path / "shared"), "--model", str(checkpoint), "--shard-size", "2"]
    result = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = sorted(int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("Embedded"))
    assert counts == [3, 4]  # four shards of 2, 2, 2 and 1 images
    names, rows = read(tmp_path / "alone")
    shared_names, shared_rows = read(tmp_path / "shared")
    assert shared_names == names
    np.testing.assert_allclose(shared_rows, rows, atol=1e-6, rtol=1e-5)


def test_a_run_goes_on_with_the_same_model_and_images_alone(checkpoint, folder, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    embed_images(folder, out, model, 8, shard_size=4)
    whole = read(out)
    (out / "part-00001.parquet").unlink()
    weights, processing = model / "model.safetensors", model / "preprocessor_config.json"
    kept = weights.read_bytes(), processing.read_text()

    changed = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds embeddings of something else: weights was '.*' and is '"):
        embed_images(folder, out, model, 8, shard_size=4)
    with pytest.raises(ValueError, match=r"of '.*model' as it was: weights was .* Embed the images again"):
        search_embeddings(out, folder / "0.png")
    weights.write_bytes(kept[0])
    processing.write_text(kept[1].replace("32", "48"))
    with pytest.raises(ValueError, match="processing size height was 32 and is 48"):
        embed_images(folder, out, model, 8, shard_size=4)
    processing.write_text(kept[1])
    other = (folder / "0.png").rename(folder / "00.png")
    with pytest.raises(ValueError, match="something else: names was"):
        embed_images(folder, out, model, 8, shard_size=4)
    other.rename(folder / "0.png")

    with (
        only_writer(out, "out", "embedding"),
        pytest.raises(ValueError, match=r"`out` .* is being written by another embedding"),
    ):
        embed_images(folder, out, model, 8, shard_size=4)
    assert embed_images(folder, out, model, 8, shard_size=4)[:2] == (3, 4)
    assert read(out) == whole
