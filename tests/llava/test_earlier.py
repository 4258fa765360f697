"""Folders that earlier versions saved."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from polyscale.llava import BudgetLlavaProcessor

from .llava_tiny import PROMPTS, make_photographs, swapped


# (tower, pixels per token and the quadtree's settings, as version 0.1 wrote them)
SAVED = [
    ("s2_dynamic", 8, None),
    ("quadtree_threshold", 1, {"min_patch_size": 8, "max_patch_size": 16, "split_threshold": 1.0, "num_tokens": None}),
]


def as_version_0_1(folder, patch_size, quadtree):
    file = folder / "processor_config.json"
    record = json.loads(file.read_text())
    record.pop("tower_config")
    old = {"processor_class": "PerPictureLlavaProcessor", "patch_size": patch_size, "quadtree": quadtree}
    file.write_text(json.dumps({**record, **old}))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("BudgetLlavaProcessor", "PerPictureLlavaProcessor"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].pop("num_front_tokens", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("name", "patch_size", "quadtree"), SAVED)
def test_the_per_picture_processor_of_version_0_1(name, patch_size, quadtree, tmp_path):
    model, processor = swapped(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    as_version_0_1(tmp_path, patch_size, quadtree)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is BudgetLlavaProcessor
    own, again = (
        one(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt") for one in (processor, loaded)
    )
    assert own.keys() == again.keys()
    for key, value in own.items():
        assert torch.equal(value, again[key]), key
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()(**again).logits
        torch.testing.assert_close(logits, model(**own).logits, atol=1e-5, rtol=1e-5)


def test_a_processor_without_its_model_says_what_to_do(tmp_path):
    model, processor = swapped("s2_dynamic")
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    as_version_0_1(tmp_path, 8, None)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has to lie beside the config\.json of its model"):
        AutoProcessor.from_pretrained(tmp_path)
