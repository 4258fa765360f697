"""Loads LLaVAs with another tower in a process that never saw them being made. `<family>/` holds each with its
processor, and `expected.safetensors` what it was given and what it answered.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

import polyscale.llava  # noqa: F401

from ...llava.llava_tiny import encode_photographs
from ..running import answer_checks


@torch.no_grad()
def check_generation(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    inputs = encode_photographs(AutoProcessor.from_pretrained(folder))
    for name, value in inputs.items():
        assert_close(value, expected[name], rtol=0, atol=0)
    assert_close(model(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-6)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, expected["tokens"])


if __name__ == "__main__":
    answer_checks(dict(globals()), Path(sys.argv[1]), lambda family, folder, facts: folder)
