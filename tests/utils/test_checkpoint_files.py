"""Checkpoint files are read without running their code."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from polyscale.utils.checkpoint_files import (
    as_tensor,
    check_hub_name,
    check_index,
    check_state_dict,
    load_state_dict_file,
    rename_keys,
    unwrap_state_dict,
)


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def assert_equal(actual, expected=TENSORS):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_every_format_gives_the_same_tensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    torch.save(TENSORS, tmp_path / "x.pt")
    torch.save(
        {"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}, "epoch": 3}, tmp_path / "x.pth"
    )
    for name in ("x.safetensors", "x.npz", "x.pt", "x.pth"):
        assert_equal(load_state_dict_file(tmp_path / name))


def test_averaged_weights_come_before_the_others():
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    assert_equal(unwrap_state_dict({"state_dict": other, "state_dict_ema": TENSORS}))


def test_bfloat16_in_npz(tmp_path):
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    raw = values.view(torch.int16).numpy().view("V2")
    assert torch.equal(as_tensor(raw), values)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".npz", ".safetensors"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, suffix):
    marker, path = tmp_path / "pwned", tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"weight": Malicious(marker)}, protocol=2))
    with pytest.raises(ValueError, match="evil"):
        load_state_dict_file(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the file does bite where nothing guards
    assert marker.exists()


def test_a_torch_file_that_runs_code_is_refused_with_the_reason(tmp_path):
    marker, path = tmp_path / "pwned", tmp_path / "evil.pth"
    torch.save({"state_dict": TENSORS, "hook": Malicious(marker)}, path)
    with pytest.raises(ValueError, match=r"refused.*run code"):
        load_state_dict_file(path)
    assert not marker.exists()


def test_object_arrays_in_npz_are_refused(tmp_path):
    marker, path = tmp_path / "pwned", tmp_path / "evil.npz"
    np.savez(path, weight=np.array([Malicious(marker)], dtype=object))
    with pytest.raises(ValueError, match="refused"):
        load_state_dict_file(path)
    assert not marker.exists()


def test_unreadable_files_are_named(tmp_path):
    for suffix in (".pt", ".npz", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match="broken"):
            load_state_dict_file(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_state_dict_file(tmp_path / "absent.pt")
    (tmp_path / "weights.pickle").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.safetensors"):
        load_state_dict_file(tmp_path / "weights.pickle")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_state_dict_file(tmp_path / "list.pt")


def test_rename_keys_loses_nothing():
    rules = [(r"a\.(weight|bias)", r"c.\1"), (r"b", None)]
    assert_equal(rename_keys(TENSORS, rules, "it"), {"c.weight": TENSORS["a.weight"]})
    with pytest.raises(ValueError, match=r"it holds.*: b\."):
        rename_keys(TENSORS, rules[:1], "it")


def test_check_state_dict_names_every_problem():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"missing: bias; unexpected: b; other shapes: weight is \(1, 2\)"):
        check_state_dict({"weight": torch.zeros(1, 2), "b": torch.zeros(1)}, model, "it")
    check_state_dict(model.state_dict(), model, "it")


def save_bomb(path, name, header=b""):
    """An archive of a hundred megabytes of zeros, in a few hundred kilobytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as entry:
        entry.write(header)
        for _ in range(100):
            entry.write(bytes(1 << 20))


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused_unread(tmp_path, name, monkeypatch):
    save_bomb(tmp_path / name, "a.npy")
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"bytes would unpack to 104857600"):
        load_state_dict_file(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npz", ".safetensors"])
def test_a_file_cut_short_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    elif suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.") as caught:
            load_state_dict_file(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [np.zeros((10**9, 0)), np.array(["text"]), np.array([b"bytes"]), np.zeros(3, "M8[s]"), np.zeros(2, "i4,f4")],
)
def test_arrays_that_are_no_weights_are_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(ValueError, match=r"`a` must be an array of numbers"):
        load_state_dict_file(tmp_path / "x.npz")


def test_tensors_that_claim_more_memory_than_their_file_holds_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 30)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="would unpack to 4294967296"):
        load_state_dict_file(tmp_path / "x.pt")
    torch.save({"a": torch.zeros(4, device="meta")}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="must be a plain tensor"):
        load_state_dict_file(tmp_path / "y.pt")


def test_a_checkpoint_that_holds_itself_ends(tmp_path):
    checkpoint = {"epoch": 1}
    checkpoint["model"] = checkpoint
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_state_dict_file(tmp_path / "x.pt")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="no ordinary file"):
        load_state_dict_file(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, None])
def test_an_index_that_names_other_folders_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        check_index(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_index(tmp_path)


def test_what_cannot_come_from_the_hub_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("models/absent", "./absent", "/absent", "~/absent", "a/b/c", "", "a b"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            check_hub_name(path)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    for name in ("nobody/nothing", "nothing"):
        with pytest.raises(ConnectionError, match="offline"):
            check_hub_name(name)
