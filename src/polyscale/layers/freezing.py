"""Tensors that are made from weights once and kept, because that was asked for: the parts of a frozen budget."""

import sys

import torch
from torch import nn


class FreezableMixin:
    """A module that can keep tensors made from its weights. Stands in front of `nn.Module` among the bases.

    They are buffers, so that they follow `.to()`, and outside of the state dict. What may change the weights drops
    them: `train()`, loading a state dict, and a new module or parameter in the place of a part, such as an adapter.
    """

    # Names of the buffers; `None` where nothing is kept.
    frozen_tensors: tuple[str, ...] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in self.frozen_tensors:
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_pre_hook(_thaw_before_loading)

    def train(self, mode: bool = True) -> "FreezableMixin":
        if mode:
            thaw(self)
        return super().train(mode)

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            thaw(self)
        if isinstance(value, nn.Module):
            thaw(value)
        super().__setattr__(name, value)


def thaw(module: nn.Module) -> None:
    """Drops what a module and the modules in it keep."""
    for part in module.modules():
        if isinstance(part, FreezableMixin):
            for name in part.frozen_tensors:
                if getattr(part, name, None) is not None:  # a module that is being made has none of them yet
                    setattr(part, name, None)


def _thaw_before_loading(module: nn.Module, *args) -> None:
    thaw(module)


def is_plain(*weights: torch.Tensor | None) -> bool:
    """Whether weights are ordinary tensors with values: not quantised, not split over processes, not offloaded."""
    kinds = (torch.Tensor, nn.Parameter)
    return all(weight is None or (type(weight) in kinds and not weight.is_meta) for weight in weights)


def takes_gradients(*weights: torch.Tensor | None) -> bool:
    """Whether a product with weights is differentiated with respect to them, so that no copy may stand for them."""
    return torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)


def check_no_adapters(model: nn.Module) -> None:
    """Refuses a model with adapters of peft, which change what its weights do.

    Raises:
        ValueError: that names the first adapter layer.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # adapters cannot be there if it was never imported
    for name, module in model.named_modules():
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(
                f"`freeze_budget` needs a model without adapters, and `{name}` is a {type(module).__name__}. Merge "
                "them first (`model = model.merge_and_unload()`), or leave the budget unfrozen."
            )


__all__ = ["FreezableMixin", "check_no_adapters", "is_plain", "takes_gradients", "thaw"]
