"""The public functions that stand on their own."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import polyscale

from .outcomes import anything, cases, clear_error_at_most, nearly


KERNEL = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(0))
SCORES = (torch.rand(2, 2, 2), torch.rand(2, 4, 4))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def some(**good):
    """Arguments of which one or two may be anything."""
    return st.fixed_dictionaries({name: nearly(value) for name, value in good.items()})


@cases(30)
@given(arguments=some(patch_embed=KERNEL, new_patch_size=4, interpolation="bilinear", antialias=True))
def test_kernel_resizes(arguments):
    for function in (polyscale.pi_resize_patch_embed, polyscale.interpolate_resize_patch_embed):
        with clear_error_at_most(*arguments):
            function(**arguments)


@cases(30)
@given(
    arguments=some(
        pos_embed=POSITIONS, new_size=6, old_size=4, num_prefix_tokens=1, interpolation="bicubic", antialias=False
    )
)
def test_position_resizes(arguments):
    with clear_error_at_most(*arguments):
        polyscale.resize_abs_pos_embed(**arguments)


@cases(40)
@given(arguments=some(scores=SCORES, num_tokens=10, split_threshold=None))
def test_quadtrees(arguments):
    with clear_error_at_most(*arguments):
        polyscale.quadtree_tokens(**arguments)


@cases(30)
@given(
    arguments=some(
        tokens=torch.randn(1, 4, 5),
        patch_centers=torch.tensor([[[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [12.0, 12.0]]]),
        patch_sizes=torch.full((1, 4), 8),
        image_size=(16, 16),
        min_patch_size=4,
        token_mask=None,
    )
)
def test_reversed_quadtrees(arguments):
    with clear_error_at_most(*arguments):
        polyscale.reverse_quadtree(**arguments)


@cases(40)
@given(
    arguments=some(
        input=IMAGES,
        scales=[1, 2],
        img_sizes=None,
        max_split_size=16,
        resize_output_to_idx=0,
        num_prefix_token=0,
        output_shape="bchw",
        split_forward=False,
        uneven="resize",
        tiles_per_forward=None,
    )
)
def test_multiscale(arguments):
    with clear_error_at_most(*arguments):
        polyscale.multiscale_forward(lambda tiles: tiles, **arguments)


@cases(10)
@given(name=anything)
def test_names(name):
    for function in (
        polyscale.bundled_checkpoint,
        polyscale.SparseFormerConfig.preset,
        polyscale.FlexiViTConfig.preset,
    ):
        with clear_error_at_most("name"):
            function(name)
