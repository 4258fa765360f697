"""What commands say of a mistake is in the words that the user typed."""

import io
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from polyscale.assets import sample_photographs
from polyscale.cli import app
from polyscale.evaluation.labels import read_label_map
from polyscale.utils.outputs import only_writer
from polyscale_cli.printing import escape_unprintable
from polyscale_cli.wording import as_typed, printable

from ..tiny_checkpoints import save_tiny_flexivit, save_tiny_quadtree_vit


LABELS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoints `flexivit` and `quadtree_vit`, and the folder `data` of images."""
    folder, generator = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    save_tiny_flexivit(folder / "flexivit", **LABELS)
    save_tiny_quadtree_vit(folder / "quadtree_vit", **LABELS)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "data" / split / name).mkdir(parents=True)
            pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / split / name / "0.png")
    return folder


def said(place, monkeypatch, *words):
    """The one line that a command ends with; `M` and `Q` stand for the checkpoints, `D` for the data, `P` for a
    photograph.
    """
    monkeypatch.chdir(place)
    named = {"M": "flexivit", "Q": "quadtree_vit", "D": "data", "P": str(sample_photographs()[0])}
    done = CliRunner().invoke(app, [named.get(word, word) for word in words])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    return line.partition(": ")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("classify P --model M --budgets 40", "`--budgets` 40: `patch_size` must not be larger than the image"),
        ("classify P --model Q --budgets 999", "`--budgets` 999: `num_tokens` must be 4 + 3 k"),
        ("classify P --model M --num-tokens 4", "`--num-tokens` does not fit a model of type 'flexivit'"),
        ("classify P --model M --image-size 0", "`--image-size` must be at least 1 pixel"),
        ("classify P --model nix/nix/nix", "`--model` 'nix/nix/nix' cannot be loaded"),
        ("classify P --model M --policy nix.json", "`--policy` nix.json cannot be read: No such file"),
        ("evaluate M D --image-sizes 0", "`--image-sizes` must be at least 1 pixel"),
        ("evaluate M D --crop-pct 2", "`--crop-pct` must be above 0 and at most 1"),
        ("evaluate M D --mean .5", "`--mean` must hold 3 numbers, one for each channel, got [0.5]"),
        ("evaluate M D --resize-method PI", "`--resize-method` must be one of 'pi', 'interpolate', got 'PI'"),
        ("evaluate M nix/nix/nix", "`DATASET` must be a folder, a parquet file or a hub name; nix/nix/nix is none"),
        ("evaluate nix/nix/nix D", "`MODEL` 'nix/nix/nix' cannot be loaded"),
        ("evaluate M D --label-map cow=cat", "`--label-map` names 'cow', which is no class of the data"),
        ("benchmark M --budgets 99 --rounds 1 --batch-size 1", "`--budgets` 99: `patch_size` must not be larger"),
        ("calibrate P --model M --output p.json --agreement 2", "`--agreement` must be a share above 0"),
        ("embed D out --model M --budget 40", "`--budget` 40: `patch_size` must not be larger than the image"),
        ("embed D M --model M", "`OUT` flexivit holds other files"),
        ("convert M M", "`OUT` {place}/flexivit exists already. Name another, or overwrite it: `--overwrite`."),
        ("convert M out --to foo", "`--to` must be one of"),
        ("train D out --std 0,0,0", "`--std` must be above 0"),
        ("train D out --mean 1,2", "`--mean` must hold 3 numbers"),
        ("train D out --set image_size=0", "`image_size` must be at least 1 pixel"),
        ("train D out --image-size 32 --set image_size=64", "`--image-size` is (32, 32), and (64, 64) in `--set`"),
        ("train D out --set num_labels=7", "`--set` must not hold `num_labels`"),
        ("train D out --seed 4294967296", "`--seed` must be at most 4294967295"),
        ("train D data/out", "`OUTPUT_DIR` {place}/data/out lies inside the data"),
        ("train D out --resume", "`--resume`: there is no checkpoint in {place}/out.training"),
    ],
)
def test_mistakes(place, monkeypatch, words, message):
    assert message.format(place=place) in said(place, monkeypatch, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("classify P --model M --budgets 8,8", "`--budgets` holds 8 twice: give each once."),
        ("classify P --model M --budgets 8,8x8", "`--budgets` holds (8, 8) twice"),
        ("evaluate M D --budgets 8 --budgets 8", "`--budgets` holds 8 twice"),
        ("evaluate M D --image-sizes 32,32x32", "`--image-sizes` holds (32, 32) twice"),
        ("evaluate M ./flexivit D", "`MODEL` holds './flexivit' twice"),
        ("benchmark M --budgets 8 8", "`--budgets` holds 8 twice"),
        ("calibrate P --model M --output p.json --budgets 8,8,4", "`--budgets` holds 8 twice"),
        ("show P --model M --output s.png --budgets 8,8", "`--budgets` holds 8 twice"),
        ("train D out --patch-sizes 8,8,16", "`--patch-sizes` holds 8 twice"),
        ("evaluate M D --label-map cat=dog --label-map cat=cat", "`--label-map` maps 'cat' to 'dog' and to 'cat'"),
    ],
)
def test_what_is_given_twice(place, monkeypatch, words, message):
    assert message in said(place, monkeypatch, *words.split())
    assert not (place / "out").exists()


def test_a_field_that_is_set_twice(place, monkeypatch):
    monkeypatch.chdir(place)
    words = ["train", "data", "out", "--set", "pooling=mean", "--set", "pooling=cls"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "pooling is set twice, to 'mean' and 'cls'" in done.stderr
    done = CliRunner().invoke(app, ["benchmark", "flexivit", "--image-size", "x"], env={"COLUMNS": "200"})
    assert "Invalid value for --image-size: expected a number such as 16" in done.stderr


def test_a_label_map_may_say_the_same_twice(tmp_path):
    file = tmp_path / "map.json"
    file.write_text('{"cat": "dog"}')
    assert read_label_map(["cat=dog", str(file)]) == {"cat": "dog"}
    with pytest.raises(ValueError, match="`label_map` maps 'cat' to 'cow' and to 'dog'"):
        read_label_map(["cat=cow", str(file)])


def test_a_file_that_is_found_twice_counts_once(place, monkeypatch):
    monkeypatch.chdir(place)
    files = ["data/test", "data/test/cat/0.png", "data/test/../test/cat/0.png"]
    done = CliRunner().invoke(app, ["classify", *files, "--model", "flexivit", "--budgets", "8", "--json"])
    assert done.exit_code == 0
    assert done.stdout.count('"file"') == 2


def test_an_evaluation_s_folder_has_one_writer(place, monkeypatch):
    with only_writer(place / "out", "output", "evaluation"):
        line = said(place, monkeypatch, *["evaluate", "M", "D", "--budgets", "8", "--output", "out"])
    assert line == "`--output` out is being written by another evaluation. Wait for it or name another."


def test_without_a_command_words_stay():
    assert as_typed("`budgets` is empty") == "`budgets` is empty"


def test_control_characters_do_nothing():
    assert printable("a\x1b[31m\nb") == "a\N{REPLACEMENT CHARACTER}[31m\nb"


def test_names_that_an_encoding_lacks_are_written_as_escapes(monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii"))
    escape_unprintable()
    print("caf\N{LATIN SMALL LETTER E WITH ACUTE} \udce9", flush=True)
    assert written.getvalue() == b"caf\\xe9 \\udce9\n"
