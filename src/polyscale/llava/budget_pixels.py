"""A token budget above the pixels of an image, for hosts that pass nothing but the images to their tower.

Rows on top of the image hold whole numbers that every floating-point type keeps: a mark that no pixel has, how many
rows there are, and how many numbers; then each number as three digits to the base 256. Only square images carry a
budget, so that an image that is square carries none.
"""

from collections.abc import Sequence

import torch


MARK = -4096.0
_BASE, _DIGITS = 256, 3


def put_budget(image: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The image below a budget: (channels, height, width) -> (channels, rows + height, width).

    Args:
        image: what an image processor made of an image, at least two pixels wide.
        numbers: below 2 ** 24.
    """
    digits = [number // _BASE**place % _BASE for number in numbers for place in range(_DIGITS)]
    width = image.shape[-1]
    rows = -(-(3 + len(digits)) // width)
    values = [MARK, rows, len(numbers), *digits]
    if not image.is_floating_point():
        image = image.to(torch.get_default_dtype())
    strip = image.new_tensor(values + [0] * (rows * width - len(values))).view(1, rows, width)
    return torch.cat([strip.expand(image.shape[0], -1, -1), image], dim=-2)


def take_budgets(pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[list[int]] | None]:
    """The images without their budgets, and the numbers of each image; `None` where they carry none.

    Reads values on the host: on an accelerator a synchronisation.

    Args:
        pixel_values: (batch, channels, height, width).

    Raises:
        ValueError: where only some images carry a budget.
    """
    first = pixel_values[:, 0, 0].tolist()
    is_marked = [row[0] == MARK for row in first]
    if not any(is_marked):
        return pixel_values, None
    if not all(is_marked):
        raise ValueError(
            "`pixel_values` holds images with a token budget and images without: make all images of a batch in one "
            "call of the processor, or all with a budget."
        )
    rows = int(first[0][1])
    strips = first if rows == 1 else pixel_values[:, 0, :rows].flatten(1).tolist()
    budgets = []
    for strip in strips:
        digits = [int(value) for value in strip[3 : 3 + _DIGITS * int(strip[2])]]
        places = (digits[start : start + _DIGITS] for start in range(0, len(digits), _DIGITS))
        budgets.append([sum(digit * _BASE**place for place, digit in enumerate(number)) for number in places])
    return pixel_values[..., rows:, :], budgets


__all__ = ["MARK", "put_budget", "take_budgets"]
