"""Towers of this library inside of LLaVA models: swapped in, and their token budget changed.

Importing this registers what a saved LLaVA with a tower of this library needs to load; the functions, which need the
LLaVA models of transformers, are imported at first use.
"""

from importlib import import_module

from .downsampled import DownsampledTower, DownsampledTowerConfig
from .earlier import PerPictureLlavaProcessor
from .packed import PackedTower, PackedTowerConfig
from .processing import (
    BudgetLlavaNextProcessor,
    BudgetLlavaOnevisionProcessor,
    BudgetLlavaProcessor,
    BudgetVipLlavaProcessor,
)
from .processing_gemma import BudgetGemma3Processor, BudgetPaliGemmaProcessor


_LAZY = {
    "ResumableCheckpoints": ".resuming",
    "load_vila": ".convert_vila",
    "set_token_budget": ".swap",
    "swap_vision_tower": ".swap",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BudgetGemma3Processor",
    "BudgetLlavaNextProcessor",
    "BudgetLlavaOnevisionProcessor",
    "BudgetLlavaProcessor",
    "BudgetPaliGemmaProcessor",
    "BudgetVipLlavaProcessor",
    "DownsampledTower",
    "DownsampledTowerConfig",
    "PackedTower",
    "PackedTowerConfig",
    "PerPictureLlavaProcessor",
    "ResumableCheckpoints",
    "load_vila",
    "set_token_budget",
    "swap_vision_tower",
]
