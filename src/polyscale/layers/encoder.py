"""The ViT encoder that families share: attention, MLPs, layer, pooling.

One encoder for ViT (arXiv 2010.11929), DeiT (2012.12877), DINOv2 (2304.07193) and CLIP's vision part (2103.00020);
parameters have the names of transformers' ViT, so that its tensor-parallel plans and LoRA recipes carry over.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import attention_for, attention_name
from .attention_pooling import AttentionPooling
from .call_checks import CheckedModelMixin
from .encoder_config import EncoderConfig
from .freezing import FreezableMixin, is_plain, takes_gradients
from .key_bias import with_key_bias
from .packing import Packing, packed_attention
from .token_merging import MergeStep, merge_tokens


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops the whole input of a sample with probability `rate`."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        """With `packing` the samples are the images of one packed sequence."""
        if self.rate == 0.0 or not self.training:
            return hidden_states
        batch = hidden_states.shape[0] if packing is None else len(packing.order)
        keep = hidden_states.new_empty((batch,) + (1,) * (hidden_states.ndim - 1))
        keep = keep.bernoulli_(1 - self.rate).div_(1 - self.rate)
        return hidden_states * (keep if packing is None else keep[packing.images].transpose(0, 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.weight = nn.Parameter(config.layer_scale_init_value * torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


def first_tokens(tokens: torch.Tensor, count: int, packing: Packing | None) -> torch.Tensor:
    """The first `count` tokens of each image of a batch; with `packing` the batch is one sequence."""
    return tokens[:, :count] if packing is None else packing.take_first(tokens, count)


class EncoderAttention(FreezableMixin, nn.Module):
    """Multi-head self-attention with the attention implementations of transformers."""

    frozen_tensors = ("frozen_qkv_weight", "frozen_qkv_bias")

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

    @torch.no_grad()
    def freeze(self) -> None:
        """Puts the three projections into one product; a frozen budget asks for it."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if not all(type(projection) is nn.Linear and is_plain(projection.weight) for projection in projections):
            return
        self.frozen_qkv_weight = torch.cat([projection.weight for projection in projections])
        if self.config.qkv_bias:
            self.frozen_qkv_bias = torch.cat([projection.bias for projection in projections])

    def _project(self, hidden_states: torch.Tensor, query_tokens: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Queries of `query_tokens` (all tokens when None), keys and values of all: (batch, tokens, hidden) each."""
        weight, bias = self.frozen_qkv_weight, self.frozen_qkv_bias
        if weight is None or takes_gradients(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight):
            queries = hidden_states if query_tokens is None else query_tokens
            return self.q_proj(queries), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if query_tokens is None:
            return nn.functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)
        width = hidden_states.shape[-1]
        key_value = nn.functional.linear(hidden_states, weight[width:], None if bias is None else bias[width:])
        return self.q_proj(query_tokens), *key_value.chunk(2, dim=-1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_bias: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result of the config's attention function, (batch, queries, heads, head width), and its weights."""
        name, inputs = attention_name(self.config), (query, key, value, attention_mask)
        if key_bias is not None:
            inputs = with_key_bias(*inputs, key_bias, self.scaling, name)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        needs_fused = inputs[3] is not None or dropout > 0
        attention = attention_for(name, *inputs[:2], needs_fused=needs_fused)
        output, weights = attention(
            self,
            *inputs,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.head_dim], weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_queries: int | None = None,
        key_bias: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens (batch, queries, hidden), attention weights or None, and keys (batch, heads, tokens, head width).

        With `num_queries` only the first tokens of an image are queries, and all of them keys. `key_bias` (batch,
        tokens) is added to the logits of each key. With `packing` the batch is one sequence, each image in it attends
        to itself, and there are no weights.
        """
        query_tokens = None if num_queries is None else first_tokens(hidden_states, num_queries, packing)
        query, key, value = (
            tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for tokens in self._project(hidden_states, query_tokens)
        )  # (batch, heads, tokens, head width)
        if packing is None:
            output, weights = self._attend(query, key, value, attention_mask, key_bias, **kwargs)
        else:
            weights = None
            output = packed_attention(self, query, key, value, packing, num_queries, key_bias, self._attend, **kwargs)
        return self.o_proj(output.flatten(2)), weights, key


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
    last layer. With `merge_step` tokens are merged between attention and MLP, and their sizes come back too. With
    `packing` the batch is one sequence, of which linear layers see no padding.
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
        key_bias: torch.Tensor | None = None,
        merge_step: MergeStep | None = None,
        packing: Packing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        keeps_layout = packing is not None and packing.keeps_layout
        if keeps_layout:
            hidden_states = packing.pack(hidden_states)
        # No name holds what a step below no longer needs: the MLP's large tensors take that memory over.
        update, _, keys = self.attention(
            self.layernorm_before(hidden_states), attention_mask, num_queries, key_bias, packing, **kwargs
        )
        keys = None if merge_step is None else keys.mean(dim=1)
        if num_queries is not None:
            hidden_states = first_tokens(hidden_states, num_queries, packing)
            packing = None if packing is None else packing.of_first(num_queries)
        hidden_states = hidden_states + self.drop_path(self.attention_scale(self.dropout(update)), packing)
        del update
        sizes = None
        if merge_step is not None:
            hidden_states, sizes = merge_tokens(hidden_states, keys, *merge_step)
        update = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.mlp_scale(self.dropout(update)), packing)
        if keeps_layout:
            hidden_states = packing.unpack(hidden_states)
        return hidden_states if merge_step is None else (hidden_states, sizes)


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
        self.config = config
        self.made_for = config.pooling
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.pooling == "pooler":
            self.dense = nn.Linear(config.hidden_size, config.pooled_size)
            self.activation = ACT2FN[config.pooler_act]
        if config.pooling == "attention":
            self.attention = AttentionPooling(config)
        self.layernorm = (
            nn.LayerNorm(config.pooled_size, eps=config.layer_norm_eps) if config.fc_norm else nn.Identity()
        )

    @property
    def pooling(self) -> str:
        """`config.pooling`, which may have changed since the model was made: where no weights depend on it.

        Raises:
            ValueError: where they do.
        """
        pooling, same_weights = self.config.pooling, ("cls", "mean") if self.config.use_cls_token else ("mean",)
        if pooling != self.made_for and not (pooling in same_weights and self.made_for in ("cls", "mean")):
            raise ValueError(
                f"`config.pooling` was {self.made_for!r} when the model was made, whose weights cannot pool by "
                f"{pooling!r}: make or load a model with `pooling={pooling!r}`."
            )
        return pooling

    def _with_prefix(self, token_weights: torch.Tensor | None) -> torch.Tensor | None:
        """Weights of the patch tokens -> of all tokens: prefix tokens count once."""
        if token_weights is None or self.num_prefix_tokens == 0:
            return token_weights
        return nn.functional.pad(token_weights.float(), (self.num_prefix_tokens, 0), value=1.0)

    def _mean(self, hidden_states: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
        patches = hidden_states[:, self.num_prefix_tokens :]
        if token_weights is None:
            return patches.mean(dim=1)
        weights = token_weights.float()[..., None]  # the sum may be more than float16 holds
        return ((patches * weights).sum(dim=1) / weights.sum(dim=1)).to(patches.dtype)

    def forward(self, hidden_states: torch.Tensor, token_weights: torch.Tensor | None = None) -> torch.Tensor:
        """`token_weights` (batch, patch tokens): how much each counts in a mean, 0 for padding; all alike if None."""
        pooling = self.pooling
        if pooling == "mean":
            pooled = self._mean(hidden_states, token_weights)
        elif pooling == "cls_mean":
            pooled = torch.cat([hidden_states[:, 0], self._mean(hidden_states, token_weights)], dim=-1)
        elif pooling == "pooler":
            pooled = self.activation(self.dense(hidden_states[:, 0]))
        elif pooling == "attention":
            pooled = self.attention(hidden_states, self._with_prefix(token_weights))
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
        elif isinstance(module, AttentionPooling):
            module.draw_probe(self.config.initializer_range)
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
