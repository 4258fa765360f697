"""Other people's checkpoints as checkpoints of polyscale: the part of `polyscale convert` that is no command line.

Each family reads its sources in its own module, `models/<family>/convert_<family>.py`; here the family is chosen and
the output written, so that a failed conversion leaves nothing behind.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .layers.resizing import pi_resize_patch_embed
from .models.auto import families, family_of
from .utils.checkpoint_files import (
    SAFETENSORS_SUFFIXES,
    TORCH_SUFFIXES,
    load_safetensors_file,
    load_torch_file,
)
from .utils.validation import check_choice


def _converter(model_type: str) -> Callable[..., Any]:
    """The function (source, out, **options) of a family, which writes into the folder `out`, which is empty."""
    known = [name for name, family in families().items() if family.converter is not None]
    check_choice("to", model_type, tuple(known))
    return family_of(model_type).function("converter")


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


def _check_free(out: Path, name: str, overwrite: bool) -> None:
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder and not overwrite:
        raise ValueError(f"`{name}` {out} exists already. Name another, or overwrite it with `overwrite=True`.")


def convert_checkpoint(
    source: str | os.PathLike | torch.nn.Module,
    out: str | os.PathLike,
    to: str = "flexivit",
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Converts a checkpoint of another library and writes model, image processor and labels to the folder `out`.

    Args:
        source: what to convert; for "flexivit" see `polyscale.models.flexivit.convert_flexivit.load_flexivit_source`.
        out: the folder to write; it appears complete, or not at all.
        to: model type of the result.
        overwrite: whether to replace `out` if it is there and not empty.
        options: for the family's converter, for instance config fields (`patch_size=16`).

    Returns:
        The path of `out`.

    Raises:
        ValueError: for an unknown model type, an `out` that is not empty, a source of unknown layout, tensors that do
            not fit, or a pickle that holds more than tensors.
        OSError: if a file is missing, or a download is needed and not possible.
    """
    convert = _converter(to)
    out = Path(out).expanduser().absolute()
    _check_free(out, "out", overwrite)
    with _workplace(out) as workplace:
        result = workplace / out.name
        result.mkdir()
        convert(source, result, **options)
        _move_into_place(result, out, workplace)
    return out


def _find_holder(checkpoint: Any, name: str) -> dict | None:
    """The dict with the entry `name` in what a training script saved: itself, or one inside it."""
    if not isinstance(checkpoint, dict):
        return None
    if isinstance(checkpoint.get(name), torch.Tensor):
        return checkpoint
    return next((found for inner in checkpoint.values() if (found := _find_holder(inner, name)) is not None), None)


def _kernel_names(checkpoint: Any) -> list[str]:
    """Names of everything in a checkpoint that could be a patch kernel."""
    if not isinstance(checkpoint, dict):
        return []
    names = [str(name) for name, value in checkpoint.items() if isinstance(value, torch.Tensor) and value.ndim == 4]
    return names + [name for inner in checkpoint.values() for name in _kernel_names(inner)]


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
        input: `.safetensors`, `.pt` or `.pth`.
        output: the file to write, of the same kind; it appears complete, or not at all.
        name: of the kernel, of shape (width, channels, height, width).
        patch_size: int or (height, width) of the new kernel, in pixels.
        interpolation: "bicubic" or "bilinear"; see `polyscale.pi_resize_patch_embed`.
        antialias: see there.
        overwrite: whether to replace `output` if it is there.

    Returns:
        Shapes of the old and the new kernel.

    Raises:
        ValueError: if there is no such kernel, the file's kind is unknown, or it holds more than tensors.
        FileNotFoundError: if there is no such file.
    """
    input, output = Path(input).expanduser(), Path(output).expanduser().absolute()
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
    _check_free(output, "output", overwrite)

    is_safetensors = suffixes[0] in SAFETENSORS_SUFFIXES
    checkpoint, metadata = load_safetensors_file(input) if is_safetensors else (load_torch_file(input), None)
    holder = _find_holder(checkpoint, name)
    if holder is None:
        kernels = _kernel_names(checkpoint)
        raise ValueError(
            f"`name` {name!r} is no tensor in `{input}`. Kernels in it: {', '.join(kernels[:8]) or 'none'}."
        )
    old_shape = tuple(holder[name].shape)
    holder[name] = pi_resize_patch_embed(holder[name].detach(), patch_size, interpolation, antialias).contiguous()
    with _workplace(output) as workplace:
        result = workplace / output.name
        if is_safetensors:
            save_file(checkpoint, result, metadata=metadata)
        else:
            torch.save(checkpoint, result)
        os.replace(result, output)
    return old_shape, tuple(holder[name].shape)


__all__ = ["convert_checkpoint", "convert_patch_embed"]
