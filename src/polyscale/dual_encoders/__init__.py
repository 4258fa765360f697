"""Towers of this library inside of CLIP-like models: zero-shot classification and search at any token budget."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from .configuration_dual_encoder import BudgetCLIPConfig, BudgetSiglipConfig
from .modeling_dual_encoder import BudgetCLIPModel, BudgetSiglipModel, DualEncoderOutput


_LAZY = {"is_dual_encoder", "swap_dual_encoder_tower"}  # need the CLIP and SigLIP of transformers


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(".swap_dual_encoder", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _config, _model in ((BudgetCLIPConfig, BudgetCLIPModel), (BudgetSiglipConfig, BudgetSiglipModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(_config, _model, exist_ok=True)

__all__ = [
    "BudgetCLIPConfig",
    "BudgetCLIPModel",
    "BudgetSiglipConfig",
    "BudgetSiglipModel",
    "DualEncoderOutput",
    "is_dual_encoder",
    "swap_dual_encoder_tower",
]
