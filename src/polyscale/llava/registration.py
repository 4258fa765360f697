"""What a saved LLaVA model with a tower that packs its tokens needs to load with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .packed import PackedTower, PackedTowerConfig, PerPictureLlavaProcessor


def register() -> None:
    AutoConfig.register(PackedTowerConfig.model_type, PackedTowerConfig, exist_ok=True)
    AutoModel.register(PackedTowerConfig, PackedTower, exist_ok=True)
    AutoProcessor.register(PackedTowerConfig, PerPictureLlavaProcessor, exist_ok=True)


__all__ = ["register"]
