"""What the answers of a model depend on, in a few words: to tell later whether it is still the same one."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor


_VALUES = 64  # that are read of each tensor
# What the record of an image processor holds beside what it does to images.
_NAMES_ALONE = ("image_processor_type", "processor_class", "auto_map")


def digest_of(texts: Iterable[str]) -> str:
    """A short digest of texts, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def file_digest(file: Path) -> str:
    """SHA-256 of what is in a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def image_digest(stored: Any) -> str:
    """A digest of an image as it is stored: a file, a cell of a table with its bytes or path, or an array; empty where
    it cannot be read.
    """
    if isinstance(stored, dict):
        path = stored.get("path")
        stored = Path(path) if stored.get("bytes") is None and path is not None else stored.get("bytes")
    if isinstance(stored, Path):
        try:
            return file_digest(stored) if stored.is_file() else ""
        except OSError:
            return ""
    return hashlib.sha256(stored if isinstance(stored, bytes) else np.asarray(stored).tobytes()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Tells the weights of a model from other weights, wherever it runs: a digest of some values of every tensor.

    Training changes them all. Tensors that are not there as plain values (offloaded, quantized) count by their shape.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta:
            values = tensor.detach().flatten()
            digest.update(values[:: max(len(values) // _VALUES, 1)][:_VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def processing_of(processor: BaseImageProcessor) -> dict[str, Any]:
    """What an image processor does to images (size, crop, mean, ...), as JSON holds it."""
    fields = json.loads(json.dumps(processor.to_dict(), default=str))
    return {name: value for name, value in sorted(fields.items()) if name not in _NAMES_ALONE}


def changes_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, such as "size was 32 and is 64"; what one of the two does not have counts as `None`."""
    changes = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += [f"{name} {change}" for change in changes_of(old, new)]
        elif old != new:
            changes.append(f"{name} was {old!r} and is {new!r}")
    return changes


__all__ = ["changes_of", "digest_of", "file_digest", "image_digest", "processing_of", "weights_digest"]
