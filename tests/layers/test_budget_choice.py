import numpy as np
import pytest
import torch

from polyscale import FlexiViTConfig, S2VisionConfig, SparseFormerConfig
from polyscale.layers.budget_choice import at_budget, checked_budgets, distinct_budgets


def test_budgets_are_listed_as_they_are_given():
    config = FlexiViTConfig(image_size=32, base_patch_size=8)
    assert checked_budgets((4, (8, 4), [8, 8]), config) == [4, (8, 4), [8, 8]]
    budgets = checked_budgets([np.int64(4), 8], config)
    assert budgets == [4, 8]
    assert type(budgets[0]) is int
    assert checked_budgets(np.array([4, 8]), config) == [4, 8]
    budgets = checked_budgets([torch.tensor(4), (np.int64(8), 4), np.array([2, 4])], config)
    assert budgets == [4, (8, 4), [2, 4]]
    assert (type(budgets[0]), type(budgets[1][0]), type(budgets[2][0])) == (int, int, int)


@pytest.mark.parametrize(
    "budgets", [[8, 8], [8, (8, 8)], [[8, 8], (8, 8)], [[1, 2], (1, 2.0)], [[[16, 16], 32], [16, 32]], [{}, {}]]
)
def test_none_comes_twice(budgets):
    with pytest.raises(ValueError, match=r"`budgets` holds .* twice: give each once"):
        distinct_budgets(budgets)
    assert len(distinct_budgets([budgets[0], (4, 8)])) == 2


def test_what_is_none():
    config = SparseFormerConfig.preset("sparseformer_v1_tiny")
    with pytest.raises(ValueError, match="`budgets` must be None for a model of type 'sparseformer'"):
        checked_budgets([4], config)
    assert checked_budgets([None], config) == [None]
    for budgets in ("48", 8, {}, None):
        with pytest.raises(ValueError, match="`policy` must be a list of budgets, got"):
            checked_budgets(budgets, S2VisionConfig(), "policy")


def test_an_error_says_at_which_budget():
    with pytest.raises(ValueError, match=r"^`budgets` \(8, 4\): too large$"), at_budget((8, 4)):
        raise ValueError("too large")
    with pytest.raises(ValueError, match=r"^`budget` 4: too large$"), at_budget(4, "budget"):
        raise ValueError("too large")
    with pytest.raises(ValueError, match=r"^too large$"), at_budget(None):
        raise ValueError("too large")
