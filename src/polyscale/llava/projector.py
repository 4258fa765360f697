"""The projector of a LLaVA model when its vision tower changes."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def num_feature_layers(vision_feature_layer: int | list[int]) -> int:
    return 1 if isinstance(vision_feature_layer, int) else len(vision_feature_layer)


def _widened(old: nn.Linear, width: int, num_scales: int, layers: int) -> nn.Linear:
    """Reads `num_scales` times as many channels; those of the first scale as before, the others not at all."""
    new = nn.Linear(
        old.in_features * num_scales,
        old.out_features,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        # channels: layer by layer, in each of them scale by scale
        columns = new.weight.view(old.out_features, layers, num_scales, width)
        columns[:, :, 0] = old.weight.view(old.out_features, layers, width)
        if old.bias is not None:
            new.bias.copy_(old.bias)
    return new


def fit_projector(model: PreTrainedModel, old_config: PreTrainedConfig, layers: int, old_layers: int) -> None:
    """Makes `model.multi_modal_projector` read the tower in `model.config.vision_config`: kept, widened or new.

    Args:
        model: a `LlavaModel` or `LlavaNextModel`, its config already that of the new tower.
        old_config: the config of the tower before.
        layers: feature layers that are concatenated now.
        old_layers: feature layers before.
    """
    projector = model.multi_modal_projector
    tower_config = model.config.vision_config
    old_width, new_width = projector.linear_1.in_features, tower_config.hidden_size * layers
    if old_width == new_width:
        return
    inner = (
        getattr(tower_config, "vision_config", None)
        if tower_config.model_type == "polyscale_packed_tower"
        else tower_config
    )
    scales = getattr(inner, "num_scales", 1)
    if (
        scales > 1
        and layers == old_layers
        and old_width * scales == new_width
        and old_config.model_type != "s2_vision"
    ):
        projector.linear_1 = _widened(projector.linear_1, old_width // layers, scales, layers)
        return
    warnings.warn(
        f"The projector reads {old_width} channels and the new tower gives {new_width}: it is replaced "
        "by a new one, which has to be trained.",
        stacklevel=3,
    )
    weight = projector.linear_1.weight
    new = type(projector)(model.config).to(device=weight.device, dtype=weight.dtype)
    for module in new.modules():
        model._init_weights(module)
    model.multi_modal_projector = new.train(projector.training)


__all__ = ["fit_projector", "num_feature_layers"]
