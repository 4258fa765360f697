"""Checkpoints of other libraries as FlexiViT: transformers, timm and big_vision.

>>> source = load_flexivit_source("google/vit-base-patch16-224")
>>> model = flexivit_from_source(source)
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...utils.checkpoint_files import CHECKPOINT_SUFFIXES, NUMPY_SUFFIXES, model_from_state_dict
from ...vit_sources.common import FlexiViTSource
from ...vit_sources.npz_vit import RELEASED_NAMES, load_npz_source, released_file
from ...vit_sources.timm_files import load_timm_file, load_timm_folder
from ...vit_sources.timm_vit import (
    is_timm_model,
    is_timm_name,
    load_timm_name,
    source_from_timm_model,
)
from ...vit_sources.transformers_vit import load_hf_source, source_from_hf_model
from .modeling_flexivit import FlexiViTPreTrainedModel


_TIMM_HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def _load_folder(path: Path, overrides: dict[str, Any]) -> FlexiViTSource:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"`{path}` is a folder without a config.json: expected a model of transformers or timm.")
    try:
        record = json.loads(config_file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{config_file}` is not readable JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"`{config_file}` must hold a JSON object, got a {type(record).__name__}.")
    if "model_type" in record:
        return load_hf_source(path, **overrides)
    if "architecture" in record:
        return load_timm_folder(path, **overrides)
    raise ValueError(
        f"`{config_file}` has an unknown layout: it names neither a `model_type` (transformers) nor an `architecture` "
        "(timm)."
    )


def _load_name(name: str, pretrained: bool, overrides: dict[str, Any]) -> FlexiViTSource:
    if name.removesuffix(".npz") in RELEASED_NAMES:
        return load_npz_source(released_file(name), **overrides)
    if name.startswith("timm:"):
        return load_timm_name(name.removeprefix("timm:"), pretrained, **overrides)
    if name.startswith("timm/"):
        return load_timm_name(f"hf-hub:{name}", pretrained, **overrides)
    if name.startswith(_TIMM_HUB_PREFIXES) or is_timm_name(name):
        return load_timm_name(name, pretrained, **overrides)
    if Path(name).suffix.lower() in CHECKPOINT_SUFFIXES:
        raise FileNotFoundError(f"There is no file or folder `{name}`.")
    return load_hf_source(name, **overrides)


def load_flexivit_source(
    source: str | os.PathLike | torch.nn.Module,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = True,
    **overrides: Any,
) -> FlexiViTSource:
    """Reads a checkpoint of another library as FlexiViT, in memory.

    Args:
        source: a folder or hub name of transformers (ViT, DeiT, DINOv2, CLIP's vision part); a name of timm
            ("vit_base_patch16_224", "timm/vit_...", "timm:vit_..."), a folder or a weights file of timm; a `.npz` of
            big_vision, or the name of a released one ("flexivit_b_i1k"); or a live model of transformers or timm.
        architecture: timm's name of the model in a bare weights file.
        model_args: arguments of `timm.create_model` for such a file.
        pretrained: False takes random weights for a name of timm.
        overrides: fields of FlexiViTConfig to set otherwise, such as `patch_size` or `kernel_interpolation`.

    Returns:
        (config, state_dict, image_processor): `config.architectures` names the class the tensors belong to;
        the image processor is None where the source has none.

    Raises:
        ValueError: for a source of unknown layout or with parts that FlexiViT does not have, tensors that are missing
            or left over, or a pickle that holds more than tensors.
        OSError: if a file is missing, or something must be downloaded and cannot be.
    """
    if isinstance(source, torch.nn.Module):
        if isinstance(source, PreTrainedModel):
            return source_from_hf_model(source, **overrides)
        if is_timm_model(source):
            return source_from_timm_model(source, **overrides)
        raise ValueError(f"`source` must be a model of transformers or timm, got a {type(source).__name__}.")
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, overrides)
    if path.is_file():
        if path.suffix.lower() in NUMPY_SUFFIXES:
            return load_npz_source(path, **overrides)
        return load_timm_file(path, architecture, model_args, **overrides)
    return _load_name(str(source), pretrained, overrides)


def flexivit_from_source(source: FlexiViTSource) -> FlexiViTPreTrainedModel:
    """The model of a loaded source, in evaluation mode: with its classifier or CLIP's projection where it has one."""
    return model_from_state_dict(source.model_class, source.config, source.state_dict, "the source")


def convert_flexivit(
    source: str | os.PathLike | torch.nn.Module, out: str | os.PathLike, **options: Any
) -> FlexiViTPreTrainedModel:
    """Writes model and image processor of a source to the folder `out`. Arguments: `load_flexivit_source`."""
    loaded = load_flexivit_source(source, **options)
    model = flexivit_from_source(loaded)
    model.save_pretrained(out)
    if loaded.image_processor is not None:
        loaded.image_processor.save_pretrained(out)
    return model


__all__ = ["FlexiViTSource", "convert_flexivit", "flexivit_from_source", "load_flexivit_source"]
