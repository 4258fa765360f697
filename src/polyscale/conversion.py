"""Other people's checkpoints as checkpoints of polyscale: the part of `polyscale convert` that is no command line.

Each family reads its sources in its own module, `models/<family>/convert_<family>.py`; here the family is chosen and
the output written, so that a failed conversion leaves nothing behind.
"""

import inspect
import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoImageProcessor, PreTrainedModel

from .checkpoints import resolve_checkpoint
from .layers.resizing import pi_resize_patch_embed
from .models.auto import Family, families, family_of
from .utils.checkpoint_files import (
    SAFETENSORS_SUFFIXES,
    TORCH_SUFFIXES,
    check_index,
    load_safetensors_file,
    load_torch_file,
)
from .utils.outputs import check_output, only_writer, write_failure
from .utils.processors import check_processor
from .utils.validation import check_choice, check_flag, check_path, closest_name
from .utils.weight_files import is_finite


# Of a config, what no option changes in the weights that are written.
_SETTLED = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path")

# What the parsers of torch, NumPy, safetensors and the libraries that models come from raise at a file that lies.
_PARSER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError),
    *(TypeError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
    *(SafetensorError, StrictDataclassError),
)


_LLAVA = "llava"  # a whole model of transformers, with a tower of this library in it


def _fitting(source: Any) -> str:
    """What a source becomes where `to` is not given."""
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return "flexivit"
    from .llava.convert_llava import is_original_llava

    return _LLAVA if is_original_llava(Path(source)) else "flexivit"


def _converter(source: Any, to: str) -> Callable[..., Any]:
    """The function (source, out, **options) that writes into the folder `out`, which is empty: a family's reader of
    other libraries' models, or what writes its own models as those of another library or family."""
    if to == _LLAVA:
        from .llava.convert_llava import convert_llava

        return convert_llava
    known = [name for name, family in families().items() if family.converter is not None]
    exporting = {name: family for family in families().values() for name in family.exporters if name not in known}
    check_choice("to", to, (*known, *exporting, _LLAVA))
    own_exporter = None if (family := _family_of_source(source)) is None else family.exporter(to)
    if own_exporter is not None:
        return own_exporter
    if to in exporting and family is not None and family is not exporting[to]:
        between = exporting[to].config_class.model_type
        if family.exporter(between) is not None:
            raise ValueError(
                f"`to`: a model of type {family.config_class.model_type!r} becomes a {to!r} by way of {between!r}. "
                f"Convert it to that first (`--to {between}`), then the result."
            )
    return exporting[to].exporter(to) if to in exporting else family_of(to).function("converter")


def _family_of_source(source: Any) -> Family | None:
    """The family of a model in memory or in a folder; `None` for what is of none, or is no such thing."""
    if isinstance(source, PreTrainedModel):
        return family_of(source.config)
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        record = json.loads((Path(resolve_checkpoint(source)) / "config.json").read_text(encoding="utf-8"))
        return family_of(str(record["model_type"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, so that a rename moves the result there; removed at the end, with every parent
    folder made for it where the result never came."""
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def _writable(out: Path, name: str) -> Iterator[None]:
    """A full or read-only disk is said to be that, and no fault of the source."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error, out.with_name(f".{out.name}"))  # the workplace begins so
        if reason is None or (isinstance(error, SafetensorError) and "serializing" not in str(error)):
            raise
        raise ValueError(f"`{name}` {out} cannot be written: {reason}. Nothing was left there.") from error


def _move_into_place(result: Path, out: Path, workplace: Path) -> None:
    """Renames `result` to `out`; what stood there before comes back if that fails."""
    if not out.exists():
        result.rename(out)
        return
    before = workplace / "before"
    out.rename(before)
    try:
        result.rename(out)
    except OSError:
        before.rename(out)
        raise


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one that `save_pretrained` wrote, and holds no other folders."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "model_type" in record and not any(entry.is_dir() for entry in folder.iterdir())
    except (OSError, ValueError, TypeError):
        return False


def _check_free(out: Path, name: str, overwrite: bool, source: Path | None) -> None:
    """Refuses an output that is there, unless it may be replaced: a checkpoint (or file) that is not the source."""
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if not os.path.lexists(out) or is_empty_folder:
        return
    if not overwrite:
        raise ValueError(
            f"`{name}` {out} exists already. Name another, or overwrite it: `overwrite=True` (`--overwrite`)."
        )
    if source is not None and source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"`{name}` {out} holds the source {source}, which would be deleted. Name another.")
    if out.is_dir() and not _is_checkpoint(out):
        raise ValueError(
            f"`{name}` {out} is not replaced: it is no checkpoint (a folder of files with a config.json that names a "
            "`model_type`). Name another, or delete it yourself."
        )


def _check_source(convert: Callable[..., Any], to: str, source: Any) -> None:
    """Refuses a model in memory where a family's converter reads checkpoints alone, as its annotation says."""
    annotation = next(iter(inspect.signature(convert).parameters.values())).annotation
    kinds = tuple(get_origin(kind) or kind for kind in get_args(annotation))
    if isinstance(source, torch.nn.Module) and kinds and not isinstance(source, kinds):
        raise ValueError(
            f"`source` of a conversion to {to!r} must be a path or a name, got a {type(source).__name__}: save it "
            "with `save_pretrained` and give the folder."
        )


def _check_options(convert: Callable[..., Any], to: str, options: dict[str, Any]) -> None:
    """Refuses options that a family's converter does not take, and what a config says of itself."""
    parameters = inspect.signature(convert).parameters
    for name in _SETTLED:
        if name in options and name not in parameters:
            raise ValueError(f"`{name}` cannot be chosen: it follows from the weights and from what writes them.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = list(parameters)[2:]  # after source and out
    for name in options:
        if name not in known:
            nearest = closest_name(name, known)
            hint = f"Did you mean `{nearest}`?" if nearest else f"Its options: {', '.join(known)}."
            raise ValueError(f"The conversion to {to!r} has no option `{name}`. {hint}")


def _with_labels(options: dict[str, Any]) -> dict[str, Any]:
    """Options with both maps of the classes, where they name one: a config keeps each as it was."""
    names, indices = options.get("id2label"), options.get("label2id")
    if isinstance(names, Mapping) and indices is None and all(str(index).isdigit() for index in names):
        return {**options, "label2id": {name: int(index) for index, name in names.items()}}
    if isinstance(indices, Mapping) and names is None and all(str(index).isdigit() for index in indices.values()):
        return {**options, "id2label": {int(index): name for name, index in indices.items()}}
    return options


@contextmanager
def _readable(source: Any, options: dict[str, Any]) -> Iterator[None]:
    """What breaks a parser at a file is the file's fault, and said so; so is what is wrong where no options are."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"`source` {source!r} is no path, and no name that the hub can have: {error}") from error
    except ValueError as error:
        text = str(error)
        if options or not isinstance(source, str | os.PathLike) or os.fspath(source) in text or "`source`" in text:
            raise
        raise ValueError(f"`source` {source} cannot be converted: {text.replace('`', '')}") from error
    except _PARSER_ERRORS as error:
        if isinstance(error, ValueError | OSError) or "Error while serializing" in str(error):
            raise
        if not isinstance(source, str | os.PathLike | dict):
            raise
        reason = str(error).strip().split("\n")[0] or "no reason given"
        name = "source" if isinstance(source, dict) else source
        raise ValueError(f"`{name}` cannot be converted ({type(error).__name__}: {reason}).") from error


def _check_result(folder: Path) -> None:
    """Refuses what no model could use: a source's weights that are not numbers, or its useless image processor.

    Raises:
        ValueError: naming the tensor, or the setting.
    """
    if (folder / "preprocessor_config.json").is_file():
        check_processor(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not is_finite(tensors.get_tensor(name)):
                    raise ValueError(f"its tensor {name!r} holds NaN or infinite values.")


def convert_checkpoint(
    source: str | os.PathLike | torch.nn.Module,
    out: str | os.PathLike,
    to: str | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Converts a checkpoint of another library and writes model, image processor and labels to the folder `out`.

    Args:
        source (`str`, `os.PathLike` or `torch.nn.Module`): what to convert: the name of a bundled checkpoint, or for
            "flexivit" see `polyscale.models.flexivit.convert_flexivit.load_flexivit_source`.
        out (`str` or `os.PathLike`): the folder to write; it appears complete, or not at all.
        to (`str`, *optional*): model type of the result; also of a checkpoint of another family here (a Quadtree ViT
            becomes a FlexiViT). "vit" or "timm" write a FlexiViT at one budget (`image_size=240, patch_size=16`) as
            a plain ViT of transformers or timm; "llava" a LLaVA or VILA of the original code, whole, as a LLaVA of
            transformers. When `None`, "llava" for a folder in such a layout, else "flexivit".
        overwrite (`bool`, *optional*, defaults to `False`): whether to replace `out` if it is a checkpoint. A folder
            that is none, or that holds the source, is never deleted.
        options: for the family's converter, for instance config fields (`patch_size=16`).

    Returns:
        `Path`: of `out`.

    Raises:
        ValueError: for an unknown model type or option, an `out` that is not empty or is being written by another
            process, a source of unknown layout, a damaged file, tensors that do not fit, or a pickle that holds more
            than tensors.
        OSError: if a file is missing, or a download is needed and not possible.
    """
    check_path("out", out)
    check_flag("overwrite", overwrite)
    to = _fitting(source) if to is None else to
    convert = _converter(source, to)
    _check_options(convert, to, options)
    _check_source(convert, to, source)
    options = _with_labels(options)
    if not isinstance(source, str | os.PathLike | torch.nn.Module | dict):
        raise ValueError(f"`source` must be a path, a name or a model, got a {type(source).__name__}.")
    path = None
    if isinstance(source, str | os.PathLike):
        source = resolve_checkpoint(source)
        path = Path(source)
        if path.is_dir():
            check_index(path)
    out = Path(out).expanduser().absolute()
    with only_writer(out, "out", "conversion"):
        _check_free(out, "out", overwrite, path)
        check_output(out, "out", folder=True)
        with _writable(out, "out"), _workplace(out) as workplace:
            result = workplace / out.name
            result.mkdir()
            with _readable(source, options):
                convert(source, result, **options)
                _check_result(result)
            _move_into_place(result, out, workplace)
    return out


def _dicts_in(checkpoint: Any) -> list[dict]:
    """What a training script saved and the dicts inside it, outermost first; each once, for one may hold itself."""
    found, waiting = {}, [checkpoint]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, dict) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(value.values())
    return list(found.values())


def _is_kernel(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()


def _find_holder(checkpoint: Any, name: str) -> dict | None:
    """The dict with the kernel `name` in what a training script saved."""
    return next((inner for inner in _dicts_in(checkpoint) if _is_kernel(inner.get(name))), None)


def _kernel_names(checkpoint: Any) -> list[str]:
    """Names of everything in a checkpoint that could be a patch kernel."""
    return [str(name) for inner in _dicts_in(checkpoint) for name, value in inner.items() if _is_kernel(value)]


def convert_patch_embed(
    input: str | os.PathLike,
    output: str | os.PathLike,
    name: str = "patch_embed.proj.weight",
    patch_size: int | Sequence[int] = 16,
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
    overwrite: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Resizes the patch kernel in a weights file by PI-resize and writes the file anew; all else stays as it is.

    Args:
        input (`str` or `os.PathLike`): `.safetensors`, `.pt` or `.pth`.
        output (`str` or `os.PathLike`): the file to write, of the same kind; it appears complete, or not at all.
        name (`str`, *optional*, defaults to `"patch_embed.proj.weight"`): of the kernel, of shape (width, channels,
            height, width).
        patch_size (`int` or `(height, width)`, *optional*, defaults to 16): of the new kernel, in pixels.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`; see
            `polyscale.pi_resize_patch_embed`.
        antialias (`bool`, *optional*, defaults to `True`): see there.
        overwrite (`bool`, *optional*, defaults to `False`): whether to replace `output` if it is there. The input
            itself is never replaced.

    Returns:
        Shapes of the old and the new kernel.

    Raises:
        ValueError: if there is no such kernel, the file's kind is unknown, or it holds more than tensors.
        FileNotFoundError: if there is no such file.
    """
    input = Path(check_path("input", input)).expanduser()
    output = Path(check_path("output", output)).expanduser().absolute()
    check_flag("overwrite", overwrite)
    suffixes = (input.suffix.lower(), output.suffix.lower())
    if not input.is_file():
        raise FileNotFoundError(f"There is no file `{input}`.")
    if not any(all(suffix in kind for suffix in suffixes) for kind in (SAFETENSORS_SUFFIXES, TORCH_SUFFIXES)):
        raise ValueError(
            f"`input` and `output` must both be {', '.join(SAFETENSORS_SUFFIXES)} or both be one of "
            f"{', '.join(TORCH_SUFFIXES)}, got {input.name} and {output.name}."
        )
    if output.is_dir():
        raise ValueError(f"`output` must be a file, {output} is a folder.")
    _check_free(output, "output", overwrite, input)

    is_safetensors = suffixes[0] in SAFETENSORS_SUFFIXES
    checkpoint, metadata = load_safetensors_file(input) if is_safetensors else (load_torch_file(input), None)
    holder = _find_holder(checkpoint, name)
    if holder is None:
        kernels = _kernel_names(checkpoint)
        raise ValueError(
            f"`name` {name!r} is no patch kernel in `{input}`. Kernels in it: {', '.join(kernels[:8]) or 'none'}."
        )
    old_shape = tuple(holder[name].shape)
    holder[name] = pi_resize_patch_embed(holder[name].detach(), patch_size, interpolation, antialias).contiguous()
    with _writable(output, "output"), _workplace(output) as workplace:
        result = workplace / output.name
        if is_safetensors:
            save_file(checkpoint, result, metadata=metadata)
        else:
            torch.save(checkpoint, result)
        os.replace(result, output)
    return old_shape, tuple(holder[name].shape)


__all__ = ["convert_checkpoint", "convert_patch_embed"]
