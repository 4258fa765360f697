from ..auto import register_family
from .configuration_flexivit import FlexiViTConfig
from .image_processing_flexivit import FlexiViTImageProcessor
from .image_processing_pil_flexivit import FlexiViTImageProcessorPil
from .modeling_flexivit import (
    FlexiViTBackbone,
    FlexiViTForImageClassification,
    FlexiViTModel,
    FlexiViTPreTrainedModel,
)
from .modeling_projection_flexivit import FlexiViTModelWithProjection


register_family(
    FlexiViTConfig,
    FlexiViTModel,
    classifier=FlexiViTForImageClassification,
    backbone=FlexiViTBackbone,
    image_processors={"torchvision": FlexiViTImageProcessor, "pil": FlexiViTImageProcessorPil},
    converter=f"{__name__}.convert_flexivit:convert_flexivit",
    exporters={
        "vit": f"{__name__}.export_flexivit:export_vit",
        "timm": f"{__name__}.export_timm_flexivit:export_timm",
    },
    drawing=f"{__name__}.plot_flexivit:draw_flexivit",
    budget_drawing=f"{__name__}.plot_flexivit:draw_patches",
    training_callbacks=(f"{__name__}.callbacks_flexivit:PatchSizeCallback",),
    training_config=f"{__name__}.training_flexivit:training_config",
    projection=FlexiViTModelWithProjection,
)


__all__ = [
    "FlexiViTBackbone",
    "FlexiViTConfig",
    "FlexiViTForImageClassification",
    "FlexiViTImageProcessor",
    "FlexiViTImageProcessorPil",
    "FlexiViTModel",
    "FlexiViTModelWithProjection",
    "FlexiViTPreTrainedModel",
]
