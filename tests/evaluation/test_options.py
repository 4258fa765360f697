"""What an evaluation is asked for is said in one place, and each model is asked once."""

import inspect
from dataclasses import MISSING, fields

import pytest

from polyscale.evaluation import evaluate_budgets, evaluate_checkpoints, labels
from polyscale.evaluation.options import EvaluationOptions

from .tiny_data import NAMES, save_checkpoint


def test_options_are_the_arguments_of_evaluate_budgets():
    own = ("model", "processor", "split", "budgets")
    arguments = inspect.signature(evaluate_budgets).parameters.values()
    expected = {argument.name: argument.default for argument in arguments if argument.name not in own}
    assert {field.name: field.default for field in fields(EvaluationOptions)} == expected
    assert MISSING not in expected.values()


def test_an_unknown_option_is_refused_before_anything_is_read():
    with pytest.raises(TypeError, match="'crop'"):
        evaluate_checkpoints(["nowhere"], "nowhere", crop=0.9)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        evaluate_checkpoints(["nowhere"], "nowhere", batch_size=0)


def test_options_that_ask_for_rows_are_those_that_are_given():
    assert EvaluationOptions().asking() == []
    assert EvaluationOptions(shrink_to=[8], image_sizes=[16], crop_pct=0.9).asking() == ["image_sizes", "shrink_to"]


def test_classes_are_matched_once_for_each_model(split, checkpoint, tmp_path, monkeypatch):
    split.to_parquet(tmp_path / "test.parquet")
    models = [checkpoint, save_checkpoint(tmp_path / "other")]
    match, matched = labels.match_labels, []
    monkeypatch.setattr(labels, "match_labels", lambda names, *a, **k: matched.append(names) or match(names, *a, **k))
    first, second = evaluate_checkpoints(models, tmp_path / "test.parquet", device="cpu", label_map={"a": "b"})
    assert matched == [NAMES, NAMES]
    assert [result.images for result in first.results + second.results] == [11, 11]
    matched.clear()
    evaluate_checkpoints([checkpoint], tmp_path / "test.parquet", device="cpu")
    assert matched == [NAMES]
