"""Swapped models that carry their code, loaded by a process that has no polyscale."""

import os
import subprocess
import sys

import pytest
import torch

from polyscale.hub import save_with_code

from .llava_tiny import PROMPTS, make_photographs, swapped


LOAD = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "polyscale":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
folder, out, *order = sys.argv[1:]
load = {
    "model": lambda: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval(),
    "processor": lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=True),
}
loaded = {name: load[name]() for name in order}
images = [Image.open(f"{out}/{index}.png") for index in range(2)]
inputs = loaded["processor"](images=images, text=PROMPTS, padding=True, return_tensors="pt", **WORDS)
with torch.no_grad():
    torch.save(loaded["model"](**inputs).logits, f"{out}/logits.pt")
assert not any(name.partition(".")[0] == "polyscale" for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "name", "words", "order"),
    [
        ("llava", "s2", {"num_tiles": 2}, ("model", "processor")),
        ("llava", "flexivit", {"num_tokens": 9}, ("processor", "model")),
        ("llava", "quadtree_threshold", {}, ("model", "processor")),
        ("llava_next", "flexivit", {}, ("model", "processor")),
        ("vipllava", "sparseformer", {}, ("processor", "model")),
    ],
)
def test_a_swapped_model_loads_without_polyscale(host, name, words, order, tmp_path):
    model, processor = swapped(name, host)
    save_with_code(model, tmp_path / "model", processor)
    for index, image in enumerate(make_photographs()):
        image.save(tmp_path / f"{index}.png")
    code = f"PROMPTS, WORDS = {PROMPTS!r}, {words!r}\n{LOAD}"
    variables = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path), *order],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = processor(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt", **words)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-4)


def test_where_polyscale_is_imported_its_own_classes_are_used(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from polyscale.llava import BudgetLlavaProcessor, PackedTower

    model, processor = swapped("flexivit")
    save_with_code(model, tmp_path, processor)
    for trust in (True, False):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(again.model.vision_tower) is PackedTower
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is BudgetLlavaProcessor
