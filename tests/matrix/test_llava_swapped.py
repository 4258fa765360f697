"""A LLaVA that was trained with another tower, and got one of each family."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from ..llava.llava_tiny import encode_photographs, make_llava, swapped
from .families import each_family
from .running import Report, ask_worker
from .test_compile import CountingBackend


_COLUMN = "LLaVA with its tower swapped: fresh process, generation, hidden states, bfloat16, compile"
# Family -> name of the tower in llava_tiny.py.
_TOWERS = {"flexivit": "flexivit", "quadtree_vit": "quadtree", "sparseformer": "sparseformer", "s2_vision": "s2"}
# The error of one rounding is a draw: so many times that of the model before the swap may another be.
_FACTOR = 4


@pytest.fixture(scope="session")  # a parallel run goes back and forth between modules
def fresh_report(tmp_path_factory) -> Report:
    """The answers of one fresh process that loads them all."""
    folder = tmp_path_factory.mktemp("swapped")
    for family, tower in _TOWERS.items():
        model, processor = swapped(tower)
        inputs = encode_photographs(processor)
        with torch.no_grad():
            logits = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert tokens.shape == (2, inputs["input_ids"].shape[1] + 4)
        model.save_pretrained(folder / family)
        processor.save_pretrained(folder / family)
        save_file({**inputs, "logits": logits, "tokens": tokens}, folder / family / "expected.safetensors")
    return ask_worker("swapped_llava", folder, {family: {} for family in _TOWERS})


@pytest.mark.slow
@pytest.mark.xdist_group("swapped-llava")
@each_family(_COLUMN)
def test_in_a_fresh_process(family, fresh_report):
    fresh_report.require(family.name, "generation")


@each_family(_COLUMN)
@torch.no_grad()
def test_a_call_after_hidden_states_gives_the_same(family):
    model, processor = swapped(_TOWERS[family.name])
    inputs = encode_photographs(processor)
    tower, pixels = model.model.vision_tower, inputs["pixel_values"]
    features, expected = tower(pixels).last_hidden_state, model(**inputs).logits
    assert len(tower(pixels, output_hidden_states=True).hidden_states) > 1
    assert len(model(**inputs, output_hidden_states=True).hidden_states) > 1
    assert_close(tower(pixels).last_hidden_state, features, rtol=0, atol=0)
    assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def _error_in_bfloat16(model, inputs) -> float:
    """The error of the logits, relative to them."""
    expected = model(**inputs).logits
    logits = model.bfloat16()(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits
    assert logits.dtype == torch.bfloat16
    return ((logits.float() - expected).norm() / expected.norm()).item()


@each_family(_COLUMN)
def test_bfloat16(family):
    """As near to float32 as the model was before the swap."""
    plain, plain_processor = make_llava()
    reference = _error_in_bfloat16(plain, encode_photographs(plain_processor))
    model, processor = swapped(_TOWERS[family.name])
    assert _error_in_bfloat16(model, encode_photographs(processor)) < _FACTOR * reference


@each_family(_COLUMN)
@torch.no_grad()
def test_tower_in_one_graph(family):
    """The tower alone: transformers' own code breaks the graph of every LLaVA, and budgets are read on the host."""
    torch.compiler.reset()
    model, processor = swapped(_TOWERS[family.name])
    inputs = encode_photographs(processor)
    expected = model(**inputs).logits
    backend = CountingBackend()
    model.model.vision_tower.tower.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert backend.graphs == 1
    torch.compiler.reset()
