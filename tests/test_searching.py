"""Search in embeddings: the nearest by cosine, by images and by words."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

import polyscale
from polyscale.embedding import embed_images
from polyscale.searching import search_embeddings
from polyscale.utils.images import open_image
from polyscale_cli import app

from .llava.llava_tiny import CLIP, WORDS, make_tokenizer
from .tiny_checkpoints import save_tiny_flexivit


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(7):
        pixels = generator.integers(0, 255, (30 + index, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def clip(tmp_path):
    """A folder with a tiny CLIP whose tower has a token budget, and its processor."""
    torch.manual_seed(0)
    text = {**CLIP, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(vision_config={**CLIP, "initializer_range": 0.2}, text_config=text, projection_dim=8)
    model = CLIPModel(config).eval()
    polyscale.convert_checkpoint(model.vision_model, tmp_path / "tower")
    dual = polyscale.swap_vision_tower(model, AutoModel.from_pretrained(tmp_path / "tower").eval())
    dual.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = make_tokenizer()
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", dual, images, tokenizer


def cosines(queries, vectors):
    return F.cosine_similarity(queries, vectors, dim=-1).tolist()


@torch.no_grad()
def test_an_image_finds_itself_and_then_its_nearest(folder, tmp_path):
    checkpoint = save_tiny_flexivit(tmp_path / "flexivit")
    embed_images(folder, tmp_path / "out", checkpoint, 8, shard_size=3)
    found = search_embeddings(tmp_path / "out", folder / "4.png", top=10)
    loaded = polyscale.loading.load_base_model(checkpoint)
    files = sorted(folder.iterdir())
    pooled = torch.cat(
        [
            loaded.model(**loaded.image_processor(open_image(file), return_tensors="pt"), patch_size=8).pooler_output
            for file in files
        ]
    )
    expected = sorted(zip(cosines(pooled[4:5], pooled), map(str, files), strict=True), reverse=True)
    assert [result.file for result in found] == [file for _, file in expected]
    np.testing.assert_allclose([result.score for result in found], [score for score, _ in expected], atol=1e-5)
    assert found[0].file == str(files[4])
    assert [result.file for result in search_embeddings(tmp_path / "out", folder / "4.png", top=2)] == [
        result.file for result in found[:2]
    ]
    with pytest.raises(ValueError, match="reads no texts"):
        search_embeddings(tmp_path / "out", "a cat")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        search_embeddings(tmp_path / "out", str(folder / "none.png"))
    with pytest.raises(ValueError, match="`top` must be"):
        search_embeddings(tmp_path / "out", folder / "4.png", top=0)


def test_an_array_finds_itself(tmp_path):
    checkpoint = save_tiny_flexivit(tmp_path / "flexivit")
    (tmp_path / "arrays").mkdir()
    for index in range(3):
        array = np.random.default_rng(index).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        np.save(tmp_path / "arrays" / f"{index}.npy", array)
    embed_images(tmp_path / "arrays", tmp_path / "out", checkpoint, 8)
    found = search_embeddings(tmp_path / "out", tmp_path / "arrays" / "1.npy", top=1)
    assert found[0].file == str(tmp_path / "arrays" / "1.npy")
    assert found[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match="is no file"):
        search_embeddings(tmp_path / "out", "missing.npy")


@torch.no_grad()
def test_words_and_images_of_a_clip_at_a_budget(clip, folder, tmp_path):
    checkpoint, dual, images, tokenizer = clip
    embed_images(folder, tmp_path / "out", checkpoint, 16)
    files = sorted(folder.iterdir())
    pixels = images([open_image(file) for file in files], return_tensors="pt")["pixel_values"]
    stored = dual.get_image_features(pixels, patch_size=16).pooler_output
    ids = tokenizer(["a cat"], return_tensors="pt")
    words = dual.get_text_features(ids["input_ids"], ids["attention_mask"]).pooler_output
    for query, vector in (("a cat", words), (files[2], stored[2:3])):
        expected = sorted(zip(cosines(vector, stored), map(str, files), strict=True), reverse=True)
        found = search_embeddings(tmp_path / "out", query, top=7)
        assert [result.file for result in found] == [file for _, file in expected]
        np.testing.assert_allclose([result.score for result in found], [score for score, _ in expected], atol=1e-5)


def test_the_command(clip, folder, tmp_path):
    arguments = ["embed", str(folder), str(tmp_path / "out"), "--model", str(clip[0]), "--budget", "16", "--top", "2"]
    first = CliRunner().invoke(app, [*arguments, "--search", str(folder / "3.png")])
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[1] == f"1.0000  {folder / '3.png'}"
    again = CliRunner().invoke(app, [*arguments, "--search", "a dog"])
    assert "7 were there already" in again.output
    expected = search_embeddings(tmp_path / "out", "a dog", top=2)
    assert again.stdout.splitlines()[1:] == [f"{found.score:.4f}  {found.file}" for found in expected]


def test_what_cannot_be_searched_is_refused(folder, tmp_path):
    checkpoint = save_tiny_flexivit(tmp_path / "flexivit")
    with pytest.raises(ValueError, match="holds no embeddings"):
        search_embeddings(tmp_path / "out", folder / "4.png")
    embed_images(folder, tmp_path / "out", checkpoint, tokens=True)
    with pytest.raises(ValueError, match="holds the tokens of each image"):
        search_embeddings(tmp_path / "out", folder / "4.png")


def test_an_unfinished_folder_says_how_much_was_searched(folder, tmp_path):
    (folder / "9.png").write_bytes(b"no image")
    checkpoint = save_tiny_flexivit(tmp_path / "flexivit")
    embed_images(folder, tmp_path / "out", checkpoint, shard_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(search_embeddings(tmp_path / "out", folder / "4.png", top=10)) == 7
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with pytest.warns(UserWarning, match="holds 5 of its 8 images: the others were not searched"):
        found = search_embeddings(tmp_path / "out", folder / "4.png", top=10)
    assert sorted(file.file[-5:] for file in found) == ["0.png", "1.png", "2.png", "6.png"]
