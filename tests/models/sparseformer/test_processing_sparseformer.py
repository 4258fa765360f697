import numpy as np
import pytest
import torch
from PIL import Image
from sparseformer_reference import make_model, tiny_config
from torchvision.transforms import v2

from polyscale.models.sparseformer import (
    SparseFormerForVideoClassification,
    SparseFormerImageProcessor,
    SparseFormerImageProcessorPil,
    SparseFormerVideoProcessor,
)


SMALL = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}


def image(height: int = 30, width: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("processor_class", [SparseFormerImageProcessor, SparseFormerImageProcessorPil])
def test_images_equal_the_official_preprocessing(processor_class, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    processor_class().save_pretrained(tmp_path)
    pixels = processor_class.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    expected = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )(image)
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels[0], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("processor_class", [SparseFormerImageProcessor, SparseFormerImageProcessorPil])
def test_whole_images_of_any_shape(processor_class):
    pixels = processor_class(do_center_crop=False, size={"shortest_edge": 20})(
        image(), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (1, 3, 20, 33)


@pytest.mark.parametrize("processor_class", [SparseFormerImageProcessor, SparseFormerImageProcessorPil])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(processor_class, value):
    image = np.zeros((3, 20, 20), dtype=np.float32)
    image[0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor_class(**SMALL)(image, return_tensors="pt")


def test_videos_frame_by_frame_like_images(tmp_path):
    frames = [image(), image().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    SparseFormerVideoProcessor(**SMALL).save_pretrained(tmp_path)
    processor = SparseFormerVideoProcessor.from_pretrained(tmp_path)
    pixels = processor(frames, return_tensors="pt")
    assert list(pixels) == ["pixel_values"]
    assert pixels.pixel_values.shape == (1, 2, 3, 16, 16)
    images = SparseFormerImageProcessor(**SMALL)(frames, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels.pixel_values[0], images, atol=1e-5, rtol=0)


def test_frames_are_sampled_at_equal_distances():
    video = np.repeat(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, 16, axis=1)
    video = np.repeat(np.repeat(video, 16, axis=2), 3, axis=3)  # (12, 16, 16, 3)
    processor = SparseFormerVideoProcessor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
    pixels = processor(video, do_sample_frames=True, num_frames=4, return_tensors="pt").pixel_values
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 60, 120, 180]


def test_videos_of_any_type_have_the_same_pixels():
    video = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    processor = SparseFormerVideoProcessor(**SMALL)
    expected = processor(video, return_tensors="pt").pixel_values
    deep = video.astype(np.uint16) * 256 + 7
    for other in (deep, torch.from_numpy(deep), video / 255, video.astype(np.float32), video.astype(np.int64), [deep]):
        assert torch.equal(processor(other, return_tensors="pt").pixel_values, expected)
    flipped = video[:, :, ::-1]
    for other in (flipped, [list(flipped)]):
        made = processor(other, return_tensors="pt").pixel_values
        assert torch.equal(made, processor(flipped.copy(), return_tensors="pt").pixel_values)
    frames = [Image.fromarray(frame[..., 0]) for frame in deep]  # of 16 bits
    grey = np.repeat(video[..., :1], 3, axis=3)
    assert torch.equal(
        processor(frames, return_tensors="pt").pixel_values, processor(grey, return_tensors="pt").pixel_values
    )
    with pytest.raises(ValueError, match="`videos` holds floats from -1 to"):
        processor(video / 127.5 - 1, return_tensors="pt")


def test_bad_videos_are_refused():
    processor = SparseFormerVideoProcessor(**SMALL)
    with pytest.raises(ValueError, match="zero frames"):
        processor(np.zeros((0, 16, 16, 3), dtype=np.uint8), return_tensors="pt")
    video = np.zeros((2, 16, 16, 3), dtype=np.float32)
    video[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(video, return_tensors="pt")


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        ([], {}, "`videos` is empty"),
        ("nothing.mp4", {}, "`videos` cannot be processed"),
        (None, {"banana": 1}, "`banana` is no option of SparseFormerVideoProcessor"),
        (None, {"size": "64"}, r"`size` must be of int, .*got '64'"),
        (None, {"image_std": [0.0, 1.0, 1.0]}, "`image_std` must be above 0"),
        (None, {"image_mean": float("nan")}, "`image_mean` is NaN"),
        (None, {"resample": "bicubic"}, "`resample` must be a filter of Pillow"),
    ],
)
def test_videos_and_options_that_make_no_pixels_are_named(videos, options, message):
    video = np.zeros((2, 20, 24, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        SparseFormerVideoProcessor(**SMALL)(video if videos is None else videos, return_tensors="pt", **options)


def test_statistics_of_videos_may_be_ints():
    video = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    processor = SparseFormerVideoProcessor(**SMALL)
    made = processor(video, return_tensors="pt", image_mean=[0, 0, 0], image_std=np.ones(3)).pixel_values
    assert 0 <= made.min() < made.max() <= 1


def test_a_processed_video_goes_through_the_model():
    model = make_model(SparseFormerForVideoClassification, tiny_config("video"))
    video = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    inputs = SparseFormerVideoProcessor(**SMALL)([video, video], return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[0], logits[1])
