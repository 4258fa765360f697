import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from polyscale import FlexiViTModel
from polyscale.assets import sample_photographs
from polyscale.checkpoints import available_checkpoints
from polyscale.classification import (
    classify_images,
    load_classifier,
    num_prefix_tokens,
)
from polyscale.layers.token_budget import default_budgets_of, format_budget, token_budget
from polyscale.utils.images import find_images, open_image

from .tiny_checkpoints import CIFAR10_LABELS, save_tiny_flexivit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(tmp_path_factory.mktemp("flexivit"))


def write_png_header(path, width: int, height: int) -> None:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


# the sample photographs


def test_sample_photographs_are_small_attributed_and_of_several_classes():
    photographs = sample_photographs()
    classes = {path.name.split("_")[0] for path in photographs}
    assert len(photographs) == 6
    assert len(classes) >= 3
    assert classes <= set(CIFAR10_LABELS)
    attribution = (photographs[0].parent.parent / "ATTRIBUTION.md").read_text()
    for path in photographs:
        assert path.stat().st_size < 100_000
        assert f"photographs/{path.name}" in attribution
        assert max(open_image(path).size) <= 480


# reading files


def test_find_images_searches_folders_and_keeps_files_of_any_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub" / "c.webp"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without picture files"):
        find_images(tmp_path / "empty")


def test_open_image_turns_the_picture_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_open_image_scales_16_bit_greys(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (0x80, 0x80, 0x80)


@pytest.mark.parametrize("name", ["missing.png", "text.png", "truncated.jpg", "folder", "floats.tif", "program.png"])
def test_open_image_refuses_what_is_no_picture(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "floats.tif")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    whole = sample_photographs()[0].read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"no such file|not a file|not a readable picture|pixels of 32 bits"):
        open_image(tmp_path / name)


@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow warns of the first and refuses the second
def test_open_image_refuses_decompression_bombs(tmp_path, side):
    write_png_header(tmp_path / "bomb.png", side, side)
    with pytest.raises(ValueError, match="decompression bomb"):
        open_image(tmp_path / "bomb.png")


# budgets


def test_default_budgets_are_the_trained_patch_sizes_or_the_own_one(checkpoint):
    config = load_classifier(checkpoint).model.config
    assert default_budgets_of(config) == [4, 8, 16]
    config.train_patch_sizes = None
    assert default_budgets_of(config) == [8]
    config.patch_size = (4, 8)
    assert default_budgets_of(config) == [[4, 8]]
    assert default_budgets_of(ViTConfig()) == [None]


def test_token_budget_is_put_back_even_after_an_error(checkpoint):
    model = load_classifier(checkpoint).model
    with token_budget(model.config, 4):
        assert model.base_model.config.patch_size == 4
    assert model.config.patch_size is None
    with pytest.raises(ValueError, match="must not be larger"), token_budget(model.config, 40):
        model(torch.zeros(1, 3, 32, 32))
    assert model.config.patch_size is None
    with pytest.raises(ValueError, match="no patch_size of 'flexivit'"), token_budget(model.config, "four"):
        pass


def test_format_budget():
    assert [format_budget(budget) for budget in (8, (4, 8), [4, 8], None)] == ["8", "4x8", "4x8", ""]


# classifying


def test_records_are_those_of_the_plain_pipeline_at_each_patch_size(checkpoint):
    files = sample_photographs()[:2]
    records, errors = classify_images(files, checkpoint, budgets=[4, (8, 16)])
    assert errors == []
    assert [record["budget"] for record in records] == [4, [8, 16], 4, [8, 16]]
    assert [record["tokens"] for record in records] == [64, 8, 64, 8]

    plain = pipeline("image-classification", model=str(checkpoint), device="cpu")
    for record in records:
        plain.model.config.patch_size = record["budget"]
        best = plain(record["file"])[0]
        assert record["label"] == best["label"]
        assert record["score"] == pytest.approx(best["score"], abs=1e-6)
        assert set(record) == {"file", "budget", "tokens", "label", "score", "milliseconds"}
        assert record["milliseconds"] > 0
    json.dumps(records)


def test_a_pipeline_can_be_given_and_is_left_as_it_was(checkpoint):
    classifier = load_classifier(checkpoint, device="cpu")
    before = dict(classifier.model._forward_hooks), classifier.model.config.patch_size
    records, _ = classify_images(sample_photographs()[:1], classifier)
    assert [record["budget"] for record in records] == [4, 8, 16]
    assert (dict(classifier.model._forward_hooks), classifier.model.config.patch_size) == before


def test_unreadable_files_are_reported_and_the_others_go_on(checkpoint, tmp_path):
    good = sample_photographs()[0]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_png_header(tmp_path / "bomb.png", 30_000, 30_000)
    (tmp_path / "empty").mkdir()
    records, errors = classify_images([tmp_path, tmp_path / "missing.jpg", tmp_path / "empty", good], checkpoint, [8])
    assert [record["file"] for record in records] == [str(good)]
    assert [error["file"] for error in errors] == [
        str(tmp_path / name) for name in ("bomb.png", "broken.png", "missing.jpg", "empty")
    ]
    assert "decompression bomb" in errors[0]["error"]
    assert "not a readable picture" in errors[1]["error"]
    assert errors[2]["error"] == "no such file"


@pytest.mark.parametrize("budgets", [[0], [-4], [33], [8, "x"], []])
def test_a_budget_that_is_not_allowed_is_refused(checkpoint, budgets):
    with pytest.raises(ValueError, match=r"patch_size|budgets"):
        classify_images(sample_photographs()[:1], checkpoint, budgets)


def test_repeats_below_one_are_refused(checkpoint):
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        classify_images(sample_photographs()[:1], checkpoint, repeats=0)


def small_vit(config_class, **fields):
    return config_class(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        num_labels=3,
        **fields,
    )


@pytest.mark.parametrize(
    ("model", "tokens", "prefix"),
    [
        (lambda: ViTForImageClassification(small_vit(ViTConfig)), 16, 1),
        (lambda: DeiTForImageClassification(small_vit(DeiTConfig)), 16, 2),
        (
            lambda: ResNetForImageClassification(
                ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
            ),
            16,  # a map of 4 x 4
            0,
        ),
    ],
)
def test_other_models_run_once_and_their_tokens_are_counted(tmp_path, model, tokens, prefix):
    model = model()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert num_prefix_tokens(model) == prefix
    records, errors = classify_images(sample_photographs()[:1], tmp_path)
    assert errors == []
    assert [(record["budget"], record["tokens"]) for record in records] == [(None, tokens)]
    with pytest.raises(ValueError, match="has no budget to choose"):
        classify_images(sample_photographs()[:1], tmp_path, budgets=[4])


def test_a_checkpoint_without_a_classifier_is_refused(checkpoint, tmp_path):
    FlexiViTModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no trained image classifier: 2 tensors are missing"):
        load_classifier(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere' cannot be loaded: it is neither a bundled checkpoint"):
        load_classifier(tmp_path / "nowhere")


def test_the_caller_s_gradient_mode_is_kept(checkpoint):
    classify_images(sample_photographs()[:1], checkpoint, [8])
    assert torch.is_grad_enabled()


@pytest.mark.skipif("flexivit-cifar10" not in available_checkpoints(), reason="the checkpoint is not installed")
def test_the_bundled_checkpoint_gets_the_sample_photographs_mostly_right():
    records, errors = classify_images(sample_photographs(), "flexivit-cifar10")
    assert errors == []
    finest = [record for record in records if record["budget"] == 4]
    right = [record["label"] in record["file"].rpartition("/")[2] for record in finest]
    assert sum(right) >= 4  # of six: the model is small, and two of the photographs are hard for it
