"""Checkpoints in a process that never saw them being made: Auto classes, processors, pipelines; with polyscale
installed, and without it from the code that travels with the weights."""

from functools import lru_cache

import pytest
import torch
from torch.testing import assert_close

from .families import FAMILIES, each_check, each_family
from .reference import write_reference
from .running import Report, ask_worker


_CHECKS = {
    "polyscale_is_or_is_not_there": "save and load in a fresh process",
    "auto_classes": "Auto classes",
    "model": "save and load in a fresh process",
    "classifier": "save and load in a fresh process",
    "knobs_in_the_config": "token budget from the config",
    "auto_backbone": "Auto classes",
    "processors": "image processors, torchvision and PIL",
    "classification_pipeline": 'pipeline("image-classification")',
    "feature_pipeline": 'pipeline("image-feature-extraction")',
}
_WITHOUT = "without polyscale, by the code in the checkpoint"


@pytest.fixture(scope="session")  # a parallel run goes back and forth between modules
def fresh_report(tmp_path_factory):
    """with_code -> the answers of one fresh process that loads a checkpoint of each family, asked once."""

    @lru_cache
    def ask(with_code: bool) -> Report:
        folder = tmp_path_factory.mktemp(f"fresh-{with_code}")
        facts = {family.name: write_reference(family, folder / family.name, with_code) for family in FAMILIES}
        return ask_worker("fresh_process", folder, facts, HF_MODULES_CACHE=str(folder / "modules"))

    return ask


@pytest.mark.slow
@each_check(_CHECKS, "fresh")
def test_in_a_fresh_process(family, check, fresh_report):
    fresh_report(False).require(family.name, check)


@pytest.mark.slow
@each_check({**_CHECKS, "trust_is_asked_for": _WITHOUT}, "without", reported_as=_WITHOUT)
def test_without_polyscale(family, check, fresh_report):
    fresh_report(True).require(family.name, check)


@each_family("save and load in a fresh process")
def test_a_new_head_on_old_weights(family, tmp_path):
    """Fine-tuning starts like this: the body loads, the head is new because its size differs."""
    model = family.make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.classifier.from_pretrained(tmp_path, num_labels=7)
    other, info = family.classifier.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = {key for key, *_ in info["mismatched_keys"]}
    assert new
    for key, value in model.state_dict().items():
        if key not in new:
            assert_close(other.state_dict()[key], value, rtol=0, atol=0)
    with torch.no_grad():
        assert other(family.make_inputs()).logits.shape == (2, 7)
