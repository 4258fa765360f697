"""Whether a tensor is one: tracers put stand-ins in the place of tensors, which have shapes and no values."""

import torch


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a call is compiled or exported: a stand-in has no values, and does not mix with real tensors."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def can_be_kept(tensor: torch.Tensor) -> bool:
    """Whether later calls may use a tensor that was made in this one: neither a stand-in, nor on the meta device."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


def longest(lengths: torch.Tensor, advice: str) -> int:
    """The largest of some lengths as the size of a tensor.

    Raises:
        ValueError: in `torch.export`, whose shapes cannot depend on values; it ends with `advice`.
    """
    if torch.compiler.is_exporting():
        raise ValueError(f"A model whose number of tokens depends on the images cannot be exported: {advice}.")
    return int(lengths.max())


__all__ = ["can_be_kept", "is_traced", "longest"]
