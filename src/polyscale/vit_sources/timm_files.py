"""Weights files and folders of timm's `vit_*`, `deit_*` and `flexivit_*` as FlexiViT.

A folder may come from anyone: it may say what its model is made of, and name no other file and no code.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.checkpoint_files import check_state_dict, load_state_dict_file
from .common import FlexiViTSource
from .timm_parts import check_supported
from .timm_vit import import_timm, is_timm_name, source_from_timm_model


# What a folder may say about its model: the parts that a `VisionTransformer` is made of, and no files.
_ALLOWED_ARGS = frozenset(
    {
        *("act_layer", "attn_drop_rate", "class_token", "depth", "drop_path_rate", "drop_rate", "dynamic_img_pad"),
        *("dynamic_img_size", "embed_dim", "fc_norm", "final_norm", "global_pool", "img_size", "in_chans"),
        *("init_values", "mlp_ratio", "no_embed_class", "norm_layer", "num_classes", "num_heads"),
        *("patch_drop_rate", "patch_size", "pool_include_prefix", "pos_drop_rate", "pos_embed", "pre_norm"),
        *("proj_bias", "proj_drop_rate", "qk_norm", "qkv_bias", "reg_tokens", "swiglu_mlp"),
    }
)
_ARCHITECTURE = re.compile(r"\w+(\.\w+)?")
_MAX_SIDE = 1 << 16  # of anything that a folder says about its model's sizes


def _is_plain(value: Any) -> bool:
    """Whether a value is a number of ordinary size, a word, or a short list of such."""
    if isinstance(value, list | tuple):
        return len(value) <= 2 and all(map(_is_plain, value))
    if isinstance(value, str):
        return value.replace("_", "").isalnum() or value == ""
    return value is None or (isinstance(value, int | float) and abs(value) <= _MAX_SIDE)


def _check_model_args(model_args: Any, source: str) -> dict[str, Any]:
    """Refuses arguments of `timm.create_model` other than plain facts about the architecture."""
    if not isinstance(model_args, dict):
        raise ValueError(f"`model_args` of {source} must be a dict, got {model_args!r}.")
    for name, value in model_args.items():
        if name not in _ALLOWED_ARGS:
            known = ", ".join(sorted(_ALLOWED_ARGS))
            raise ValueError(f"`model_args` of {source} may not name `{name}`, but only: {known}.")
        if not _is_plain(value):
            raise ValueError(f"`{name}` in `model_args` of {source} must be a number or a word, got {value!r}.")
    return dict(model_args)


def _build_for(architecture: str, state_dict: dict[str, torch.Tensor], model_args: dict[str, Any]) -> nn.Module:
    """A timm model of the sizes that the tensors have, holding them."""
    kernel, positions = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or positions is None or positions.ndim != 3:
        raise ValueError(
            f"The checkpoint for timm's {architecture} has an unknown layout: `patch_embed.proj.weight` (width, "
            f"channels, height, width) and `pos_embed` (1, positions, width) are expected; found "
            f"{', '.join(sorted(state_dict)[:5])}, ..."
        )
    head = state_dict.get("head.weight")
    args = {
        "num_classes": 0 if head is None else len(head),
        "in_chans": kernel.shape[1],
        "patch_size": tuple(kernel.shape[2:]),
        **model_args,
    }
    if int(args.get("depth") or 0) > len(state_dict):
        raise ValueError(f"`depth` {args['depth']} is more than the {len(state_dict)} tensors of the checkpoint have.")
    nominal = _create_empty(architecture, args)
    check_supported(nominal, f"timm's {architecture}")
    num_prefix = 0 if nominal.no_embed_class else nominal.num_prefix_tokens
    num_patches = positions.shape[1] - num_prefix
    if num_patches != nominal.patch_embed.num_patches and "img_size" not in args:
        side = math.isqrt(max(num_patches, 0))
        args["img_size"] = tuple(side * size for size in args["patch_size"])
    model = _create_empty(architecture, args)
    check_state_dict(state_dict, model, f"the checkpoint for timm's {architecture}")
    model.load_state_dict(state_dict, assign=True)
    return model


def _create_empty(architecture: str, args: dict[str, Any]) -> nn.Module:
    """A timm model without memory for its weights, whatever sizes a folder claims."""
    timm = import_timm()
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, pretrained=False, **args)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"timm's {architecture} cannot be made with {args} ({type(error).__name__}: {error})."
        ) from error


def _check_architecture(architecture: Any) -> None:
    """Refuses all but names in timm's own table: a name may also lead to another folder, or to the hub."""
    import_timm()
    if (
        not isinstance(architecture, str)
        or not _ARCHITECTURE.fullmatch(architecture)
        or not is_timm_name(architecture)
    ):
        raise ValueError(f"`architecture` must be a name that timm knows, got {architecture!r}.")


def load_timm_file(
    path: str | Path, architecture: str | None = None, model_args: dict[str, Any] | None = None, **overrides: Any
) -> FlexiViTSource:
    """A checkpoint file of timm (or of a training script with its names) as FlexiViT.

    Args:
        path: `.safetensors`, `.pt`, `.pth` or `.bin`.
        architecture: timm's name of the model, for the file does not say it.
        model_args: arguments of `timm.create_model` that differ from that name's.
        overrides: config fields to set otherwise.

    Raises:
        ValueError: without an architecture, or if the tensors do not fit it.
    """
    state_dict = load_state_dict_file(path)
    if architecture is None:
        raise ValueError(
            f"`{path}` holds tensors only ({', '.join(sorted(state_dict)[:5])}, ...): give `architecture`, timm's "
            "name of the model, for instance 'vit_base_patch16_224'; or give the folder that a model was saved to."
        )
    _check_architecture(architecture)
    model = _build_for(architecture, state_dict, dict(model_args or {}))
    return source_from_timm_model(model, **overrides)


def load_timm_folder(path: str | Path, **overrides: Any) -> FlexiViTSource:
    """A folder that timm wrote for the hub (config.json and weights) as FlexiViT.

    Raises:
        FileNotFoundError: if it holds no weights.
        ValueError: if the tensors do not fit the config.
    """
    path = Path(path)
    record = json.loads((path / "config.json").read_text())
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"`{path}` holds neither model.safetensors nor pytorch_model.bin.")
    _check_architecture(record["architecture"])
    model_args = _check_model_args(record.get("model_args") or {}, f"`{path}`")
    if record.get("global_pool"):
        model_args |= _check_model_args(
            {"global_pool": model_args.get("global_pool", record["global_pool"])}, f"`{path}`"
        )
    own_cfg = record.get("pretrained_cfg") or {}
    if not isinstance(own_cfg, dict):
        raise ValueError(f"`pretrained_cfg` of `{path}` must be a dict, got {own_cfg!r}.")
    model = _build_for(record["architecture"], load_state_dict_file(files[0]), model_args)
    # Older folders keep the preprocessing beside the architecture instead of in `pretrained_cfg`.
    pretrained_cfg = {**record, **own_cfg, "architecture": record["architecture"]}
    return source_from_timm_model(model, pretrained_cfg, **overrides)


__all__ = ["load_timm_file", "load_timm_folder"]
