"""Checkpoints as models that are sure to be whole, on a device that is there."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from .checkpoints import available_checkpoints, resolve_checkpoint
from .models.auto import family_of


class LoadedModel(NamedTuple):
    """A model and what prepares its images.

    Attributes:
        model (`PreTrainedModel`): in evaluation mode.
        image_processor (`BaseImageProcessor`): of the same checkpoint.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def pick_device(device: str | int | torch.device | None = None) -> torch.device:
    """A device that is there; the machine's accelerator, else the CPU, when `None`.

    Raises:
        ValueError: for a name that is none, or a device that is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return accelerator or torch.device("cpu")
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be one of {', '.join(there)}, got {device!r}.") from error
    name = chosen.type if chosen.index is None else f"{chosen.type}:{chosen.index}"
    if name not in {*there, *(entry.partition(":")[0] for entry in there)}:
        raise ValueError(f"`device` {str(device)!r} is not on this machine, which has {', '.join(there)}.")
    return chosen


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _missing(source: str, reason: object) -> OSError:
    return OSError(
        f"`model` {source!r} cannot be loaded: it is neither a bundled checkpoint "
        f"({', '.join(available_checkpoints())}) nor a complete one in a local folder or on the hub. {reason}"
    )


def checkpoint_source(source: str | os.PathLike) -> str:
    """What `from_pretrained` takes: the folder of a bundled checkpoint, a local folder, or a hub name.

    Raises:
        OSError: for a path where nothing is.
    """
    resolved = resolve_checkpoint(source)
    if _looks_like_a_path(resolved):
        resolved = os.path.expanduser(resolved)
        if not Path(resolved).exists():
            raise _missing(resolved, "There is no such folder.")
    return resolved


def load_config(source: str | os.PathLike, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint. Arguments and errors: `load_checkpoint`."""
    source = checkpoint_source(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _missing(source, error) from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"`model` {source!r} has no config that can be read ({_told(error)}).") from error


def load_checkpoint(
    source: str | os.PathLike, auto_class: type, *, trust_remote_code: bool = False, **config_options: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, which fails where weights would be random, or left over.

    Args:
        source (`str` or `os.PathLike`): name of a bundled checkpoint, local folder, or name on the hub.
        auto_class (`type`): `AutoModelForImageClassification`, `AutoModel` and the like.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings; False never
            asks.
        config_options: config fields to set.

    Raises:
        ValueError: for a checkpoint that lacks tensors of the model, has others than the model, or is damaged.
        OSError: if there is no such checkpoint.
    """
    source = checkpoint_source(source)
    try:
        model, info = auto_class.from_pretrained(
            source, output_loading_info=True, trust_remote_code=trust_remote_code, **config_options
        )
    except OSError as error:
        raise _missing(source, error) from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"`model` {source!r} cannot be loaded ({_told(error)}).") from error
    kind = "image classifier" if auto_class is AutoModelForImageClassification else "model"
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"`model` {source!r} holds no trained {kind}: {len(missing)} tensors are missing or have another shape, "
            f"such as {missing[0]!r}."
        )
    left_over = _left_over(model, info["unexpected_keys"])
    if left_over:
        raise ValueError(
            f"`model` {source!r} has {len(left_over)} tensors that its {type(model).__name__} does not, such as "
            f"{left_over[0]!r}: its config.json belongs to another model."
        )
    return model.eval()


def _left_over(model: PreTrainedModel, unexpected: set[str]) -> list[str]:
    """Tensors that a checkpoint should not have. A head is no fault where the model without one was asked for, and
    other people's models keep all kinds of things.
    """
    if family_of(model.config) is None:
        return []
    names = sorted(unexpected)
    if model.base_model is not model:
        return names
    inner = {name.partition(".")[0] for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(prefix) or name.partition(".")[0] in inner]


def load_image_processor(source: str | os.PathLike, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """The image processor of a checkpoint.

    Raises:
        ValueError: for a damaged one.
        OSError: if there is none.
    """
    source = checkpoint_source(source)
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _missing(source, error) from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"`model` {source!r} has an image processor that cannot be loaded ({_told(error)})."
        ) from error


def load_classifier(
    source: str | os.PathLike,
    device: str | int | torch.device | None = "cpu",
    *,
    dtype: torch.dtype | None = None,
    convert: bool = False,
    trust_remote_code: bool = False,
    **config_options: Any,
) -> LoadedModel:
    """An image classifier and its image processor: what `classify`, `evaluate` and `benchmark` start from.

    Args:
        source (`str` or `os.PathLike`): name of a bundled checkpoint, local folder, or name on the hub; with
            `convert` also what `convert_checkpoint(..., to="flexivit")` reads: a timm ViT, a big_vision `.npz`.
        device (`str`, `int` or `torch.device`, *optional*, defaults to `"cpu"`): where it runs; the machine's
            accelerator, else the CPU, when `None`.
        dtype (`torch.dtype`, *optional*): of the weights; the checkpoint's own when `None`.
        convert (`bool`, *optional*, defaults to `False`): whether an ordinary ViT becomes a FlexiViT in memory, so
            that it has budgets.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.
        config_options: config fields to set, e.g. `resize_method`.

    Raises:
        ValueError: for a checkpoint that holds no trained classifier, is damaged, or has no image processor; for a
            device that is not there.
        OSError: if there is no such checkpoint.
    """
    chosen = pick_device(device)
    loaded = _converted(source, config_options) if convert else None
    if loaded is None:
        model = load_checkpoint(
            source, AutoModelForImageClassification, trust_remote_code=trust_remote_code, **config_options
        )
        loaded = LoadedModel(model, load_image_processor(source, trust_remote_code=trust_remote_code))
    return LoadedModel(loaded.model.to(device=chosen, dtype=dtype).eval(), loaded.image_processor)


def load_base_model(
    source: str | os.PathLike, device: str | int | torch.device | None = "cpu", *, trust_remote_code: bool = False
) -> LoadedModel:
    """A model without its head, and its image processor. Arguments and errors: `load_classifier`."""
    chosen = pick_device(device)
    model = load_checkpoint(source, AutoModel, trust_remote_code=trust_remote_code)
    return LoadedModel(model.to(chosen), load_image_processor(source, trust_remote_code=trust_remote_code))


def _converted(source: str | os.PathLike, config_options: dict[str, Any]) -> LoadedModel | None:
    """A plain ViT as a FlexiViT; `None` for a checkpoint that has budgets already, or cannot have any."""
    from .models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source

    resolved = resolve_checkpoint(source)
    model_type = _model_type(resolved)
    if model_type is not None and family_of(model_type) is not None:
        return None
    try:
        loaded = load_flexivit_source(resolved, **config_options)
    except ValueError:
        if model_type is None:
            raise
        return None  # not a ViT: it runs as it is
    if loaded.config.architectures != ["FlexiViTForImageClassification"]:
        raise ValueError(f"`model` {resolved!r} has no classifier: an image-classification checkpoint is needed.")
    if loaded.image_processor is None:
        raise ValueError(f"`model` {resolved!r} brings no image processor: convert it, and write one beside it.")
    return LoadedModel(flexivit_from_source(loaded), loaded.image_processor)


def _model_type(source: str) -> str | None:
    if source.endswith(".npz"):
        return None
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    except (OSError, ValueError):  # no config, or one that transformers does not know: a timm name or folder
        return None


__all__ = [
    "LoadedModel",
    "checkpoint_source",
    "load_base_model",
    "load_checkpoint",
    "load_classifier",
    "load_config",
    "load_image_processor",
    "pick_device",
]
