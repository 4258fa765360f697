"""Labels mean the same class in every split, whatever a split holds and however its files number them."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from polyscale.training.data import load_image_dataset
from polyscale.training.labels import renumbered


def write(path, labels, feature):
    images = [PILImage.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    features = Features({"image": Image(), "label": feature})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


def labels_of(split):
    return split.with_format(None)["label"][:]


def test_integers_stay_what_they_are(tmp_path):
    write(tmp_path / "train.parquet", list(range(12)), Value("int64"))
    write(tmp_path / "test.parquet", [11, 2], Value("int32"))
    splits = load_image_dataset(tmp_path)
    assert labels_of(splits["train"]) == list(range(12))
    assert labels_of(splits["test"]) == [11, 2]
    assert splits["test"].features["label"].names == [str(label) for label in range(12)]
    assert splits["train"][3]["image"].getpixel((0, 0)) == (3, 0, 0)


def test_one_file_of_integers(tmp_path):
    write(tmp_path / "x.parquet", [0, 10, 2, 10], Value("int64"))
    assert labels_of(load_image_dataset(tmp_path / "x.parquet")["train"]) == [0, 10, 2, 10]


def test_a_split_that_lacks_a_class_has_the_same_numbers(tmp_path):
    write(tmp_path / "train.parquet", ["owl", "cat", "dog"], Value("string"))
    write(tmp_path / "test.parquet", ["owl", "dog"], Value("string"))
    splits = load_image_dataset(tmp_path)
    assert splits["train"].features["label"].names == ["cat", "dog", "owl"]
    assert labels_of(splits["train"]) == [2, 0, 1]
    assert labels_of(splits["test"]) == [2, 1]


def test_files_that_number_their_classes_otherwise_are_aligned(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 2], ClassLabel(names=["owl", "cat", "dog"]))
    write(tmp_path / "test.parquet", [0, 1], ClassLabel(names=["dog", "owl"]))
    splits = load_image_dataset(tmp_path)
    assert splits["train"].features["label"].names == ["owl", "cat", "dog"]
    assert labels_of(splits["test"]) == [2, 0]


@pytest.mark.parametrize(
    "kinds",
    [
        [(["1", "10", "2"], Value("string")), ([1, 10, 2], Value("int64"))],
        [([0, 1], Value("int64")), (["cat", "dog"], Value("string"))],
        [([0], ClassLabel(names=["a", "b"])), ([0], ClassLabel(names=["b", "a"])), ([1], Value("int64"))],
    ],
)
def test_integers_beside_other_names_mean_no_class(tmp_path, kinds):
    for name, (labels, feature) in zip(("train", "test", "validation"), kinds, strict=False):
        write(tmp_path / f"{name}.parquet", labels, feature)
    with pytest.raises(ValueError, match="class names in some parts, and plain integers in others"):
        load_image_dataset(tmp_path)


def test_integers_beside_one_list_of_names_are_places_in_it(tmp_path):
    write(tmp_path / "train.parquet", [0, 1], ClassLabel(names=["owl", "cat"]))
    write(tmp_path / "test.parquet", [1, 0], Value("int64"))
    splits = load_image_dataset(tmp_path)
    assert splits["test"].features["label"].names == ["owl", "cat"]
    assert labels_of(splits["test"]) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, None, 1], Value("int64"), "has 1 images without a label .missing or negative., the first in row 1"),
        ([0, 1, -1], Value("int64"), "1 images without a label"),
        ([-1, -1, -1], ClassLabel(names=["a", "b"]), "has no labels: all are missing or negative"),
        ([0.5, 1.0, 2.0], Value("float32"), "must be integers or text"),
        ([0, 90210, 5], Value("int64"), "must count classes from 0: the highest is 90210, of 3 different ones"),
    ],
)
def test_labels_that_name_no_class_are_refused(tmp_path, labels, feature, message):
    write(tmp_path / "x.parquet", labels, feature)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(tmp_path / "x.parquet")


def test_a_split_with_secret_labels_is_left_out(tmp_path):
    write(tmp_path / "train.parquet", [0, 1], Value("int64"))
    write(tmp_path / "test.parquet", [-1, -1], Value("int64"))
    assert set(load_image_dataset(tmp_path)) == {"train"}


def test_renumbering_keeps_images_and_classes(tmp_path):
    write(tmp_path / "x.parquet", [0, 1, 2, 1], ClassLabel(names=["owl", "cat", "dog"]))
    split = load_image_dataset(tmp_path / "x.parquet")["train"]
    changed = renumbered(split, [1, 2, 0], ["dog", "owl", "cat"])
    assert labels_of(changed) == [1, 2, 0, 2]
    assert changed.features["label"].names == ["dog", "owl", "cat"]
    for index in range(4):
        names = [part.features["label"].names[part[index]["label"]] for part in (split, changed)]
        assert names[0] == names[1]
        assert np.array_equal(np.asarray(changed[index]["image"]), np.asarray(split[index]["image"]))
