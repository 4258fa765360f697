"""VILA (arXiv 2312.07533) and NVILA (arXiv 2412.04468): a vision tower that brings neighbouring tokens together.

Faithful to NVlabs/VILA, `MultimodalProjector`. What stands there in front of the last two linear layers is part of the
tower here, so that the projector of a LLaVA model holds those two.
"""

import copy
from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ..layers.pooled_only import layers_wanted
from ..layers.token_budget import TokenBudgetMixin
from ..layers.wrapping import OuterModelMixin
from ..models.s2_vision.projector_s2_vision import space_to_depth
from ..utils.transformers_internals import sub_config
from ..utils.vision_configs import base_feature_grid, base_image_size, base_num_prefix_tokens, base_width


def _shrunk(grid: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-grid[0] // factor), -(-grid[1] // factor)


@strict
class DownsampledTowerConfig(TokenBudgetMixin, PreTrainedConfig):
    """Configuration of `DownsampledTower`. Its budgets are those of the tower inside.

    Args:
        vision_config (`PreTrainedConfig` or `dict`): of the tower inside: a vision model with a grid of tokens.
        vision_feature_layer (`int`, *optional*, defaults to -2): which of its hidden states is read.
        downsample (`int`, *optional*, defaults to 2): how many tokens become one, on each side of the grid.
        token_order (`str`, *optional*, defaults to `"rows"`): of the tokens that come out: row by row, or "columns".
        stage_widths (`list[int]`, *optional*): widths of linear layers, each with a GELU and a LayerNorm after it,
            that follow the first LayerNorm.
        num_dropped_tokens (`int`, *optional*): tokens in front of those of the tower inside, without a place in the
            image (CLS, registers), which are dropped; known for the usual models.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new linear layers' weights.

    Raises:
        ValueError: for a tower whose tokens are no grid.
    """

    model_type = "polyscale_downsampled_tower"
    # Has to name a model that is there wherever this class is: it may travel without the families.
    sub_configs_defaults = {"vision_config": sub_config("clip_vision_model")}

    vision_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    downsample: int = 2
    token_order: Literal["rows", "columns"] = "rows"
    stage_widths: list[int] | tuple[int, ...] = ()
    num_dropped_tokens: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        is_given = self.vision_config is not None  # transformers makes a default config to compare with
        super().__post_init__(**kwargs)
        if not is_given:
            return
        if self.num_dropped_tokens is None:
            self.num_dropped_tokens = base_num_prefix_tokens(self.vision_config)
        if self.downsample < 1:
            raise ValueError(f"`downsample` must be at least 1, got {self.downsample}.")
        layer, count = self.vision_feature_layer, self.vision_config.num_hidden_layers + 1
        is_there = -count <= layer < count if self._budgets is None else self._budgets.gives_tokens_at(layer)
        if not is_there:
            raise ValueError(
                f"`vision_feature_layer` {layer} does not exist in the model inside, which has {count - 1} layers, or "
                "has another width than its last layer."
            )
        if not self.tokens_vary and self._inner_grid() is None:
            raise ValueError(
                f"`vision_config` of type {self.vision_config.model_type!r} gives tokens that are no grid, which "
                "cannot be brought together."
            )
        if self.tokens_vary and getattr(self.vision_config, "features_per_tile", None) is None:
            raise ValueError(
                f"`vision_config` of type {self.vision_config.model_type!r} gives every image its own number of "
                "tokens, and they are no grid of tiles."
            )
        if self.tokens_vary and self.token_order != "rows":
            raise ValueError("`token_order` must be 'rows' for a tower that cuts every image into tiles of its own.")

    @property
    def _budgets(self) -> TokenBudgetMixin | None:
        """The config inside, if it has budgets."""
        return self.vision_config if isinstance(self.vision_config, TokenBudgetMixin) else None

    def __getattr__(self, name: str) -> Any:
        """Budget fields of the tower inside."""
        inner = self.__dict__.get("vision_config")
        if isinstance(inner, TokenBudgetMixin) and name in inner.changeable_fields:
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _inside(self, name: str, otherwise: Any) -> Any:
        return otherwise if self._budgets is None else getattr(self._budgets, name)

    @property
    def budget_argument(self) -> str | None:
        return self._inside("budget_argument", None)

    @property
    def changeable_fields(self) -> tuple[str, ...]:
        return self._inside("changeable_fields", ())

    @property
    def fixed_fields(self) -> dict[str, str]:
        return self._inside("fixed_fields", {})

    @property
    def tokens_vary(self) -> bool:
        return self._inside("tokens_vary", False)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """(height, width) in pixels, or int."""
        return self.vision_config.image_size

    @property
    def num_channels(self) -> int:
        return getattr(self.vision_config, "num_channels", 3)

    @property
    def num_hidden_layers(self) -> int:
        return self.vision_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int | None:
        return getattr(self.vision_config, "num_attention_heads", None)

    @property
    def num_prefix_tokens(self) -> int:
        """None: those of the tower inside are dropped."""
        return 0

    @property
    def widths(self) -> list[int]:
        """Of the tokens brought together, and after each stage."""
        return [self.downsample**2 * base_width(self.vision_config), *self.stage_widths]

    @property
    def hidden_size(self) -> int:
        return self.widths[-1]

    def gives_tokens_at(self, layer: int) -> bool:
        """Only the last: what is read inside is `vision_feature_layer`."""
        return layer == -1

    def _inner_grid(self, image_size: int | Sequence[int] | None = None, **budget) -> tuple[int, int] | None:
        """(rows, columns) of the tokens of the tower inside."""
        if self._budgets is not None:
            return self._budgets.token_grid_for(image_size, **budget)
        size = base_image_size(self.vision_config) if image_size is None else image_size
        size = (size, size) if isinstance(size, int) else size
        return None if size is None else base_feature_grid(self.vision_config, tuple(size))

    def inner_grid(self, image_size: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, columns) of the tokens of the tower inside, in a call with the keyword arguments `options`."""
        known = () if self._budgets is None else signature(self._budgets.token_grid_for).parameters
        return self._inner_grid(image_size, **{name: options[name] for name in known if name in options})

    def token_grid_for(self, image_size: int | Sequence[int] | None = None, **budget) -> tuple[int, int] | None:
        """(rows, columns) of the tokens. With tokens that vary, every tile is brought together by itself."""
        grid = self._inner_grid(image_size, **budget)
        if grid is None or not self.tokens_vary:
            return None if grid is None else _shrunk(grid, self.downsample)
        per_tile = self.vision_config.features_per_tile
        rows, columns = _shrunk(per_tile, self.downsample)
        return grid[0] // per_tile[0] * rows, grid[1] // per_tile[1] * columns

    def _count(self, inner_tokens: int) -> int:
        """Tokens of an image of which the tower inside gives so many, in whole tiles."""
        per_tile = self.vision_config.features_per_tile
        rows, columns = _shrunk(per_tile, self.downsample)
        return inner_tokens // (per_tile[0] * per_tile[1]) * rows * columns

    def max_num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int:
        if not self.tokens_vary:
            return self.num_tokens_for(image_size, **budget)
        return self._count(self._budgets.max_num_tokens_for(image_size, **budget))

    def with_budget(self, **changes) -> "DownsampledTowerConfig":
        if self._budgets is None:
            raise ValueError(f"A tower of type {self.vision_config.model_type!r} has no token budget.")
        changed = copy.deepcopy(self)
        changed.vision_config = self._budgets.with_budget(**changes)
        return changed

    def hosted(self) -> tuple["DownsampledTowerConfig", list[str]]:
        hosted, notes = copy.deepcopy(self), []
        if self._budgets is not None:
            hosted.vision_config, notes = self._budgets.hosted()
        return hosted, notes

    def image_processor_fields(self) -> dict[str, Any]:
        return {} if self._budgets is None else self._budgets.image_processor_fields()

    def default_budgets(self) -> list:
        return [None] if self._budgets is None else self._budgets.default_budgets()

    def budget_code(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        return () if self._budgets is None else self._budgets.budget_code(image_size)

    def budget_from_code(self, code: Sequence[int], num_tokens: int) -> dict[str, Any]:
        return {} if self._budgets is None else self._budgets.budget_from_code(code, num_tokens)

    def count_images(
        self, pixel_values: Sequence[torch.Tensor], image_sizes: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, tuple[int, ...]]]:
        if not self.tokens_vary:
            return super().count_images(pixel_values, image_sizes)
        counted = self._budgets.count_images(pixel_values, image_sizes)
        return [(self._count(count), code) for count, code in counted]

    def budget_calls(
        self, codes: Sequence[tuple[int, ...]], counts: Sequence[int]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """One forward for each budget, whose images have one grid; with tokens that vary, as the tower inside."""
        return self._budgets.budget_calls(codes, counts) if self.tokens_vary else super().budget_calls(codes, counts)


class DownsampledTower(OuterModelMixin, PreTrainedModel):
    """The tokens of a vision tower, brought together and normalised: (batch, tokens, downsample ** 2 * width)."""

    config: DownsampledTowerConfig
    base_model_prefix = "downsampled_tower"

    def __init__(self, config: DownsampledTowerConfig):
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config)
        widths = config.widths
        self.norms = nn.ModuleList([nn.LayerNorm(width) for width in widths])
        self.linears = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(widths)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor`): what the tower inside takes.
            output_hidden_states (`bool` or `int` or `list[int]`, *optional*): whether `hidden_states` is wanted. It
                holds the last one alone.
            kwargs: passed to the tower inside, budgets among them.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch, tokens, hidden), zeros after an image that has
                fewer tokens than others; `pooler_output` is the mean over the tokens of an image.
        """
        layer = self.config.vision_feature_layer
        outputs = self.tower(pixel_values, output_hidden_states=[layer], return_dict=True, **kwargs)
        tokens = outputs.hidden_states[layer][:, self.config.num_dropped_tokens :]
        if self.config.tokens_vary:
            images = [
                self._project(self._tile_by_tile(image, blocks))
                for image, blocks in zip(tokens, outputs["block_sizes"].tolist(), strict=True)
            ]
            features = nn.utils.rnn.pad_sequence(images, batch_first=True)
            pooled = torch.stack([image.mean(dim=0) for image in images])
        else:
            grid = self.config.inner_grid(tuple(side.__index__() for side in pixel_values.shape[-2:]), kwargs)
            features = self._project(space_to_depth(tokens, grid, self.config.downsample, self.config.token_order))
            pooled = features.mean(dim=1)
        wants_states = layers_wanted(output_hidden_states) not in (None, False)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=pooled,
            hidden_states=(features,) if wants_states else None,
            attentions=outputs.get("attentions"),
        )

    def _tile_by_tile(self, tokens: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        """One image (tokens, width), padded, of (rows, columns) = `blocks` tiles -> (fewer tokens, more channels)"""
        rows, columns = blocks
        per_tile = self.config.vision_config.features_per_tile
        factor = self.config.downsample
        image = tokens[: rows * columns * per_tile[0] * per_tile[1]]
        tiles = image.unflatten(0, (rows, per_tile[0], columns, per_tile[1])).transpose(1, 2)
        tiles = space_to_depth(tiles.flatten(2, 3).flatten(0, 1), per_tile, factor)
        return (
            tiles.unflatten(1, _shrunk(per_tile, factor)).unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 3)
        )

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norms[0](tokens)
        for linear, norm in zip(self.linears, self.norms[1:], strict=True):
            hidden = norm(nn.functional.gelu(linear(hidden)))
        return hidden


AutoConfig.register(DownsampledTowerConfig.model_type, DownsampledTowerConfig, exist_ok=True)
AutoModel.register(DownsampledTowerConfig, DownsampledTower, exist_ok=True)

__all__ = ["DownsampledTower", "DownsampledTowerConfig"]
