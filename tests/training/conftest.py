"""A small labelled data set that a tiny model can learn: each class has its own colour and stripes."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


LABELS = ["red stripes", "green stripes", "blue stripes"]


def make_picture(label: int, index: int, size: int = 16) -> PILImage.Image:
    rng = np.random.default_rng([label, index])
    pixels = rng.integers(0, 60, (size, size, 3))
    pixels[:, :: 2 + label, label] += 150
    return PILImage.fromarray(pixels.astype(np.uint8))


def make_split(pictures_a_class: int, first: int = 0) -> Dataset:
    rows = [(label, first + index) for index in range(pictures_a_class) for label in range(len(LABELS))]
    return Dataset.from_dict(
        {"image": [make_picture(*row) for row in rows], "label": [label for label, _ in rows]},
        features=Features({"image": Image(), "label": ClassLabel(names=LABELS)}),
    )


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    make_split(24).to_parquet(folder / "train.parquet")
    make_split(8, first=1000).to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    for split, first, count in (("train", 0, 4), ("test", 1000, 2)):
        for label, name in enumerate(LABELS):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                make_picture(label, first + index).save(folder / split / name / f"{index}.png")
    return folder
