"""Swapped models that carry their code, loaded by a process that has no polyscale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyscale.hub import save_with_code

from .llava_tiny import PROMPTS, make_photographs, swapped


CASES = {
    "llava-s2": ({"num_tiles": 2}, ("model", "processor")),
    "llava-flexivit": ({"num_tokens": 9}, ("processor", "model")),
    "llava-quadtree_threshold": ({}, ("model", "processor")),
    "llava_next-flexivit": ({}, ("model", "processor")),
    "vipllava-sparseformer": ({}, ("processor", "model")),
    "paligemma-flexivit": ({"num_tokens": 9}, ("model", "processor")),
    "gemma3-flexivit": ({"num_tokens": 9}, ("processor", "model")),
}
# A child for each case, so that what one loads is not there for the next; the imports behind them are shared.
LOAD = """
import json
import os
import sys
import traceback
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "polyscale":
            raise ModuleNotFoundError(name)

def answer(name, words, order):
    load = {
        "model": lambda: AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval(),
        "processor": lambda: AutoProcessor.from_pretrained(name, trust_remote_code=True),
    }
    loaded = {kind: load[kind]() for kind in order}
    images = [[Image.open(f"{index}.png")] for index in range(2)]
    inputs = loaded["processor"](images=images, text=PROMPTS, padding=True, return_tensors="pt", **words)
    with torch.no_grad():
        torch.save(loaded["model"](**inputs).logits, f"{name}.pt")
    assert not any(module.partition(".")[0] == "polyscale" for module in sys.modules)

sys.meta_path.insert(0, Nowhere())
for name, (words, order) in CASES.items():
    child = os.fork()
    if child == 0:
        try:
            answer(name, words, order)
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="session")  # a parallel run goes back and forth between modules
def answers_without_polyscale(tmp_path_factory) -> tuple[Path, str]:
    """The folder where a process without polyscale left the logits of each case, and what it printed."""
    folder = tmp_path_factory.mktemp("code")
    for case in CASES:
        host, name = case.split("-")
        model, processor = swapped(name, host)
        save_with_code(model, folder / case, processor)
    for index, image in enumerate(make_photographs()):
        image.save(folder / f"{index}.png")
    code = f"PROMPTS, CASES = {PROMPTS!r}, {CASES!r}\n{LOAD}"
    variables = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, cwd=folder, capture_output=True, text=True
    )
    return folder, done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("llava-code")
@pytest.mark.parametrize("case", CASES)
def test_a_swapped_model_loads_without_polyscale(case, answers_without_polyscale):
    folder, errors = answers_without_polyscale
    assert (folder / f"{case}.pt").is_file(), errors[-6000:]
    host, name = case.split("-")
    model, processor = swapped(name, host)
    words, _ = CASES[case]
    images = [[image] for image in make_photographs()]
    inputs = processor(images=images, text=PROMPTS, padding=True, return_tensors="pt", **words)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(folder / f"{case}.pt"), expected, atol=1e-5, rtol=1e-4)


def test_where_polyscale_is_imported_its_own_classes_are_used(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from polyscale.llava import BudgetLlavaProcessor, PackedTower

    model, processor = swapped("flexivit")
    save_with_code(model, tmp_path, processor)
    for trust in (True, False):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(again.model.vision_tower) is PackedTower
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is BudgetLlavaProcessor
