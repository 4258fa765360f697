"""Runs the layers of the shared encoder: all tokens or what a head pools, padded, packed, or merging on the way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .encoder import EncoderLayer
from .encoder_config import EncoderConfig
from .packing import Padding, choose_packing, padding_mask
from .token_merging import MergeStep, merge_schedule


class Encoded(NamedTuple):
    """What comes out of layers that merge tokens.

    Attributes:
        hidden_states (`torch.Tensor`): (batch, tokens, hidden).
        weights (`torch.Tensor`): (batch, tokens), how much each counts in a mean.
    """

    hidden_states: torch.Tensor
    weights: torch.Tensor


def run_layers(
    layers: Sequence[EncoderLayer],
    hidden_states: torch.Tensor,
    config: EncoderConfig,
    padding: Padding | None = None,
    num_queries: int | None = None,
    key_bias: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Runs layers on a batch of images; what comes out at padding means nothing.

    Args:
        layers (`Sequence[EncoderLayer]`): up to the last of a model.
        hidden_states (`torch.Tensor`): (batch, tokens, hidden).
        config (`EncoderConfig`): of the model.
        padding (`Padding`, *optional*): which tokens are real, where images have token counts of their own.
        num_queries (`int`, *optional*): how many tokens, the first ones, are read of the last layer; all when `None`.
        key_bias (`torch.Tensor`, *optional*): (batch, tokens), added to the logits of each key.
        kwargs: for each layer.

    Returns:
        `torch.Tensor`: (batch, tokens, hidden); with `num_queries` these alone, where the last layer could leave the
        others out.
    """
    attention_mask = packing = None
    if padding is not None:
        packing = choose_packing(config, hidden_states, padding, kwargs)
        if packing is not None:
            kwargs["packing"] = packing
            key_bias = None if key_bias is None else packing.pack(key_bias)
            hidden_states = hidden_states if packing.keeps_layout else packing.pack(hidden_states)
        else:
            attention_mask = padding_mask(config, hidden_states, padding)
            if num_queries != 1:
                num_queries = None  # transformers' flash attention takes several for the last of a padded sequence
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        queries_of_layer = num_queries if index == last else None
        if queries_of_layer is not None and padding is not None and packing is None:
            attention_mask = padding_mask(config, hidden_states, padding, queries_of_layer)
        hidden_states = layer(hidden_states, attention_mask, queries_of_layer, key_bias, **kwargs)
    if packing is not None and not packing.keeps_layout:
        is_short = num_queries is not None and len(layers) > 0
        hidden_states = (packing.of_first(num_queries) if is_short else packing).unpack(hidden_states)
    return hidden_states


def run_merging_layers(
    layers: Sequence[EncoderLayer],
    hidden_states: torch.Tensor,
    merge_tokens_to: int,
    num_prefix_tokens: int,
    key_bias: torch.Tensor | None = None,
    num_merging: int | None = None,
    token_weights: torch.Tensor | None = None,
    **kwargs,
) -> Encoded:
    """Runs layers that merge similar tokens between attention and MLP, down to an exact number (ToMe).

    Args:
        layers (`Sequence[EncoderLayer]`): all of a model.
        hidden_states (`torch.Tensor`): (batch, num_prefix_tokens + patches, hidden).
        merge_tokens_to (`int`): patch tokens after the last layer.
        num_prefix_tokens (`int`): tokens in front that are not merged.
        key_bias (`torch.Tensor`, *optional*): (batch, tokens), logarithms of sizes that tokens have from the start.
        num_merging (`int`, *optional*): layers, the first ones, that merge; all when `None`.
        token_weights (`torch.Tensor`, *optional*): (batch, tokens), how much tokens count in a mean from the start; as
            `key_bias` says when `None`.
        kwargs: for each layer.

    Raises:
        ValueError: for a number that the layers cannot reach: each merges at most half of its tokens.
    """
    sizes = None if key_bias is None else key_bias.exp()
    if token_weights is not None:
        token_weights = token_weights.float()
        sizes = torch.stack([torch.ones_like(token_weights) if sizes is None else sizes, token_weights], dim=-1)
    num_merging = len(layers) if num_merging is None else min(max(num_merging, 0), len(layers))
    schedule = merge_schedule(hidden_states.shape[1] - num_prefix_tokens, merge_tokens_to, num_merging)
    schedule += [0] * (len(layers) - num_merging)
    for layer, num_merged in zip(layers, schedule, strict=True):
        bias = None if sizes is None else (sizes if token_weights is None else sizes[..., 0]).log()
        step = MergeStep(num_merged, sizes, num_prefix_tokens)
        hidden_states, sizes = layer(hidden_states, key_bias=bias, merge_step=step, **kwargs)
        sizes = sizes.detach()  # reentrant checkpointing marks all that comes out of a layer as differentiable
    if sizes is None:  # there was no layer
        sizes = hidden_states.new_ones(hidden_states.shape[:2])
    return Encoded(hidden_states, sizes if token_weights is None else sizes[..., 1])


__all__ = ["Encoded", "run_layers", "run_merging_layers"]
