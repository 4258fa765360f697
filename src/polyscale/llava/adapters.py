"""What each kind of LLaVA model wants of its vision tower and its processor: one class for each kind."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    VipLlavaForConditionalGeneration,
    VipLlavaModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..utils.validation import to_pair
from ..utils.vision_configs import base_image_size
from .image_processors import resized, tower_image_processor
from .layout import TokenLayout
from .packed import PackedTowerConfig, inner_config
from .processing import (
    BudgetLlavaNextProcessor,
    BudgetLlavaOnevisionProcessor,
    BudgetLlavaProcessor,
    BudgetVipLlavaProcessor,
)
from .projector import ProjectorInput


def type_of_tower(tower: PreTrainedConfig) -> str:
    """The model type of a tower, as the host sees its config."""
    return inner_config(tower).model_type


class LlavaAdapter:
    """LLaVA: any tower; image by image its own number of tokens, and its own budget in each call.

    Attributes:
        name: of the kind of model.
        model_classes: with and without the head.
        plain_processor_class: for towers without a budget.
        processor_class: for towers of this library.
        num_front_tokens: tokens that the model drops whatever its tower gives.
        reads_layers: whether `vision_feature_layer` of its config says which layers of the tower it reads.
        projector_linear: name of the linear layer of its projector that reads the tower.
        host_knobs: words of `set_token_budget` that are fields of its own config.
    """

    name = "LLaVA"
    model_classes: tuple[type[PreTrainedModel], ...] = (LlavaForConditionalGeneration, LlavaModel)
    plain_processor_class: type[ProcessorMixin] = LlavaProcessor
    processor_class: type[ProcessorMixin] = BudgetLlavaProcessor
    num_front_tokens = 0
    reads_layers = True
    projector_linear: str | None = "linear_1"
    host_knobs: tuple[str, ...] = ()

    def inner(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the tower in it."""
        return model if hasattr(model, "vision_tower") else model.model

    def feature_layer(self, config: PreTrainedConfig) -> int | list[int]:
        """The layer or layers of the tower that a model with this config reads."""
        return config.vision_feature_layer

    def packed_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of the `PackedTowerConfig` of a tower of this library in a model with this config."""
        return {"num_front_tokens": self.num_front_tokens}

    def tower_fields(self, config: PreTrainedConfig, tower: PreTrainedConfig) -> dict[str, Any]:
        """What the model looks for in the config of its tower, and puts there or would not find."""
        return {}

    def with_knobs(self, config: PreTrainedConfig, knobs: Mapping[str, Any]) -> PreTrainedConfig:
        """The config with other values of `host_knobs`.

        Raises:
            ValueError: for a value that is not legal.
        """
        return config

    def projector_input(self, projector: nn.Module) -> ProjectorInput:
        """How the projector reads the tower."""
        linear = getattr(projector, self.projector_linear)
        return ProjectorInput(linear.in_features, linear.weight, self.projector_linear)

    def fit_projector(self, projector: nn.Module, config: PreTrainedConfig) -> None:
        """Makes a projector that stays follow the config of its model, in place."""

    def check_layout(self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout) -> None:
        """Raises ValueError for a tower that a model of this kind, with this config, cannot have."""

    def host_fields(
        self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout, old_size: int
    ) -> dict[str, Any]:
        """Fields of the host's config that follow from its tower.

        Args:
            config: the host's, with its old values.
            tower: the config of the tower, as the host sees it.
            layout: its tokens.
            old_size: side in pixels of the images that the host's tower took so far.
        """
        fields = {"vision_config": tower, "vision_feature_select_strategy": layout.select_strategy}
        if layout.image_seq_length is not None:
            fields["image_seq_length"] = layout.image_seq_length
        return {name: value for name, value in fields.items() if hasattr(config, name)}

    def make_processor(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        layout: TokenLayout,
        image_processor: BaseImageProcessor,
    ) -> ProcessorMixin:
        """A processor like `processor` that counts the tokens of the tower in `config`.

        Args:
            processor: the old one.
            config: the host's, with its new values.
            layout: the tokens of its tower.
            image_processor: of the tower.
        """
        tower = config.vision_config
        settings = {"image_processor": image_processor, **self._settings(processor, config, layout)}
        if not isinstance(tower, PackedTowerConfig):
            return self.plain_processor_class(**settings)
        return self.processor_class(**settings, tower_config=tower.vision_config.to_dict())

    def image_processor(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        layout: TokenLayout,
        given: BaseImageProcessor | None,
        fit: str | None,
    ) -> BaseImageProcessor:
        """The image processor for another tower: see `tower_image_processor`."""
        tower = inner_config(config.vision_config)
        return tower_image_processor(tower, layout, processor.image_processor, given, fit)

    def resized_image_processor(
        self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout
    ) -> BaseImageProcessor:
        """The image processor for the same tower at another budget."""
        fields = inner_config(config.vision_config).image_processor_fields()
        return resized(processor.image_processor, layout.image_size, **fields)

    def _settings(self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout) -> dict[str, Any]:
        shared = {name: getattr(processor, name) for name in ("tokenizer", "chat_template", "image_token")}
        return {**shared, **layout.processor_settings}


class VipLlavaAdapter(LlavaAdapter):
    """VipLLaVA: a fixed number of tokens; it always drops the first."""

    name = "VipLLaVA"
    model_classes = (VipLlavaForConditionalGeneration, VipLlavaModel)
    processor_class = BudgetVipLlavaProcessor
    num_front_tokens = 1

    def check_layout(self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout) -> None:
        prefix = tower.num_front_tokens if isinstance(tower, PackedTowerConfig) else layout.num_prefix_tokens
        if layout.num_tokens is None or prefix != 1:
            raise ValueError(
                f"`tower` of type {type_of_tower(tower)!r} cannot be in a VipLLaVA model: it passes nothing but the "
                "images to its tower and drops the first token, so that it needs the same number of tokens for every "
                f"image and one prefix token; got {layout.num_tokens} tokens and {prefix} prefix tokens. A "
                "LlavaForConditionalGeneration takes it."
            )


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT: a square grid of tokens for each of the tiles that it cuts an image into."""

    name = "LLaVA-NeXT"
    model_classes = (LlavaNextForConditionalGeneration, LlavaNextModel)
    plain_processor_class = LlavaNextProcessor
    processor_class = BudgetLlavaNextProcessor

    def check_layout(self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout) -> None:
        size, patch = getattr(tower, "image_size", None), getattr(tower, "patch_size", None)
        side = size // patch if isinstance(size, int) and isinstance(patch, int) else None
        if layout.grid is None or layout.grid != (side, side) or layout.num_prefix_tokens > 1:
            raise ValueError(
                f"`tower` of type {type_of_tower(tower)!r} cannot be in a {self.name} model: that needs a "
                "square grid of tokens for square images, and at most one prefix token; got "
                f"{layout.num_tokens} tokens, the grid {layout.grid}, `image_size` {size!r} and "
                f"{layout.num_prefix_tokens} prefix tokens. A LlavaForConditionalGeneration takes it."
            )

    def host_fields(
        self, config: PreTrainedConfig, tower: PreTrainedConfig, layout: TokenLayout, old_size: int
    ) -> dict[str, Any]:
        fields = super().host_fields(config, tower, layout, old_size)
        new_size = layout.image_size[0]
        return fields | {"image_grid_pinpoints": scaled_pinpoints(config.image_grid_pinpoints, old_size, new_size)}

    def image_processor(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        layout: TokenLayout,
        given: BaseImageProcessor | None,
        fit: str | None,
    ) -> BaseImageProcessor:
        """The host's own image processor, or `given`, which cuts tiles of the tower's size."""
        if fit is not None:
            raise ValueError(f"`fit` must be None for a {self.name} model, which cuts images into tiles; got {fit!r}.")
        own = given or processor.image_processor
        return self._with_tile_size(own, layout.image_size, config.image_grid_pinpoints)

    def resized_image_processor(
        self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout
    ) -> BaseImageProcessor:
        return self._with_tile_size(processor.image_processor, layout.image_size, config.image_grid_pinpoints)

    def _with_tile_size(
        self, image_processor: BaseImageProcessor, size: tuple[int, int], pinpoints: Sequence
    ) -> BaseImageProcessor:
        tiles = resized(image_processor, size, image_grid_pinpoints=pinpoints)
        tiles.size = type(tiles.size)(shortest_edge=size[0])
        return tiles


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """LLaVA-OneVision: as LLaVA-NeXT, and the frames of videos."""

    name = "LLaVA-OneVision"
    model_classes = (LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel)
    plain_processor_class = LlavaOnevisionProcessor
    processor_class = BudgetLlavaOnevisionProcessor

    def _with_tile_size(
        self, image_processor: BaseImageProcessor, size: tuple[int, int], pinpoints: Sequence
    ) -> BaseImageProcessor:
        return resized(image_processor, size, image_grid_pinpoints=pinpoints)

    def _settings(self, processor: ProcessorMixin, config: PreTrainedConfig, layout: TokenLayout) -> dict[str, Any]:
        names = ("tokenizer", "chat_template", "image_token", "video_token", "vision_aspect_ratio")
        video_processor = processor.video_processor
        return {
            **{name: getattr(processor, name) for name in names},
            "video_processor": None if video_processor is None else resized(video_processor, layout.image_size),
            # with CLS, where there is one: its processor takes that off again for "default"
            "num_image_tokens": layout.num_tokens + layout.num_prefix_tokens,
            "vision_feature_select_strategy": layout.select_strategy,
        }


def scaled_pinpoints(pinpoints: Sequence, old: int, new: int) -> list[list[int]]:
    """The image sizes that LLaVA-NeXT may cut into tiles, for tiles of another size."""
    return [[height // old * new, width // old * new] for height, width in pinpoints]


def tile_side(config: PreTrainedConfig) -> int:
    """Side in pixels of the images that a tower with this config takes."""
    size = base_image_size(config)
    return 1 if size is None else to_pair(size, "image_size")[0]


__all__ = [
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaOnevisionAdapter",
    "VipLlavaAdapter",
    "scaled_pinpoints",
    "tile_side",
    "type_of_tower",
]
