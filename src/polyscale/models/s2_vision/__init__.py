from ..auto import register_family
from .configuration_s2_vision import S2VisionConfig
from .image_processing_pil_s2_vision import S2ImageProcessorPil
from .image_processing_s2_vision import S2ImageProcessor
from .modeling_s2_vision import (
    S2VisionBackbone,
    S2VisionForImageClassification,
    S2VisionOutput,
    S2VisionPreTrainedModel,
    S2VisionWrapper,
)
from .multiscale_s2_vision import multiscale_forward
from .tile_map_s2_vision import fit_tile_map


register_family(
    S2VisionConfig,
    S2VisionWrapper,
    classifier=S2VisionForImageClassification,
    backbone=S2VisionBackbone,
    image_processors={"torchvision": S2ImageProcessor, "pil": S2ImageProcessorPil},
    converter=f"{__name__}.convert_s2_vision:convert_s2_vision",
    drawing=f"{__name__}.plot_s2_vision:draw_s2",
    training_config=f"{__name__}.training_s2_vision:training_config",
)


__all__ = [
    "S2ImageProcessor",
    "S2ImageProcessorPil",
    "S2VisionBackbone",
    "S2VisionConfig",
    "S2VisionForImageClassification",
    "S2VisionOutput",
    "S2VisionPreTrainedModel",
    "S2VisionWrapper",
    "fit_tile_map",
    "multiscale_forward",
]
