"""Images of any size become legal ones, in four ways and with two backends."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from polyscale import QuadtreeViTImageProcessor, QuadtreeViTImageProcessorPil
from polyscale.utils.processors import seen_region


BOTH = pytest.mark.parametrize("processor_class", [QuadtreeViTImageProcessor, QuadtreeViTImageProcessorPil])


def random_image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@BOTH
@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        ({}, (300, 200), (256, 256)),
        ({"size": {"height": 128, "width": 192}}, (300, 200), (128, 192)),
        ({"fit": "aspect"}, (300, 200), (192, 320)),
        ({"fit": "aspect"}, (1000, 100), (64, 832)),
        ({"fit": "aspect", "size": {"shortest_edge": 128}}, (300, 200), (128, 192)),
        ({"fit": "crop"}, (300, 200), (256, 256)),
        ({"fit": "crop", "size": {"height": 64, "width": 192}}, (300, 200), (64, 192)),
        ({"fit": "pad"}, (300, 200), (256, 256)),
        ({"fit": "pad", "do_resize": False}, (300, 200), (256, 320)),
        ({"size": {"shortest_edge": 140}, "crop_size": 128, "do_center_crop": True}, (300, 200), (128, 128)),
    ],
)
def test_sizes(processor_class, fields, size, expected):
    pixels = processor_class(**fields)(random_image(*size), return_tensors="pt").pixel_values
    assert tuple(pixels.shape) == (1, 3, *expected)


@BOTH
def test_padding_is_the_mean_colour_and_the_image_keeps_its_shape(processor_class):
    photo = random_image(300, 200)
    padded = processor_class(fit="pad")(photo, return_tensors="pt").pixel_values[0]
    assert padded[:, 171:].eq(0).all()
    resized = processor_class(max_patch_size=1, size={"height": 171, "width": 256})(photo, return_tensors="pt")
    torch.testing.assert_close(padded[:, :171], resized.pixel_values[0])


@BOTH
def test_a_crop_is_the_middle_of_the_resized_image(processor_class):
    photo = random_image(300, 200)
    processor = processor_class(fit="crop")
    cropped = processor(photo, return_tensors="pt").pixel_values[0]
    resized = processor_class(max_patch_size=1, size={"height": 256, "width": 384})(photo, return_tensors="pt")
    torch.testing.assert_close(cropped, resized.pixel_values[0][:, :, 64:320])
    assert seen_region(photo, processor).tobytes() == photo.crop((50, 0, 250, 200)).tobytes()


def test_backends_agree():
    photo = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 200, 3)))
    for fit in ("squash", "crop", "pad", "aspect"):
        ours = QuadtreeViTImageProcessor(fit=fit)(photo, return_tensors="pt").pixel_values
        pil = QuadtreeViTImageProcessorPil(fit=fit)(photo, return_tensors="pt").pixel_values
        torch.testing.assert_close(ours, pil, atol=0.03, rtol=0)


@BOTH
def test_errors(processor_class):
    with pytest.raises(ValueError, match="192 and 256"):
        processor_class(size={"height": 224, "width": 256})(random_image(30, 30))
    with pytest.raises(ValueError, match="fit"):
        processor_class(fit="stretch")
    with pytest.raises(ValueError, match="fit"):
        processor_class()(random_image(30, 30), fit="stretch")
    with pytest.raises(ValueError, match="NaN"):
        processor_class()(np.full((30, 30, 3), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="one batch"):
        processor_class(fit="aspect")([random_image(300, 200), random_image(200, 300)], return_tensors="pt")


def test_saved_and_loaded(tmp_path):
    QuadtreeViTImageProcessor(fit="pad", max_patch_size=32, size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, QuadtreeViTImageProcessor)
    assert (loaded.fit, loaded.max_patch_size, dict(loaded.crop_size)) == ("pad", 32, {"height": 96, "width": 96})
    pil = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert isinstance(pil, QuadtreeViTImageProcessorPil)
    assert pil(random_image(40, 50), return_tensors="pt").pixel_values.shape == (1, 3, 96, 96)
