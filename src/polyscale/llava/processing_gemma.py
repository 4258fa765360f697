"""Processors of PaliGemma and Gemma 3 models with a tower of this library, at the budget of each call."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoProcessor, Gemma3Processor, PaliGemmaProcessor
from transformers.feature_extraction_utils import BatchFeature

from ..layers.token_budget import TokenBudgetMixin
from .budget_pixels import put_budget, take_budgets
from .processing import CallBudgetMixin, count_by_budget


class PixelBudgetMixin(CallBudgetMixin):
    """A processor that writes the budget of a call above the pixels of its images: see `budget_pixels`."""

    def _count(self, processed: BatchFeature, configs: Sequence[TokenBudgetMixin]) -> list[int]:
        """The number of tokens of each image; its budget is put above it where the call names one.

        Raises:
            ValueError: for images that are no squares.
        """
        counted = count_by_budget(processed, configs)
        if any(self._call_budget):
            images = []
            for pixels, config, (count, code) in zip(processed["pixel_values"], configs, counted, strict=True):
                image = torch.as_tensor(pixels)
                height, width = image.shape[-2:]
                if height != width:
                    raise ValueError(
                        f"`image_size` must be a square for a budget of a call, got {height} x {width} pixels."
                    )
                grid = config.token_grid_for((height, width))
                images.append(put_budget(image, [count, 0 if grid is None else grid[0], *code]))
            processed["pixel_values"] = images
        return [count for count, _ in counted]


class BudgetPaliGemmaProcessor(PixelBudgetMixin, PaliGemmaProcessor):
    """A `PaliGemmaProcessor` that takes a token budget in each call; the tower follows by way of `pixel_values`.

    Args:
        image_processor: the tower's, with `image_seq_length`, the tokens of an image at the tower's own budget.
        tokenizer: the model's.
        chat_template (`str`, *optional*): the model's.
        tower_config (`dict`, *optional*): the config of the tower.

    Example:

    ```python
    >>> inputs = processor(images=photograph, text="<image>caption en", num_tokens=100, return_tensors="pt")
    ```
    """

    batch_limit = "requests of a batch must have as many tokens, and all name a budget or none"

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, tower_config: dict | None = None, **kwargs
    ):
        self.tower_config = tower_config
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images=None, text=None, suffix=None, *, image_budgets=None, **kwargs):
        """
        Args:
            images, text, suffix, kwargs: as in `PaliGemmaProcessor`, and the budget words of the tower (`num_tokens`,
                `patch_size`, `num_tiles`, ...) for all images.
            image_budgets (`list[dict]`, *optional*): one dict of budget words for each image, over those for all, with
                the same number of tokens for each.

        Returns:
            `BatchFeature`: as in `PaliGemmaProcessor`. Where the call names a budget, `pixel_values` holds it in rows
                above the pixels.

        Raises:
            ValueError: for an unknown word, an illegal budget, or images that would have different sizes or different
                numbers of tokens.
        """
        one_call, others = self._for_one_call(kwargs, image_budgets)
        return super(BudgetPaliGemmaProcessor, one_call).__call__(images, text, suffix, **others)

    def _carry(self, processed: BatchFeature, configs: Sequence[TokenBudgetMixin]) -> list[str]:
        counts = self._count(processed, configs)
        if len(set(counts)) > 1:
            raise ValueError(
                f"`image_budgets` gives the images of one call {counts} tokens, and a PaliGemma model takes the same "
                "number for each: give such images to calls of their own."
            )
        return [self.image_token * count for count in counts]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        pixels = torch.as_tensor(image_inputs["pixel_values"][image_idx])
        _, numbers = take_budgets(pixels[None])
        return self.image_token * (self.image_seq_length if numbers is None else numbers[0][0])


class BudgetGemma3Processor(PixelBudgetMixin, Gemma3Processor):
    """A `Gemma3Processor` that takes a token budget of the tower in each call, which follows by way of `pixel_values`.

    The language model gets `image_seq_length` tokens of an image (and as many of each crop with pan and scan) whatever
    the tower's budget is: its tokens are averaged.

    Args:
        image_processor: a `Gemma3ImageProcessor`.
        tokenizer: the model's.
        chat_template (`str`, *optional*): the model's.
        image_seq_length (`int`, *optional*, defaults to 256): `mm_tokens_per_image` of the model.
        tower_config (`dict`, *optional*): the config of the tower.

    Example:

    ```python
    >>> inputs = processor(images=photograph, text="<start_of_image> what?", patch_size=28, return_tensors="pt")
    ```
    """

    batch_limit = "requests of a batch must all name a budget or none"

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        image_seq_length: int = 256,
        tower_config: dict | None = None,
        **kwargs,
    ):
        self.tower_config = tower_config
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template, image_seq_length=image_seq_length, **kwargs
        )

    def __call__(self, images=None, text=None, *, image_budgets=None, **kwargs):
        """
        Args:
            images, text, kwargs: as in `Gemma3Processor`, and the budget words of the tower (`num_tokens`,
                `patch_size`, ...) for all images.
            image_budgets (`list[dict]`, *optional*): one dict of budget words for each image, over those for all.

        Returns:
            `BatchFeature`: as in `Gemma3Processor`. Where the call names a budget, `pixel_values` holds it in rows
                above the pixels.

        Raises:
            ValueError: for an unknown word, an illegal budget, one with fewer rows or columns of tokens than the
                language model gets, or images that would have different sizes.
        """
        one_call, others = self._for_one_call(kwargs, image_budgets)
        return super(BudgetGemma3Processor, one_call).__call__(images, text, **others)

    def _split_words(self, words: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if "mm_tokens_per_image" in words:
            raise ValueError(
                "`mm_tokens_per_image` cannot be given to a call of this processor: a Gemma 3 model takes it from its "
                "config. Use `polyscale.set_token_budget(model, processor, mm_tokens_per_image=...)`, which changes "
                "both sides."
            )
        return super()._split_words(words)

    def _config_at(self, words: Mapping[str, Any]) -> TokenBudgetMixin:
        config = super()._config_at(words)
        check_grid(config.token_grid_for(), self.image_seq_length)
        return config

    def _carry(self, processed: BatchFeature, configs: Sequence[TokenBudgetMixin]) -> list[str]:
        crops = [int(count) for count in processed["num_crops"]]
        self._count(
            processed, [config for config, count in zip(configs, crops, strict=True) for _ in range(1 + count)]
        )
        return [self.replace_image_token(processed, place) for place in range(len(configs))]

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs):
        """Tokens of images of (height, width) pixels; as in `Gemma3Processor`, crops are not counted."""
        budget, _ = self._split_words(kwargs)
        self._config_at(budget)
        return super(CallBudgetMixin, self)._get_num_multimodal_tokens(image_sizes=image_sizes)


def check_grid(grid: tuple[int, int], num_tokens: int) -> None:
    """Raises ValueError for a grid of tokens with fewer rows or columns than the square that it is averaged to."""
    side = math.isqrt(num_tokens)
    if min(grid) < side:
        raise ValueError(
            f"The budget gives a grid of {grid[0]} x {grid[1]} tokens, which cannot be averaged to {side} x {side} "
            f"for the language model: give one of at least {num_tokens} tokens, or `mm_tokens_per_image` of at most "
            f"{min(grid) ** 2} to `set_token_budget`."
        )


for _processor in (BudgetPaliGemmaProcessor, BudgetGemma3Processor):
    # A saved processor is found by its name: the key is never looked up.
    AutoProcessor.register(_processor, _processor, exist_ok=True)


__all__ = ["BudgetGemma3Processor", "BudgetPaliGemmaProcessor", "PixelBudgetMixin", "check_grid"]
