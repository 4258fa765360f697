import numpy as np
import pytest
import torch
from PIL import Image

from polyscale.training.data import evaluation_split, load_image_dataset
from polyscale.training.transforms import AugmentedImages, ImageCollator, TrainingTransform

from .conftest import LABELS, make_picture, make_split


STATS = ([0.5] * 3, [0.25] * 3)


def test_parquet_and_image_folders_read_alike(parquet_folder, image_folder):
    for folder, pictures in ((parquet_folder, 72), (image_folder, 12)):
        splits = load_image_dataset(folder)
        assert set(splits) == {"train", "test"}
        assert evaluation_split(splits) == "test"
        train = splits["train"]
        assert len(train) == pictures
        assert sorted(train.features["label"].names) == sorted(LABELS)
        row = train[0]
        label = LABELS.index(train.features["label"].names[row["label"]])
        assert np.asarray(row["image"])[..., label].max() > 150
        assert train.column_names == ["image", "label"]


def test_one_parquet_file_and_other_column_names(tmp_path):
    split = make_split(2).rename_columns({"image": "picture", "label": "fine_label"}).add_column("id", range(6))
    split.to_parquet(tmp_path / "x.parquet")
    splits = load_image_dataset(tmp_path / "x.parquet")
    assert splits["train"].column_names == ["image", "label"]


def test_sources_that_are_no_image_data(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.parquet is none of them"):
        load_image_dataset(tmp_path / "missing.parquet")
    make_split(2).remove_columns("label").to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="label column"):
        load_image_dataset(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="`split` must be one of"):
        evaluation_split(load_image_dataset(_written(tmp_path)), "nonsense")


def _written(folder):
    make_split(2).to_parquet(folder / "good.parquet")
    return folder / "good.parquet"


def test_no_augmentation_is_resize_and_normalise():
    transform = TrainingTransform("none", (8, 8), *STATS)
    flat = Image.new("RGB", (16, 16), (255, 0, 51))
    torch.testing.assert_close(transform(flat)[:, 3, 5], torch.tensor([2.0, -2.0, (0.2 - 0.5) / 0.25]))
    with pytest.raises(ValueError, match="`augmentation` must be one of"):
        TrainingTransform("magic", (8, 8), *STATS)


@pytest.mark.parametrize("augmentation", ["crop", "resized-crop", "trivial"])
def test_augmentation_changes_pictures_not_shapes(augmentation):
    rows = AugmentedImages(make_split(2), TrainingTransform(augmentation, (12, 10), *STATS))
    first = rows[0]["pixel_values"]
    assert first.shape == (3, 12, 10)
    assert first.dtype == torch.float32

    generator = torch.get_rng_state()
    torch.testing.assert_close(rows[0]["pixel_values"], first, rtol=0, atol=0)  # the same row of the same epoch
    assert torch.equal(torch.get_rng_state(), generator)
    rows.set_epoch(1)
    assert not torch.equal(rows[0]["pixel_values"], first)


def test_collator_mixes_pictures_and_labels_alike():
    rows = [{"pixel_values": torch.full((3, 4, 4), float(label)), "label": label, "index": label} for label in (0, 1)]
    plain = ImageCollator(2)(rows)
    assert plain["labels"].tolist() == [0, 1]
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}):
        batch = ImageCollator(2, **options)(rows)
        # the value of each pixel is the label it came from, so the mean picture is the weight of label 1
        torch.testing.assert_close(batch["pixel_values"].mean(dim=(1, 2, 3)), batch["labels"][:, 1])
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(2))


def test_greyscale_pictures_become_rgb():
    split = make_split(1).map(lambda row: {"image": make_picture(0, 0).convert("L")})
    row = AugmentedImages(split, TrainingTransform("none", (8, 8), *STATS))[0]
    assert row["pixel_values"].shape == (3, 8, 8)
