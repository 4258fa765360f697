"""Attention of many thin heads on a CPU: SparseFormer v1 has 64 heads, 4 to 12 wide."""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable


# Attention weights at a time: a cache holds them.
_WEIGHTS = 2**20


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float
) -> Iterator[tuple[tuple[int, slice], torch.Tensor, torch.Tensor]]:
    """Goes through the pictures, and through parts of the heads where there are too many weights.

    Args:
        query, key: (batch, heads, head_dim, tokens).

    Yields:
        Which picture and heads; their weights (heads, keys, queries); memory of the same shape, free to use. Both are
        overwritten in the next step: fresh memory takes longer to get than to compute into.
    """
    batch, num_heads, _, num_tokens = query.shape
    num_parts = -(-num_heads * num_tokens**2 // _WEIGHTS)
    part_size = -(-num_heads // num_parts)
    buffers = query.new_empty(2, part_size, num_tokens, num_tokens)
    for picture in range(batch):
        for first in range(0, num_heads, part_size):
            part = picture, slice(first, first + part_size)
            scores, weights = buffers[:, : num_heads - first]
            torch.bmm(key[part].transpose(1, 2) * scaling, query[part], out=scores)
            torch.softmax(scores, dim=1, out=weights)
            yield part, weights, scores


class ThinAttention(torch.autograd.Function):
    """Attention: `apply(qkv, scaling)`, (batch, tokens, 3, heads, head_dim) -> (batch, tokens, heads, head_dim).

    Products are several times faster if their rows are long, so all results are (..., head_dim, tokens) here. The
    backward pass computes the weights again instead of storing them. Not differentiable twice, as torch's fused
    attention.
    """

    @staticmethod
    def forward(qkv: torch.Tensor, scaling: float) -> torch.Tensor:
        query, key, value = qkv.permute(2, 0, 3, 4, 1)
        output = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
        attended = output.permute(0, 2, 3, 1)
        for part, weights, _ in _attention_weights(query, key, scaling):
            attended[part] = torch.bmm(value[part], weights)
        return output

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        qkv, ctx.scaling = inputs
        ctx.save_for_backward(qkv, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        qkv, output = ctx.saved_tensors
        gradients = torch.empty_like(qkv)
        query, key, value = qkv.permute(2, 0, 3, 4, 1)
        to_query, to_key, to_value = gradients.permute(2, 0, 3, 4, 1)
        # Each weight's gradient less the mean, by the weights, of those of its query.
        mean = (output * gradient).sum(dim=-1).transpose(1, 2).unsqueeze(2)
        gradient = gradient.permute(0, 2, 3, 1)
        for part, weights, buffer in _attention_weights(query, key, ctx.scaling):
            to_value[part] = torch.bmm(gradient[part], weights.transpose(1, 2))
            scores = torch.bmm(value[part].transpose(1, 2), gradient[part], out=buffer)
            scores.sub_(mean[part]).mul_(weights).mul_(ctx.scaling)
            to_query[part] = torch.bmm(key[part], scores)
            to_key[part] = torch.bmm(query[part], scores.transpose(1, 2))
        return gradients, None


__all__ = ["ThinAttention"]
