"""S2 configuration."""

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ...layers.config_checks import CheckedConfigMixin, checked_config, non_negative, pixel_size, positive
from ...layers.token_merging import check_nothing_merges
from ...utils.transformers_internals import sub_config
from ...utils.validation import MAX_SIDE, to_pair
from ...utils.vision_configs import (
    base_feature_grid,
    base_image_size,
    base_num_layers,
    base_num_prefix_tokens,
    base_output_shape,
    base_pooled_width,
    base_width,
    check_base,
)
from .dynamic_tiling_s2_vision import dynamic_tile_grid
from .tiling_s2_vision import TilePlan, check_num_tiles, check_scale_index, plan_tiles, scale_list
from .token_budget_s2_vision import S2TokenBudgetMixin


@checked_config
class S2VisionConfig(CheckedConfigMixin, S2TokenBudgetMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of S2: a vision model applied at several scales, its features concatenated on channels.

    Exactly one of `scales` and `img_sizes` is given. All sizes are in pixels, (height, width) or an int for both.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): of the model that is wrapped, of any type registered
            with `AutoModel`; CLIP's vision part when `None`.
        scales (`list[float]`, *optional*): the scales, as multiples of the tile's size. Where some are below 1, the
            smallest is the tile: `[0.5, 1]` is `[1, 2]`. They do not depend on the size of an image; an image that is
            not square keeps its aspect ratio, its short side scaled.
        img_sizes (`list`, *optional*): in place of `scales`, the size at each scale; an image of another aspect ratio
            is squashed.
        max_split_size (`int` or `(height, width)`, *optional*): size of the tiles that the model sees; its own
            `image_size` when `None`.
        resize_output_to_idx (`int`, *optional*, defaults to 0): the scale (its place in the list) whose feature grid
            the output has.
        num_prefix_tokens (`int`, *optional*): tokens in front of the model's output without a place in the image (CLS,
            registers); known for the usual models.
        output_shape (`str`, *optional*): `"bnc"` (tokens) or `"bchw"` (maps, from ConvNets); known for the usual
            models.
        uneven (`str`, *optional*, defaults to `"resize"`): how a size that is no multiple of the tile is cut:
            `"resize"` or `"pad"`, as in `multiscale_forward`.
        split_forward (`bool`, *optional*, defaults to `False`): whether tiles go through the model one place at a
            time: the memory of about one scale.
        tiles_per_forward (`int`, *optional*): how many tiles go through the model at a time; all when `None`.
        antialias (`bool`, *optional*): whether images are shrunk to the lower scales with antialias; the published
            code does not, which is what `None` means. `swap_vision_tower` makes `None` True: a LLaVA model is used to
            images shrunk by an image processor, with antialias.
        num_tiles (`int`, *optional*): how many tiles of the scales above the smallest go through the model, those that
            show most detail; all when `None`.
        tile_fill (`str`, *optional*): what stands in for the other tiles: `"coarse"` (the same tile at a cheaper
            budget of the wrapped model), `"first_scale"` (the features of the smallest scale, enlarged) or `"map"`
            (these, through linear maps that `fit_tile_map` fits); `"coarse"` where the wrapped model has a cheaper
            budget, else `"first_scale"`, when `None`.
        tile_map_layers (`list[int]`, *optional*): hidden states that the maps of `"map"` fill beside the output, as
            `fit_tile_map` sets it; `None` where no maps were fitted.
        pooling (`str`, *optional*, defaults to `"pooler"`): what a head reads: `"pooler"` (`pooler_output`) or
            `"mean"` (over the patch tokens).
        dynamic (`bool`, *optional*, defaults to `False`): Dynamic-S2 (NVILA, arXiv 2412.04468): the last scale has as
            many tiles as fit the image's aspect ratio.
        max_tiles (`int`, *optional*, defaults to 12): with `dynamic`, the most tiles in the last scale; the fewest are
            those of the last scale's square.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the classifier's initial
            weights.
        keep_all_tokens (`bool`, *optional*, defaults to `False`): whether a classifier has a wrapped model of this
            library compute every token of its last layer, also those that the classifier does not read.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`): whether a backbone gives maps, not tokens.

    Raises:
        ValueError: for both or neither of `scales` and `img_sizes`, an unknown choice or index, or a model that S2
            cannot wrap.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig
    >>> from polyscale import S2VisionConfig

    >>> config = S2VisionConfig(vision_config=CLIPVisionConfig(image_size=336, patch_size=14), scales=[1, 2, 3])
    >>> config.hidden_size, config.image_size, config.num_tokens
    (2304, 1008, 576)
    ```
    """

    model_type = "s2_vision"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "token_mask",
        "num_tokens",
        "block_sizes",
        "tile_mask",
    ]
    changeable_fields = ("scales", "img_sizes", "max_tiles", "num_tiles")
    fixed_fields = {
        "num_tokens": "its tokens are those of the wrapped model at one scale, whatever the other scales are"
    }
    sub_configs_defaults = {"vision_config": sub_config("clip_vision_model")}

    vision_config: dict | PreTrainedConfig | None = None
    scales: list | tuple | None = None
    img_sizes: list | tuple | None = None
    max_split_size: int | list[int] | tuple[int, int] | None = pixel_size(None)
    resize_output_to_idx: int = 0
    num_prefix_tokens: int | None = non_negative(None)
    output_shape: Literal["bnc", "bchw"] | None = None
    uneven: Literal["resize", "pad"] = "resize"
    split_forward: bool = False
    tiles_per_forward: int | None = positive(None)
    antialias: bool | None = None
    num_tiles: int | None = non_negative(None)
    tile_fill: Literal["coarse", "first_scale", "map"] | None = None
    tile_map_layers: list[int] | None = None
    pooling: Literal["pooler", "mean"] = "pooler"
    dynamic: bool = False
    max_tiles: int = positive(12)
    initializer_range: float | int = non_negative(0.02)
    keep_all_tokens: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        if self.vision_config is None and self.scales is None and self.img_sizes is None:
            self.scales = [1, 2]
        out_indices, out_features = kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        super().__post_init__(**kwargs)
        if isinstance(self.vision_config, S2VisionConfig):
            raise ValueError("`vision_config` is that of an S2 model, which has several scales already.")
        check_nothing_merges(self.vision_config, "a model at several scales")
        check_base(self.vision_config)
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = base_num_prefix_tokens(self.vision_config)
        if self.output_shape is None:
            self.output_shape = base_output_shape(self.vision_config)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(out_indices=out_indices, out_features=out_features)

    def validate_scales(self) -> None:
        """Rules between fields; transformers runs this when a config is made and saved."""
        if self.output_shape == "bchw" and self.num_prefix_tokens:
            raise ValueError(
                f"`num_prefix_tokens` must be 0 with `output_shape='bchw'`, got {self.num_prefix_tokens}."
            )
        plan = self.plan_for(self.tile_size)
        check_scale_index(self.resize_output_to_idx, len(plan.sizes))
        if self.num_tiles is not None:
            check_num_tiles(self.num_tiles, sum(plan.num_tiles(scale) for scale in plan.higher_scales))
        if self.tile_fill == "coarse" and self.coarse_budget({}) is None:
            raise ValueError(
                f"`tile_fill='coarse'` needs a model with a cheaper budget inside, got one of type "
                f"{self.vision_config.model_type!r}: use 'first_scale'."
            )
        layers = self.tile_map_layers or []
        if len(set(layers)) < len(layers) or not all(0 <= layer <= self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`tile_map_layers` must be different layers from 0 to {self.num_hidden_layers}, got {layers}."
            )
        if self.dynamic:
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        multiples = self.scale_multiples
        if self.num_tiles is not None:
            raise ValueError("`num_tiles` needs the same tiles for every image; with `dynamic=True` use `max_tiles`.")
        if self.output_shape == "bchw":
            raise ValueError("`dynamic=True` needs a model with tokens (`output_shape='bnc'`), not a ConvNet.")
        if self.tile_size[0] != self.tile_size[1]:
            raise ValueError(
                f"`dynamic=True` needs square tiles, got {self.tile_size}: give `max_split_size` as an int."
            )
        if any(multiple < 1 or multiple != int(multiple) for multiple in multiples) or multiples != sorted(multiples):
            raise ValueError(
                "`dynamic=True` needs scales that are whole multiples of the tile, in rising order, got "
                f"{multiples} tiles."
            )
        if self.max_tiles < multiples[-1] ** 2:
            raise ValueError(
                f"`max_tiles` must be at least {int(multiples[-1]) ** 2}, the tiles of the last scale's "
                f"square, got {self.max_tiles}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but class names are stored once: the wrapped model has no classifier to need them."""
        fields = super().to_dict()
        inner = fields["vision_config"]
        if inner.get("id2label") == fields.get("id2label"):
            fields["vision_config"] = {name: inner[name] for name in inner if name not in ("id2label", "label2id")}
        return fields

    @property
    def num_scales(self) -> int:
        return len(self.scales if self.scales is not None else self.img_sizes)

    @property
    def hidden_size(self) -> int:
        """Channels of the output: those of the wrapped model, once per scale."""
        return self.num_scales * base_width(self.vision_config)

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`."""
        return self.num_scales * base_pooled_width(self.vision_config)

    @property
    def num_hidden_layers(self) -> int:
        return base_num_layers(self.vision_config)

    @property
    def num_attention_heads(self) -> int | None:
        return getattr(self.vision_config, "num_attention_heads", None)

    @property
    def num_channels(self) -> int:
        return getattr(self.vision_config, "num_channels", 3)

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of the tiles that the wrapped model sees."""
        if self.max_split_size is not None:
            return to_pair(self.max_split_size, "max_split_size")
        size = base_image_size(self.vision_config)
        if size is None:
            raise ValueError(
                f"`vision_config` of type {self.vision_config.model_type!r} has no `image_size`: give "
                "`max_split_size`, the size of the tiles."
            )
        return size

    @property
    def scale_multiples(self) -> list[float]:
        """Height of a square image at each scale, in tiles."""
        sizes = self._static_plan(self.tile_size, self.scales, self.img_sizes).sizes
        return [height / self.tile_size[0] for height, _ in sizes]

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The size at the largest scale, which images are best given in: int where it is a square."""
        height, width = max(self.plan_for(self.tile_size).sizes)
        return height if height == width else (height, width)

    @property
    def features_per_tile(self) -> tuple[int, int] | None:
        """(rows, columns) of the wrapped model's features for a tile; None where its config does not say."""
        return base_feature_grid(self.vision_config, self.tile_size)

    @property
    def patch_size(self) -> int | None:
        """Pixels per token, in an image of `image_size`: what `LlavaProcessor` counts with. With `dynamic`, of the
        last scale.
        """
        if self.features_per_tile is None:
            return None
        if self.dynamic:
            return self.tile_size[0] // self.features_per_tile[0]
        return max(self.plan_for(self.tile_size).sizes)[0] // self.feature_grid_for(self.tile_size)[0]

    @property
    def num_tokens(self) -> int | None:
        """Tokens of a square image, prefix tokens not counted: see `num_tokens_for`."""
        return self.num_tokens_for(self.tile_size)

    @property
    def budget_argument(self) -> str:
        """ "scales" or "img_sizes", whichever is configured."""
        return "scales" if self.scales is not None else "img_sizes"

    @property
    def tokens_vary(self) -> bool:
        """Whether each image has its own number of tokens: with `dynamic`, by its aspect ratio."""
        return self.dynamic

    def token_grid_for(
        self,
        image_size: int | Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
    ) -> tuple[int, int] | None:
        """(rows, columns) of the output; `None` where the wrapped config does not say.

        Args:
            image_size (`int` or `(height, width)`, *optional*): in pixels; `config.image_size` when `None`.
            scales, img_sizes: as in `plan_for`.
        """
        if self.features_per_tile is None:
            return None
        plan = self.plan_for(self.image_size if image_size is None else image_size, scales, img_sizes)
        return plan.feature_grid(self.resize_output_to_idx % self.num_scales, self.features_per_tile)

    def parse_budget(self, text: str) -> list:
        """Scales or sizes as a user types them: "1+2+3", "224+448", "224x336+448x672".

        Raises:
            ValueError: for any other text.
        """
        try:
            if self.budget_argument == "scales":
                numbers = [float(part) for part in text.split("+")]
                return [int(number) if number.is_integer() else number for number in numbers]
            sizes = [[int(side) for side in part.lower().split("x")] for part in text.split("+")]
        except (ValueError, OverflowError):
            sizes = [[]]
        if any(len(size) not in (1, 2) for size in sizes):
            example = "1+2" if self.budget_argument == "scales" else "224+448 or 224x336+448x672"
            raise ValueError(
                f"`budgets` of an S2 model must be its `{self.budget_argument}`, such as {example}, got {text!r}."
            )
        return [size[0] if len(size) == 1 else size for size in sizes]

    def format_budget(self, budget: Sequence) -> str:
        """The text that `parse_budget` reads as `budget`."""
        return "+".join("x".join(map(str, part)) if isinstance(part, list | tuple) else str(part) for part in budget)

    def resolve_budget(self, **changes) -> dict[str, Any]:
        """The fields; `scales` end `img_sizes` and the other way round, as many of them as before.

        Raises:
            ValueError: for both, or another number of them.
        """
        fields = dict(changes)
        if "scales" in fields and "img_sizes" in fields:
            raise ValueError("Give either `scales` or `img_sizes`, not both.")
        for name, other in (("scales", "img_sizes"), ("img_sizes", "scales")):
            if name not in changes:
                continue
            if len(scale_list(changes[name], name)) != self.num_scales:
                raise ValueError(
                    f"`{name}` must name {self.num_scales} scales, as many as the weights behind the features were "
                    f"made for, got {len(changes[name])}: another number of scales needs new weights."
                )
            fields |= {name: list(changes[name]), other: None}
        return fields

    def plan_for(
        self,
        image_size: int | Sequence[int],
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
    ) -> TilePlan:
        """The tiles of an image.

        Args:
            image_size: (height, width) of the image in pixels, or int.
            scales: in place of the configured scales, as many of them.
            img_sizes: likewise, as sizes.

        Raises:
            ValueError: for both of them, or another number of scales than configured.
        """
        size = to_pair(tuple(image_size) if isinstance(image_size, Sequence) else image_size, "image_size")
        for name, given in (("scales", scales), ("img_sizes", img_sizes)):
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"`{name}` must be a list with one entry per scale, got {given!r}.")
        if scales is None and img_sizes is None:
            scales, img_sizes = self.scales, self.img_sizes
        elif (scales is None) != (img_sizes is None):
            name, given = ("scales", scales) if img_sizes is None else ("img_sizes", img_sizes)
            if len(scale_list(given, name)) != self.num_scales:
                raise ValueError(
                    f"Give {self.num_scales} `{name}`, as many as configured: got {list(given)}. The output's width "
                    "depends on their number, and the weights behind it on that width."
                )
        plan = self._static_plan(size, scales, img_sizes)
        return plan if not self.dynamic else self._dynamic_plan(size, plan)

    def _static_plan(self, size: tuple[int, int], scales, img_sizes) -> TilePlan:
        if scales is None:
            reference = size
        else:
            scales = scale_list(scales, "scales")
            reference = self._reference_size(size, scales)
        return plan_tiles(reference, scales, img_sizes, self.tile_size, self.uneven)

    def _reference_size(self, size: tuple[int, int], scales: Sequence[float]) -> tuple[int, int]:
        """What scale 1 means for an image of `size`: an image of its aspect ratio that just covers a tile at
        the smallest scale of at most 1.
        """
        numbers = [scale for scale in scales if isinstance(scale, (int, float)) and scale >= 1 / MAX_SIDE]
        smallest = min([1, *numbers])
        factor = max(tile / side for tile, side in zip(self.tile_size, size, strict=True)) / smallest
        return tuple(max(1, round(side * factor)) for side in size)

    def _dynamic_plan(self, size: tuple[int, int], plan: TilePlan) -> TilePlan:
        tile = self.tile_size[0]
        multiples = [max(1, round(min(sides) / tile)) for sides in plan.sizes]
        rows, columns = dynamic_tile_grid(size, multiples[-1], self.max_tiles, tile)
        squares = tuple((tile * multiple, tile * multiple) for multiple in multiples[:-1])
        return TilePlan((*squares, (tile * rows, tile * columns)), plan.tile, plan.uneven)


__all__ = ["S2VisionConfig"]
