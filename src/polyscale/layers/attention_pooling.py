"""Attention pooling: a learned query reads the tokens (SigLIP, arXiv 2303.15343; big_vision's and timm's "map")."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .encoder_config import EncoderConfig


class AttentionPooling(nn.Module):
    """(batch, tokens, hidden) -> (batch, hidden): one learned query attends to all tokens; then an MLP."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor, token_weights: torch.Tensor | None = None) -> torch.Tensor:
        """`token_weights` (batch, tokens): how often each token counts, 0 for padding; once if None."""
        query, key, value = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (
                self.q_proj(self.probe.expand(hidden_states.shape[0], -1, -1)),
                self.k_proj(hidden_states),
                self.v_proj(hidden_states),
            )
        )  # (batch, heads, 1 or tokens, head width)
        mask = None if token_weights is None else token_weights.to(query.dtype).log()[:, None, None, :]
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        pooled = self.o_proj(pooled.transpose(1, 2).flatten(2))[:, 0]  # (batch, hidden)
        return pooled + self.fc2(self.activation(self.fc1(self.layernorm(pooled))))

    def draw_probe(self, std: float) -> None:
        """The initial query."""
        init.trunc_normal_(self.probe, mean=0.0, std=std)


__all__ = ["AttentionPooling"]
