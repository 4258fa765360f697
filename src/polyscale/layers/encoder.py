"""The ViT encoder that families share: attention, MLPs, layer, pooling.

One encoder for ViT (arXiv 2010.11929), DeiT (2012.12877), DINOv2 (2304.07193) and CLIP's vision part (2103.00020);
parameters have the names of transformers' ViT, so that its tensor-parallel plans and LoRA recipes carry over.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .call_checks import CheckedModelMixin
from .encoder_config import EncoderConfig


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops the whole input of a sample with probability `rate`."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = hidden_states.new_empty((hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1))
        return hidden_states * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.weight = nn.Parameter(config.layer_scale_init_value * torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; query, key, value are (batch, heads, tokens, head width)."""
    weights = query @ key.transpose(2, 3) * scaling  # (batch, heads, tokens, tokens)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EncoderAttention(nn.Module):
    """Multi-head self-attention with the attention implementations of transformers."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `num_queries` only the first tokens ask, of all: (batch, num_queries, hidden) comes back."""
        queries = hidden_states[:, :num_queries]
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, queries),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )  # (batch, heads, tokens, head width)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class EncoderMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class EncoderSwiGLU(nn.Module):
    """Gated MLP with SiLU (arXiv 2002.05202), as in DINOv2 giant."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = nn.SiLU()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class EncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer. (batch, tokens, hidden) -> the same shape.

    With `num_queries` only the first tokens are computed, and only they come back: all that a classifier reads of the
    last layer.
    """

    def __init__(self, config: EncoderConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EncoderAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderSwiGLU(config) if config.mlp_type == "swiglu" else EncoderMLP(config)
        has_scale = config.layer_scale_init_value is not None
        self.attention_scale = LayerScale(config) if has_scale else nn.Identity()
        self.mlp_scale = LayerScale(config) if has_scale else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        update, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self.drop_path(self.attention_scale(self.dropout(update)))
        update = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.mlp_scale(self.dropout(update)))


def make_encoder_layers(config: EncoderConfig) -> nn.ModuleList:
    """The layers of an encoder, stochastic depth growing linearly to `config.drop_path_rate`."""
    last = max(config.num_hidden_layers - 1, 1)
    return nn.ModuleList(
        EncoderLayer(config, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
    )


class PrefixTokens(nn.Module):
    """CLS, distillation and register tokens, put in front of patch tokens."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_size

        def token(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, count, width)) if count else None

        self.cls_token = token(int(config.use_cls_token))
        self.distillation_token = token(int(config.use_distillation_token))
        self.register_tokens = token(config.num_register_tokens)

    def forward(self, batch_size: int) -> torch.Tensor | None:
        """(batch_size, num_prefix_tokens, hidden), or None where there are none."""
        tokens = [
            token.expand(batch_size, -1, -1)
            for token in (self.cls_token, self.distillation_token, self.register_tokens)
            if token is not None
        ]
        return torch.cat(tokens, dim=1) if tokens else None


class TokenPooler(nn.Module):
    """All tokens of an image -> one vector, as `config.pooling` says. (batch, tokens, hidden) -> (batch, pooled)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.pooling = config.pooling
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.pooling == "pooler":
            self.dense = nn.Linear(config.hidden_size, config.pooled_size)
            self.activation = ACT2FN[config.pooler_act]
        self.layernorm = (
            nn.LayerNorm(config.pooled_size, eps=config.layer_norm_eps) if config.fc_norm else nn.Identity()
        )

    def _mean(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        patches = hidden_states[:, self.num_prefix_tokens :]
        if token_mask is None:
            return patches.mean(dim=1)
        weights = token_mask.to(patches.dtype)[..., None]
        return (patches * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`token_mask` (batch, patch tokens): True where a patch token is real; without it all are."""
        if self.pooling == "mean":
            pooled = self._mean(hidden_states, token_mask)
        elif self.pooling == "cls_mean":
            pooled = torch.cat([hidden_states[:, 0], self._mean(hidden_states, token_mask)], dim=-1)
        elif self.pooling == "pooler":
            pooled = self.activation(self.dense(hidden_states[:, 0]))
        else:
            pooled = hidden_states[:, 0]
        return self.layernorm(pooled)


class EncoderClassificationHead(nn.Module):
    """`pooler_output` -> logits; with DeiT's second classifier, the mean of both, as timm evaluates."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        has_labels = config.num_labels > 0
        self.classifier = nn.Linear(config.pooled_size, config.num_labels) if has_labels else nn.Identity()
        self.distillation_classifier = (
            nn.Linear(config.hidden_size, config.num_labels) if config.use_distillation_head and has_labels else None
        )

    def forward(self, pooled: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(pooled)
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(last_hidden_state[:, 1])) / 2
        return logits


class EncoderPreTrainedModel(CheckedModelMixin, PreTrainedModel):
    """Flags and weight initialisation of models on this encoder; `hidden_states` and `attentions` are recorded."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": EncoderAttention}

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection: its output is the first that depends on weights."""
        return self.base_model.embeddings.patch_embeddings.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings.patch_embeddings.projection = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrefixTokens):
            for token in module.parameters(recurse=False):
                init.trunc_normal_(token, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LayerScale):
            init.constant_(module.weight, self.config.layer_scale_init_value)


__all__ = [
    "DropPath",
    "EncoderAttention",
    "EncoderClassificationHead",
    "EncoderLayer",
    "EncoderPreTrainedModel",
    "LayerScale",
    "PrefixTokens",
    "TokenPooler",
    "make_encoder_layers",
]
