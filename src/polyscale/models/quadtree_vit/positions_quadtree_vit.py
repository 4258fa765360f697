"""Sinusoidal positions (arXiv 2304.00287, section 3.3)."""

import math

import torch


def sinusoid(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(positions,) -> (positions, width), float32: the sine at each frequency, then the cosine at each."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


__all__ = ["sinusoid"]
