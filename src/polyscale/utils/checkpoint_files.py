"""Other people's checkpoint files: reading them without running their code, renaming tensors with nothing lost.

safetensors hold nothing but tensors; `.npz` is read without pickle; `.pt` and its kin are read by torch's restricted
unpickler (`weights_only=True`), and a file that wants more than tensors is refused.
"""

import json
import os
import pickle
import re
import socket
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel


SAFETENSORS_SUFFIXES = (".safetensors",)
NUMPY_SUFFIXES = (".npz",)
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
CHECKPOINT_SUFFIXES = SAFETENSORS_SUFFIXES + NUMPY_SUFFIXES + TORCH_SUFFIXES

# Where training scripts put the weights inside what they save; the averaged ones are those they evaluate.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What DistributedDataParallel and torch.compile put before each name.
_NAME_PREFIXES = ("module.", "_orig_mod.")
# A compressed file may grow to this many bytes, or to this many times its own size: weights hardly compress.
_MAX_UNPACKED, _MAX_GROWTH = 1 << 26, 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECONDS_FOR_AN_ANSWER = 5
_SHOWN = 8  # names in an error message; a wrong layout would print hundreds


def _check_readable(path: str | os.PathLike) -> None:
    """Raises where there is no such file, or it is a device or a pipe, which may never end."""
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no checkpoint file `{path}`.")
    if not Path(path).is_file():
        raise ValueError(f"`{path}` is no ordinary file.")


def _check_unpacked_size(path: str | os.PathLike, size: int) -> None:
    if size > max(_MAX_UNPACKED, _MAX_GROWTH * Path(path).stat().st_size):
        raise ValueError(
            f"`{path}` is refused: its {Path(path).stat().st_size} bytes would unpack to {size}, as weights never do."
        )


def _check_archive(path: str | os.PathLike) -> None:
    """Refuses a zip archive that unpacks to far more than its own size."""
    with zipfile.ZipFile(path) as archive:
        _check_unpacked_size(path, sum(entry.file_size for entry in archive.infolist()))


def load_safetensors_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file on the CPU, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not in that format, or damaged.
    """
    _check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` is not a readable safetensors file: {error}.") from error


def load_npz_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file, read without pickle.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such archive, is damaged, holds pickled objects or arrays of other things than
            numbers, or would unpack to far more than its own size.
    """
    _check_readable(path)
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except PermissionError:
        raise
    except Exception as error:  # NumPy's parsers raise a dozen kinds at a file that lies, none of them a fault here
        raise ValueError(
            f"`{path}` is refused: a `.npz` file of plain arrays was expected, and it is no whole archive or holds "
            f"pickled Python objects, which can run code when they are read ({type(error).__name__}: {error})."
        ) from error
    for name, array in arrays.items():
        is_number = array.dtype.kind in "biuf" or (array.dtype.kind == "V" and array.dtype.itemsize == 2)
        if not is_number or array.size == 0:
            raise ValueError(
                f"`{path}` is refused: `{name}` must be an array of numbers with at least one entry, got the shape "
                f"{array.shape} of {array.dtype}."
            )
    return arrays


def load_torch_file(path: str | os.PathLike) -> Any:
    """What `torch.save` wrote, on the CPU, if it consists of tensors and plain containers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file wants to build other Python objects (which can run code), cannot be read, or would
            unpack to far more than its own size.
    """
    _check_readable(path)
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`{path}` is refused: it is a pickle that holds more than tensors and plain containers, and unpickling "
            "such objects can run code on this machine. Where you trust the file, load it yourself and save its "
            f"`state_dict` as safetensors. (torch: {reason})"
        ) from error
    except Exception as error:  # torch's unpickler raises a dozen kinds at a file that lies, none of them a fault here
        raise ValueError(f"`{path}` is not a readable PyTorch checkpoint: {type(error).__name__}: {error}.") from error


def check_index(folder: str | os.PathLike) -> None:
    """Refuses a folder whose index of shards names files outside of it.

    Raises:
        ValueError: naming the index and the file.
    """
    for index in Path(folder).glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = sorted(name for name in names if Path(name).name != name or name in ("..", "."))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"`{index}` is no readable index of weight files: {error}.") from error
        if outside:
            raise ValueError(f"`{index}` is refused: it names {outside[0]!r}, which is no file beside it.")


def check_hub_name(name: str, what: str = "source") -> None:
    """Refuses at once what cannot come from the Hub, where a library would ask for it again and again.

    Args:
        name (`str`): what is no local file or folder.
        what (`str`, *optional*, defaults to `"source"`): the argument that it was given as.

    Raises:
        FileNotFoundError: for a path.
        ConnectionError: for a name that is not in the cache while the Hub cannot be reached.
    """
    if not _HUB_NAME.fullmatch(name) or (name.count("/") == 1 and Path(name).parent.is_dir()):
        raise FileNotFoundError(f"There is no file or folder `{name}` (`{what}`).")
    is_answered_at_once = constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if is_answered_at_once or urllib.request.getproxies():
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname, port), timeout=_SECONDS_FOR_AN_ANSWER).close()
    except OSError as error:
        raise ConnectionError(
            f"`{name}` (`{what}`) is no local file or folder, and this machine is offline: {host.hostname} cannot be "
            f"reached ({error}). Give the path of a local checkpoint."
        ) from error


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor; NumPy reads bfloat16, which it does not know, as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def unwrap_state_dict(checkpoint: Any, path: str | os.PathLike = "checkpoint") -> dict[str, torch.Tensor]:
    """The state dict inside what a training script saved: wrappers such as {"model": ...} and "module." are removed.

    Raises:
        ValueError: if no mapping from names to tensors is found.
    """
    state_dict = checkpoint
    for _ in _WRAPPERS:  # one may hold itself
        if not isinstance(state_dict, dict):
            break
        inner = next((state_dict[key] for key in _WRAPPERS if isinstance(state_dict.get(key), dict)), None)
        if inner is None:
            break
        state_dict = inner
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    )
    if not is_state_dict or not state_dict:
        kind = type(state_dict).__name__
        raise ValueError(f"`{path}` holds no state dict (names and tensors): found {kind} instead.")
    for prefix in _NAME_PREFIXES:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix) :]: tensor for name, tensor in state_dict.items()}
    return state_dict


def load_state_dict_file(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file of any supported format, by its suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown suffix, an unreadable file, or a pickle that wants more than tensors.
    """
    path = Path(path)
    _check_readable(path)
    suffix = path.suffix.lower()
    if suffix in SAFETENSORS_SUFFIXES:
        return load_safetensors_file(path)[0]
    if suffix in NUMPY_SUFFIXES:
        return {name: as_tensor(array) for name, array in load_npz_file(path).items()}
    if suffix in TORCH_SUFFIXES:
        state_dict = unwrap_state_dict(load_torch_file(path), path)
        for name, tensor in state_dict.items():
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                kind = f"{tensor.layout} on {tensor.device}"
                raise ValueError(f"`{path}` is refused: `{name}` must be a plain tensor, it is {kind}.")
        # An expanded tensor claims more than the file holds, and takes that memory when it is copied.
        _check_unpacked_size(path, sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values()))
        return state_dict
    raise ValueError(f"`{path}` has no suffix of a checkpoint: expected one of {', '.join(CHECKPOINT_SUFFIXES)}.")


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def rename_keys(
    state_dict: dict[str, torch.Tensor], rules: Iterable[tuple[str, str | None]], source: str
) -> dict[str, torch.Tensor]:
    """Each name replaced by the first rule that matches all of it; a rule with None drops the tensor.

    Args:
        state_dict: names and tensors.
        rules: (regular expression, replacement) pairs.
        source: what the tensors come from, for the error.

    Raises:
        ValueError: if some name fits no rule.
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            match = pattern.fullmatch(name)
            if match:
                if replacement is not None:
                    renamed[match.expand(replacement)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{source} holds tensors of an unknown layout, which would be lost: {_listing(unknown)}.")
    return renamed


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights (on torch's meta device)."""
    with torch.device("meta"):
        return model_class(config)


def check_state_dict(state_dict: dict[str, torch.Tensor], model: torch.nn.Module, source: str) -> None:
    """Compares the tensors with those that `model` wants.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    problems = []
    if missing := wanted.keys() - state_dict.keys():
        problems.append(f"missing: {_listing(missing)}")
    if unexpected := state_dict.keys() - wanted.keys():
        problems.append(f"unexpected: {_listing(unexpected)}")
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state_dict.keys()
        if state_dict[name].shape != wanted[name].shape
    ]
    if misshapen:
        problems.append(f"other shapes: {_listing(misshapen)}")
    if problems:
        raise ValueError(f"The tensors of {source} do not fit: {'; '.join(problems)}.")


def model_from_state_dict(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state_dict: dict[str, torch.Tensor], source: str
) -> PreTrainedModel:
    """A model in evaluation mode that holds these tensors, without a random initialisation on the way.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another shape.
    """
    model = empty_model(model_class, config)
    check_state_dict(state_dict, model, source)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


__all__ = [
    "CHECKPOINT_SUFFIXES",
    "NUMPY_SUFFIXES",
    "SAFETENSORS_SUFFIXES",
    "TORCH_SUFFIXES",
    "as_tensor",
    "check_hub_name",
    "check_index",
    "check_state_dict",
    "empty_model",
    "load_npz_file",
    "load_safetensors_file",
    "load_state_dict_file",
    "load_torch_file",
    "model_from_state_dict",
    "rename_keys",
    "unwrap_state_dict",
]
