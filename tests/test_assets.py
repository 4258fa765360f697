"""The sample photographs: their classes, their files, and what `ATTRIBUTION.md` says of them."""

import re
from pathlib import Path

import pytest
from PIL import Image

import polyscale.assets
from polyscale.assets import photograph_class, sample_photographs

from .tiny_checkpoints import CIFAR10_LABELS, TINY_IMAGENET_LABELS


FOLDER = Path(polyscale.assets.__file__).parent
TINY200 = sample_photographs(TINY_IMAGENET_LABELS)
LICENCES = {
    "public domain",
    "[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/)",
    "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)",
    "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
}


def attributed(folder: str) -> dict[str, list[str]]:
    """The rows of `ATTRIBUTION.md` about the files of a folder: file -> the other cells."""
    lines = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    cells = {row[0].strip("`"): row[1:] for row in rows}
    assert len(cells) == len(rows)
    return {file: row for file, row in cells.items() if file.startswith(f"{folder}/")}


def test_the_class_of_a_photograph_is_in_its_name():
    assert photograph_class("somewhere/German_shepherd_1.jpg") == "German shepherd"
    assert [photograph_class(file) for file in sample_photographs()] == ["bird", "cat", "deer", "dog", "dog", "horse"]


def test_photographs_are_those_of_a_models_labels():
    assert len(TINY_IMAGENET_LABELS) == len(set(TINY_IMAGENET_LABELS)) == 200
    assert {file.parent.name for file in TINY200} == {"tiny200"}
    for labels in (None, CIFAR10_LABELS, ["something", "else"], []):
        assert {file.parent.name for file in sample_photographs(labels)} == {"photographs"}


def test_twelve_photographs_show_twelve_of_the_200_classes():
    classes = [photograph_class(file) for file in TINY200]
    assert len(TINY200) == len(set(classes)) == 12
    assert set(classes) <= set(TINY_IMAGENET_LABELS)
    assert sorted(FOLDER.glob("tiny200/*")) == sorted(TINY200)


@pytest.mark.parametrize("file", TINY200, ids=lambda file: file.stem)
def test_a_photograph_is_whole_square_small_and_attributed(file):
    with Image.open(file) as image:
        image.load()
        assert (image.format, image.mode) == ("JPEG", "RGB")
        width, height = image.size
    _, author, licence, source, crop = attributed("tiny200")[f"tiny200/{file.name}"]
    assert author
    assert licence in LICENCES
    assert re.search(r"commons\.wikimedia\.org/wiki/File:|Debian's |scikit-image ", source)
    left, top, right, bottom, source_width, source_height = map(int, re.findall(r"\d+", crop))
    assert 0 <= left < right <= source_width
    assert 0 <= top < bottom <= source_height
    assert right - left == bottom - top
    assert width == height == min(right - left, 320)


def test_the_photographs_are_small_together_and_each_is_attributed_once():
    assert sum(file.stat().st_size for file in TINY200) < 450_000
    for folder in ("photographs", "tiny200"):
        assert set(attributed(folder)) == {f"{folder}/{file.name}" for file in (FOLDER / folder).iterdir()}
