"""FlexiViT's image processors: twins that agree, timm's evaluation, pictures that are no pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from polyscale import FlexiViTImageProcessor, FlexiViTImageProcessorPil


PROCESSORS = [FlexiViTImageProcessor, FlexiViTImageProcessorPil]


@pytest.fixture(scope="module")
def picture():
    """A smooth random picture, larger than the crop and not square."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((410, 300), Image.Resampling.BICUBIC)


def in_pixels(pixel_values, mean=0.5, std=0.5):
    return (torch.as_tensor(pixel_values) * std + mean) * 255


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_default_is_timms_evaluation(processor_class, picture):
    timm_data = pytest.importorskip("timm.data")
    transform = timm_data.create_transform(
        input_size=(3, 240, 240), crop_pct=0.95, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    actual = processor_class()(picture, return_tensors="pt").pixel_values
    assert actual.shape == (1, 3, 240, 240)
    difference = (in_pixels(actual[0]) - in_pixels(transform(picture))).abs()
    assert difference.max() < 2.01


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 60, "width": 90}, "crop_size": {"height": 48, "width": 80}},
        {"do_resize": False, "do_center_crop": False},
        {"size": {"shortest_edge": 50}, "do_center_crop": False, "resample": Image.Resampling.BILINEAR},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_twins_agree(settings, picture):
    one, other = (cls(**settings)(picture, return_tensors="pt").pixel_values.float() for cls in PROCESSORS)
    assert one.shape == other.shape
    scale = 255 if settings.get("do_rescale", True) else 1
    std = 0.5 if settings.get("do_normalize", True) else 1
    assert ((one - other).abs() * scale * std).max() < 2.01


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_values_of_a_plain_picture(processor_class):
    gray = Image.new("RGB", (300, 300), (0, 51, 255))
    pixel_values = processor_class()(gray, return_tensors="pt").pixel_values[0]
    for channel, value in zip(pixel_values, (-1.0, -0.6, 1.0), strict=True):
        torch.testing.assert_close(torch.as_tensor(channel), torch.full((240, 240), value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_gray_and_transparent_pictures_become_rgb(processor_class):
    pixel_values = processor_class()([Image.new("L", (260, 260), 255), Image.new("RGBA", (300, 260))])["pixel_values"]
    assert [tuple(picture.shape) for picture in pixel_values] == [(3, 240, 240), (3, 240, 240)]
    assert torch.as_tensor(np.asarray(pixel_values[0])).min() == 1


@pytest.mark.parametrize("processor_class", PROCESSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_nan_and_infinite_pixels_are_refused(processor_class, value, kind):
    picture = np.zeros((3, 250, 250), dtype=np.float32)
    picture[1, 17, 3] = value
    picture = picture if kind == "array" else torch.from_numpy(picture)
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor_class()(picture, return_tensors="pt", do_rescale=False)


def test_processor_survives_saving(tmp_path):
    processor = FlexiViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"shortest_edge": 99}, crop_size=88)
    processor.save_pretrained(tmp_path)
    loaded = FlexiViTImageProcessor.from_pretrained(tmp_path)
    assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
    assert loaded.size["shortest_edge"] == 99
    assert loaded.crop_size["height"] == loaded.crop_size["width"] == 88
