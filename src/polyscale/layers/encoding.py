"""Runs the layers of the shared encoder: all tokens or what a head pools, with or without merging on the way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .encoder import EncoderLayer
from .token_merging import MergeStep, merge_schedule


class Encoded(NamedTuple):
    """What comes out of the layers.

    Attributes:
        hidden_states (`torch.Tensor`): (batch, tokens, hidden).
        sizes (`torch.Tensor` or `None`): (batch, tokens), how many tokens each stands for; `None` without merging.
    """

    hidden_states: torch.Tensor
    sizes: torch.Tensor | None


def run_merging_layers(
    layers: Sequence[EncoderLayer],
    hidden_states: torch.Tensor,
    merge_tokens_to: int,
    num_prefix_tokens: int,
    key_bias: torch.Tensor | None = None,
    num_merging: int | None = None,
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
        kwargs: for each layer.

    Raises:
        ValueError: for a number that the layers cannot reach: each merges at most half of its tokens.
    """
    sizes = None if key_bias is None else key_bias.exp()
    num_merging = len(layers) if num_merging is None else min(max(num_merging, 0), len(layers))
    schedule = merge_schedule(hidden_states.shape[1] - num_prefix_tokens, merge_tokens_to, num_merging)
    schedule += [0] * (len(layers) - num_merging)
    for layer, num_merged in zip(layers, schedule, strict=True):
        bias = None if sizes is None else sizes.log()
        step = MergeStep(num_merged, sizes, num_prefix_tokens)
        hidden_states, sizes = layer(hidden_states, key_bias=bias, merge_step=step, **kwargs)
    return Encoded(hidden_states, sizes)


__all__ = ["Encoded", "run_merging_layers"]
