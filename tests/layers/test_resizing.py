"""Kernel and position resizing against torch's own interpolation, a plain pseudo-inverse, and golden tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from polyscale import interpolate_resize_patch_embed, pi_resize_patch_embed, resize_abs_pos_embed
from polyscale.layers.resizing import _block_weights, interpolation_matrix, pseudo_inverse_matrix
from tests.golden import assert_golden


GOLDEN = Path(__file__).parents[1] / "fixtures" / "flexivit_golden.safetensors"
KERNEL_SIZES = ["8x8", "10x15", "12x12", "24x24", "32x32", "48x48"]
GRIDS = ["5x5", "10x15", "15x15", "30x30"]
MODES = [(mode, antialias) for mode in ("bilinear", "bicubic") for antialias in (False, True)]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def parse(size: str) -> tuple[int, int]:
    height, width = size.split("x")
    return int(height), int(width)


def plain_pi_resize(kernel, new_size, interpolation, antialias):
    """The definition: one large resize matrix, made of resized unit patches, and its pseudo-inverse."""
    height, width = kernel.shape[-2:]
    unit_patches = torch.eye(height * width, dtype=kernel.dtype).reshape(-1, 1, height, width)
    resize = F.interpolate(unit_patches, new_size, mode=interpolation, antialias=antialias).flatten(1)
    resized = kernel.flatten(2) @ torch.linalg.pinv(resize, rtol=1e-5).T
    return resized.reshape(*kernel.shape[:2], *new_size)


@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_pi_resize_equals_golden(golden, size):
    assert_golden(pi_resize_patch_embed(golden["kernel16"], parse(size)), golden[f"pi.{size}"])


@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_interpolate_resize_equals_golden(golden, size):
    assert_golden(interpolate_resize_patch_embed(golden["kernel16"], parse(size)), golden[f"interpolate.{size}"])


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_equal_golden(golden, grid):
    resized = resize_abs_pos_embed(golden["pos7x7"], parse(grid), (7, 7), num_prefix_tokens=0)
    assert_golden(resized, golden[f"pos.{grid}"])


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize(
    ("old", "new"), [(7, 15), (15, 7), (7, 5), (7, 7), (32, 12), (16, 48), (1, 4), (4, 1), (14, 20)]
)
def test_interpolation_matrix_equals_torch(old, new, interpolation, antialias):
    signals = torch.eye(old, dtype=torch.float64).reshape(old, 1, old, 1).expand(-1, -1, -1, 2)
    expected = F.interpolate(signals, (new, 2), mode=interpolation, antialias=antialias)[:, 0, :, 0].T
    actual = interpolation_matrix(old, new, interpolation, antialias)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (16, 5)])
def test_pseudo_inverse_matrix_fulfils_its_definition(old, new):
    resize = interpolation_matrix(old, new, "bicubic", True)
    inverse = pseudo_inverse_matrix(old, new, "bicubic", True).T
    np.testing.assert_allclose(resize @ inverse @ resize, resize, atol=1e-10)
    np.testing.assert_allclose(inverse @ resize @ inverse, inverse, atol=1e-10)
    np.testing.assert_allclose((resize @ inverse).T, resize @ inverse, atol=1e-10)


@pytest.mark.parametrize(
    ("interpolation", "old", "new", "weights"),
    [
        ("bilinear", 32, 16, (1, 1)),
        ("bilinear", 32, 8, (0, 1, 1, 0)),
        ("bicubic", 32, 16, ()),
        ("bilinear", 32, 12, ()),
        ("bilinear", 16, 16, ()),
    ],
)
def test_sums_of_blocks_stand_for_the_matrices_that_are_no_more(interpolation, old, new, weights):
    assert _block_weights("pi", old, new, interpolation, False) == weights
    kernel = torch.randn(3, 2, old, 24, requires_grad=True)
    rows, columns = (
        torch.tensor(pseudo_inverse_matrix(size, target, interpolation, False), dtype=torch.float32)
        for size, target in ((old, new), (24, 12))
    )
    expected = rows @ kernel @ columns.T
    resized = pi_resize_patch_embed(kernel, (new, 12), interpolation, antialias=False)
    torch.testing.assert_close(resized, expected)
    gradient = torch.randn_like(resized)
    torch.testing.assert_close(
        torch.autograd.grad(resized, kernel, gradient), torch.autograd.grad(expected, kernel, gradient)
    )


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize("new_size", [(5, 5), (11, 11), (6, 13), (8, 3)])
def test_pi_resize_equals_plain_pseudo_inverse_with_gradients(interpolation, antialias, new_size):
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 8, 8)
    weights = torch.randn(3, 2, *new_size)
    ours, plain = kernel.clone().requires_grad_(), kernel.double().requires_grad_()
    actual = pi_resize_patch_embed(ours, new_size, interpolation, antialias)
    expected = plain_pi_resize(plain, new_size, interpolation, antialias)
    torch.testing.assert_close(actual, expected.float(), atol=2e-5, rtol=1e-4)
    (actual * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("new_size", [16, (16, 24)])
def test_inner_products_survive_upsampling(new_size):
    """What the resize is for: a larger picture under a larger kernel gives the same tokens."""
    torch.manual_seed(0)
    patches, kernel = torch.randn(5, 3, 8, 8), torch.randn(4, 3, 8, 8)
    size = (new_size, new_size) if isinstance(new_size, int) else new_size
    larger = F.interpolate(patches, size, mode="bilinear")
    resized = pi_resize_patch_embed(kernel, new_size, "bilinear", False)
    torch.testing.assert_close(
        torch.einsum("nchw,dchw->nd", larger, resized),
        torch.einsum("nchw,dchw->nd", patches, kernel),
        atol=1e-3,
        rtol=1e-4,
    )


def test_same_size_is_left_alone():
    kernel = torch.randn(2, 3, 8, 8)
    assert torch.equal(pi_resize_patch_embed(kernel, 8), kernel)
    positions = torch.randn(1, 17, 4)
    assert resize_abs_pos_embed(positions, 4) is positions


def test_resize_runs_in_float32_inside_autocast_and_keeps_the_dtype():
    kernel = torch.randn(2, 3, 8, 8)
    expected = pi_resize_patch_embed(kernel, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pi_resize_patch_embed(kernel, 6), expected)
    half = pi_resize_patch_embed(kernel.bfloat16(), 6)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, pi_resize_patch_embed(kernel.bfloat16().float(), 6).bfloat16())


def test_a_first_use_in_inference_mode_does_not_spoil_training():
    kernel = torch.randn(2, 3, 9, 9, requires_grad=True)
    with torch.inference_mode():
        pi_resize_patch_embed(kernel, 13)  # a size that no other test uses: its matrix is made here
    pi_resize_patch_embed(kernel, 13).sum().backward()
    assert torch.isfinite(kernel.grad).all()


def test_interpolate_resize_takes_torchs_other_modes():
    kernel = torch.randn(2, 3, 8, 8)
    expected = F.interpolate(kernel, (4, 4), mode="area")
    assert torch.equal(interpolate_resize_patch_embed(kernel, 4, "area", antialias=False), expected)


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
def test_positions_equal_torchs_interpolation_and_prefixes_stay(interpolation, antialias):
    torch.manual_seed(0)
    positions = torch.randn(1, 2 + 3 * 5, 6)
    resized = resize_abs_pos_embed(positions, (4, 2), (3, 5), 2, interpolation, antialias)
    grid = positions[:, 2:].reshape(1, 3, 5, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 2), mode=interpolation, antialias=antialias).flatten(2).transpose(1, 2)
    assert torch.equal(resized[:, :2], positions[:, :2])
    torch.testing.assert_close(resized[:, 2:], expected, atol=1e-5, rtol=1e-5)


def test_grids_are_compared_by_shape_not_by_count():
    positions = torch.randn(1, 16, 3)
    resized = resize_abs_pos_embed(positions, (2, 8), (4, 4), num_prefix_tokens=0)
    grid = positions.reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (2, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(resized, positions)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_embed": torch.zeros(3, 8, 8), "new_patch_size": 4}, "patch_embed"),
        ({"patch_embed": torch.zeros(1, 3, 8, 8), "new_patch_size": 0}, "new_patch_size"),
        ({"patch_embed": torch.zeros(1, 3, 8, 8), "new_patch_size": (4, -1)}, "new_patch_size"),
        ({"patch_embed": torch.zeros(1, 3, 8, 8), "new_patch_size": (4, 4, 4)}, "new_patch_size"),
        ({"patch_embed": torch.zeros(1, 3, 8, 8), "new_patch_size": 4.5}, "new_patch_size"),
        ({"patch_embed": torch.zeros(1, 3, 8, 8), "new_patch_size": 4, "interpolation": "cubic"}, "interpolation"),
    ],
)
def test_bad_kernels_and_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pi_resize_patch_embed(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pos_embed": torch.zeros(16, 3), "new_size": 4}, "pos_embed"),
        ({"pos_embed": torch.zeros(1, 16, 3), "new_size": 4}, "old_size"),  # 15 positions beside CLS are no square
        ({"pos_embed": torch.zeros(1, 17, 3), "new_size": 4, "old_size": (3, 5)}, "old_size"),
        ({"pos_embed": torch.zeros(1, 17, 3), "new_size": 0}, "new_size"),
        ({"pos_embed": torch.zeros(1, 1, 3), "new_size": 4}, "pos_embed"),
    ],
)
def test_positions_that_are_no_grid_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        resize_abs_pos_embed(**kwargs)
