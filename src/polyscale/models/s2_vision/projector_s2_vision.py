"""VILA's projector, which reads 2 x 2 tokens of an S2 tower as one."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn


PROJECTOR_FILE = "mm_projector.safetensors"


def space_to_depth(
    tokens: torch.Tensor, grid: tuple[int, int] | None = None, factor: int = 2, order: str = "rows"
) -> torch.Tensor:
    """A grid of tokens, each factor x factor of them as one; a grid that does not divide gets zeros after it.

    Args:
        tokens (`torch.Tensor`): (batch, rows * columns, width).
        grid (`(rows, columns)`, *optional*): of the tokens; a square when `None`.
        factor (`int`, *optional*, defaults to 2): of each side.
        order (`str`, *optional*, defaults to `"rows"`): of the new tokens: "rows" (row by row) or "columns".

    Returns:
        `torch.Tensor`: (batch, ceil(rows / factor) * ceil(columns / factor), factor ** 2 * width).

    Raises:
        ValueError: for tokens that are no such grid.
    """
    batch, count, width = tokens.shape
    rows, columns = grid or (int(count**0.5),) * 2
    if rows * columns != count:
        raise ValueError(
            f"`tokens` must be a {'square grid' if grid is None else f'grid {grid}'}, got {count} tokens."
        )
    maps = tokens.reshape(batch, rows, columns, width)
    if rows % factor or columns % factor:
        maps = nn.functional.pad(maps, (0, 0, 0, -columns % factor, 0, -rows % factor))
    maps = maps.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (batch, rows, factor, columns, factor, width)
    axes = (0, 1, 3, 2, 4, 5) if order == "rows" else (0, 3, 1, 2, 4, 5)
    return maps.permute(axes).flatten(3).flatten(1, 2)


def is_nvila(record: dict[str, Any]) -> bool:
    """Whether the code of NVILA (December 2024) wrote a config.json; VILA-1.5 is older."""
    return "image_encoder" in record


def token_order_of(record: dict[str, Any], projector: str) -> str:
    """The order in which the language model learnt to read the tokens: by "rows" or by "columns".

    The code that VILA-1.5 was trained with leaves the grid transposed after it has brought tokens together; that of
    NVILA turns it back.

    Args:
        record: config.json of the checkpoint.
        projector: the kind of its projector.
    """
    return "columns" if projector == "mlp_downsample" and not is_nvila(record) else "rows"


class DownsampleProjector(nn.Module):
    """VILA's projector "mlp_downsample": 2 x 2 tokens as one, LayerNorm, two linear layers. (batch, tokens,
    width) -> (batch, tokens / 4, text width)

    Args:
        vision_width (`int`): channels of a token of the tower.
        text_width (`int`): of a token of the language model.
        token_order (`str`, *optional*, defaults to `"rows"`): of the tokens that come out: row by row, or "columns".
    """

    def __init__(self, vision_width: int, text_width: int, token_order: str = "rows"):
        super().__init__()
        self.token_order = token_order
        self.layernorm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.linear_1(self.layernorm(space_to_depth(features, order=self.token_order)))
        return self.linear_2(nn.functional.gelu(hidden))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "DownsampleProjector":
        """The projector that `convert_s2_vision` wrote beside a VILA tower."""
        with safe_open(Path(folder) / PROJECTOR_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            order = (file.metadata() or {}).get("token_order", "rows")
        text_width, width = tensors["linear_1.weight"].shape
        projector = cls(width // 4, text_width, order).to(tensors["linear_1.weight"].dtype)
        projector.load_state_dict(tensors)
        return projector


__all__ = ["PROJECTOR_FILE", "DownsampleProjector", "is_nvila", "space_to_depth", "token_order_of"]
