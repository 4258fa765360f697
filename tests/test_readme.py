"""The examples of the README's section "Use" run as they stand there, one after the other."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_examples_of_use_run(tmp_path, monkeypatch):
    section = README.read_text(encoding="utf-8").split("\n## Use\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)

    model, pixel_values = names["model"], names["pixel_values"]
    assert model.num_tokens_for((32, 48), patch_size=4) == 96
    assert model.patch_size_for((32, 48), num_tokens=24) == 8
    assert model(pixel_values).logits.shape == (1, 10)
    assert names["trainer"].state.global_step == 10
