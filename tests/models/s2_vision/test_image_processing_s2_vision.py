"""S2 image processors: values by hand, both backends, pipelines."""

import numpy as np
import pytest
import torch
from PIL import Image
from s2_tiny import make_base
from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor, pipeline

from polyscale.models.s2_vision import (
    S2ImageProcessor,
    S2ImageProcessorPil,
    S2VisionConfig,
    S2VisionForImageClassification,
)


CLIP_PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def config():
    return S2VisionConfig(vision_config=make_base("clip").config, scales=[1, 2])


@pytest.fixture
def photograph():
    ramp = np.linspace(0, 255, 100 * 60 * 3).reshape(60, 100, 3).astype(np.uint8)
    return Image.fromarray(ramp)


def by_hand(image: Image.Image) -> torch.Tensor:
    values = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(field)[:, None, None] for field in (CLIP_PROCESSOR.image_mean, CLIP_PROCESSOR.image_std))
    return (values - mean) / std


def test_ways_to_a_square(config, photograph):
    mean_colour = tuple(int(255 * value) for value in CLIP_PROCESSOR.image_mean)
    padded = Image.new("RGB", (100, 100), mean_colour)
    padded.paste(photograph, (0, 20))
    scaled = photograph.resize((106, 64), Image.Resampling.BICUBIC)
    expected = {
        "squash": photograph.resize((64, 64), Image.Resampling.BICUBIC),
        "crop": scaled.crop((21, 0, 85, 64)),
        "pad": padded.resize((64, 64), Image.Resampling.BICUBIC),
    }
    for fit, image in expected.items():
        for backend in (S2ImageProcessor, S2ImageProcessorPil):
            processor = backend.for_config(config, CLIP_PROCESSOR, fit=fit)
            pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
            assert pixel_values.shape == (1, 3, 64, 64)
            # one step of 255 is 0.015: the two backends round resized pixels differently
            assert (pixel_values[0] - by_hand(image)).abs().max() < 0.031
            assert dict(processor.crop_size)["height"] == 64


def test_settings_come_from_the_base_processor(config):
    assert S2ImageProcessor.for_config(config, CLIP_PROCESSOR).fit == "crop"
    siglip = S2ImageProcessor.for_config(config, SiglipImageProcessor())
    assert siglip.fit == "squash"
    assert list(siglip.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("options", [{}, {"dynamic": True, "max_tiles": 6, "resize_output_to_idx": -1}])
def test_saves_reloads_and_serves_pipelines(options, photograph, tmp_path):
    other = photograph.resize((40, 70))
    model = S2VisionForImageClassification.from_vision_model(make_base("clip"), scales=[1, 2], num_labels=3, **options)
    processor = S2ImageProcessor.for_config(model.config, CLIP_PROCESSOR)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for backend, expected in (("torchvision", S2ImageProcessor), ("pil", S2ImageProcessorPil)):
        assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)) is expected
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    inputs = processor([photograph, other], return_tensors="pt")
    for name, value in reloaded([photograph, other], return_tensors="pt").items():
        assert torch.equal(value, inputs[name])

    classify = pipeline("image-classification", model=str(tmp_path), top_k=1)
    logits = model(**inputs).logits.softmax(dim=-1)
    for batch_size in (1, 2):
        results = classify([photograph, other], batch_size=batch_size)
        for result, expected in zip(results, logits, strict=True):
            assert result[0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)

    model.s2_vision.save_pretrained(tmp_path)
    features = model.s2_vision(**inputs)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    for batch_size in (1, 2):
        pooled = extract([photograph, other], pool=True, batch_size=batch_size)
        for result, expected in zip(pooled, features.pooler_output, strict=True):
            np.testing.assert_allclose(np.array(result)[0], expected.detach(), atol=1e-4)
    tokens = np.array(extract(photograph))[0]
    np.testing.assert_allclose(tokens, features.last_hidden_state[0].detach()[: len(tokens)], atol=1e-4)


def test_bad_images_and_choices_are_refused(config):
    for backend in (S2ImageProcessor, S2ImageProcessorPil):
        processor = backend.for_config(config, CLIP_PROCESSOR)
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="NaN or infinite"):
                processor(np.full((3, 40, 40), value, dtype=np.float32))
        with pytest.raises(ValueError, match="`fit` must be one of 'squash', 'crop', 'pad'"):
            processor(np.zeros((3, 40, 40), dtype=np.float32), fit="stretch")
    with pytest.raises(ValueError, match="`fit`"):
        S2ImageProcessor.for_config(config, fit="stretch")
    with pytest.raises(ValueError, match="belongs to Dynamic-S2"):
        S2ImageProcessor.for_config(config).tile_grid_for((40, 40))


@pytest.mark.parametrize("processor_class", [S2ImageProcessor, S2ImageProcessorPil])
def test_padding_is_the_mean_colour_whatever_the_values(config, processor_class):
    processor = processor_class.for_config(config, fit="pad")
    dark = np.full((8, 20, 3), 0.75, np.float32)  # of 255, as the other image says
    for images, options in (
        ([dark, dark * 300], {}),
        (dark * 4 - 2, {"do_rescale": False}),
        (np.full((8, 20, 3), 60000, np.uint16), {"rescale_factor": 1 / 65535}),
    ):
        made = processor(images, return_tensors="pt", **options)["pixel_values"]
        torch.testing.assert_close(made[0, :, 0, 0], torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("processor_class", [S2ImageProcessor, S2ImageProcessorPil])
def test_a_size_alone_takes_effect(config, photograph, processor_class):
    size = {"height": 32, "width": 48}
    processor = processor_class(size=size)
    assert processor.output_size == (32, 48)
    assert processor(photograph, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 48)
    processor = processor_class.for_config(config)
    for options in ({"size": size}, {"crop_size": size}, {"crop_size": size, "size": 8}):
        assert processor(photograph, return_tensors="pt", **options)["pixel_values"].shape == (1, 3, 32, 48)
    assert processor(photograph, return_tensors="pt", image_mean=0.5)["pixel_values"].shape == (1, 3, 64, 64)
