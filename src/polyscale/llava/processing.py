"""Processors of LLaVA models with a tower of this library: they count its tokens, at the budget of each call."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from ..layers.token_budget import TokenBudgetMixin
from ..utils.processors import options_for_size, output_size
from ..utils.validation import closest_name, shown, to_pair
from .packed import budget_row, read_budget_row


class BudgetWordsMixin:
    """Knows the budget words of the tower, and refuses words that neither the tower nor transformers knows.

    Goes in front of a processor of transformers. `tower_config` is a dict: the config of the tower, as it is saved.
    """

    @property
    def budget_config(self) -> TokenBudgetMixin:
        """The config of the tower."""
        settings = self.tower_config
        return CONFIG_MAPPING[settings["model_type"]].from_dict(settings)

    def _split_words(self, words: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Budget words, and the others.

        Raises:
            ValueError: for an unknown word.
        """
        config = self.budget_config
        budget = {name: value for name, value in words.items() if name in config.changeable_fields}
        others = {name: value for name, value in words.items() if name not in budget}
        known = self._words_of_transformers()
        for name in others:
            if name in known:
                continue
            if name in config.fixed_fields:
                raise ValueError(
                    f"`{name}` is no budget of a tower of type {config.model_type!r}: {config.fixed_fields[name]}."
                )
            nearest = closest_name(name, [*config.changeable_fields, *known])
            hint = "" if nearest is None else f" Did you mean `{nearest}`?"
            raise ValueError(
                f"`{name}` is no argument of this processor.{hint} Budgets of its tower: "
                f"{', '.join(config.changeable_fields) or 'none'}."
            )
        return budget, others

    def _config_at(self, words: Mapping[str, Any]) -> TokenBudgetMixin:
        """The config of the tower at the budget that these words ask for; none of them leave it as it is."""
        config = self.budget_config
        return config.with_budget(**words).hosted()[0] if words else config

    def _words_of_transformers(self) -> set[str]:
        """Every keyword argument that a processor of transformers, its tokenizer or its image processor takes."""
        kinds = self.valid_processor_kwargs.__annotations__
        words = {*kinds, "audio", "common_kwargs", "return_metadata", "tokenizer_init_kwargs", "videos"}
        parts = [
            *kinds.values(),
            *(getattr(getattr(self, name), "valid_kwargs", None) for name in self.get_attributes()),
        ]
        for part in parts:
            words |= set(getattr(part, "__annotations__", {}))
        return words


class CallBudgetMixin(BudgetWordsMixin):
    """A processor that takes a token budget in each call. A class says in `_carry` how it gets to the tower, and in
    `batch_limit` what the budgets of calls must have in common whose images are run together, if anything.
    """

    batch_limit: str | None = None
    _call_budget: tuple[dict[str, Any], Sequence[Mapping[str, Any]] | None] = ({}, None)

    def _for_one_call(
        self, words: Mapping[str, Any], image_budgets: Sequence[Mapping[str, Any]] | None
    ) -> tuple["CallBudgetMixin", dict[str, Any]]:
        """A processor that knows the budget of a call, and the other words of the call.

        Raises:
            ValueError: for an unknown word, or `image_budgets` that are no list of dicts.
        """
        budget, others = self._split_words(words)
        is_list = isinstance(image_budgets, list | tuple)
        if image_budgets is not None and not (is_list and all(isinstance(own, Mapping) for own in image_budgets)):
            raise ValueError(
                "`image_budgets` must be a list with one dict of budget words for each image ({} for none), got "
                f"{shown(image_budgets)}."
            )
        one_call = copy.copy(self)
        one_call._call_budget = (budget, image_budgets)
        return one_call, others

    def _budgets(self, count: int) -> list[TokenBudgetMixin]:
        """The config of the tower at the budget of each image of this call."""
        shared, for_each = self._call_budget
        if for_each is not None and len(for_each) != count:
            raise ValueError(
                f"`image_budgets` must hold one dict of budget words for each of {count} images, got {len(for_each)}."
            )
        known: dict[str, TokenBudgetMixin] = {}
        configs = []
        for own in for_each or [{}] * count:
            named, others = self._split_words(own)
            if others:
                raise ValueError(
                    f"`image_budgets` holds `{next(iter(others))}`, which is no budget: give it to the call. Budgets "
                    f"of the tower: {', '.join(self.budget_config.changeable_fields) or 'none'}."
                )
            words = {**shared, **named}
            key = repr(sorted(words.items()))
            if key not in known:
                known[key] = self._config_at(words)
            configs.append(known[key])
        return configs

    def _image_options(self, config: TokenBudgetMixin) -> dict[str, Any]:
        """Arguments of the image processor for a budget, where it is not the one that the processor was made for."""
        options = {
            name: value
            for name, value in config.image_processor_fields().items()
            if value != getattr(self.image_processor, name, None)
        }
        size = to_pair(config.image_size, "image_size")
        if size != to_pair(self.budget_config.image_size, "image_size") and output_size(self.image_processor):
            options |= options_for_size(self.image_processor, size)
        return options

    def _process_images(self, images, **kwargs):
        configs = self._budgets(len(make_flat_list_of_images(self.image_processor.fetch_images(images))))
        if not configs:
            raise ValueError("`images` holds no image: leave it out where no text has one.")
        options = [self._image_options(config) for config in configs]
        if any(other != options[0] for other in options):
            sizes = [to_pair(config.image_size, "image_size") for config in configs]
            raise ValueError(
                "The budgets of one batch need images of one size, and of as many tiles; these need (height, width) "
                f"{sizes}: give such images to calls of their own."
            )
        processed = self.image_processor(images, **{**options[0], **kwargs})
        replacements = self._carry(processed, configs)
        return type(processed)(dict(processed), tensor_type=kwargs.get("return_tensors")), replacements

    def _carry(self, processed: BatchFeature, configs: Sequence[TokenBudgetMixin]) -> list[str]:
        """Puts the budget of each image into what the image processor made.

        Args:
            processed: changed in place.
            configs: of the tower at the budget of each image; images of one budget share it.

        Returns:
            The placeholder text of each image.
        """
        raise NotImplementedError

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs
    ) -> MultiModalData:
        """Tokens of images of (height, width) pixels: exact where all images cost the same, else the most that any
        image can cost. A server that plans its memory with it never has too little.
        """
        if image_sizes is None:
            return MultiModalData()
        most, count = self._config_at(self._split_words(kwargs)[0]).max_num_tokens_for(), len(image_sizes)
        return MultiModalData(num_image_tokens=[most] * count, num_image_patches=[1] * count)


def count_by_budget(
    processed: Mapping[str, Any], configs: Sequence[TokenBudgetMixin]
) -> list[tuple[int, tuple[int, ...]]]:
    """The number of tokens and the budget code of each image that an image processor made.

    Args:
        processed: `pixel_values`, and `image_sizes` where the tower needs them.
        configs: of the tower at the budget of each image.
    """
    pixel_values, sizes = processed["pixel_values"], processed.get("image_sizes")
    counted: list = [None] * len(configs)
    for config in {id(config): config for config in configs}.values():
        places = [place for place, other in enumerate(configs) if other is config]
        own_sizes = None if sizes is None else [sizes[place] for place in places]
        own = config.count_images([torch.as_tensor(pixel_values[place]) for place in places], own_sizes)
        for place, budget in zip(places, own, strict=True):
            counted[place] = budget
    return counted


class FixedBudgetMixin(BudgetWordsMixin):
    """A processor whose host reads the grid of tokens from its config, so that a call cannot change it."""

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Arguments: those of the processor of transformers.

        Raises:
            ValueError: for a budget, or an unknown word.
        """
        self._refuse_budgets(kwargs)
        return super().__call__(images, text, videos, audio, **kwargs)

    def _refuse_budgets(self, words: Mapping[str, Any]) -> None:
        budget, _ = self._split_words(words)
        if budget:
            name = next(iter(budget))
            raise ValueError(
                f"`{name}` cannot be given to a call of this processor: {self.why_fixed}. Use "
                f"`polyscale.set_token_budget(model, processor, {name}=...)`, which changes both sides."
            )

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        self._refuse_budgets(kwargs)
        return super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)


class PatchSizeProcessorMixin:
    """The constructor of the processors that count the tokens of an image by a patch size."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy="full",
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        tower_config: dict | None = None,
        **kwargs,
    ):
        self.tower_config = tower_config
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )


class BudgetLlavaProcessor(CallBudgetMixin, PatchSizeProcessorMixin, LlavaProcessor):
    """A `LlavaProcessor` that takes a token budget in each call; the tower follows by way of `image_sizes`.

    Args:
        image_processor: the tower's.
        tokenizer: the model's.
        patch_size (`int`, *optional*): pixels per token at the tower's own budget.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`): as in the model's config.
        chat_template (`str`, *optional*): the model's.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder of a token.
        num_additional_image_tokens (`int`, *optional*, defaults to 0): as in `LlavaProcessor`.
        tower_config (`dict`, *optional*): the config of the tower.

    Example:

    ```python
    >>> inputs = processor(images=photograph, text=prompt, num_tokens=100, return_tensors="pt")
    >>> inputs = processor(images=[a, b], text=prompts, image_budgets=[{"num_tokens": 100}, {"num_tokens": 36}])
    ```
    """

    def __call__(self, images=None, text=None, videos=None, audio=None, *, image_budgets=None, **kwargs):
        """
        Args:
            images, text, videos, audio, kwargs: as in `LlavaProcessor`, and the budget words of the tower
                (`num_tokens`, `patch_size`, `num_tiles`, ...) for all images.
            image_budgets (`list[dict]`, *optional*): one dict of budget words for each image, over those for all.

        Returns:
            `BatchFeature`: as in `LlavaProcessor`, and `image_sizes` (images, numbers): tokens and budget of each
                image, which the model takes as it takes `pixel_values`.

        Raises:
            ValueError: for an unknown word, an illegal budget, or images that would have different sizes.
        """
        one_call, others = self._for_one_call(kwargs, image_budgets)
        return super(BudgetLlavaProcessor, one_call).__call__(images, text, videos, audio, **others)

    def _carry(self, processed: BatchFeature, configs: Sequence[TokenBudgetMixin]) -> list[str]:
        counted = count_by_budget(processed, configs)
        processed["image_sizes"] = [budget_row(*budget) for budget in counted]
        return [self.image_token * count for count, _ in counted]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        row = [int(number) for number in image_inputs["image_sizes"][image_idx]]
        return self.image_token * read_budget_row(row)[0]


class BudgetVipLlavaProcessor(FixedBudgetMixin, PatchSizeProcessorMixin, LlavaProcessor):
    """The processor of a VipLLaVA model with a tower of this library. Arguments: `BudgetLlavaProcessor`."""

    why_fixed = "a VipLLaVA model passes nothing but the images to its tower"


class BudgetLlavaNextProcessor(FixedBudgetMixin, PatchSizeProcessorMixin, LlavaNextProcessor):
    """The processor of a LLaVA-NeXT model with a tower of this library. Arguments: `BudgetLlavaProcessor`."""

    why_fixed = (
        "a LLaVA-NeXT model keeps `image_sizes` for the sizes of whole images, and takes the grid of its tokens from "
        "its config"
    )


class BudgetLlavaOnevisionProcessor(FixedBudgetMixin, LlavaOnevisionProcessor):
    """The processor of a LLaVA-OneVision model with a tower of this library.

    Args:
        num_image_tokens (`int`, *optional*): tokens of one tile.
        tower_config (`dict`, *optional*): the config of the tower.
        The others: those of `LlavaOnevisionProcessor`.
    """

    why_fixed = (
        "a LLaVA-OneVision model keeps `image_sizes` for the sizes of whole images, and takes the grid of its tokens "
        "from its config"
    )

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        tower_config: dict | None = None,
        **kwargs,
    ):
        self.tower_config = tower_config
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )


def is_budget_processor(processor: ProcessorMixin) -> bool:
    """Whether a processor knows the budgets of a tower of this library."""
    return isinstance(processor, BudgetWordsMixin)


for _processor in (
    BudgetLlavaProcessor,
    BudgetLlavaNextProcessor,
    BudgetLlavaOnevisionProcessor,
    BudgetVipLlavaProcessor,
):
    # A saved processor is found by its name: the key is never looked up.
    AutoProcessor.register(_processor, _processor, exist_ok=True)


__all__ = [
    "BudgetLlavaNextProcessor",
    "BudgetLlavaOnevisionProcessor",
    "BudgetLlavaProcessor",
    "BudgetVipLlavaProcessor",
    "CallBudgetMixin",
    "count_by_budget",
    "is_budget_processor",
]
