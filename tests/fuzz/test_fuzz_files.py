"""Checkpoint files with bytes changed, cut off or added, and converters that read them."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from transformers import ViTConfig, ViTForImageClassification

import polyscale
from polyscale.conversion import convert_patch_embed
from polyscale.utils.checkpoint_files import load_state_dict_file

from .outcomes import anything, cases, clear_error_at_most


TENSORS = {"patch_embed.proj.weight": torch.randn(4, 3, 8, 8), "pos_embed": torch.randn(1, 17, 4)}


def _bytes_of(kind: str) -> bytes:
    if kind == ".safetensors":
        return save_safetensors(TENSORS)
    buffer = io.BytesIO()
    if kind == ".npz":
        np.savez_compressed(buffer, **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    elif kind == ".pt":
        torch.save({"model": TENSORS, "epoch": 3}, buffer)
    else:
        torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


WHOLE = {kind: _bytes_of(kind) for kind in (".safetensors", ".npz", ".pt", ".pth")}


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        # most of what a parser reads stands at the beginning or the end
        near = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, 400), st.integers(-400, -1))
        place = draw(near) % max(len(content), 1)
        kind = draw(st.sampled_from(["change", "cut", "insert", "swap"]))
        if kind == "change":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        else:
            content = content[place:] + content[:place]
    return bytes(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", WHOLE)
@cases(30)
@given(data=st.data())
def test_damaged_weights(kind, place, data):
    path = place / f"weights{kind}"
    path.write_bytes(data.draw(st.one_of(damaged(WHOLE[kind]), st.binary(max_size=64))))
    with clear_error_at_most():
        state_dict = load_state_dict_file(path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values())
    if kind != ".npz":
        with clear_error_at_most():
            convert_patch_embed(path, place / f"out{kind}", patch_size=4, overwrite=True)


@pytest.fixture(scope="module")
def vit(place):
    torch.manual_seed(0)
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**fields, image_size=16, patch_size=8)).save_pretrained(place / "vit")
    return place / "vit"


@pytest.mark.parametrize("to", ["flexivit", "quadtree_vit", "s2_vision"])
@cases(6)
@given(data=st.data())
def test_converters_of_damaged_folders(to, vit, place, data):
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(vit, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    record = json.loads(config.read_text())
    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=3,
    )
    what = data.draw(st.sampled_from(["field", "config", "weights", "index"]))
    if what == "field":
        name = data.draw(st.sampled_from(sorted(record)))
        config.write_text(json.dumps({**record, name: data.draw(json_values)}))
    elif what == "config":
        config.write_bytes(
            data.draw(st.one_of(damaged(config.read_bytes()), json_values.map(json.dumps).map(str.encode)))
        )
    elif what == "weights":
        weights.write_bytes(data.draw(damaged(weights.read_bytes())))
    else:
        weights.rename(place / "elsewhere.safetensors")
        names = dict.fromkeys(("vit.embeddings.cls_token",), "../elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with clear_error_at_most():
        polyscale.convert_checkpoint(folder, place / "out", to=to, overwrite=True)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@cases(15)
@given(source=anything, to=st.sampled_from(["flexivit", "sparseformer", "s2_vision", "resnet"]))
def test_converters_of_anything(source, to, place):
    with clear_error_at_most():
        polyscale.convert_checkpoint(source, place / "nothing", to=to)
    assert not (place / "nothing").exists()
