"""One way from an image file to RGB, whoever reads it."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from polyscale import FlexiViTImageProcessor, FlexiViTImageProcessorPil
from polyscale.assets import sample_photographs
from polyscale.utils.images import UnreadableImageError, find_images, open_image, read_image, to_rgb, upright_8_bit


DEEP = (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096 + 0x40).astype(np.uint16)
UPPER_8_BITS = (DEEP >> 8).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def big_endian_tiff(pixels: np.ndarray) -> bytes:
    """A grey TIFF of 16 bits whose upper byte comes first."""
    data = pixels.astype(">u2").tobytes()
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(data)))
    head = b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", len(tags))
    return head + b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags) + struct.pack(">I", 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def gif(frames: list[Image.Image]) -> bytes:
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    return encoded(image, "PNG", exif=exif)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return image


GREY = np.repeat(UPPER_8_BITS[..., None], 3, axis=2)
TWO = np.array([[[10, 20, 30], [200, 100, 50]]], dtype=np.uint8)
ODD_FILES = {
    "16 bit PNG": (encoded(Image.fromarray(DEEP), "PNG"), GREY),
    "16 bit TIFF, lower byte first": (encoded(Image.fromarray(DEEP), "TIFF"), GREY),
    "16 bit TIFF, upper byte first": (big_endian_tiff(DEEP), GREY),
    "16 bit PGM": (b"P5\n4 4\n65535\n" + DEEP.astype(">u2").tobytes(), GREY),
    "palette": (encoded(palette(), "PNG"), TWO),
    "turned": (turned(Image.fromarray(TWO)), TWO.transpose(1, 0, 2)),
    "CMYK": (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), np.uint8([[[255, 0, 0]]])),
    "transparent": (encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG"), np.uint8([[[9, 8, 7]]])),
    "black and white": (encoded(Image.new("1", (1, 1), 1), "PNG"), np.uint8([[[255, 255, 255]]])),
    "Lab": (encoded(Image.new("LAB", (1, 1), (0, 128, 128)), "TIFF"), np.uint8([[[1, 0, 1]]])),
    "first frame": (gif([Image.new("RGB", (1, 1), c) for c in ("red", "blue")]), np.uint8([[[255, 0, 0]]])),
    # The format loses some; every version of its encoder keeps a flat grey.
    "AVIF": (encoded(Image.new("RGB", (8, 8), (200, 200, 200)), "AVIF"), np.full((8, 8, 3), 200, np.uint8)),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_has_the_same_right_pixels_everywhere(tmp_path, name):
    content, expected = ODD_FILES[name]
    (tmp_path / "image").write_bytes(content)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image")), expected)
    np.testing.assert_array_equal(np.asarray(open_image(content)), expected)
    for value in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "image")}):
        np.testing.assert_array_equal(np.asarray(read_image(value)), expected)
    opened = Image.open(tmp_path / "image")
    np.testing.assert_array_equal(np.asarray(to_rgb(opened)), expected)
    for processor_class in (FlexiViTImageProcessor, FlexiViTImageProcessorPil):
        processor = processor_class(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
        pixel_values = processor(Image.open(tmp_path / "image"), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixel_values.transpose(1, 2, 0), expected)


def test_a_grey_processor_keeps_one_channel_of_8_bits():
    image = upright_8_bit(Image.open(io.BytesIO(ODD_FILES["16 bit PNG"][0])))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), UPPER_8_BITS)


def test_find_images_searches_folders_and_keeps_files_of_any_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub" / "c.webp"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without image files"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "no such file"),
        ("folder", "not a file"),
        ("text.png", "not a readable image"),
        ("truncated.jpg", "not a readable image"),
        ("program.png", "not a readable image"),
        ("floats.tif", "32-bit floats"),
        ("integers.tif", "32-bit integers"),
        ("warned.png", "decompression bomb"),  # Pillow warns of this size and refuses the next
        ("refused.png", "decompression bomb"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "floats.tif")
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "integers.tif")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    whole = sample_photographs()[0].read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "warned.png").write_bytes(png_header(10_000, 10_000))
    (tmp_path / "refused.png").write_bytes(png_header(30_000, 30_000))
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        open_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    copy = pickle.loads(pickle.dumps(caught.value))  # as a data loader's process sends it
    assert (copy.name, copy.reason) == (caught.value.name, caught.value.reason)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_image_processors_refuse_pixels_of_unknown_range(dtype):
    for processor_class in (FlexiViTImageProcessor, FlexiViTImageProcessorPil):
        with pytest.raises(ValueError, match="whose range is unknown"):
            processor_class()(Image.fromarray(np.ones((8, 8), dtype=dtype)))


def test_what_stands_for_no_image_is_refused():
    with pytest.raises(UnreadableImageError, match="row 3: expected a file, bytes or a PIL image, got NoneType"):
        read_image(None, "row 3")


def test_a_link_to_nothing_is_found_and_cannot_be_read(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(tmp_path / "d.png")  # which nobody should wait for
    found = find_images(tmp_path)
    assert [file.name for file in found] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UnreadableImageError, match=r"b\.png: no such file"):
        open_image(found[1])
