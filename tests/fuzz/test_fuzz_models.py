"""`forward` of every family with random inputs, arguments and labels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..tiny_models import FAMILIES, pixels_shape, tiny_classifier
from .outcomes import anything, cases, clear_error_at_most, nearly


ARGUMENTS = {
    "flexivit": ("patch_size",),
    "quadtree_vit": ("num_tokens", "split_threshold", "patch_scores"),
    "sparseformer": (),
    "sparseformer_video": (),
    "s2_vision": ("scales", "img_sizes", "image_sizes", "num_tiles", "tile_scores"),
}
HOST_WORDS = ("use_cache", "return_dict", "num_items_in_batch")
OTHERS = ("num_tokens", "patch_size", "scales", "patchsize", "label", *HOST_WORDS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    torch.manual_seed(0)
    return tiny_classifier(family)


@pytest.fixture(scope="module")
def pixels(family):
    return torch.randn(pixels_shape(family), generator=torch.Generator().manual_seed(0))


@cases(25)
@given(data=st.data())
def test_forward(family, model, pixels, data):
    given_pixels = data.draw(nearly(pixels))
    names = data.draw(st.lists(st.sampled_from([*ARGUMENTS[family], "labels", *OTHERS]), max_size=2, unique=True))
    arguments = {name: data.draw(anything if name not in HOST_WORDS else st.booleans()) for name in names}
    with torch.no_grad(), clear_error_at_most():
        outputs = model(given_pixels, **arguments)
        assert outputs is not None


@cases(10)
@given(data=st.data())
def test_labels(model, pixels, data):
    labels = data.draw(st.one_of(anything, st.lists(st.integers(-2, 5), max_size=3).map(torch.tensor)))
    model.config.problem_type = None
    with torch.no_grad(), clear_error_at_most("labels"):
        model(pixels, labels=labels)
