"""Checkpoints as models that are sure to be whole, on a device that is there."""

import os
import pickle
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
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
from .utils.devices import pick_device
from .utils.processors import check_processor, processor_for_size
from .utils.validation import check_flag, check_path, shown
from .utils.weight_files import DamagedWeightsError, check_weight_files, is_finite, quiet_loading


_TOLD = 400  # characters of another library's error that are passed on


class LoadedModel(NamedTuple):
    """A model and what prepares its images.

    Attributes:
        model (`PreTrainedModel`): in evaluation mode.
        image_processor (`BaseImageProcessor`): of the same checkpoint.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor


class MissingCheckpointError(OSError, ValueError):
    """There is no such checkpoint: neither in the package, nor in a folder, nor on the hub as far as it is reached."""


def is_offline() -> bool:
    """Whether the hub cannot be reached, as far as a look at its name tells; asked anew each time."""
    if constants.HF_HUB_OFFLINE:
        return True
    address = urlsplit(constants.ENDPOINT)
    if getproxies():  # which finds names itself
        return False
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return True
    return False


def checkpoint_source(source: str | os.PathLike, argument: str = "model") -> str:
    """What `from_pretrained` takes: the folder of a bundled checkpoint, a local folder, or a hub name; offline, the
    folder where a checkpoint of the hub was kept.

    Args:
        source (`str` or `os.PathLike`): name of a bundled checkpoint, local folder, or name on the hub.
        argument (`str`, *optional*, defaults to `"model"`): what an error calls it.

    Raises:
        ValueError: for no path or name.
        MissingCheckpointError: for a path where nothing is, and offline for a name that was never loaded.
    """
    resolved = resolve_checkpoint(check_path(argument, source))
    if resolved.startswith((".", "/", "~")) or resolved.count("/") > 1:
        resolved = os.path.expanduser(resolved)
        if not Path(resolved).exists():
            raise _missing(argument, resolved, "There is no such folder.")
    if not Path(resolved).exists() and is_offline():
        try:
            return snapshot_download(resolved, local_files_only=True)  # a folder, for which nothing waits
        except (OSError, ValueError) as error:
            raise _missing(argument, resolved, "Offline: the hub cannot be reached.") from error
    return resolved


def checkpoint_folder(source: str | os.PathLike, argument: str = "model", files: list[str] | None = None) -> Path:
    """The folder of a checkpoint, downloaded from the hub where it is there.

    Args:
        source, argument: as in `checkpoint_source`.
        files (`list[str]`, *optional*): patterns of the files that are needed; all when `None`.

    Raises:
        MissingCheckpointError: if there is no such checkpoint, or it cannot be downloaded.
    """
    resolved = checkpoint_source(source, argument)
    if Path(resolved).exists():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise _missing(argument, resolved, " ".join(str(error).split())) from error


def _missing(argument: str, source: str, reason: object) -> MissingCheckpointError:
    return MissingCheckpointError(
        f"`{argument}` {source!r} cannot be loaded: it is neither a bundled checkpoint "
        f"({', '.join(available_checkpoints())}) nor a complete one in a local folder or on the hub. {reason}"
    )


def _why_unread(source: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "There is no such file or folder."
    if not Path(source).exists() and is_offline():
        return "Offline: the hub cannot be reached."
    return " ".join(str(error).split())


@contextmanager
def reading(argument: str, source: str | os.PathLike, chosen: Iterable[str] = ()) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is read into a `ValueError` that names it.

    Args:
        argument (`str`): what gave the checkpoint.
        source (`str` or `os.PathLike`): the checkpoint.
        chosen (`Iterable[str]`, *optional*): config fields that the caller sets: what is wrong with them is no fault
            of the checkpoint.
    """
    source = os.fspath(source)
    try:
        yield
    except OSError as error:
        if isinstance(error, MissingCheckpointError):
            raise
        raise _missing(argument, source, _first_line(error)) from error
    except DamagedWeightsError as error:
        told = str(error).replace("`", "").rstrip(".")
        raise ValueError(
            f"`{argument}` {source!r} cannot be loaded: it is damaged or of another kind ({told})."
        ) from error
    except ValueError as error:
        if f"`{argument}`" in str(error) or any(f"`{name}`" in str(error) for name in chosen):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"`{argument}` {source!r} brings code of its own, which runs only with `trust_remote_code=True`: read "
                "it first."
            ) from error
        # what stands in backquotes is a field of the checkpoint, and no argument of the caller
        told = _first_line(error).replace("`", "").rstrip(".")
        raise ValueError(f"`{argument}` {source!r} cannot be loaded: {told}.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{argument}` {source!r} cannot be loaded: its weights are a pickle that holds more than tensors, and "
            "unpickling such objects can run code on this machine."
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"`{argument}` {source!r} cannot be loaded: it is damaged or of another kind ({type(error).__name__}: "
            f"{_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    """The beginning of a message: some of transformers list hundreds of names."""
    line = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return line if len(line) <= _TOLD else f"{line[:_TOLD]}..."


def load_config(
    source: str | os.PathLike, *, trust_remote_code: bool = False, argument: str = "model"
) -> PreTrainedConfig:
    """The config of a checkpoint. Arguments and errors: `load_checkpoint`."""
    check_flag("trust_remote_code", trust_remote_code)
    source = checkpoint_source(source, argument)
    with reading(argument, source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_checkpoint(
    source: str | os.PathLike,
    auto_class: type,
    *,
    trust_remote_code: bool = False,
    argument: str = "model",
    called: str | None = None,
    unused: tuple[str, ...] = (),
    **config_options: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, which fails where weights would be random, or left over.

    Args:
        source (`str` or `os.PathLike`): name of a bundled checkpoint, local folder, or name on the hub.
        auto_class (`type`): `AutoModelForImageClassification`, `AutoModel` and the like.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings; `False` never
            asks.
        argument (`str`, *optional*, defaults to `"model"`): the argument that an error names.
        called (`str`, *optional*): what an error calls the checkpoint, where `source` is a copy of it.
        unused (`tuple[str, ...]`, *optional*): beginnings of the names of tensors that are not read, so that a
            checkpoint may lack them.
        config_options: config fields to set, and other arguments of `from_pretrained`.

    Raises:
        ValueError: for a checkpoint that lacks tensors of the model, has others than the model, or is damaged.
        MissingCheckpointError: if there is no such checkpoint.
    """
    check_flag("trust_remote_code", trust_remote_code)
    source = checkpoint_source(source, argument)
    called = called or source
    with reading(argument, called, config_options), quiet_loading():
        if Path(source).is_dir():
            check_weight_files(Path(source))
        model, info = auto_class.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=trust_remote_code,
            **config_options,
        )
    kind = "image classifier" if auto_class is AutoModelForImageClassification else "model"
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    missing = sorted(name for name in missing if not name.startswith(unused))
    if missing:
        raise ValueError(
            f"`{argument}` {called!r} holds no trained {kind}: {len(missing)} tensors are missing or have another "
            f"shape, such as {missing[0]!r}."
        )
    left_over = left_over_tensors(model, info["unexpected_keys"])
    if left_over:
        raise ValueError(
            f"`{argument}` {called!r} has {len(left_over)} tensors that its {type(model).__name__} does not, such as "
            f"{left_over[0]!r}: its config.json belongs to another model."
        )
    check_finite_weights(model, argument, called)
    return model.eval()


def check_finite_weights(model: torch.nn.Module, argument: str, called: str) -> None:
    """Refuses weights that are not numbers.

    Raises:
        ValueError: naming a tensor.
    """
    for name, tensor in model.state_dict().items():
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
        if is_plain and not is_finite(tensor):
            raise ValueError(f"`{argument}` {called!r} is damaged: its tensor {name!r} holds NaN or infinite values.")


def left_over_tensors(model: PreTrainedModel, unexpected: set[str]) -> list[str]:
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


def load_image_processor(
    source: str | os.PathLike, *, trust_remote_code: bool = False, argument: str = "model"
) -> BaseImageProcessor:
    """The image processor of a checkpoint. Arguments and errors: `load_checkpoint`."""
    check_flag("trust_remote_code", trust_remote_code)
    source = checkpoint_source(source, argument)
    with reading(argument, source):
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_processor(processor)
    return processor


def load_classifier(
    source: str | os.PathLike,
    device: str | int | torch.device | None = "cpu",
    *,
    dtype: torch.dtype | None = None,
    convert: bool = False,
    image_size: int | tuple[int, int] | None = None,
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
        image_size (`int` or `(height, width)`, *optional*): in pixels, that the image processor makes; the
            checkpoint's own when `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.
        config_options: config fields to set, e.g. `resize_method`.

    Raises:
        ValueError: for a checkpoint that holds no trained classifier, is damaged, or has no image processor; for a
            device that is not there.
        OSError: if there is no such checkpoint.
    """
    check_flag("convert", convert)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16, got {shown(dtype)}.")
    chosen = pick_device(device)
    loaded = _converted(source, config_options) if convert else None
    if loaded is None:
        model = load_checkpoint(
            source, AutoModelForImageClassification, trust_remote_code=trust_remote_code, **config_options
        )
        loaded = LoadedModel(model, load_image_processor(source, trust_remote_code=trust_remote_code))
    return _sized(LoadedModel(loaded.model.to(device=chosen, dtype=dtype).eval(), loaded.image_processor), image_size)


def load_base_model(
    source: str | os.PathLike,
    device: str | int | torch.device | None = "cpu",
    *,
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model without its head, and its image processor. Arguments and errors: `load_classifier`."""
    chosen = pick_device(device)
    model = load_checkpoint(source, AutoModel, trust_remote_code=trust_remote_code)
    processor = load_image_processor(source, trust_remote_code=trust_remote_code)
    return _sized(LoadedModel(model.to(chosen), processor), image_size)


def _sized(loaded: LoadedModel, image_size: int | tuple[int, int] | None) -> LoadedModel:
    if image_size is None:
        return loaded
    return LoadedModel(loaded.model, processor_for_size(loaded.image_processor, image_size))


def _converted(source: str | os.PathLike, config_options: dict[str, Any]) -> LoadedModel | None:
    """A plain ViT as a FlexiViT; `None` for a checkpoint that has budgets already, or cannot have any."""
    from .models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source

    resolved = resolve_checkpoint(check_path("model", source))
    model_type = _model_type(resolved)
    if model_type is not None and family_of(model_type) is not None:
        return None
    try:
        loaded = load_flexivit_source(resolved, **config_options)
    except ValueError:
        if model_type is None:
            raise
        return None  # not a ViT: it runs as it is
    except OSError as error:
        raise _missing("model", resolved, _why_unread(resolved, error)) from error
    if loaded.config.architectures != ["FlexiViTForImageClassification"]:
        raise ValueError(f"`model` {resolved!r} has no classifier: an image-classification checkpoint is needed.")
    if loaded.image_processor is None:
        raise ValueError(f"`model` {resolved!r} brings no image processor: convert it, and write one beside it.")
    return LoadedModel(flexivit_from_source(loaded), loaded.image_processor)


def _model_type(source: str) -> str | None:
    if source.endswith(".npz"):
        return None
    try:
        return load_config(source).model_type
    except (OSError, ValueError):  # no config, or one that transformers does not know: a timm name or folder
        return None


__all__ = [
    "LoadedModel",
    "MissingCheckpointError",
    "check_finite_weights",
    "checkpoint_folder",
    "checkpoint_source",
    "is_offline",
    "left_over_tensors",
    "load_base_model",
    "load_checkpoint",
    "load_classifier",
    "load_config",
    "load_image_processor",
    "pick_device",
    "quiet_loading",
    "reading",
]
