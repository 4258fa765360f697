"""What the backbones of the families share."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def feature_maps_of(
    backbone: PreTrainedModel,
    hidden_states: Sequence[torch.Tensor],
    to_map: Callable[[torch.Tensor], torch.Tensor],
    layernorm: nn.Module | None = None,
) -> tuple[torch.Tensor, ...]:
    """The feature maps of the stages in `backbone.out_features`.

    Args:
        backbone (`PreTrainedModel`): with `stage_names` and `out_features`, as transformers' `BackboneMixin` sets
            them, and `config.reshape_hidden_states`.
        hidden_states (`Sequence[torch.Tensor]`): one tensor for each stage, (batch, tokens, hidden).
        to_map (`Callable`): lays tokens out as (batch, hidden, rows, columns).
        layernorm (`nn.Module`, *optional*): applied before, where `config.apply_layernorm`.
    """
    feature_maps = ()
    for stage, states in zip(backbone.stage_names, hidden_states, strict=True):
        if stage not in backbone.out_features:
            continue
        if layernorm is not None and backbone.config.apply_layernorm:
            states = layernorm(states)
        feature_maps += (to_map(states) if backbone.config.reshape_hidden_states else states,)
    return feature_maps


__all__ = ["feature_maps_of"]
