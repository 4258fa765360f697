"""What PaliGemma and Gemma 3 want of their vision tower and their processor."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    Gemma3Processor,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PaliGemmaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

from .adapters import LlavaAdapter, type_of_tower
from .image_processors import own_normalization, resized
from .layout import TokenLayout
from .packed import PackedTowerConfig, inner_config
from .processing_gemma import BudgetGemma3Processor, BudgetPaliGemmaProcessor, check_grid
from .projector import ProjectorInput


def _is_square(tower: PreTrainedConfig) -> bool:
    """Whether the config of a tower gives its sizes as these hosts read them: numbers."""
    return all(isinstance(getattr(tower, name, None), int) for name in ("image_size", "patch_size"))


class GemmaAdapter(LlavaAdapter):
    """What both have in common: they read the last layer and pass nothing but the images to their tower."""

    reads_layers = False

    def feature_layer(self, config: PreTrainedConfig) -> int:
        return -1

    def packed_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"budget_in_pixels": True}

    def _settings(self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout) -> dict[str, Any]:
        return {"tokenizer": processor.tokenizer, "chat_template": processor.chat_template}


class PaliGemmaAdapter(GemmaAdapter):
    """PaliGemma: one tensor with the tokens that leave the last layer, as many for every image."""

    name = "PaliGemma"
    model_classes = (PaliGemmaForConditionalGeneration, PaliGemmaModel)
    plain_processor_class = PaliGemmaProcessor
    processor_class = BudgetPaliGemmaProcessor
    projector_linear = "linear"

    def tower_fields(self, config: PreTrainedConfig, tower: PreTrainedConfig) -> dict[str, Any]:
        return {"projection_dim": config.projection_dim}

    def check_layout(self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout) -> None:
        height, width = layout.image_size
        if layout.num_tokens is None or not _is_square(tower):
            raise ValueError(
                f"`tower` of type {type_of_tower(tower)!r} cannot be in a PaliGemma model: it takes one tensor of "
                "tokens, so that it needs the same number of tokens for every image, and square images; got "
                f"{layout.num_tokens} tokens and images of {height} x {width} pixels. A LlavaForConditionalGeneration "
                "takes it."
            )

    def make_processor(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        layout: TokenLayout,
        image_processor: BaseImageProcessor,
    ) -> ProcessorMixin:
        # PaliGemma reads every token that its tower gives, and its processor has the count from the image processor.
        image_processor.image_seq_length = layout.num_tokens + layout.num_prefix_tokens
        return super().make_processor(processor, config, layout, image_processor)


class Gemma3Adapter(GemmaAdapter):
    """Gemma 3: a grid of tokens, averaged to the square of `mm_tokens_per_image` tokens.

    A tower of this library averages its tokens itself, whatever grid a budget gives, and the projector finds nothing
    left to average.
    """

    name = "Gemma 3"
    model_classes = (Gemma3ForConditionalGeneration, Gemma3Model)
    plain_processor_class = Gemma3Processor
    processor_class = BudgetGemma3Processor
    host_knobs = ("mm_tokens_per_image",)

    def packed_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {**super().packed_fields(config), "pooled_side": math.isqrt(config.mm_tokens_per_image)}

    def tower_fields(self, config: PreTrainedConfig, tower: PreTrainedConfig) -> dict[str, Any]:
        if hasattr(tower, "layer_norm_eps"):
            return {}
        return {"layer_norm_eps": getattr(config.vision_config, "layer_norm_eps", 1e-6)}

    def with_knobs(self, config: PreTrainedConfig, knobs: Mapping[str, Any]) -> PreTrainedConfig:
        changed = copy.deepcopy(config)
        for count in knobs.values():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1 or math.isqrt(count) ** 2 != count:
                raise ValueError(f"`mm_tokens_per_image` must be a square number such as 64 or 256, got {count!r}.")
            changed.mm_tokens_per_image = count
        return changed

    def host_fields(
        self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout, old_size: int
    ) -> dict[str, Any]:
        fields = super().host_fields(config, tower, layout, old_size)
        return fields | {"mm_tokens_per_image": config.mm_tokens_per_image}

    def check_layout(self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout) -> None:
        height, width = layout.image_size
        if layout.grid is None or layout.num_prefix_tokens or not _is_square(tower):
            raise ValueError(
                f"`tower` of type {type_of_tower(tower)!r} cannot be in a Gemma 3 model: it averages neighbouring "
                "tokens, so that it needs a grid of tokens, square images and no prefix token; got "
                f"{layout.num_tokens} tokens, the grid {layout.grid}, images of {height} x {width} pixels and "
                f"{layout.num_prefix_tokens} prefix tokens. A LlavaForConditionalGeneration takes it."
            )
        side = math.isqrt(config.mm_tokens_per_image)
        check_grid(layout.grid, config.mm_tokens_per_image)
        if isinstance(tower, PackedTowerConfig):
            if height // (height // side) != side:
                raise ValueError(
                    f"`mm_tokens_per_image={side**2}` is no grid of equal patches of images of {height} x {width} "
                    "pixels: a Gemma 3 model cannot find it again. Give a smaller one."
                )
            return
        rows, columns = layout.grid
        if rows != columns or rows % side:
            possible = [count**2 for count in range(1, rows + 1) if rows % count == 0]
            raise ValueError(
                f"`tower` of type {type_of_tower(tower)!r} gives a grid of {rows} x {columns} tokens, which a Gemma 3 "
                f"model cannot average to {side} x {side}: it needs a square grid of a multiple of {side}. With this "
                f"tower `mm_tokens_per_image` can be one of {possible}; a tower of this library can have any grid of "
                f"at least {side} x {side} tokens."
            )

    def image_processor(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        layout: TokenLayout,
        given: BaseImageProcessor | None,
        fit: str | None,
    ) -> BaseImageProcessor:
        """The host's own image processor, which can cut crops, or `given`; with mean and deviation of the tower."""
        if fit is not None:
            raise ValueError(f"`fit` must be None for a {self.name} model, which squashes its images; got {fit!r}.")
        own = given or processor.image_processor
        if not isinstance(own, type(processor.image_processor)):
            raise ValueError(
                f"`image_processor` must be a {type(processor.image_processor).__name__} for a {self.name} model, "
                f"which can cut crops out of images; got {type(own).__name__}."
            )
        normalization = {} if given is not None else own_normalization(inner_config(config.vision_config))
        return resized(own, layout.image_size, **normalization)

    def _settings(self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout) -> dict[str, Any]:
        return {**super()._settings(processor, config, layout), "image_seq_length": config.mm_tokens_per_image}

    def projector_input(self, projector: nn.Module) -> ProjectorInput:
        weight = projector.mm_input_projection_weight
        return ProjectorInput(weight.shape[0], weight, None)

    def fit_projector(self, projector: nn.Module, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            fresh = type(projector)(config)
        for name in ("patches_per_image", "tokens_per_side", "kernel_size", "avg_pool"):
            setattr(projector, name, getattr(fresh, name))
        projector.mm_soft_emb_norm.eps = fresh.mm_soft_emb_norm.eps


__all__ = ["Gemma3Adapter", "PaliGemmaAdapter"]
