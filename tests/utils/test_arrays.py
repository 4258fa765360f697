"""Arrays and tensors get the pixels that the same image has as a file, in every image processor, or are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import polyscale
from polyscale.utils.arrays import with_values_of_files
from polyscale.utils.images import UnreadableImageError, displayed, find_images, open_pixels


SIZE = {"height": 32, "width": 32}
CLASSES = {
    "FlexiViTImageProcessor": {"do_center_crop": False},
    "QuadtreeViTImageProcessor": {"max_patch_size": 16},
    "SparseFormerImageProcessor": {"do_center_crop": False},
    "S2ImageProcessor": {"crop_size": SIZE},
}
GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (20, 24, 3)).astype(np.uint8)
RGBA = GENERATOR.integers(0, 256, (20, 24, 4)).astype(np.uint8)
DEEP = GENERATOR.integers(0, 65536, (20, 24)).astype(np.uint16)
FIRST = (2, 0, 1)
ARRAYS = {
    "uint8, channels first": (RGB.transpose(FIRST), RGB),
    "int64": (RGB.astype(np.int64), RGB),
    "int16 tensor": (torch.from_numpy(RGB.astype(np.int16)).permute(FIRST), RGB),
    "upper byte first": (RGB.astype(">i4"), RGB),
    "bool": (RGB[..., 0] > 99, RGB[..., 0] > 99),
    "grey": (RGB[..., 0], RGB[..., 0]),
    "uint16": (DEEP, DEEP),
    "uint16 of three channels": (np.repeat(DEEP[..., None], 3, axis=2), DEEP),
    "uint16 tensor": (torch.from_numpy(np.repeat(DEEP[None], 3, axis=0)), DEEP),
    "uint16, upper byte first": (DEEP.astype(">u2"), DEEP),
    "floats to 255": (RGB.astype(np.float32), RGB),
    "float16 to 255": (RGB.astype(np.float16), RGB),
    "floats to 1": (RGB / 255, RGB),
    "float tensor to 1": (torch.from_numpy(RGB.transpose(FIRST)).float() / 255, RGB),
    "flipped": (RGB[::-1, ::-1], RGB[::-1, ::-1].copy()),
    "with gradients": (torch.from_numpy(RGB.transpose(FIRST)).float().requires_grad_(), RGB),
    "transparent": (RGBA, RGBA),
    "transparent, channels first": (torch.from_numpy(RGBA).permute(FIRST), RGBA),
}


@pytest.fixture(params=[f"{name}{end}" for name in CLASSES for end in ("", "Pil")], scope="module")
def processor(request):
    options = CLASSES[request.param.removesuffix("Pil")]
    return getattr(polyscale, request.param)(size=SIZE, **options)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_has_the_pixels_of_its_file(processor, name):
    array, stored = ARRAYS[name]
    expected = processor(Image.fromarray(stored), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(array, return_tensors="pt")["pixel_values"].detach(), expected)
    pair = processor([array, array], return_tensors="pt")["pixel_values"]
    assert torch.equal(pair.detach(), torch.cat([expected, expected]))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RGB.astype(np.int32) * 300, "int32 values from 0 to 76500, whose range is unknown"),
        (RGB.astype(np.int16) - 10, "int16 values from -10 to 245"),
        (torch.from_numpy(RGB).permute(FIRST).int() + 1, "int32 values from 1 to 256"),
        (RGB.astype(np.float32) / 127.5 - 1, "floats from -1 to 1, whose range is unknown"),
        (RGB.astype(np.float32) * 257, r"floats from 0 to 6.554e\+04"),
        (torch.randn(3, 20, 20), "floats from"),
    ],
)
def test_values_of_an_unknown_range_are_refused(processor, array, message):
    with pytest.raises(ValueError, match=f"`images` holds {message}.*`do_rescale=False`"):
        processor(array, return_tensors="pt")


def test_values_are_left_alone_where_they_are_not_those_of_a_file():
    processor = polyscale.FlexiViTImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    deep = np.repeat(DEEP[..., None], 3, axis=2).astype(np.int32)
    signed = RGB / 127.5 - 1
    kept = processor(signed, do_rescale=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(kept.transpose(1, 2, 0), signed)
    scaled = processor(deep, rescale_factor=1 / 65535, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(scaled.transpose(1, 2, 0), deep / 65535, rtol=1e-5)


FLOATS = GENERATOR.random((20, 24, 3))
STEPS = np.where(np.indices((20, 24)).sum(axis=0)[..., None] // 5 % 2, np.uint16(65535), np.uint16([0, 9, 99]))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("images", "options"),
    [
        (FLOATS, {}),
        (FLOATS.astype(np.float16), {}),
        (torch.from_numpy(FLOATS.transpose(FIRST)).bfloat16(), {}),
        (FLOATS.astype(np.longdouble), {}),
        (FLOATS * 6 - 3, {"do_rescale": False}),
        (torch.from_numpy(FLOATS.transpose(FIRST)).bfloat16() * 6, {"do_rescale": False}),
        (RGB[:9, :7], {"do_resize": False, "do_center_crop": True, "crop_size": SIZE}),
        (STEPS, {"rescale_factor": 1 / 65535}),
        (torch.from_numpy(STEPS.transpose(FIRST)).to(torch.uint32), {"rescale_factor": 1 / 65535}),
    ],
)
def test_both_backends_make_the_same_of_arrays(name, images, options):
    if name.startswith(("Quadtree", "S2")) and "do_resize" in options:
        return  # they take images of legal sizes, or of any
    made = [
        getattr(polyscale, name + end)(size=SIZE, **CLASSES[name])(images, return_tensors="pt", **options)
        for end in ("", "Pil")
    ]
    torch.testing.assert_close(*(one["pixel_values"].float() for one in made), atol=1e-3, rtol=1e-3)


def test_wide_integers_do_not_wrap_around_when_resized(processor):
    made = processor(STEPS, rescale_factor=1 / 65535, return_tensors="pt")["pixel_values"]
    expected = processor(STEPS.astype(np.float64) / 65535, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_a_fourth_channel_that_is_no_transparency_weighs_nothing(name):
    """Pillow multiplies the others by it when it resizes."""
    options = {**CLASSES[name], "size": SIZE, "do_convert_rgb": False, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    for end in ("", "Pil"):
        processor = getattr(polyscale, name + end)(**options)
        made, zeroed = (
            processor(array, return_tensors="pt")["pixel_values"]
            for array in (RGBA, np.concatenate([RGBA[..., :3], RGBA[..., 3:] * 0], axis=2))
        )
        assert torch.equal(made[:, :3], zeroed[:, :3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_mean": float("nan")}, "`image_mean` is NaN"),
        ({"image_std": [0, 1, 1]}, "`image_std` must be above 0"),
        ({"image_std": float("inf")}, "`image_std` must be finite"),
        ({"rescale_factor": 0}, "`rescale_factor` must be finite and not 0"),
        ({"rescale_factor": "1/255"}, "`rescale_factor` must be a number, got '1/255'"),
        ({"resample": "bicubic"}, "`resample` must be a filter of Pillow, such as `PIL.Image.BICUBIC`, got 'bicubic'"),
        ({"resample": 99}, "`resample` must be a filter of Pillow.*got 99"),
        ({"banana": 1}, r"`banana` is no option of \w+ImageProcessor"),
        ({"size": "64"}, r"`size` must be of int, list\[int\], .*None, got '64'"),
        ({"do_resize": "no"}, "`do_resize` must be of bool, None, got 'no'"),
    ],
)
def test_options_of_a_call_that_are_none_are_named(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(RGB, return_tensors="pt", **options)


def test_statistics_may_be_ints_and_arrays(processor):
    expected = processor(RGB, return_tensors="pt", image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 2.0, 4.0])
    for mean, std in (([0, 0, 0], [1, 2, 4]), (np.zeros(3), torch.tensor([1.0, 2.0, 4.0]))):
        made = processor(RGB, return_tensors="pt", image_mean=mean, image_std=std)
        assert torch.equal(made["pixel_values"], expected["pixel_values"])


def test_filters_that_torchvision_lacks_are_refused():
    processor = polyscale.FlexiViTImageProcessor(size=SIZE, do_center_crop=False)
    for filter in (Image.Resampling.BOX, 5):
        with pytest.raises(ValueError, match="`resample` must be one of 'NEAREST'"):
            processor(RGB, resample=filter, return_tensors="pt")
    twin = polyscale.FlexiViTImageProcessorPil(size=SIZE, do_center_crop=False)
    for image in (RGB, FLOATS):
        assert twin(image, resample=Image.Resampling.BOX, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_dark_images_among_bright_ones_stay_dark():
    dark, bright = np.full((4, 4, 3), 0.5, np.float32), np.full((4, 4, 3), 200, np.float32)
    made = with_values_of_files([dark, bright])
    assert made[0].max() == 0.5
    assert made[1].max() == 200
    assert with_values_of_files(dark).max() == 127.5
    tensors = with_values_of_files([torch.from_numpy(dark), [torch.from_numpy(bright)]])
    assert (tensors[0].max(), tensors[1][0].dtype) == (0.5, torch.uint8)


def test_other_channels_keep_the_precision_of_16_bits():
    deep = np.arange(20 * 24 * 5, dtype=np.uint16).reshape(20, 24, 5)
    np.testing.assert_allclose(with_values_of_files(deep), deep / 257, rtol=1e-6)
    np.testing.assert_allclose(
        with_values_of_files(deep[..., :4], without_alpha=False), deep[..., :4] / 257, rtol=1e-6
    )


@pytest.mark.parametrize("name", CLASSES)
def test_grey_processors_take_colours_and_processors_of_other_channels_take_arrays(name):
    options = {**CLASSES[name], "size": SIZE, "do_convert_rgb": False}
    grey = getattr(polyscale, name)(**options, image_mean=[0.5], image_std=[0.5])
    expected = grey(np.asarray(Image.fromarray(RGB).convert("L")), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 1, 32, 32)
    assert torch.equal(grey(Image.fromarray(RGB), return_tensors="pt")["pixel_values"], expected)
    five = getattr(polyscale, name)(**options, image_mean=[0.5] * 5, image_std=[0.25] * 5)
    array = np.concatenate([RGB, RGB[..., :2]], axis=2)
    made = five(array, return_tensors="pt")["pixel_values"]
    assert made.shape == (1, 5, 32, 32)
    assert torch.equal(five(array.transpose(FIRST), return_tensors="pt")["pixel_values"], made)
    assert torch.equal(made[:, :2], made[:, 3:])
    for wrong in (RGB, Image.fromarray(RGB)):
        with pytest.raises(ValueError, match=r"`images` must .*5 channels, as many as `image_mean` has entries"):
            five(wrong, return_tensors="pt")


def test_files_of_arrays_are_images(tmp_path):
    for name in ("a.npy", ".hidden.png", "__MACOSX/b.png", "c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a.npy", tmp_path / "c.JPG"]
    np.save(tmp_path / "a.npy", DEEP.astype(">u2"))
    array = open_pixels(tmp_path / "a.npy")
    assert array.dtype == np.uint16
    np.testing.assert_array_equal(array, DEEP)
    np.save(tmp_path / "line.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    for name, reason in (
        ("line", "an array .* was expected"),
        ("objects", "not a readable"),
        ("cut", "not a readable"),
    ):
        with pytest.raises(UnreadableImageError, match=rf"{name}.npy: {reason}"):
            open_pixels(tmp_path / f"{name}.npy")


def test_arrays_are_shown_by_their_first_channels():
    five = np.concatenate([RGB, RGB[..., :2]], axis=2)
    for array in (five, five.transpose(FIRST), five / 255, RGB):
        np.testing.assert_array_equal(np.asarray(displayed(array)), RGB)
    np.testing.assert_array_equal(np.asarray(displayed(RGB[..., :2])), np.repeat(RGB[..., :1], 3, axis=2))
    np.testing.assert_array_equal(np.asarray(displayed(DEEP))[..., 0], DEEP >> 8)
