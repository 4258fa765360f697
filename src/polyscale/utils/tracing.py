"""Whether a tensor is one: tracers put stand-ins in the place of tensors, which have shapes and no values."""

import torch


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a call is compiled or exported: a stand-in has no values, and does not mix with real tensors."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def can_be_kept(tensor: torch.Tensor) -> bool:
    """Whether later calls may use a tensor that was made in this one: neither a stand-in, nor on the meta device."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


__all__ = ["can_be_kept", "is_traced"]
