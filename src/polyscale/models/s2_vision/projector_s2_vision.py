"""VILA's projector, which reads 2 x 2 tokens of an S2 tower as one."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


PROJECTOR_FILE = "mm_projector.safetensors"


def space_to_depth(tokens: torch.Tensor) -> torch.Tensor:
    """A square grid of tokens (batch, rows * columns, width) -> each 2 x 2 of them as one, (batch, ..., 4 *
    width); odd grids get zeros after them.
    """
    batch, count, width = tokens.shape
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"`tokens` must be a square grid, got {count} tokens.")
    grid = tokens.reshape(batch, side, side, width)
    if side % 2:
        grid = nn.functional.pad(grid, (0, 0, 0, 1, 0, 1))
    half = (side + 1) // 2
    grid = grid.reshape(batch, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, half * half, 4 * width)


class DownsampleProjector(nn.Module):
    """VILA's projector "mlp_downsample": 2 x 2 tokens as one, LayerNorm, two linear layers. (batch, tokens,
    width) -> (batch, tokens / 4, text width)
    """

    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.linear_1(self.layernorm(space_to_depth(features)))
        return self.linear_2(nn.functional.gelu(hidden))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "DownsampleProjector":
        """The projector that `convert_s2_vision` wrote beside a VILA tower."""
        tensors = load_file(Path(folder) / PROJECTOR_FILE)
        text_width, width = tensors["linear_1.weight"].shape
        projector = cls(width // 4, text_width).to(tensors["linear_1.weight"].dtype)
        projector.load_state_dict(tensors)
        return projector


__all__ = ["PROJECTOR_FILE", "DownsampleProjector", "space_to_depth"]
