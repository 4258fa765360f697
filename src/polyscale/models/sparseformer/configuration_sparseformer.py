"""SparseFormer configuration."""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedConfig

from ...layers.config_checks import (
    CheckedConfigMixin,
    above_zero,
    activation,
    at_least,
    checked_config,
    non_negative,
    pixel_size,
    positive,
    rate,
)
from ...layers.token_budget import TokenBudgetMixin
from ...utils.validation import check_choice


OPERATIONS = ("attn", "mlp", "roi_adj", "sampling_m", "pe_inject")
ROI_OPERATIONS = ("roi_adj", "sampling_m", "pe_inject")


def v1_operations(num_layers: int) -> list[list[str]]:
    """The operation lists of SparseFormer v1: the first two layers sample the image, the others do not."""
    sampling = ["attn", "roi_adj", "sampling_m", "mlp"]
    return [list(sampling), list(sampling)] + [["attn", "mlp"] for _ in range(num_layers - 2)]


def bootstrapped_operations(num_layers: int) -> list[list[str]]:
    """The operation lists of the bootstrapped SparseFormer: two new layers in front, then the blocks of a ViT."""
    front = [["sampling_m", "pe_inject", "attn", "mlp", "roi_adj"], ["sampling_m", "pe_inject"]]
    return front + [["attn", "mlp"] for _ in range(num_layers - 2)]


def _v1(width: int, num_latent_tokens: int, num_layers: int, drop_path_rate: float) -> dict:
    return {
        "num_latent_tokens": num_latent_tokens,
        "widths": [width // 2] + [width] * (num_layers - 1),
        "repeats": [4] + [1] * (num_layers - 1),
        "operations": v1_operations(num_layers),
        "drop_path_rate": drop_path_rate,
        "num_labels": 1000,
    }


def _bootstrapped(width: int, num_latent_tokens: int, num_layers: int, **options) -> dict:
    return {
        "num_latent_tokens": num_latent_tokens,
        "widths": [width // 2] + [width] * (num_layers - 1),
        "repeats": [4] + [1] * (num_layers - 1),
        "operations": bootstrapped_operations(num_layers),
        "feature_width": 64,
        "num_sampling_points": 16,
        "shared_token_embedding": True,
        "cls_token_layer": 2,
        "num_attention_heads": None,
        "layer_norm_eps": 1e-5,
        "roi_adjustment": "mlp",
        "roi_drop_path": False,
        "mixing_bias": False,
        "generator_width": 128,
        "sampling_padding": "border",
        "transition_norm": False,
        "stage_embedding": True,
        "pooling": "cls",
        **options,
    }


PRESETS = {
    "sparseformer_v1_tiny": _v1(512, 49, 9, 0.2),
    "sparseformer_v1_small": _v1(640, 64, 9, 0.3),
    "sparseformer_v1_base": _v1(768, 81, 11, 0.4),
    "sparseformer_btsp_augreg_base": _bootstrapped(768, 48, 10, num_labels=1000),
    "sparseformer_btsp_augreg_large": _bootstrapped(1024, 48, 18, num_labels=1000),
    "sparseformer_btsp_openai_clip_base": _bootstrapped(768, 48, 10, hidden_act="quick_gelu", projection_dim=512),
    "sparseformer_btsp_openai_clip_large": _bootstrapped(1024, 63, 18, hidden_act="quick_gelu", projection_dim=768),
}


@checked_config
class SparseFormerConfig(CheckedConfigMixin, TokenBudgetMixin, PreTrainedConfig):
    """Configuration of a SparseFormer: a few latent tokens, each with a region of interest (RoI) that it moves.

    The defaults are SparseFormer v1 tiny; `SparseFormerConfig.preset` gives the seven published variants. A model is a
    list of layers; layer i has the width `widths[i]`, and runs the operations `operations[i]`, one after the other,
    `repeats[i]` times with the same weights. The operations:

    - "attn": self-attention between the tokens; "mlp": an MLP on each token;
    - "roi_adj": moves and scales the RoI of each token;
    - "sampling_m": samples the image's features in the RoI and mixes them into the token;
    - "pe_inject": adds an encoding of the RoI to the token.

    A CLS token has no RoI: the last three leave it alone.

    Args:
        num_channels (`int`, *optional*, defaults to 3): channels of an image.
        image_size (`int` or `(height, width)`, *optional*, defaults to 224): in pixels: what image processors crop to.
            The model takes any size.
        feature_width (`int`, *optional*, defaults to 96): channels of the early convolution.
        num_latent_tokens (`int`, *optional*, defaults to 49): tokens with a RoI; CLS is not counted.
        shared_token_embedding (`bool`, *optional*, defaults to `False`): whether all tokens start from one vector
            (bootstrapped) or each from its own (v1).
        num_sampling_points (`int`, *optional*, defaults to 36): points that a token samples in its RoI, at least 2.
        widths (`list[int]`, *optional*): width of the tokens in each layer; v1 tiny's when `None`, like the next two.
        repeats (`list[int]`, *optional*): how often each layer is applied.
        operations (`list[list[str]]`, *optional*): for each layer, the list of its operations.
        cls_token_layer (`int`, *optional*): index of the layer before which a CLS token joins; `None` for no CLS
            token.
        pooling (`str`, *optional*, defaults to `"mean"`): what a head reads: `"mean"` (over the tokens) or `"cls"`.
        num_attention_heads (`int`, *optional*, defaults to 64): heads of every layer whatever its width (v1: 64), or
            `None` for `width / attention_head_width`.
        attention_head_width (`int`, *optional*, defaults to 64): width of a head where `num_attention_heads` is
            `None`.
        mlp_ratio (`float`, *optional*, defaults to 4): width inside an MLP, in widths of its layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation in the MLPs of layers with `repeats` of 1.
        repeated_hidden_act (`str`, *optional*, defaults to `"gelu"`): activation in the MLPs of layers with more
            repeats, and in RoI adjustment and mixing.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): epsilon of the LayerNorms, except that of the
            parameter generator, which is 1e-5.
        roi_adjustment (`str`, *optional*, defaults to `"linear"`): `"linear"` (v1) or `"mlp"` (bootstrapped): what
            computes the change of a RoI.
        roi_drop_path (`bool`, *optional*, defaults to `True`): whether stochastic depth also drops changes of RoIs
            (v1).
        mixing_bias (`bool`, *optional*, defaults to `True`): whether mixing has biases, and an activation between its
            two products (v1).
        generator_width (`int`, *optional*): width inside the generator of mixing parameters; `None` for a quarter of
            the layer's width (v1).
        sampling_padding (`str`, *optional*, defaults to `"zeros"`): `"zeros"` (v1) or `"border"` (bootstrapped): what
            a point outside of the image sees.
        restrict_grad_norm (`bool`, *optional*, defaults to `False`): whether the gradient of sampling points is
            clamped to one row of features (v1's training).
        transition_norm (`bool`, *optional*, defaults to `True`): whether a LayerNorm follows the linear layer between
            two widths (v1).
        stage_embedding (`bool`, *optional*, defaults to `False`): whether layers with several repeats add a vector of
            their own at each of them (bootstrapped).
        drop_path_rate (`float`, *optional*, defaults to 0.0): stochastic depth at the last repeat of the last layer,
            in [0, 1); it grows linearly from 0 at the first.
        projection_dim (`int`, *optional*, defaults to 512): width of the image embeddings of
            `SparseFormerModelWithProjection`.
        projection_bias (`bool`, *optional*, defaults to `False`): whether that projection has a bias.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights of linear
            layers.
        output_all_rois (`bool`, *optional*, defaults to `False`): whether the output holds the RoIs of each layer.
        output_sampling_points (`bool`, *optional*, defaults to `False`): whether it holds the points of each sampling.
        output_sampling_rois (`bool`, *optional*, defaults to `False`): whether it holds the RoIs of each sampling.
        keep_all_tokens (`bool`, *optional*, defaults to `False`): whether a classifier computes every token of the
            last layer, also those that its head does not read. Without it they are computed where
            `output_hidden_states` or `output_attentions` asks for them.
        cpu_kernels (`bool`, *optional*, defaults to `True`): whether attention of thin heads and sampling take their
            faster way on a CPU (`cpu_sparseformer.py`); results differ by rounding alone. `False`, also set on a live
            model's config, takes the operations of a GPU.

    Raises:
        ValueError: for an unknown name or choice, or operation lists that cannot run.

    Example:

    ```python
    >>> from polyscale import SparseFormerConfig

    >>> config = SparseFormerConfig.preset("sparseformer_v1_tiny", num_labels=10)
    >>> config.num_tokens, config.hidden_size, config.operations[0]
    (49, 512, ['attn', 'roi_adj', 'sampling_m', 'mlp'])
    ```
    """

    model_type = "sparseformer"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "rois",
        "all_rois",
        "sampling_points",
        "sampling_rois",
    ]
    changeable_fields = ("image_size",)
    fixed_fields = {
        "num_tokens": "its tokens are weights (one latent token each), so another number of them needs new weights"
    }
    base_model_tp_plan = {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"}
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    num_channels: int = positive(3)
    image_size: int | list[int] | tuple[int, int] = pixel_size(224)
    feature_width: int = positive(96)
    num_latent_tokens: int = at_least(1, 49, f"{', '.join(ROI_OPERATIONS)} need tokens with a RoI (CLS has none)")
    shared_token_embedding: bool = False
    num_sampling_points: int = at_least(2, 36, "offsets are divided by their standard deviation over the points")
    widths: list | tuple | None = None
    repeats: list | tuple | None = None
    operations: list | tuple | None = None
    cls_token_layer: int | None = non_negative(None)
    pooling: Literal["mean", "cls"] = "mean"
    num_attention_heads: int | None = positive(64)
    attention_head_width: int = positive(64)
    mlp_ratio: int | float = above_zero(4)
    hidden_act: str = activation("gelu")
    repeated_hidden_act: str = activation("gelu")
    layer_norm_eps: float | int = above_zero(1e-6)
    roi_adjustment: Literal["linear", "mlp"] = "linear"
    roi_drop_path: bool = True
    mixing_bias: bool = True
    generator_width: int | None = positive(None)
    sampling_padding: Literal["zeros", "border"] = "zeros"
    restrict_grad_norm: bool = False
    transition_norm: bool = True
    stage_embedding: bool = False
    drop_path_rate: float | int = rate(0.0)
    projection_dim: int = positive(512)
    projection_bias: bool = False
    initializer_range: float | int = non_negative(0.02)
    output_all_rois: bool = False
    output_sampling_points: bool = False
    output_sampling_rois: bool = False
    keep_all_tokens: bool = False
    cpu_kernels: bool = True

    def __post_init__(self, **kwargs):
        tiny = PRESETS["sparseformer_v1_tiny"]
        if self.widths is None and self.repeats is None and self.operations is None:
            self.widths, self.repeats, self.operations = tiny["widths"], tiny["repeats"], tiny["operations"]
        for name in ("widths", "repeats", "operations"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, [list(value) if isinstance(value, list | tuple) else value for value in values])
        super().__post_init__(**kwargs)

    def validate_layers(self) -> None:
        """Rules between fields; transformers runs this when a config is made and saved."""
        self._check_operations()
        self._check_tokens()

    def _check_operations(self) -> None:
        lists = {"widths": self.widths, "repeats": self.repeats, "operations": self.operations}
        missing = [f"`{name}`" for name, values in lists.items() if not values]
        if missing:
            raise ValueError(
                f"`widths`, `repeats` and `operations` need an entry for each layer; {missing[0]} has none."
            )
        if not len(self.widths) == len(self.repeats) == len(self.operations):
            raise ValueError(
                "`widths`, `repeats` and `operations` need one entry for each layer each, got "
                f"{len(self.widths)}, {len(self.repeats)} and {len(self.operations)}."
            )
        for name in ("widths", "repeats"):
            values = lists[name]
            if any(
                isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16 for value in values
            ):
                raise ValueError(f"`{name}` must hold ints of at least 1 and at most {1 << 16}, got {list(values)}.")
        for index, operations in enumerate(self.operations):
            if not isinstance(operations, list | tuple) or not operations:
                raise ValueError(
                    f"`operations[{index}]` must be a list of at least one operation of {', '.join(OPERATIONS)}, got "
                    f"{operations!r}."
                )
            for operation in operations:
                check_choice(f"operations[{index}]", operation, OPERATIONS)
            if len(set(operations)) < len(operations):
                raise ValueError(
                    f"`operations[{index}]` names an operation twice: {list(operations)}. A layer has one set of "
                    "weights for each operation: use `repeats`, or one more layer."
                )
        if not any("sampling_m" in operations for operations in self.operations):
            raise ValueError("`operations` has no 'sampling_m': no token would ever see the image.")

    def _check_tokens(self) -> None:
        for index, (width, operations) in enumerate(zip(self.widths, self.operations, strict=True)):
            if "pe_inject" in operations and width % 4:
                raise ValueError(
                    f"'pe_inject' in `operations[{index}]` needs a width that is a multiple of 4 (a quarter for each "
                    f"side of a RoI), got `widths[{index}]` = {width}."
                )
            if "attn" in operations and (width % self.num_heads_for(width) or width < self.num_heads_for(width)):
                raise ValueError(
                    f"`widths[{index}]` = {width} is not a multiple of its {self.num_heads_for(width)} attention "
                    "heads: change it, `num_attention_heads` or `attention_head_width`."
                )
        if self.cls_token_layer is None:
            if self.pooling == "cls":
                raise ValueError("`pooling='cls'` needs a CLS token: set `cls_token_layer`, or pool by 'mean'.")
            return
        if not 0 <= self.cls_token_layer < len(self.widths):
            raise ValueError(
                f"`cls_token_layer` must be the index of a layer, 0 to {len(self.widths) - 1}, got "
                f"{self.cls_token_layer}."
            )
        if any(width != self.hidden_size for width in self.widths[self.cls_token_layer :]):
            raise ValueError(
                f"From `cls_token_layer` = {self.cls_token_layer} on, all `widths` must be the last one, "
                f"{self.hidden_size} (the width of CLS), got {self.widths}."
            )

    @classmethod
    def preset(cls, name: str, **overrides) -> "SparseFormerConfig":
        """The config of a published variant.

        Args:
            name: "sparseformer_v1_tiny", "sparseformer_v1_small", "sparseformer_v1_base",
                "sparseformer_btsp_augreg_base", "sparseformer_btsp_augreg_large", "sparseformer_btsp_openai_clip_base"
                or "sparseformer_btsp_openai_clip_large".
            overrides: fields that differ from the preset.
        """
        check_choice("name", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    def num_heads_for(self, width: int) -> int:
        """Attention heads of a layer of that width."""
        if self.num_attention_heads is not None:
            return self.num_attention_heads
        return max(width // self.attention_head_width, 1)

    def generator_width_for(self, width: int) -> int:
        """Width inside the parameter generator of a layer of that width."""
        return self.generator_width if self.generator_width is not None else max(width // 4, 1)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens that the model gives."""
        return self.widths[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Layers, each counted once whatever its repeats."""
        return len(self.widths)

    @property
    def num_tokens(self) -> int:
        """Tokens per image; CLS is not counted."""
        return self.num_latent_tokens

    def num_tokens_for(self, image_size: int | Sequence[int] | None = None) -> int:
        """How many tokens an image (or video) costs, CLS not counted: `num_tokens`, whatever its size."""
        return self.num_tokens

    def gives_tokens_at(self, layer: int) -> bool:
        """Whether `hidden_states[layer]` is as wide as the last layer's, CLS among it if there is one."""
        if not super().gives_tokens_at(layer):
            return False
        after = layer % (self.num_hidden_layers + 1) - 1  # the layer whose output it is; -1: what goes into the first
        has_cls = self.cls_token_layer is None or after >= self.cls_token_layer
        return after >= 0 and self.widths[after] == self.hidden_size and has_cls

    @property
    def num_prefix_tokens(self) -> int:
        """1 with a CLS token, else 0."""
        return int(self.cls_token_layer is not None)

    @property
    def roi_dimensions(self) -> int:
        """Dimensions of a RoI: 2 for images, 3 for videos."""
        return 2

    @property
    def drop_path_rates(self) -> list[list[float]]:
        """For each layer, the stochastic depth of each of its repeats."""
        last = max(sum(self.repeats) - 1, 1)
        starts = [sum(self.repeats[:index]) for index in range(len(self.repeats))]
        return [
            [self.drop_path_rate * (start + repeat) / last for repeat in range(repeats)]
            for start, repeats in zip(starts, self.repeats, strict=True)
        ]

    @property
    def num_output_points(self) -> int:
        """Rows that mixing makes of the sampled points."""
        return max(self.num_sampling_points, 32)


__all__ = ["PRESETS", "SparseFormerConfig", "bootstrapped_operations", "v1_operations"]
