"""FlexiViT's released weights: `.npz` files of google-research/big_vision (JAX, `models/proj/flexi/vit.py`)."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils.checkpoint_files import as_tensor, load_npz_file
from ..utils.downloads import download_once
from .common import FLEXIVIT_KERNEL, FlexiViTSource, imagenet_labels, label_maps, make_image_processor, make_source


RELEASE_URL = "https://storage.googleapis.com/big_vision/flexivit/{name}.npz"
RELEASED_NAMES = (
    *(f"flexivit_{size}_i1k{epochs}" for size in "sbl" for epochs in ("", "_600ep", "_300ep", "_90ep")),
    *(f"flexivit_b_i21k_{epochs}ep" for epochs in (1000, 300, 90)),
    "vit_b16_i21k_300ep",
    "vit_b30_i21k_300ep",
)
IMAGE_SIZE = 240  # of every released model; the file does not say

_LAYER = re.compile(r"Transformer/encoderblock(?:_(\d+))?/(.+)")
_ATTENTION = "MultiHeadDotProductAttention_0"
_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_NORMS = {"LayerNorm_0": "layernorm_before", "LayerNorm_1": "layernorm_after"}
_LINEARS = {"MlpBlock_0/Dense_0": "mlp.fc1", "MlpBlock_0/Dense_1": "mlp.fc2"}
_WEIGHT_OR_BIAS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def released_file(name: str) -> Path:
    """The local copy of a released file: one of `RELEASED_NAMES`, with or without ".npz", downloaded at first use.

    Raises:
        ConnectionError: if it cannot be downloaded.
    """
    return download_once(RELEASE_URL.format(name=name.removesuffix(".npz")), name)


def _parameters(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's arrays alone: training checkpoints keep them under "params/", beside the optimiser's."""
    prefix = "params/"
    if any(name.startswith(prefix) for name in arrays):
        return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    return arrays


def _unstack_layers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layout with one array for all layers (leading axis) as the one with an array for each."""
    separate = {}
    for name, array in arrays.items():
        match = _LAYER.fullmatch(name)
        if match and match[1] is None:
            separate |= {f"Transformer/encoderblock_{i}/{match[2]}": layer for i, layer in enumerate(array)}
        else:
            separate[name] = array
    return separate


def _convert_layer_tensor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """A tensor of one layer by our name, heads merged and matrices transposed; None for an unknown name."""
    module, _, leaf = name.rpartition("/")
    kind = _WEIGHT_OR_BIAS.get(leaf)
    projection = module.removeprefix(f"{_ATTENTION}/")
    if kind is None:
        return None
    if module in _NORMS:
        return f"{_NORMS[module]}.{kind}", tensor
    if module in _LINEARS:
        return f"{_LINEARS[module]}.{kind}", tensor.T if kind == "weight" else tensor
    if projection in _QKV:  # kernel (width, heads, head width), bias (heads, head width)
        return f"attention.{_QKV[projection]}.{kind}", tensor.flatten(1).T if kind == "weight" else tensor.flatten()
    if module == f"{_ATTENTION}/out":  # kernel (heads, head width, width)
        return f"attention.o_proj.{kind}", tensor.flatten(0, 1).T if kind == "weight" else tensor
    return None


def _convert_tensor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    match = _LAYER.fullmatch(name)
    if match:
        converted = _convert_layer_tensor(match[2], tensor)
        return None if converted is None else (f"layers.{match[1]}.{converted[0]}", converted[1])
    fixed = {
        "embedding/kernel": ("embeddings.patch_embeddings.projection.weight", (3, 2, 0, 1)),
        "embedding/bias": ("embeddings.patch_embeddings.projection.bias", None),
        "cls": ("embeddings.prefix_tokens.cls_token", None),
        "pos_embedding": ("embeddings.position_embeddings", None),
        "Transformer/encoder_norm/scale": ("layernorm.weight", None),
        "Transformer/encoder_norm/bias": ("layernorm.bias", None),
        "head/kernel": ("head.classifier.weight", (1, 0)),
        "head/bias": ("head.classifier.bias", None),
    }
    if name not in fixed:
        return None
    ours, axes = fixed[name]
    return ours, tensor.permute(axes) if axes else tensor


def _check_layout(arrays: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    required = ("embedding/kernel", "pos_embedding", "Transformer/encoder_norm/scale")
    absent = [name for name in required if name not in arrays]
    if absent:
        raise ValueError(
            f"`{path}` has an unknown layout: expected a ViT of big_vision, which holds {', '.join(required)} (under "
            f"`params/` or not); missing {', '.join(absent)}; found {', '.join(sorted(arrays)[:5])}, ..."
        )
    query = f"Transformer/encoderblock_0/{_ATTENTION}/query/kernel"
    shapes = {"embedding/kernel": 4, "pos_embedding": 3, query: 3}
    for name, ndim in shapes.items():
        if name not in arrays or arrays[name].ndim != ndim:
            found = tuple(arrays[name].shape) if name in arrays else "nothing"
            raise ValueError(f"`{path}` has an unknown layout: `{name}` must have {ndim} axes, found {found}.")


def load_npz_source(path: str | os.PathLike, **overrides: Any) -> FlexiViTSource:
    """A big_vision `.npz` as FlexiViT; sizes are read from the arrays.

    Args:
        path: the file; layers may be separate or stacked, parameters under "params/" or not.
        overrides: config fields to set otherwise, for instance `image_size` (240) or `patch_size`.

    Raises:
        ValueError: for pickled content, an unknown layout, or arrays of which no use is known.
    """
    arrays = _unstack_layers(_parameters(load_npz_file(path)))
    _check_layout(arrays, path)
    state_dict, unknown = {}, []
    for name, array in arrays.items():
        converted = _convert_tensor(name, as_tensor(array).float())
        if converted is None:
            unknown.append(name)
        else:
            state_dict[converted[0]] = converted[1].contiguous()
    if unknown:
        raise ValueError(
            f"`{path}` holds arrays of which no use is known: {', '.join(sorted(unknown)[:8])}. Models with attention "
            "pooling (`MAPHead_0`) or a representation layer (`pre_logits`) are not supported."
        )

    kernel_height, kernel_width, num_channels, hidden_size = arrays["embedding/kernel"].shape
    num_positions = arrays["pos_embedding"].shape[1]
    grid = round(num_positions**0.5)
    if grid * grid != num_positions and "position_grid" not in overrides:
        raise ValueError(f"`{path}` has {num_positions} positions, which are no square: give `position_grid`.")
    layer_numbers = [int(match[1]) for match in map(_LAYER.fullmatch, arrays) if match]
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layer_numbers) + 1,
        "num_attention_heads": arrays[f"Transformer/encoderblock_0/{_ATTENTION}/query/kernel"].shape[1],
        "intermediate_size": arrays["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1],
        "hidden_act": "gelu_pytorch_tanh",  # flax's GELU
        "layer_norm_eps": 1e-6,
        "num_channels": num_channels,
        "image_size": IMAGE_SIZE,
        "base_patch_size": [kernel_height, kernel_width],
        "position_grid": [grid, grid],
        "prefix_positions": "none",
        "position_interpolation": "bilinear",
        "position_antialias": True,  # jax.image.resize
        "use_cls_token": "cls" in arrays,
        "pooling": "cls" if "cls" in arrays else "mean",
        **FLEXIVIT_KERNEL,
    }
    if "head/bias" in arrays:
        num_labels = len(arrays["head/bias"])
        fields |= label_maps(imagenet_labels(num_labels), num_labels)
    processor = make_image_processor(num_channels, image_mean=[0.5] * num_channels, image_std=[0.5] * num_channels)
    return make_source(fields, state_dict, processor, f"`{path}`", overrides)


__all__ = ["RELEASED_NAMES", "load_npz_source", "released_file"]
