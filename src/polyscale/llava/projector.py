"""The projector of a LLaVA model when its vision tower changes."""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ProjectorInput:
    """How a projector reads the tokens of a tower.

    Args:
        width: channels of a token that it reads.
        weight: the weight that reads them.
        linear: name of the linear layer with that weight; None where it is in none, or something else reads too.
    """

    width: int
    weight: torch.Tensor
    linear: str | None


def num_feature_layers(vision_feature_layer: int | list[int]) -> int:
    return 1 if isinstance(vision_feature_layer, int) else len(vision_feature_layer)


def share_weights(old: nn.Module, new: nn.Module) -> bool:
    """Whether `new` is `old`, holds it, or was made of it: at least half of the matrices of `old` are in it, value by
    value, wherever they stand.
    """
    own = {id(parameter) for parameter in new.parameters()}
    if all(id(parameter) in own for parameter in old.parameters()):
        return True
    matrices = [parameter for parameter in old.parameters() if parameter.ndim == 2 and parameter.device.type != "meta"]
    candidates: dict[tuple, list[torch.Tensor]] = {}
    for parameter in new.parameters():
        if parameter.device.type != "meta":
            candidates.setdefault(tuple(parameter.shape), []).append(parameter)

    def is_there(matrix: torch.Tensor) -> bool:
        return any(torch.equal(matrix, other.to(matrix)) for other in candidates.get(tuple(matrix.shape), ()))

    return bool(matrices) and 2 * sum(map(is_there, matrices)) >= len(matrices)


def _widened(old: nn.Linear, width: int, num_scales: int, layers: int) -> nn.Linear:
    """A layer that reads `num_scales` times as many channels: the old weights for the first, 0 for the others."""
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


def fitted_projector(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    keep: bool | None,
    is_related: bool,
    scales: int,
    *,
    layers: int,
    old_layers: int,
    reads: ProjectorInput,
) -> nn.Module | dict[str, nn.Module]:
    """The projector for another tower: that of the model, a new one, or the model's with the parts that are replaced.

    Args:
        model: the model with a `multi_modal_projector`, still with its old tower.
        config: that of the model with the new tower.
        keep: whether the projector is kept; where the towers are related, when None.
        is_related: whether the new tower was made of the old one.
        scales: how many scales of the old tower's features the new one gives side by side.
        layers: how many layers of the new tower are read.
        old_layers: how many of the old one.
        reads: how the projector reads the tower.

    Raises:
        ValueError: if it is to be kept and reads another width.
    """
    old = model.multi_modal_projector
    old_width, new_width = reads.width, config.vision_config.hidden_size * layers
    wanted = is_related if keep is None else keep
    if wanted and layers == old_layers:
        if old_width == new_width:
            return old
        only_linear_reads = reads.linear is not None and not any(
            parameter.shape[-1] == old_width for name, parameter in old.named_parameters() if reads.linear not in name
        )
        if scales > 1 and old_width * scales == new_width and only_linear_reads:
            return {reads.linear: _widened(getattr(old, reads.linear), old_width // layers, scales, layers)}
    if keep:
        raise ValueError(
            f"`keep_projector=True` is not possible: the projector reads {old_width} channels and the new tower gives "
            f"{new_width}."
        )
    if old_width != new_width:
        reason = f"The projector reads {old_width} channels and the new tower gives {new_width}"
    else:
        reason = "The projector was trained with another tower (`keep_projector=True` keeps it nevertheless)"
    warnings.warn(f"{reason}: it is replaced by a new one, which has to be trained.", stacklevel=3)
    new = type(old)(config).to(device=reads.weight.device, dtype=reads.weight.dtype)
    for module in new.modules():
        model._init_weights(module)
    return new.train(old.training)


__all__ = ["ProjectorInput", "fitted_projector", "num_feature_layers", "share_weights"]
