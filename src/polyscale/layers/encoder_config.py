"""The configuration fields of the ViT encoder in `encoder.py`, inherited by the config of each family that uses it."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from ..utils.validation import check_choice
from .token_budget import TokenBudgetMixin


POOLINGS = ("cls", "mean", "cls_mean", "pooler")
MLP_TYPES = ("mlp", "swiglu")
PREFIX_POSITIONS = ("none", "cls", "all")

# width, layers, heads of the published sizes (timm, big_vision, flexivit_pytorch)
ENCODER_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


@strict
class EncoderConfig(TokenBudgetMixin, BackboneConfigMixin, PreTrainedConfig):
    """Fields of a ViT encoder wide enough for ViT, DeiT, DINOv2, CLIP's vision part and timm's `vit_*`.

    Args:
        hidden_size: width of a token.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: heads; must divide `hidden_size`.
        intermediate_size: width inside the MLP; four times `hidden_size` by default.
        hidden_act: activation inside the MLP, a name that transformers knows ("gelu", "gelu_pytorch_tanh",
            "quick_gelu"). Ignored by "swiglu", which uses SiLU.
        mlp_type: "mlp" (two linear layers) or "swiglu" (gate, up and down projection, as in DINOv2 giant).
        qkv_bias: whether queries, keys and values have a bias.
        hidden_dropout_prob: dropout on the embeddings and on what each attention and MLP adds.
        attention_probs_dropout_prob: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first.
        layer_scale_init_value: initial value of the layer scale; None means no layer scale.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the initial weights.
        pre_norm: whether a LayerNorm comes before the first layer (CLIP).
        final_norm: whether a LayerNorm comes after the last layer, on every token.
        pooled_norm: whether a LayerNorm comes after pooling (CLIP; timm's `fc_norm`).
        pooling: "cls", "mean" (over patch tokens), "cls_mean" (both, concatenated: DINOv2's classifier) or "pooler"
            (CLS through a linear layer and an activation: ViT's).
        pooler_output_size: width of the "pooler"; `hidden_size` by default.
        pooler_act: activation of the "pooler".
        use_cls_token: whether a CLS token comes first.
        use_distillation_token: whether DeiT's distillation token follows CLS.
        use_distillation_head: whether a second classifier reads the distillation token; logits are the mean of both.
        num_register_tokens: register tokens, after CLS and distillation token.
        prefix_positions: which prefix tokens have a position of their own: "none" (timm's `no_embed_class`), "cls"
            (registers have none: DINOv2) or "all".
        num_channels: channels of an image.
        image_size: (height, width) in pixels, or int: the size the positions were made for.
        keep_all_tokens: whether a classifier computes every token of the last layer, those that its head does not pool
            too. Without it they are computed where `output_hidden_states` or `output_attentions` asks for them.

    Raises:
        ValueError: for an unknown choice, or parts that do not fit together.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    mlp_type: str = "mlp"
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_scale_init_value: float | int | None = None
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    pre_norm: bool = False
    final_norm: bool = True
    pooled_norm: bool = False
    pooling: str = "cls"
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    use_cls_token: bool = True
    use_distillation_token: bool = False
    use_distillation_head: bool = False
    num_register_tokens: int = 0
    prefix_positions: str = "none"
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    keep_all_tokens: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    base_model_fsdp_plan = {"embeddings": "free_full_weight", "layers.*": "free_full_weight"}

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self._check_encoder()
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def _check_encoder(self) -> None:
        check_choice("mlp_type", self.mlp_type, MLP_TYPES)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("prefix_positions", self.prefix_positions, PREFIX_POSITIONS)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be an activation that transformers knows, got {self.hidden_act!r}.")
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers < 0 or self.num_register_tokens < 0:
            raise ValueError("`num_hidden_layers` and `num_register_tokens` must not be negative.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.pooling != "mean" and not self.use_cls_token:
            raise ValueError(
                f"`pooling={self.pooling!r}` needs a CLS token: set `use_cls_token=True` or pool by 'mean'."
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
    def num_pooled_tokens(self) -> int | None:
        """How many tokens, the first ones, pooling and head read; `None` where pooling reads all."""
        if self.pooling in ("mean", "cls_mean"):
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


__all__ = ["ENCODER_SIZES", "EncoderConfig"]
