"""Comparison with golden tensors: how far float32 may lie from float32 of another machine. See fixtures/README.md."""

from collections.abc import Callable

import torch


ATOL, RTOL = 2e-5, 1e-5
# How often the sensitivity fits in the tolerance: draws come near the worst change, but need not find it.
FACTOR = 2
# A function that rounding changes by more has no golden values in float32.
MAX_SENSITIVITY = 1e-3


def rounding_sensitivity(
    function: Callable[[torch.Tensor], list[torch.Tensor]], inputs: torch.Tensor, draws: int = 6
) -> list[float]:
    """The largest change of each result of `function` where each entry of `inputs` goes up or down by one rounding
    unit of float32, drawn `draws` times.
    """
    generator = torch.Generator().manual_seed(0)
    expected = function(inputs)
    largest = [0.0] * len(expected)
    for _ in range(draws):
        signs = 2 * torch.randint(0, 2, inputs.shape, generator=generator) - 1
        results = function(inputs * (1 + signs * torch.finfo(torch.float32).eps))
        for index, (result, value) in enumerate(zip(results, expected, strict=True)):
            largest[index] = max(largest[index], (result - value).abs().max().item())
    return largest


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, sensitivity: float = 0.0) -> None:
    """Asserts that each entry differs by at most `ATOL` + `RTOL` * |expected| + `FACTOR` * `sensitivity`."""
    assert sensitivity <= MAX_SENSITIVITY, f"one rounding unit of the inputs changes the result by {sensitivity}"
    torch.testing.assert_close(actual, expected, atol=ATOL + FACTOR * sensitivity, rtol=RTOL)
