import errno
import io
import os
import tarfile
import unicodedata
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from polyscale.embedding_source import items_of
from polyscale.training.data import check_images, evaluation_split, load_image_dataset, sample_rows
from polyscale.training.plans import hold_out, splits_for
from polyscale.training.recipe import TrainingRecipe
from polyscale.training.transforms import AugmentedImages, ImageCollator, TrainingTransform, pixels_of
from polyscale.utils.images import open_image

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


def write_folder(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(index % 3, index).save(folder / name)
    return folder


def classes(split):
    return split.features["label"].names


def test_only_the_folders_at_the_top_are_splits(tmp_path):
    files = [f"{label}/{name}.png" for label in "ab" for name in ("test_1", "img_2", "val-3", "train")]
    splits = load_image_dataset(write_folder(tmp_path, *files))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8}
    assert classes(splits["train"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "counts", "names"),
    [
        (["train/1.png", "truck/1.png", "test/1.png"], {"train": 3}, ["test", "train", "truck"]),
        (["train/test/1.png", "val/train/1.png"], {"train": 1, "validation": 1}, ["test", "train"]),
        (["Training/a/1.png", "Training/b/1.png", "dev/a/1.png"], {"train": 2, "validation": 1}, ["a", "b"]),
        (["a/x/1.png", "a/y/z/2.png", "b/1.png", ".hidden/1.png"], {"train": 3}, ["a", "b"]),
    ],
)
def test_a_class_may_have_any_name(tmp_path, files, counts, names):
    splits = load_image_dataset(write_folder(tmp_path, *files))
    assert {name: len(split) for name, split in splits.items()} == counts
    assert all(classes(split) == names for split in splits.values())


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["train/1.png", "test/1.png"], ["a/1.png", "2.png"]])
def test_folders_without_classes_are_refused(tmp_path, files):
    write_folder(tmp_path, *files)
    with pytest.raises(ValueError, match="must have a folder for each class"):
        load_image_dataset(tmp_path)
    assert sum(map(len, load_image_dataset(tmp_path, labelled=False).values())) == 2


def test_places_that_hold_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_text("no parquet")
    for source, message in (
        (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "x.parquet", "is no readable parquet file"),
        ("no/such/folder", "is none of them"),
        (__file__, "is another file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(source)


def test_images_are_opened_as_the_other_tools_open_them(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for name, image in {
        "a/grey16.png": Image.fromarray(grey),
        "a/palette.png": make_picture(0, 1).quantize(16),
        "b/cmyk.jpg": make_picture(1, 1).convert("CMYK"),
        "b/alpha.png": make_picture(1, 2).convert("RGBA"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    make_picture(2, 1).resize((16, 8)).save(tmp_path / "a" / "turned.jpg", exif=exif)
    split = load_image_dataset(tmp_path)["train"]
    paths = [cell["path"] for cell in split.with_format(None)["image"]]
    assert len(paths) == 5
    for index, path in enumerate(paths):
        image = split[index]["image"]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(open_image(path)))
    assert np.asarray(split[paths.index(str(tmp_path / "a" / "grey16.png"))]["image"])[7, 7].tolist() == [252] * 3


def test_damaged_images_are_named_before_training(tmp_path):
    write_folder(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    content = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "b" / "2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    split = load_image_dataset(tmp_path)["train"]
    with pytest.raises(ValueError, match=r"a/2\.png: not a readable image.*b/2\.png: not a readable image"):
        check_images(split, "train")
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 image files: '.*b/1\.png'"):
        check_images(split, "train")


def test_a_limit_draws_from_all_classes():
    split = make_split(20).sort("label")
    drawn = sample_rows(split, 15, seed=3)
    assert set(drawn["label"]) == {0, 1, 2}
    assert sample_rows(split, 15, seed=3)["label"][:] == drawn["label"][:]
    assert sample_rows(split, 15, seed=4)["label"][:] != drawn["label"][:]
    assert len(sample_rows(split, None)) == len(sample_rows(split, 1000)) == 60


def test_what_is_kept_back_has_every_class_and_nothing_twice():
    split = make_split(20).add_column("row", list(range(60)))
    rest, held = hold_out(split, seed=0)
    assert sorted(held["label"]) == [0, 0, 1, 1, 2, 2]
    assert sorted([*rest["row"], *held["row"]]) == list(range(60))


def test_pixels_of_images_and_arrays():
    image = make_picture(0, 0, 8)
    assert torch.equal(pixels_of(image), torch.from_numpy(np.asarray(image)).permute(2, 0, 1))
    assert torch.equal(pixels_of(image, 1)[0], torch.from_numpy(np.asarray(image.convert("L"))))
    array = np.random.default_rng(0).integers(0, 65536, (6, 4, 5), dtype=np.uint16)
    expected = torch.from_numpy(array.astype(np.float32) / 65535).permute(2, 0, 1)
    assert torch.equal(pixels_of(array, 5), expected)
    assert torch.equal(pixels_of(array.transpose(2, 0, 1), 5), expected)
    assert pixels_of(array[..., 0], 1).shape == (1, 6, 4)
    for bad, channels, message in (
        (image, 2, "1 channel .grey. or 3"),
        (array, 3, "is no image of 3 channels"),
        (array.astype(np.float32), 5, r"must lie in \[0, 1\]"),
        (np.full((4, 4), np.nan), 1, r"must lie in \[0, 1\]"),
        (array.astype(np.int64), 5, "int64 values from 179 to 65353, whose range is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            pixels_of(bad, channels)


def test_a_short_name_is_never_what_a_local_folder_left_in_the_cache(tmp_path, monkeypatch):
    make_split(2).to_parquet(tmp_path / "train.parquet")
    kept, asked = tmp_path / "cache", []
    (kept / "folder").mkdir(parents=True)
    monkeypatch.setattr("polyscale.training.data.datasets_config.HF_DATASETS_CACHE", kept)
    monkeypatch.setattr("polyscale.training.data.is_offline", lambda: False)
    monkeypatch.chdir(kept)

    def full(self, name):
        if name != "short":
            raise OSError("404")
        return SimpleNamespace(id="owner/short")

    def load(name, **_):
        asked.append(name)
        return DatasetDict(train=make_split(2))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", full)
    monkeypatch.setattr("polyscale.training.data.load_dataset", load)
    with pytest.raises(ValueError, match="`dataset` 'long' is no folder or file here, and cannot be read"):
        load_image_dataset("long")
    assert asked == []
    assert load_image_dataset("short")["train"].num_rows == 6
    assert asked == ["owner/short"]
    monkeypatch.setattr("polyscale.training.data.is_offline", lambda: True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`dataset` 'folder' is no folder or file here, .* offline"):
        load_image_dataset("folder")
    assert asked == ["owner/short"]


@pytest.mark.parametrize("name", ["some/data", "data", "some/data-set_1.0"])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("polyscale.training.data.is_offline", lambda: True)
    monkeypatch.setattr("polyscale.training.data.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"`dataset` '{name}' is no folder or file here, .* offline"):
        load_image_dataset(name)


def _parquet(path, **columns):
    """A file of three black images and columns (values, feature)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), **{name: feature for name, (_, feature) in columns.items()}})
    values = {name: rows for name, (rows, _) in columns.items()}
    black = [Image.new("RGB", (8, 8))] * 3
    Dataset.from_dict({"image": black, **values}, features=features).to_parquet(path)
    return path


def test_the_label_column_that_is_meant(tmp_path):
    coarse, fine = ([0, 0, 1], ClassLabel(names=["x", "y"])), ([0, 1, 2], ClassLabel(names=["a", "b", "c"]))
    split = load_image_dataset(_parquet(tmp_path / "1.parquet", coarse_label=coarse, fine_label=fine))["train"]
    assert split.features["label"].names == ["a", "b", "c"]
    assert split["label"] == [0, 1, 2]
    with pytest.raises(ValueError, match="several label columns, 'genus', 'species': rename the one"):
        load_image_dataset(_parquet(tmp_path / "2.parquet", genus=coarse, species=fine))


def test_parquet_files_tell_their_splits_by_the_beginning_of_their_names(tmp_path):
    label = {"label": ([0, 1, 0], Value("int64"))}
    hub = tmp_path / "hub"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "fold_2-00000-of-00001"):
        _parquet(hub / "data" / f"{name}.parquet", **label)
    counts = {name: len(split) for name, split in load_image_dataset(hub).items()}
    assert counts == {"train": 6, "validation": 3, "fold_2": 3}
    for split in ("test", "train"):
        _parquet(tmp_path / "folders" / "default" / split / "0000.parquet", **label)
    assert list(load_image_dataset(tmp_path / "folders")) == ["train", "test"]
    for name in ("latest", "contest", "a"):  # no words of splits
        _parquet(tmp_path / "plain" / f"{name}.parquet", **label)
    assert {name: len(split) for name, split in load_image_dataset(tmp_path / "plain").items()} == {"train": 9}
    for name in ("test", "a"):
        _parquet(tmp_path / "mixed" / f"{name}.parquet", **label)
    with pytest.raises(ValueError, match=r"splits 'test', and others that name none, such as a\.parquet"):
        load_image_dataset(tmp_path / "mixed")


@pytest.mark.parametrize("tops", [("train", "val", "extra"), ("train2017", "val2017")])
def test_folders_that_are_half_splits_are_refused(tmp_path, tops):
    for top in tops:
        (tmp_path / top / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / top / "cat" / "0.png")
    with pytest.raises(ValueError, match="are called like splits, and hold folders"):
        load_image_dataset(tmp_path)


def test_names_of_images_beside_a_metadata_file_are_no_splits(tmp_path):
    names = ("test_1", "img_2", "train-3", "val 4")
    for folder in (tmp_path / "flat", tmp_path / "splits" / "train", tmp_path / "splits" / "test"):
        folder.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        rows = [f"{name}.png,{'ab'[index % 2]}" for index, name in enumerate(names)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    flat = load_image_dataset(tmp_path / "flat")
    assert {name: split["label"] for name, split in flat.items()} == {"train": [0, 1, 0, 1]}
    splits = load_image_dataset(tmp_path / "splits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "test": 4}


@pytest.mark.parametrize("source", [5, None, "", b"x"])
def test_a_source_that_is_none(source):
    with pytest.raises(ValueError, match="`dataset` must be a path or a name"):
        load_image_dataset(source)


def _png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
def test_parquet_files_of_other_libraries(tmp_path, kind):
    cells = [_png(0), _png(10)] if not pa.types.is_struct(kind) else [{"bytes": _png(red)} for red in (0, 10)]
    table = pa.table({"image": pa.array(cells, kind), "label": pa.array(["owl", "cat"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "TRAIN.PARQUET")
    for source in (tmp_path, tmp_path / "TRAIN.PARQUET"):
        split = load_image_dataset(source)["train"]
        assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in split] == [(0, 1), (10, 0)]
        assert check_images(split, "train") == 2


def test_a_column_of_paths_is_no_column_of_images(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"must have an image column \(of the type Image, or files as bytes in image"):
        load_image_dataset(tmp_path / "x.parquet")


def test_web_data_sets(tmp_path):
    with tarfile.open(tmp_path / "train-000.tar", "w") as archive:
        for index, label in enumerate([2, 0, 1]):
            for name, content in ((f"{index}.png", _png(10 * index)), (f"{index}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    split = load_image_dataset(tmp_path)["train"]
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in split] == [(0, 2), (10, 0), (20, 1)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOTDIR])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_data(tmp_path, monkeypatch, number):
    def full(*_, **__):
        raise DatasetGenerationError from OSError(number, os.strerror(number))

    make_split(2).to_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr("polyscale.training.data.Dataset.from_parquet", full)
    with pytest.raises(ValueError, match=rf"The cache .* cannot be written \({os.strerror(number)}\): set HF_HOME to"):
        load_image_dataset(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["x.tar", "train.zip", "data.py", "x.jsonl"])
def test_files_that_datasets_cannot_read_are_told_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive, no JSON")
    with pytest.raises(ValueError, match=r"`dataset` '.*' cannot be read: .+\.$"):
        load_image_dataset(tmp_path)


def test_accents_spelled_otherwise_are_the_same_class(tmp_path):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        for index, name in enumerate(("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "zoo")):
            folder = tmp_path / split / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(folder / "0.png")
    splits = load_image_dataset(tmp_path)
    assert splits["test"].features["label"].names == ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "zoo"]
    for split in splits.values():
        assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in split] == [(0, 0), (10, 1)]


def test_names_that_are_no_text_are_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/cat\xe9"
    os.mkdir(folder)
    with open(folder + b"/0.png", "wb") as file:
        file.write(_png(0))
    with pytest.raises(ValueError, match=r"`dataset` holds 1 files whose names are not UTF-8, such as b'.*cat\\xe9"):
        load_image_dataset(tmp_path)


def test_classes_too_small_to_keep_any_image_back_are_all_trained_on():
    images = [make_picture(0, index) for index in range(52)]
    train = Dataset.from_dict(
        {"image": images, "label": [index // 4 for index in range(52)]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=[f"c{index}" for index in range(13)])}),
    )
    train = train.cast_column("image", ImageFeature(decode=False))
    splits, notes = splits_for(DatasetDict({"train": train}), TrainingRecipe())
    assert {name: len(split) for name, split in splits.items()} == {"train": 52}
    assert notes == ["There is no validation or test split: none of its images is kept back, for each class has few."]


def test_a_folder_holds_images_in_files_or_in_tables(tmp_path):
    _parquet(tmp_path / "data" / "train.parquet", label=([0, 1, 0], Value("int64")))
    (tmp_path / "assets").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "assets" / "logo.png")
    with pytest.raises(ValueError, match=r"`dataset` .* holds image files, and images in data/train\.parquet: give"):
        load_image_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"`source` .* holds image files, and images in data/train\.parquet: give"):
        items_of(tmp_path)
    assert len(load_image_dataset(tmp_path / "data")["train"]) == len(items_of(tmp_path / "data")) == 3
    (tmp_path / "data" / "train.parquet").unlink()
    pq.write_table(pa.table({"file": ["logo.png"], "embedding": [[0.5]]}), tmp_path / "part-00000.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"no")
    assert len(load_image_dataset(tmp_path)["train"]) == len(items_of(tmp_path)) == 1
