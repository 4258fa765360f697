"""Towers of this library inside of LLaVA models: swapped in, their token budget changed, checkpoints converted."""

from .budget import set_token_budget
from .packed import PackedTower, PackedTowerConfig, PerPictureLlavaProcessor
from .registration import register
from .swap import swap_vision_tower


register()

__all__ = [
    "PackedTower",
    "PackedTowerConfig",
    "PerPictureLlavaProcessor",
    "register",
    "set_token_budget",
    "swap_vision_tower",
]
