"""Folders of weight files, whole or in shards, read one tensor at a time into a model that is there already."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .checkpoint_files import check_index, load_torch_file


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TOLD = 300  # characters of another library's error that are passed on


class DamagedWeightsError(ValueError):
    """A file of weights that is missing or not whole. The message names it."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is missing or no JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is missing or no readable JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got {type(record).__name__}.")
    return record


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Leaves out the table of tensors that do not fit, which transformers prints: here they are looked at."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def reading_part(part: Path, what: str) -> Iterator[None]:
    """Says which part of a checkpoint an error is about, whatever a library raises at it.

    Args:
        part (`Path`): the file or folder that is read.
        what (`str`): of it is read: "tokenizer".

    Raises:
        ValueError: naming the part.
    """
    try:
        yield
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, ValueError) and str(part) in str(error):
            raise
        reason = " ".join(str(error).split())[:_TOLD]
        told = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
        raise ValueError(f"`{part}`: its {what} cannot be used: {told.rstrip('.')}.") from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, by its sum; integers and packed formats never do."""
    return tensor.dtype not in _FLOATS or bool(tensor.sum(dtype=torch.float32).isfinite())


def check_weight_files(folder: Path) -> None:
    """Finds what is missing or cut off in a folder's weights before any of them is read.

    Raises:
        ValueError: naming the file: where a shard is missing, an index names files outside of the folder, or a
            safetensors file is not whole.
    """
    check_index(folder)
    for index in folder.glob("*.index.json"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DamagedWeightsError(
                f"`{folder}` is incomplete: {index.name} names {len(names)} files of weights, and {missing[0]!r} is "
                "not there. Download it again."
            )
    for file in sorted(folder.glob("*.safetensors")):
        with _readable(file), safe_open(file, framework="pt", device="cpu"):
            pass


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights.

    Raises:
        ValueError: where there are none, and as `check_weight_files`.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"`{folder}` has no weights: expected model*.safetensors or pytorch_model*.bin.")
    check_weight_files(folder)
    return files


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DamagedWeightsError(
            f"`{file}` is not a readable safetensors file: {error}. Download it again."
        ) from error


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, left on disk until they are used where the file's format allows that."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):  # the old format cannot be mapped; a refused pickle gets its reason
        return load_torch_file(file)


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's weight files, one at a time, from mapped files.

    Raises:
        ValueError: if there are none, a shard is missing, a file is damaged, or a pickle holds more than tensors.
    """
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with _readable(file):
                tensors = safe_open(file, framework="pt", device="cpu")
            with tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name)
        else:
            yield from _mapped(file).items()


def model_to_fill(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of images and text in evaluation mode, with memory for its weights and no values in it."""
    with no_init_weights():  # the Auto classes draw the weights of a model that is made from a config
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def fill_parameter(parameter: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    """Copies a tensor; an embedding may have fewer rows than the model, whose others become the mean.

    Raises:
        ValueError: for another shape.
    """
    is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    rows = tensor.shape[0] if tensor.ndim else 0
    if tensor.shape == parameter.shape:
        parameter.copy_(tensor)
    elif is_vocabulary and tensor.shape[1:] == parameter.shape[1:] and rows < parameter.shape[0]:
        parameter[:rows].copy_(tensor)
        parameter[rows:] = tensor.mean(dim=0, dtype=torch.float32).to(parameter.dtype)
    else:
        raise ValueError(f"{name!r} has the shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}.")


def fill_model(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    new_name: Callable[[str], str | None],
    filled: str,
    tied: tuple[str, ...] = (),
    hint: str = "",
) -> None:
    """Copies tensors into the parameters of a model, one at a time.

    Args:
        model (`nn.Module`): with memory for its parameters.
        weights (`Iterable[tuple[str, torch.Tensor]]`): names and tensors; of a name that comes twice the later counts.
        new_name (`Callable`): gives the name in `model` of a tensor's name; `None` for what is no weight.
        filled (`str`): beginning of the names of parameters that hold their values already.
        tied (`tuple[str, ...]`, *optional*): names of parameters that are others of the model.
        hint (`str`, *optional*): what an error about a tensor that does not belong ends with.

    Raises:
        ValueError: for a tensor that does not belong, one of another shape, or parameters that were not filled.
    """
    parameters = dict(model.named_parameters())
    wanted = {name for name in parameters if not name.startswith(filled) and name not in tied}
    with torch.no_grad():
        for old, tensor in weights:
            name = new_name(old)
            if name is None or name in tied:
                continue
            if name not in parameters:
                raise ValueError(f"The checkpoint holds {old!r}, which this model does not have{hint or '.'}")
            fill_parameter(parameters[name], tensor, name)
            wanted.discard(name)
    if wanted:
        raise ValueError(f"The checkpoint lacks {len(wanted)} weights of the model, {sorted(wanted)[0]!r} among them.")


__all__ = [
    "DamagedWeightsError",
    "check_weight_files",
    "fill_model",
    "fill_parameter",
    "is_finite",
    "iterate_tensors",
    "model_to_fill",
    "quiet_loading",
    "read_json",
    "reading_part",
    "weight_files",
]
