import math

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig

from polyscale import FlexiViTConfig, QuadtreeViTConfig
from polyscale.assets import photograph_class, sample_photographs
from polyscale.checkpoints import available_checkpoints
from polyscale.classification import classify_images
from polyscale.demonstration import answer_photographs, demonstration_checkpoints, spread_budgets

from .tiny_checkpoints import (
    TINY_IMAGENET_LABELS,
    label_fields,
    save_tiny_flexivit,
    save_tiny_quadtree_vit,
    save_tiny_s2,
    save_tiny_sparseformer,
)


TINY200 = label_fields(TINY_IMAGENET_LABELS)
PHOTOGRAPHS = sample_photographs(TINY_IMAGENET_LABELS)


def save_one_answer(folder, label, **fields):
    """A FlexiViT that calls everything `label`, and is sure."""
    save_tiny_flexivit(folder, **{**TINY200, **fields})
    model = AutoModelForImageClassification.from_pretrained(folder)
    torch.nn.init.zeros_(model.head.classifier.weight)
    torch.nn.init.zeros_(model.head.classifier.bias)
    with torch.no_grad():
        model.head.classifier.bias[model.config.label2id[label]] = 20
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """An empty folder in place of the one of bundled checkpoints."""
    monkeypatch.setattr("polyscale.checkpoints._FOLDER", tmp_path / "bundled")
    return tmp_path / "bundled"


def test_a_few_budgets_are_spread_from_the_fewest_tokens_to_the_most():
    flexivit = FlexiViTConfig(image_size=64, base_patch_size=8, train_patch_sizes=[4, 5, 6, 8, 10, 16])
    assert spread_budgets(flexivit) == [16, 8, 4]  # 16, 64, 256 tokens
    assert spread_budgets(flexivit, 2) == [16, 4]
    flexivit.train_patch_sizes = [8, 4]
    assert spread_budgets(flexivit) == [8, 4]
    quadtree = QuadtreeViTConfig(image_size=64, min_patch_size=8, max_patch_size=16, num_tokens=31)
    few, middle, many = spread_budgets(quadtree)
    assert (few, many) == (16, 64)
    assert abs(math.log(middle / math.sqrt(few * many))) < 0.1
    assert spread_budgets(ViTConfig()) == [None]


def test_answers_are_those_of_classification_and_say_what_is_right(tmp_path):
    names = [save_one_answer(tmp_path / "a", "koala"), save_one_answer(tmp_path / "b", "tabby")]
    done = []
    answers = answer_photographs(names, device="cpu", progress=lambda *args: done.append(args))
    assert [answer.name for answer in answers] == names
    assert done[0] == (1, 24)
    assert done[-1] == (24, 24)
    for answer, label in zip(answers, ("koala", "tabby"), strict=True):
        assert [(record["class"], record["budget"]) for record in answer.records] == [
            (photograph_class(file), budget) for file in PHOTOGRAPHS for budget in (16, 8, 4)
        ]
        right = [record for record in answer.records if record["right"]]
        assert [(record["class"], record["budget"]) for record in right] == [(label, 16), (label, 8), (label, 4)]
        assert {record["model"] for record in answer.records} == {answer.name}
    records, _ = classify_images(PHOTOGRAPHS, names[0], [16, 8, 4], device="cpu")
    for record, own in zip(records, answers[0].records, strict=True):
        for name in ("file", "budget", "tokens", "label", "score"):
            assert own[name] == record[name]


def test_every_family_answers(tmp_path):
    saves = (save_tiny_flexivit, save_tiny_quadtree_vit, save_tiny_sparseformer, save_tiny_s2)
    names = [str(save(tmp_path / save.__name__, **TINY200)) for save in saves]
    answers = answer_photographs(names, device="cpu")
    spent = [[record["tokens"] for record in answer.records if record["class"] == "bee"] for answer in answers]
    assert spent[0] == [4, 16, 64]
    assert (spent[1][0], spent[1][-1]) == (4, 64)
    assert spent[2:] == [[9], [16, 16]]  # S2: scales 1, 1 and 1, 2


def test_without_names_the_bundled_checkpoints_of_the_most_photographs_are_asked(bundled):
    save_tiny_flexivit(bundled / "flexivit-cifar10")
    save_tiny_flexivit(bundled / "of-three", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert available_checkpoints() == ["flexivit-cifar10", "of-three"]
    assert demonstration_checkpoints() == ["flexivit-cifar10"]
    (answer,) = answer_photographs(device="cpu")
    assert len(answer.records) == 6 * 3
    for name, save in (("flexivit-tiny200", save_tiny_flexivit), ("sparseformer-tiny200", save_tiny_sparseformer)):
        save(bundled / name, **TINY200)
    assert demonstration_checkpoints() == ["flexivit-tiny200", "sparseformer-tiny200"]
    assert [len(answer.records) for answer in answer_photographs(device="cpu")] == [12 * 3, 12]


def test_without_any_bundled_checkpoint_models_must_be_given(bundled):
    with pytest.raises(ValueError, match="`models` must be given: no checkpoint"):
        answer_photographs()


def test_models_that_cannot_be_compared_are_refused(tmp_path):
    tiny = save_one_answer(tmp_path / "tiny", "koala")
    cifar = str(save_tiny_flexivit(tmp_path / "cifar"))
    with pytest.raises(ValueError, match=r"`models` '.*cifar' must know .* has no label 'alp': give checkpoints of"):
        answer_photographs([tiny, cifar])
    with pytest.raises(ValueError, match=r"`models` '.*three' must know .* has no label 'bird'"):
        answer_photographs([save_tiny_flexivit(tmp_path / "three", id2label={0: "a"}, label2id={"a": 0})])
    with pytest.raises(ValueError, match=r"`models` holds .* twice"):
        answer_photographs([tiny, tiny])
    with pytest.raises(ValueError, match="`models` is empty"):
        answer_photographs([])
    with pytest.raises(ValueError, match="`models` must be a list of checkpoints, got"):
        answer_photographs(tiny)


def test_a_model_that_fails_on_a_photograph_is_named(tmp_path):
    broken = save_one_answer(tmp_path / "broken", "koala")
    model = AutoModelForImageClassification.from_pretrained(broken)
    with torch.no_grad():  # finite weights, infinite scores
        model.base_model.layernorm.weight.fill_(1e30)
        model.head.classifier.weight.fill_(1e30)
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match=r"`models` '.*broken' cannot classify .*alp_1\.jpg: .*not finite"):
        answer_photographs([broken], device="cpu")
