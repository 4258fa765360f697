from .configuration_flexivit import FlexiViTConfig
from .image_processing_flexivit import FlexiViTImageProcessor
from .image_processing_pil_flexivit import FlexiViTImageProcessorPil
from .modeling_flexivit import (
    FlexiViTBackbone,
    FlexiViTForImageClassification,
    FlexiViTModel,
    FlexiViTPreTrainedModel,
)


__all__ = [
    "FlexiViTBackbone",
    "FlexiViTConfig",
    "FlexiViTForImageClassification",
    "FlexiViTImageProcessor",
    "FlexiViTImageProcessorPil",
    "FlexiViTModel",
    "FlexiViTPreTrainedModel",
]
