"""The configuration fields of the ViT encoder in `encoder.py`, inherited by the config of each family that uses it."""

import math
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..utils.validation import check_choice
from .config_checks import (
    CheckedConfigMixin,
    above_zero,
    activation,
    checked_config,
    choice,
    non_negative,
    pixel_size,
    positive,
    rate,
)
from .token_budget import TokenBudgetMixin
from .token_merging import merge_schedule


# width, layers, heads of the published sizes (timm, big_vision, flexivit_pytorch)
ENCODER_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# The same for training from scratch, by the most pixels that the shorter side of an image has.
_TRAINING_SIZES = ((64, (192, 6, 3)), (160, ENCODER_SIZES["tiny"]), (math.inf, ENCODER_SIZES["small"]))


def training_shape(image_size: tuple[int, int]) -> dict[str, int]:
    """Fields of an encoder to train from scratch on images of (height, width) pixels: width, layers and heads."""
    shape = next(shape for largest, shape in _TRAINING_SIZES if min(image_size) <= largest)
    return dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), shape, strict=True))


@checked_config
class EncoderConfig(CheckedConfigMixin, TokenBudgetMixin, BackboneConfigMixin, PreTrainedConfig):
    """Fields of a ViT encoder wide enough for ViT, DeiT, DINOv2, CLIP's vision part and timm's `vit_*`.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): width of a token.
        num_hidden_layers (`int`, *optional*, defaults to 12): number of transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 12): heads; must divide `hidden_size`.
        intermediate_size (`int`, *optional*): width inside the MLP; four times `hidden_size` when `None`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation inside the MLP, a name that transformers knows
            (`"gelu"`, `"gelu_pytorch_tanh"`, `"quick_gelu"`). Ignored by `"swiglu"`, which uses SiLU.
        mlp_type (`str`, *optional*, defaults to `"mlp"`): `"mlp"` (two linear layers) or `"swiglu"` (gate, up and down
            projection, as in DINOv2 giant).
        qkv_bias (`bool`, *optional*, defaults to `True`): whether queries, keys and values have a bias.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0): dropout on the embeddings and on what each
            attention and MLP adds.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): dropout on attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0): stochastic depth of the last layer, in [0, 1); it grows
            linearly from 0 at the first.
        layer_scale_init_value (`float`, *optional*): initial value of the layer scale; `None` means no layer scale.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): epsilon of every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights.
        pre_norm (`bool`, *optional*, defaults to `False`): whether a LayerNorm comes before the first layer (CLIP).
        final_norm (`bool`, *optional*, defaults to `True`): whether a LayerNorm comes after the last layer, on every
            token.
        fc_norm (`bool`, *optional*, defaults to `False`): whether a LayerNorm comes after pooling (CLIP, timm). Older
            checkpoints call it `pooled_norm`.
        pooling (`str`, *optional*, defaults to `"cls"`): what a head reads: `"cls"`, `"mean"` (over patch tokens),
            `"cls_mean"` (both, concatenated: DINOv2's classifier), `"pooler"` (CLS through a linear layer and an
            activation: ViT's) or `"attention"` (a learned query that reads all tokens: SigLIP's).
        pooler_output_size (`int`, *optional*): width of the `"pooler"`; `hidden_size` when `None`.
        pooler_act (`str`, *optional*, defaults to `"tanh"`): activation of the `"pooler"`.
        projection_dim (`int`, *optional*, defaults to 512): width of the image embeddings of a
            `...ModelWithProjection` (CLIP).
        projection_bias (`bool`, *optional*, defaults to `False`): whether that projection has a bias.
        use_cls_token (`bool`, *optional*, defaults to `True`): whether a CLS token comes first.
        use_distillation_token (`bool`, *optional*, defaults to `False`): whether DeiT's distillation token follows
            CLS.
        use_distillation_head (`bool`, *optional*, defaults to `False`): whether a second classifier reads the
            distillation token; logits are the mean of both.
        num_register_tokens (`int`, *optional*, defaults to 0): register tokens, after CLS and distillation token.
        prefix_positions (`str`, *optional*, defaults to `"none"`): which prefix tokens have a position of their own:
            `"none"` (timm's `no_embed_class=True`), `"cls"` (registers have none: DINOv2) or `"all"`.
        num_channels (`int`, *optional*, defaults to 3): channels of an image.
        image_size (`int` or `(height, width)`, *optional*, defaults to 224): in pixels: the size the positions were
            made for.
        merge_tokens_to (`int`, *optional*): merges similar tokens between the layers until this many are left after
            the last, prefix tokens not counted (ToMe, arXiv 2210.09461); nothing is merged when `None`.
        merge_layers (`int`, *optional*): layers, the first ones, in which tokens merge; all when `None`. A host that
            reads an earlier layer than the last finds `merge_tokens_to` tokens behind so many.
        keep_all_tokens (`bool`, *optional*, defaults to `False`): whether a classifier computes every token of the
            last layer, also those that its head does not read. Without it they are computed where
            `output_hidden_states` or `output_attentions` asks for them.
        pack_tokens (`bool` or `str`, *optional*, defaults to `"auto"`): whether images with token counts of their own
            run as one packed sequence instead of padded to the longest: `True`, `False`, or `"auto"`, where that is
            faster. What comes out has the same layout and values either way; what stands at padding means nothing.
            `torch.compile` and `torch.export` see padding.
        apply_layernorm (`bool`, *optional*, defaults to `True`): whether a backbone normalises its feature maps.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`): whether a backbone gives maps, not tokens.

    Raises:
        ValueError: for an unknown name or choice, a value out of range, or parts that do not fit together.
    """

    attribute_map = {"pooled_norm": "fc_norm"}

    hidden_size: int = positive(768)
    num_hidden_layers: int = non_negative(12)
    num_attention_heads: int = positive(12)
    intermediate_size: int | None = positive(None)
    hidden_act: str = activation("gelu")
    mlp_type: Literal["mlp", "swiglu"] = "mlp"
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = rate(0.0)
    attention_probs_dropout_prob: float | int = rate(0.0)
    drop_path_rate: float | int = rate(0.0)
    layer_scale_init_value: float | int | None = None
    layer_norm_eps: float | int = above_zero(1e-6)
    initializer_range: float | int = non_negative(0.02)
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    pooling: Literal["cls", "mean", "cls_mean", "pooler", "attention"] = "cls"
    pooler_output_size: int | None = positive(None)
    pooler_act: str = activation("tanh")
    projection_dim: int = positive(512)
    projection_bias: bool = False
    use_cls_token: bool = True
    use_distillation_token: bool = False
    use_distillation_head: bool = False
    num_register_tokens: int = non_negative(0)
    prefix_positions: Literal["none", "cls", "all"] = "none"
    num_channels: int = positive(3)
    image_size: int | list[int] | tuple[int, int] = pixel_size(224)
    keep_all_tokens: bool = False
    pack_tokens: bool | str = choice(("auto", True, False), "auto")
    merge_tokens_to: int | None = positive(None)
    merge_layers: int | None = positive(None)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    base_model_fsdp_plan = {"embeddings": "free_full_weight", "layers.*": "free_full_weight"}

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_encoder(self) -> None:
        """Rules between fields; transformers runs this when a config is made and saved."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.pooling not in ("mean", "attention") and not self.use_cls_token:
            raise ValueError(
                f"`pooling={self.pooling!r}` needs a CLS token: set `use_cls_token=True`, or pool by 'mean' or "
                "'attention'."
            )
        if self.use_distillation_token and not self.use_cls_token:
            raise ValueError("`use_distillation_token=True` needs `use_cls_token=True`: it comes after CLS.")
        if self.use_distillation_head and not self.use_distillation_token:
            raise ValueError("`use_distillation_head=True` needs `use_distillation_token=True`: it reads that token.")

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits each linear layer; the MLP's layers depend on `mlp_type`."""
        gated = self.mlp_type == "swiglu"
        columns = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.fc1",)
        rows = ("mlp.down_proj",) if gated else ("mlp.fc2",)
        return {
            **{f"layers.*.attention.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
            "layers.*.attention.o_proj": "rowwise",
            **{f"layers.*.{name}": "colwise" for name in columns},
            **{f"layers.*.{name}": "rowwise" for name in rows},
        }

    @classmethod
    def preset(cls, name: str, **overrides) -> "EncoderConfig":
        """The config of a published size: the model type followed by "_tiny", "_small", "_base", "_large" or "_huge".

        Args:
            name: one of the five names, such as "flexivit_base".
            overrides: fields that differ from the preset.
        """
        presets = {f"{cls.model_type}_{size}": shape for size, shape in ENCODER_SIZES.items()}
        check_choice("name", name, tuple(presets))
        fields = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), presets[name], strict=True))
        return cls(**{**fields, **overrides})

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patch tokens: CLS, distillation token, registers."""
        return int(self.use_cls_token) + int(self.use_distillation_token) + self.num_register_tokens

    @property
    def num_position_prefix_tokens(self) -> int:
        """Prefix tokens that have a position."""
        if self.prefix_positions == "all":
            return self.num_prefix_tokens
        if self.prefix_positions == "cls":
            return int(self.use_cls_token) + int(self.use_distillation_token)
        return 0

    @property
    def num_merging_layers(self) -> int:
        """Layers in which tokens merge, where they do."""
        count = self.num_hidden_layers
        return count if self.merge_layers is None else min(self.merge_layers, count)

    def tokens_after_merging(self, num_tokens: int) -> int:
        """How many of the patch tokens in front of the layers are left behind them.

        Raises:
            ValueError: for more than the layers can merge down to `merge_tokens_to`.
        """
        if self.merge_tokens_to is None:
            return num_tokens
        return num_tokens - sum(merge_schedule(num_tokens, self.merge_tokens_to, self.num_merging_layers))

    def encoder_fields(self) -> dict[str, Any]:
        """The fields of `EncoderConfig` alone, for the config of another family on the same encoder."""
        return {name: getattr(self, name) for name in EncoderConfig._own_fields()}

    def hosted(self) -> tuple["EncoderConfig", list[str]]:
        """See `TokenBudgetMixin.hosted`.

        Raises:
            ValueError: where tokens are merged in all layers: a host may read an earlier one, which has more of them.
        """
        if self.merge_tokens_to is not None and self.merge_layers is None:
            raise ValueError(
                f"`merge_tokens_to` must be None in a host model that does not say which layer it reads, got "
                f"{self.merge_tokens_to}: fewer tokens are merged in layers before the last. Set `merge_layers` too, "
                "to the number of layers up to that one, or use another budget."
            )
        return super().hosted()

    @property
    def num_pooled_tokens(self) -> int | None:
        """How many tokens, the first ones, pooling and head read; `None` where pooling reads all."""
        if self.pooling in ("mean", "cls_mean", "attention"):
            return None
        return 2 if self.use_distillation_head else 1

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`."""
        if self.pooling == "cls_mean":
            return 2 * self.hidden_size
        if self.pooling == "pooler":
            return self.pooler_output_size or self.hidden_size
        return self.hidden_size


__all__ = ["ENCODER_SIZES", "EncoderConfig", "training_shape"]
