"""Values that no run can have are refused when a recipe is made."""

import math

import numpy as np
import pytest

from polyscale.training import TrainingRecipe, make_recipe, train
from polyscale.training.schedule import schedule_notes, steps_of, warmup_steps


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"epochs": math.nan}, "`epochs` must be a finite number, got nan"),
        ({"epochs": math.inf}, "`epochs` must be a finite number"),
        ({"epochs": "three"}, "`epochs` must be a finite number, got 'three'"),
        ({"epochs": 0}, "`epochs` must be above 0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a finite number"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 2.5}, "`batch_size` must be a whole number"),
        ({"batch_size": True}, "`batch_size` must be a whole number"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be below 1, got 1"),
        ({"mixup": -0.1}, "`mixup` must be at least 0"),
        ({"ema_decay": 1.5}, "`ema_decay` must be between 0 and 1"),
        ({"image_std": (0.5, 0.0, 0.5)}, "`image_std` must be above 0"),
        ({"image_std": (0.5, math.nan, 0.5)}, "`image_std` must hold a finite number for each channel"),
        ({"image_mean": (math.inf,) * 3}, "`image_mean` must hold a finite number"),
        ({"image_mean": (0.5,), "image_std": (0.5,) * 3}, "must agree: one number for each channel"),
        ({"num_channels": 1, "image_std": (0.5,) * 3}, "must agree"),
        ({"image_size": 0}, "`image_size` must be at least 1 pixel"),
        ({"image_size": (8, 8, 8)}, "`image_size` must be an int or a pair"),
        ({"init_from": 3}, "`init_from` must be text"),
        ({"temperature": 2.0}, "`temperature` goes with `teacher`"),
        ({"label_map": {"a": "b"}}, "`label_map` goes with"),
        ({"tune_budgets": (0.3, 1.0)}, "`tune_budgets` needs `init_from`"),
        ({"tune_budgets": (0.0, 1.0), "init_from": "x"}, "must be two shares of the full budget"),
        ({"tune_budgets": (0.3,), "init_from": "x"}, "must be two shares"),
        ({"tune_budgets": (0.3, 1.0), "init_from": "x", "mixup": 0.1}, "exclude each other: there are no labels"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"epoch": 3}, "`epoch` is no field of a recipe; did you mean `epochs`?"),
    ],
)
def test_values_that_no_run_can_have(choices, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(None, **choices)


def test_a_recipe_survives_json():
    recipe = TrainingRecipe(image_size=(8, 16), image_mean=(0.1, 0.2, 0.3), tune_budgets=(0.3, 1), init_from="x")
    assert TrainingRecipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.05, 1000, 50), (0.05, 33, 2), (0.05, 12, 0), (5000, 20000, 5000), (5000, 100, 10), (5000, 5, 0), (0, 100, 0)],
)
def test_the_warm_up_fits_the_run(warmup, steps, expected):
    assert warmup_steps(TrainingRecipe(warmup=warmup), steps) == expected


def test_steps_count_batches_processes_and_micro_batches():
    recipe = TrainingRecipe(batch_size=8, gradient_accumulation_steps=2, epochs=3)
    assert steps_of(recipe, num_images=50, num_processes=1) == 3 * 4  # 7 batches, 4 steps an epoch
    assert steps_of(recipe, num_images=50, num_processes=2) == 3 * 2


def test_what_does_not_fit_the_run_is_said():
    class Arguments:
        warmup_steps = 10

    notes = schedule_notes(TrainingRecipe(warmup=5000, ema_decay=0.999), Arguments, 100)
    assert "longer than the run of 100: it is shortened to 10" in notes[0]
    assert "still holds 90 % of the first weights after 100 steps" in notes[1]
    assert schedule_notes(TrainingRecipe(ema_decay=0.9), Arguments, 100) == []


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"bf16": "no"}, "`bf16` must be True or False, got 'no'"),
        ({"trust_remote_code": "false"}, "`trust_remote_code` must be True or False"),
        ({"model_options": []}, r"`model_options` must be a dict, got \[\]"),
        ({"model_options": {"num_labels": 3}}, "`model_options` must not hold `num_labels`"),
        ({"label_map": ["a"]}, "`label_map` must be a dict"),
        ({"image_mean": "abc"}, "`image_mean` must be a list of numbers"),
        ({"image_mean": [True]}, "`image_mean` must hold a finite number"),
        ({"tune_budgets": 0.5}, "`tune_budgets` must be a list of two shares"),
        ({"seed": 2**32}, "`seed` must be at most 4294967295"),
        ({"batch_size": 10**20}, "`batch_size` must be at most"),
        ({"family": ""}, "`family` must be text, got ''"),
    ],
)
def test_values_of_other_types(choice, message):
    with pytest.raises(ValueError, match=message):
        TrainingRecipe(**choice)


def test_numbers_of_numpy_are_kept_as_plain_ones():
    options = {"drop_path_rate": np.float64(0.25), "train_patch_sizes": np.array([4, 8])}
    made = make_recipe(None, options, init_from="model", tune_budgets=np.array([0.25, 1], dtype=np.float32))
    assert made.to_json()["tune_budgets"] == [0.25, 1.0]
    assert made.to_json()["model_options"] == {"drop_path_rate": 0.25, "train_patch_sizes": [4, 8]}
    with pytest.raises(ValueError, match="`model_options` must not hold `problem_type`: each image has one class"):
        make_recipe(None, {"problem_type": "regression"})
    with pytest.raises(ValueError, match=r"`model_options\['hidden_act'\]` must be a plain value"):
        make_recipe(None, {"hidden_act": {"gelu"}})
    recipe = TrainingRecipe(batch_size=np.int64(4), learning_rate=np.float32(0.5), image_mean=np.full(3, 0.25))
    assert TrainingRecipe.from_json(recipe.to_json()) == recipe
    assert (recipe.batch_size, recipe.learning_rate, recipe.image_mean) == (4, 0.5, (0.25, 0.25, 0.25))
    with pytest.raises(ValueError, match="`foo` is no field of a recipe of this version"):
        TrainingRecipe.from_json({"foo": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, "out"), "`dataset` must be a path or a name, got 5"),
        (("data", None), "`output_dir` must be a path or a name"),
        (("data", "out", "flexivit"), "`recipe` must be a TrainingRecipe or a dict of its fields, got 'flexivit'"),
        (("data", "out", {"epoch": 3}), "`epoch` is no field of a recipe; did you mean `epochs`"),
        (("data", "out", None, "yes"), "`resume` must be True or False"),
    ],
)
def test_arguments_of_a_training(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(*arguments)
    assert list(tmp_path.iterdir()) == []
