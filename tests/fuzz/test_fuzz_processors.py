"""Image and video processors with random images and options."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import polyscale

from .outcomes import anything, cases, clear_error_at_most


PROCESSORS = {
    "flexivit": lambda: polyscale.FlexiViTImageProcessor(size={"height": 16, "width": 16}),
    "quadtree_vit": lambda: polyscale.QuadtreeViTImageProcessorPil(size={"height": 16, "width": 16}, max_patch_size=8),
    "sparseformer": lambda: polyscale.SparseFormerImageProcessor(size={"shortest_edge": 16}),
    "s2_vision": lambda: polyscale.S2ImageProcessorPil(),
}
IMAGES = st.one_of(
    anything,
    st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16", "F", "I", "LA"]).map(
        lambda mode: Image.new(mode, (9, 7))
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4)).map(lambda shape: np.zeros(shape, np.uint8)),
)


@pytest.mark.parametrize("family", PROCESSORS)
@cases(15)
@given(images=IMAGES)
def test_image_processors(family, images):
    with clear_error_at_most():
        PROCESSORS[family]()(images, return_tensors="pt")
