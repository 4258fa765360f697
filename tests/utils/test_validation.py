"""Checks of what users give: the error names the argument, and shows a value in one line."""

import numpy as np
import pytest
import torch

from polyscale.utils.validation import check_distinct, check_flag, check_function, check_list, shown


def test_a_value_is_shown_in_one_short_line():
    assert shown("8") == "'8'"
    assert shown(torch.nn.Linear(2, 2)) == "a Linear"
    assert shown(np.zeros((100, 100))) == "a ndarray"
    long = shown(["a\n"] * 1000)
    assert len(long) == 100
    assert long.endswith("...")
    assert "\n" not in long


@pytest.mark.parametrize("value", ["48", b"48", 5, None, {"a": 1}, True, torch.tensor(8)])
def test_what_is_no_list(value):
    with pytest.raises(ValueError, match="`sizes` must be a list of pixels, got"):
        check_list("sizes", value, what="pixels")


def test_lists():
    assert check_list("sizes", (4, 8)) == [4, 8]
    assert check_list("sizes", np.array([4, 8])) == [4, 8]
    assert check_list("sizes", (size for size in "ab"), str) == ["a", "b"]
    with pytest.raises(ValueError, match="`sizes` is empty: give at least one"):
        check_list("sizes", [])
    with pytest.raises(ValueError, match="`sizes` must be a list of names, got 8 in it"):
        check_list("sizes", ["a", 8], str, "names")


def test_nothing_comes_twice():
    check_distinct("sizes", [4, 8])
    with pytest.raises(ValueError, match=r"`sizes` holds 8 twice: give each once. Or less."):
        check_distinct("sizes", [8, 4, 8], hint="Or less.")
    with pytest.raises(ValueError, match=r"`sizes` holds \(8, 8\) twice"):
        check_distinct("sizes", [8, (8, 8)], [8, 8])


@pytest.mark.parametrize("value", ["false", 0, None, np.True_])
def test_flags_are_true_or_false(value):
    check_flag("convert", False)
    with pytest.raises(ValueError, match="`convert` must be True or False, got"):
        check_flag("convert", value)


def test_functions():
    check_function("progress", None)
    check_function("progress", print)
    with pytest.raises(ValueError, match="`progress` must be a function or None, got 5"):
        check_function("progress", 5)
