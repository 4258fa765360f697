"""What may come of a call, how many cases are tried, and the values that they are made of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image


_TIMES = int(os.environ.get("POLYSCALE_FUZZ", "0"))


def cases(few: int) -> settings:
    """The settings of a test: `few` cases, always the same; or `POLYSCALE_FUZZ` times as many, from the seed."""
    return settings(
        max_examples=few * max(_TIMES, 1),
        derandomize=_TIMES == 0,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * (_TIMES > 0),
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def clear_error_at_most(*names: str) -> Iterator[None]:
    """Lets pass the errors that users are promised, if they say which of `names` (any, when none are given) is wrong.

    A `ValueError`, or an `OSError` for files: everything else is a fault.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        assert "`" in text, f"names no argument: {text}"
        assert not names or any(f"`{name}" in text for name in names), f"names none of {names}: {text}"


numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(),
    st.booleans(),
)
words = st.one_of(
    st.sampled_from(["", "cls", "mean", "pad", "bilinear", "8", "8x8", "\x00", "gelu"]), st.text(max_size=5)
)
tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.randn(2, 3, 32, 32),
        torch.randn(1, 3, 0, 32),
        torch.randn(0, 3, 32, 32),
        torch.randn(1, 2, 3, 32, 32),
        torch.randn(1, 4, 16, 16),
        torch.full((1, 3, 32, 32), float("nan")),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
        torch.zeros(1, 3, 32, 32, dtype=torch.bool),
        torch.randn(1, 17, 16),
        torch.randn(1, 16, 16),
        torch.tensor([0, 1]),
    ]
)
objects = st.sampled_from(
    [None, object(), {}, {"a": 1}, (), [], Image.new("RGB", (8, 8)), np.zeros((3, 8, 8)), np.float64("nan"), b"x", int]
)
anything = st.one_of(
    numbers,
    words,
    objects,
    tensors,
    st.lists(st.one_of(numbers, words), max_size=3),
    st.tuples(numbers, numbers),
    st.dictionaries(words, numbers, max_size=2),
)


def nearly(good: object) -> st.SearchStrategy:
    """Often `good`, else anything."""
    return st.one_of(st.just(good), st.just(good), st.just(good), anything)
