"""Resizing of patch kernels and position embeddings.

Both are separable: a resize of a (height, width) grid is `rows @ grid @ columns.T` with two small matrices. The
pseudo-inverse resize (PI-resize) of FlexiViT (arXiv 2212.08013, section 3.3; google-research/big_vision,
`models/proj/flexi/vit.py`) is separable too, because the pseudo-inverse of a Kronecker product is the product of the
pseudo-inverses. The matrices are made once per size in float64 with NumPy, so that they are the same on every device,
and constants inside `torch.compile` and `torch.export`.

A resized kernel is computed in each forward and never stored: two small matrix products cost less than proving that a
stored one is still right (`_version` is not bumped by fused optimisers or by `.data`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.tracing import can_be_kept
from ..utils.transformers_internals import maybe_autocast
from ..utils.validation import check_choice, check_int, check_tensor, to_pair


INTERPOLATIONS = ("bilinear", "bicubic")


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at `distance` >= 0 with parameter `a`."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _read_only(matrix: np.ndarray) -> np.ndarray:
    """Callers share the matrices that the caches keep."""
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=1024)
def interpolation_matrix(old: int, new: int, interpolation: str, antialias: bool) -> np.ndarray:
    """The matrix (new, old) that resizes a signal of length `old` to `new`, as `torch.nn.functional.interpolate`
    with `align_corners=False` does along one axis (float64).

    Antialiased kernels follow Pillow: parameter -0.5 for the cubic one, support widened by the scale, weights
    normalised within the signal. Without antialias the cubic parameter is -0.75 and the border is repeated.

    Raises:
        ValueError: for an interpolation other than "bilinear" and "bicubic".
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {INTERPOLATIONS}, got {interpolation!r}.")
    scale = old / new
    centers = (np.arange(new) + 0.5) * scale  # in pixels of the old signal, borders at 0 and `old`
    if antialias:
        stretch = max(scale, 1.0)
        distance = np.abs(np.arange(old)[None] + 0.5 - centers[:, None]) / stretch
        weights = np.maximum(0.0, 1 - distance) if interpolation == "bilinear" else _cubic(distance, a=-0.5)
        return _read_only(weights / weights.sum(axis=1, keepdims=True))

    source = centers - 0.5
    if interpolation == "bilinear":
        source = np.maximum(source, 0.0)
    first = np.floor(source).astype(int)
    fraction = source - first
    if interpolation == "bilinear":
        taps = {0: 1 - fraction, 1: fraction}
    else:
        taps = {tap: _cubic(np.abs(fraction - tap), a=-0.75) for tap in (-1, 0, 1, 2)}
    matrix = np.zeros((new, old))
    for tap, weight in taps.items():
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return _read_only(matrix)


@lru_cache(maxsize=1024)
def pseudo_inverse_matrix(old: int, new: int, interpolation: str, antialias: bool) -> np.ndarray:
    """One axis of the PI-resize: the matrix A (new, old) with `new_kernel = A_rows @ kernel @ A_columns.T` (float64).

    A is the transposed pseudo-inverse of the interpolation matrix. Singular values below 1e-5 of the largest count as
    zero, which is where float32 implementations cut.
    """
    return _read_only(np.linalg.pinv(interpolation_matrix(old, new, interpolation, antialias), rcond=1e-5).T)


_matrix_makers = {"interpolate": interpolation_matrix, "pi": pseudo_inverse_matrix}
# The matrices of the latest sizes; an image size and a patch size need up to four.
_matrices_on_device: dict[tuple, torch.Tensor] = {}
_MAX_MATRICES = 256
_lock = Lock()


def _matrix_data(method: str, old: int, new: int, interpolation: str, antialias: bool) -> list[list[float]]:
    return _matrix_makers[method](old, new, interpolation, antialias).tolist()


@lru_cache(maxsize=1024)
def _block_weights(method: str, old: int, new: int, interpolation: str, antialias: bool) -> tuple[float, ...]:
    """The weights with which each new value is the sum of its own `old / new` values, or nothing where the matrix is
    not of that kind. The PI-resize by bilinear interpolation to a half or a quarter is, such as FlexiViT's 32 to 16.
    """
    if old % new or old == new:
        return ()
    matrix = _matrix_makers[method](old, new, interpolation, antialias)
    weights = matrix[0, : old // new]
    if not np.allclose(matrix, np.kron(np.eye(new), weights), rtol=0, atol=1e-12):
        return ()
    return tuple(weights.round(12).tolist())  # exact zeros and ones cost nothing


def _block_weight_data(method: str, old: int, new: int, interpolation: str, antialias: bool) -> tuple[float, ...]:
    return _block_weights(method, old, new, interpolation, antialias)


# Plain lists and tuples are constants for every tracer: the values are made while tracing and never traced themselves.
_constant_matrix_data = torch.compiler.assume_constant_result(_matrix_data)
_constant_block_weights = torch.compiler.assume_constant_result(_block_weight_data)


def _matrix(
    method: str, old: int, new: int, interpolation: str, antialias: bool, device: torch.device
) -> torch.Tensor:
    """The matrix as a float32 tensor on `device`; made once per device outside of tracing."""
    if torch.compiler.is_compiling():
        data = _constant_matrix_data(method, old, new, interpolation, antialias)
        return torch.tensor(data, dtype=torch.float32, device=device)
    key = (method, old, new, interpolation, antialias, device)
    matrix = _matrices_on_device.get(key)
    if matrix is None:
        # outside of inference mode, so that the cached tensor may later take part in a backward pass
        with torch.inference_mode(False):
            data = np.ascontiguousarray(_matrix_makers[method](old, new, interpolation, antialias), dtype=np.float32)
            matrix = torch.tensor(data).to(device)
        if can_be_kept(matrix):
            with _lock:
                while len(_matrices_on_device) >= _MAX_MATRICES:
                    del _matrices_on_device[next(iter(_matrices_on_device))]  # the oldest
                _matrices_on_device[key] = matrix
    return matrix


def _sum_blocks(grid: torch.Tensor, dim: int, new: int, weights: tuple[float, ...]) -> torch.Tensor:
    """Weighted sums of every `len(weights)` neighbours along a dimension: (..., new * len(weights)) -> (..., new)."""
    parts = grid.unflatten(dim, (new, len(weights))).unbind(dim)
    (part, weight), *others = [pair for pair in zip(parts, weights, strict=True) if pair[1]]
    total = part if weight == 1 else part * weight
    for part, weight in others:
        total = torch.add(total, part, alpha=weight)
    return total


def _resize_separable(
    grid: torch.Tensor, new_size: tuple[int, int], method: str, interpolation: str, antialias: bool
) -> torch.Tensor:
    """(..., rows, columns) -> (..., *new_size) in float32, outside of autocast: two matrix products, or sums of blocks
    where the matrices are no more than that, at a third of the time.
    """
    rows, columns = grid.shape[-2:]
    row_weights = _constant_block_weights(method, rows, new_size[0], interpolation, antialias)
    column_weights = _constant_block_weights(method, columns, new_size[1], interpolation, antialias)
    with maybe_autocast(device_type=grid.device.type, enabled=False):
        resized = grid.float()
        if row_weights:  # first, as rows of neighbouring values are added whole
            resized = _sum_blocks(resized, -2, new_size[0], row_weights)
        if column_weights:
            resized = _sum_blocks(resized, -1, new_size[1], column_weights)
        elif columns != new_size[1]:
            resized = resized @ _matrix(method, columns, new_size[1], interpolation, antialias, grid.device).T
        if rows != new_size[0] and not row_weights:
            resized = _matrix(method, rows, new_size[0], interpolation, antialias, grid.device) @ resized
    return resized.to(grid.dtype)


def _resize_positions(
    grid: torch.Tensor, new_size: tuple[int, int], interpolation: str, antialias: bool
) -> torch.Tensor:
    """(batch, rows, columns, width) -> (batch, *new_size, width): as `_resize_separable`, but the channels stay last,
    so that the rows take one matrix product with all channels and columns side by side, and nothing is transposed.
    """
    rows, columns = grid.shape[1:3]
    with maybe_autocast(device_type=grid.device.type, enabled=False):
        resized = grid.float()
        if rows != new_size[0]:
            matrix = _matrix("interpolate", rows, new_size[0], interpolation, antialias, grid.device)
            resized = (matrix @ resized.flatten(2)).unflatten(2, (columns, -1))
        if columns != new_size[1]:
            resized = _matrix("interpolate", columns, new_size[1], interpolation, antialias, grid.device) @ resized
    return resized.to(grid.dtype)


def _check_kernel(patch_embed: torch.Tensor) -> None:
    check_tensor("patch_embed", patch_embed, ("embedding width", "channels", "height", "width"))


def pi_resize_patch_embed(
    patch_embed: torch.Tensor,
    new_patch_size: int | Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> torch.Tensor:
    """Resizes a patch-embedding kernel by the pseudo-inverse of an image resize (FlexiViT, arXiv 2212.08013, eq. 3).

    The inner products of the new kernel with resized patches equal those of the old kernel with the patches, where
    that is possible. The arguments are those of `flexivit_pytorch.pi_resize_patch_embed`. Differentiable; computed in
    float32, returned in the dtype of `patch_embed`.

    Args:
        patch_embed (`torch.Tensor` of shape `(embedding width, channels, height, width)`): the kernel, in pixels.
        new_patch_size (`int` or `(height, width)`): of the new kernel, in pixels.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): `"bicubic"`, or `"bilinear"` as for FlexiViT's
            released weights.
        antialias (`bool`, *optional*, defaults to `True`): whether the image resize that is inverted is antialiased
            (FlexiViT's released weights: no).

    Returns:
        Kernel of shape (embedding width, channels, *new_patch_size).

    Raises:
        ValueError: for a kernel that is not 4-dimensional, a size below 1 or an unknown interpolation.
    """
    _check_kernel(patch_embed)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("antialias", antialias, (True, False))
    return _resize_separable(patch_embed, to_pair(new_patch_size, "new_patch_size"), "pi", interpolation, antialias)


def interpolate_resize_patch_embed(
    patch_embed: torch.Tensor,
    new_patch_size: int | Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> torch.Tensor:
    """Resizes a patch-embedding kernel as if it were an image: the weaker baseline to `pi_resize_patch_embed`.

    The arguments are those of `flexivit_pytorch.interpolate_resize_patch_embed`. Differentiable; computed in float32,
    returned in the dtype of `patch_embed`.

    Args:
        patch_embed (`torch.Tensor` of shape `(embedding width, channels, height, width)`): the kernel, in pixels.
        new_patch_size (`int` or `(height, width)`): of the new kernel, in pixels.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): any mode of `torch.nn.functional.interpolate` for
            images.
        antialias (`bool`, *optional*, defaults to `True`): whether the resize is antialiased; only `"bicubic"` and
            `"bilinear"` can be.

    Returns:
        Kernel of shape (embedding width, channels, *new_patch_size).

    Raises:
        ValueError: for a kernel that is not 4-dimensional, a size below 1, an unknown interpolation, or one that
            cannot be antialiased.
    """
    _check_kernel(patch_embed)
    check_choice("interpolation", interpolation, (*INTERPOLATIONS, "nearest", "nearest-exact", "area"))
    check_choice("antialias", antialias, (True, False))
    new_size = to_pair(new_patch_size, "new_patch_size")
    if interpolation in INTERPOLATIONS:
        return _resize_separable(patch_embed, new_size, "interpolate", interpolation, antialias)
    if antialias:
        raise ValueError(f"`antialias` must be False with `interpolation={interpolation!r}`.")
    resized = F.interpolate(patch_embed.float(), new_size, mode=interpolation)
    return resized.to(patch_embed.dtype)


@dataclass(frozen=True)
class KernelResize:
    """How a model resizes its patch kernel: called with a kernel and a new size, it gives the new kernel.

    Args:
        method (`str`, *optional*, defaults to `"pi"`): "pi" (pseudo-inverse resize) or "interpolate".
        interpolation (`str`, *optional*, defaults to `"bilinear"`): "bilinear" or "bicubic".
        antialias (`bool`, *optional*, defaults to `False`): whether the image resize that is followed is antialiased.
    """

    method: str = "pi"
    interpolation: str = "bilinear"
    antialias: bool = False

    def __call__(self, patch_embed: torch.Tensor, new_patch_size: tuple[int, int]) -> torch.Tensor:
        resize = pi_resize_patch_embed if self.method == "pi" else interpolate_resize_patch_embed
        return resize(patch_embed, new_patch_size, self.interpolation, self.antialias)


def resize_patches(
    pixel_values: torch.Tensor, patch_size: tuple[int, int], kernel_size: tuple[int, int], resize: KernelResize
) -> torch.Tensor:
    """Resizes every patch of an image to the size of a kernel, so that the kernel's products with the new patches are
    those of the resized kernel with the old ones: <R k, x> = <k, R' x>.

    Args:
        pixel_values (`torch.Tensor`): (batch, channels, height, width).
        patch_size (`tuple[int, int]`): (height, width) of a patch, in pixels; an incomplete last row or column of
            patches is dropped.
        kernel_size (`tuple[int, int]`): (height, width) of the kernel, in pixels.
        resize (`KernelResize`): what resizes the kernel.

    Returns:
        `torch.Tensor`: (batch, channels, rows * kernel height, columns * kernel width), in the dtype of the image.
    """
    if patch_size == kernel_size:
        return pixel_values
    rows, columns = pixel_values.shape[-2] // patch_size[0], pixel_values.shape[-1] // patch_size[1]
    pixels = pixel_values[..., : rows * patch_size[0], : columns * patch_size[1]]
    with maybe_autocast(device_type=pixels.device.type, enabled=False):
        row_matrix, column_matrix = [
            _matrix(resize.method, old, new, resize.interpolation, resize.antialias, pixels.device)
            for old, new in zip(kernel_size, patch_size, strict=True)
        ]  # (patch, kernel) each
        resized = pixels.float().unflatten(-1, (columns, patch_size[1])) @ column_matrix
        resized = row_matrix.T @ resized.flatten(-2).unflatten(-2, (rows, patch_size[0]))
    return resized.flatten(-3, -2).to(pixel_values.dtype)


def resize_abs_pos_embed(
    pos_embed: torch.Tensor,
    new_size: int | Sequence[int],
    old_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> torch.Tensor:
    """Resizes absolute position embeddings from one grid to another; prefix positions are kept.

    The arguments are those of `flexivit_pytorch.resize_abs_pos_embed`. The grids are compared by shape, not by
    count: a 4 x 4 grid is resized to 2 x 8.

    Args:
        pos_embed (`torch.Tensor` of shape `(1, num_prefix_tokens + rows * columns, width)`): the position embeddings.
        new_size (`int` or `(rows, columns)`): of the new grid.
        old_size (`int` or `(rows, columns)`, *optional*): of the old grid; a square when `None`.
        num_prefix_tokens (`int`, *optional*, defaults to 1): positions in front that belong to no place (CLS,
            registers).
        interpolation (`str`, *optional*, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`.
        antialias (`bool`, *optional*, defaults to `True`): whether a resize to a smaller grid is antialiased.

    Returns:
        (1, num_prefix_tokens + new rows * new columns, width).

    Raises:
        ValueError: if the number of positions is not that of `old_size`, or is no square when it is not given.
    """
    check_tensor("pos_embed", pos_embed, ("1", "positions", "width"))
    check_int("num_prefix_tokens", num_prefix_tokens, 0)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("antialias", antialias, (True, False))
    rows, columns = to_pair(new_size, "new_size")
    num_positions = pos_embed.shape[1] - num_prefix_tokens
    if old_size is None:
        old_rows = old_columns = int(max(num_positions, 0) ** 0.5)
    else:
        old_rows, old_columns = to_pair(old_size, "old_size")
    if old_rows * old_columns != num_positions or num_positions < 1:
        raise ValueError(
            f"`pos_embed` has {pos_embed.shape[1]} positions, {num_prefix_tokens} of them prefix tokens; the other "
            f"{num_positions} are not the grid {old_size or 'of a square'}. Give `old_size` and `num_prefix_tokens`."
        )
    if (rows, columns) == (old_rows, old_columns):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.unflatten(1, (old_rows, old_columns))
    resized = _resize_positions(grid, (rows, columns), interpolation, antialias).flatten(1, 2)
    return torch.cat([prefix, resized], dim=1) if num_prefix_tokens else resized


__all__ = [
    "INTERPOLATIONS",
    "KernelResize",
    "interpolate_resize_patch_embed",
    "interpolation_matrix",
    "pi_resize_patch_embed",
    "pseudo_inverse_matrix",
    "resize_abs_pos_embed",
    "resize_patches",
]
