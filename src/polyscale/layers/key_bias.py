"""A bias on the keys of attention: tokens that count more or less than others, also in kernels that take no mask."""

import torch
import torch.nn.functional as F


# Kernels that read no bias: it goes into one more channel of queries and keys. Head widths are multiples of 8 there.
_WITHOUT_BIAS = ("flash_attention_2", "flash_attention_3", "flex_attention")
_MULTIPLE = 8


def with_key_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    key_bias: torch.Tensor,
    scaling: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, keys, values and mask with which an attention function adds `key_bias` to the logits of each key.

    Where the kernel takes a mask, the bias is one, added to the mask that is there. Else q' = [q, 1] and
    k' = [k, bias / scaling], whose product is q k + bias / scaling; values get channels of zeros, to be cut off.

    Args:
        query (`torch.Tensor`): (batch, heads, queries, head width).
        key (`torch.Tensor`): (batch, heads, tokens, head width).
        value (`torch.Tensor`): (batch, heads, tokens, head width).
        attention_mask (`torch.Tensor`, *optional*): (batch, 1, queries, tokens), bool (True = seen) or added to
            logits; for the kernels without bias, what they take.
        key_bias (`torch.Tensor`): (batch, tokens).
        scaling (`float`): of the products.
        implementation (`str`, *optional*): transformers' name of the attention function.
    """
    if implementation in _WITHOUT_BIAS:
        width = query.shape[-1]
        extra = -(width + 1) % _MULTIPLE + 1
        column = (key_bias / scaling).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, extra - 1))
        key = F.pad(torch.cat([key, column], dim=-1), (0, extra - 1))
        return query, key, F.pad(value, (0, extra)), attention_mask
    bias = key_bias.to(query.dtype)[:, None, None, :]
    if attention_mask is None:
        return query, key, value, bias
    if attention_mask.dtype == torch.bool:
        return query, key, value, torch.where(attention_mask, bias, torch.finfo(query.dtype).min)
    return query, key, value, attention_mask + bias


__all__ = ["with_key_bias"]
