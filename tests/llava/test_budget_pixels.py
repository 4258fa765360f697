"""A budget above the pixels of an image."""

import pytest
import torch

from polyscale.llava.budget_pixels import MARK, put_budget, take_budgets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 32, 896])
def test_budgets_pass_through_pixels_of_every_type(dtype, width):
    images = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    budgets = [[4096, 64, 14, 14], [1, 0, 2**20 - 1, 256]]
    marked = torch.stack([put_budget(image, numbers) for image, numbers in zip(images, budgets, strict=True)])
    assert marked[0, 0, 0, 0] == MARK
    pixels, numbers = take_budgets(marked.to(dtype))
    assert numbers == budgets
    assert torch.equal(pixels, images.to(dtype))
    assert take_budgets(images)[1] is None
