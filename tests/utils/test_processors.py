"""What image processors make, and whether a size that is asked for takes effect."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, ConvNextImageProcessor, ViTImageProcessor

from polyscale import (
    FlexiViTImageProcessor,
    QuadtreeViTImageProcessor,
    S2ImageProcessor,
    S2VisionConfig,
    SparseFormerImageProcessor,
)
from polyscale.utils.processors import options_for_size, output_size, process_images


PHOTOGRAPH = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3)).astype(np.uint8))
SMALL_VIT = CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def s2_processor(**fields) -> S2ImageProcessor:
    return S2ImageProcessor.for_config(S2VisionConfig(vision_config=SMALL_VIT, scales=[1, 2], **fields))


PROCESSORS = {
    "FlexiViT": (FlexiViTImageProcessor(), (240, 240)),
    "FlexiViT, resized": (FlexiViTImageProcessor(size={"height": 32, "width": 48}, do_center_crop=False), (32, 48)),
    "FlexiViT, short side": (FlexiViTImageProcessor(do_center_crop=False), None),
    "Quadtree ViT": (QuadtreeViTImageProcessor(size={"height": 64, "width": 64}), (64, 64)),
    "Quadtree ViT, pad": (QuadtreeViTImageProcessor(size={"height": 64, "width": 128}, fit="pad"), (64, 128)),
    "SparseFormer": (SparseFormerImageProcessor(), (224, 224)),
    "S2": (s2_processor(), (64, 64)),
    "ViT": (ViTImageProcessor(), (224, 224)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_size_is_that_of_what_is_made_and_another_takes_effect(name):
    processor, expected = PROCESSORS[name]
    assert output_size(processor) == expected
    if expected is not None:
        assert tuple(processor(PHOTOGRAPH, return_tensors="pt")["pixel_values"].shape[-2:]) == expected
    options = options_for_size(processor, (128, 192))
    assert tuple(processor(PHOTOGRAPH, return_tensors="pt", **options)["pixel_values"].shape[-2:]) == (128, 192)


def test_a_crop_keeps_its_share():
    assert options_for_size(FlexiViTImageProcessor(), (95, 95)) == {
        "size": {"shortest_edge": 99},
        "crop_size": {"height": 95, "width": 95},
        "do_resize": True,
        "do_center_crop": True,
    }
    assert options_for_size(ViTImageProcessor(), (32, 32), crop_pct=0.5)["size"] == {"shortest_edge": 64}
    with pytest.raises(ValueError, match="`crop_pct` must be above 0"):
        options_for_size(ViTImageProcessor(), (32, 32), crop_pct=0)


def test_sizes_that_follow_the_image_are_none_and_cannot_be_asked_for():
    aspect = QuadtreeViTImageProcessor(size={"height": 64, "width": 64}, fit="aspect")
    dynamic = s2_processor(dynamic=True)
    assert output_size(aspect) is output_size(dynamic) is None
    assert output_size(ConvNextImageProcessor()) is None
    with pytest.raises(ValueError, match="`fit='aspect'`, which sizes each image by its shape"):
        options_for_size(aspect, (128, 128))
    with pytest.raises(ValueError, match="Dynamic-S2"):
        options_for_size(dynamic, (128, 128))
    with pytest.raises(ValueError, match="crops as `fit='squash'` says"):
        options_for_size(s2_processor(), (128, 128), crop_pct=0.9)
    with pytest.raises(ValueError, match="crops as `fit='pad'` says"):
        options_for_size(PROCESSORS["Quadtree ViT, pad"][0], (128, 128), crop_pct=0.9)


def test_images_of_several_sizes_come_in_a_batch_each():
    aspect = QuadtreeViTImageProcessor(size={"height": 128, "width": 128}, fit="aspect", max_patch_size=32)
    images = [PHOTOGRAPH, PHOTOGRAPH.transpose(Image.Transpose.ROTATE_90), PHOTOGRAPH]
    groups = list(process_images(aspect, images))
    assert [indices for indices, _ in groups] == [[0, 2], [1]]
    for indices, inputs in groups:
        for row, index in enumerate(indices):
            alone = aspect(images[index], return_tensors="pt")["pixel_values"][0]
            assert (inputs["pixel_values"][row] == alone).all()
    ((indices, inputs),) = process_images(FlexiViTImageProcessor(), images)
    assert (indices, inputs["pixel_values"].shape) == ([0, 1, 2], (3, 3, 240, 240))
