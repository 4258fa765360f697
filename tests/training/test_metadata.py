"""Image folders with metadata files: what stands in them decides, wherever they and the images lie."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from polyscale.training.data import load_image_dataset


def write_images(folder, names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(folder / name, "png")


def write_csv(folder, rows, header="file_name,label", name="metadata.csv", encoding="utf-8"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding=encoding)


def content_of(split):
    """(red of the image, name of its class) of each row."""
    names = split.features["label"].names
    return [(row["image"].getpixel((0, 0))[0], names[row["label"]]) for row in split]


def test_one_file_at_the_top_names_the_images_of_all_splits(tmp_path):
    write_images(tmp_path, ["train/a.png", "train/b.png", "test/a.png"])
    write_csv(tmp_path, ["train/a.png,owl", "test/a.png,cat", "train/b.png,cat"])
    splits = load_image_dataset(tmp_path)
    assert {name: content_of(split) for name, split in splits.items()} == {
        "train": [(0, "owl"), (10, "cat")],
        "test": [(20, "cat")],
    }


@pytest.mark.parametrize("name", ["a[bc]", "a*", "what?", ".hidden", "two  words", "日本"])
def test_a_folder_may_have_any_name(tmp_path, name):
    write_images(tmp_path / name, ["0.PNG", "1.png"])
    write_csv(tmp_path / name, ["1.png,cat", "0.PNG,dog"], encoding="utf-8-sig")
    assert content_of(load_image_dataset(tmp_path / name)["train"]) == [(10, "cat"), (0, "dog")]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["10", "2"], ["10", "2"]),  # plain integers: class 10 is the eleventh
        (["007", "2"], ["007", "2"]),
        (["NA", "None"], ["NA", "None"]),
        (['"a, b"', "a"], ["a, b", "a"]),
    ],
)
def test_classes_are_what_the_file_calls_them(tmp_path, cells, names):
    write_images(tmp_path, ["0.png", "1.png"])
    write_csv(tmp_path, [f"{index}.png,{cell}" for index, cell in enumerate(cells)])
    assert content_of(load_image_dataset(tmp_path)["train"]) == [(0, names[0]), (10, names[1])]


def test_other_kinds_of_files_and_columns(tmp_path):
    rows = [
        {"image_file_name": "sub/1.png", "label": "cat", "more": [1]},
        {"image_file_name": "0.png", "label": "dog"},
    ]
    for folder in ("jsonl", "parquet"):
        write_images(tmp_path / folder, ["0.png", "sub/1.png"])
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / "metadata.parquet")
    for folder in ("jsonl", "parquet"):
        assert content_of(load_image_dataset(tmp_path / folder)["train"]) == [(10, "cat"), (0, "dog")]
        assert load_image_dataset(tmp_path / folder, labelled=False)["train"].column_names == ["image"]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["0.png,cat"],
            "file,label",
            "must have a column file_name; its columns are ..file', 'label'",
        ),
        ([], "file_name,label", "must have rows"),
        (
            ["../0.png,cat"],
            "file_name,label",
            "file_name of row 0 must be a file in the folder of the metadata file, got",
        ),
        (["0.png,cat", "/etc/0.png,cat"], "file_name,label", "row 1 must be a file in the folder"),
        (
            ["0.png,cat", ",dog"],
            "file_name,label",
            "row 1 must be a file in .*, got None",
        ),
        (["0.png,cat", "1.png"], "file_name,label", "no readable metadata file: line 3 has 1 cells, the header 2"),
        (['"0.png,cat'], "file_name,label", "no readable metadata file: unexpected end of data"),
        (["0.png,cat,dog"], "file_name,label,label", r"its header \[.*\] has a name twice"),
        (["0.png,0.5", "1.png,1"], "file_name,label", "must be integers or text"),
        (["0.png,1", "1.png,"], "file_name,label", "1 images without a label .missing or negative., the first in row"),
    ],
)
def test_files_that_say_too_little(tmp_path, rows, header, message):
    write_images(tmp_path, ["0.png", "1.png"])
    write_csv(tmp_path, rows, header)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(tmp_path)


def test_images_and_rows_that_belong_to_no_split(tmp_path):
    write_images(tmp_path, ["train/0.png", "test/0.png", "0.png"])
    write_csv(tmp_path / "train", ["0.png,cat"])
    with pytest.raises(ValueError, match=r"no metadata file names images of the split 'test', such as test/0\.png"):
        load_image_dataset(tmp_path)
    write_csv(tmp_path, ["0.png,cat", "test/0.png,cat"])
    with pytest.raises(ValueError, match=r"0\.png, which lies in none of the splits test, train"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("metadata.jsonl", b'{"file_name": \n'), ("metadata.parquet", b"no")])
def test_damaged_files_are_named(tmp_path, name, content):
    write_images(tmp_path, ["0.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no readable metadata file: "):
        load_image_dataset(tmp_path)
