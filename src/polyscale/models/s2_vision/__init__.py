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
from .multiscale import multiscale_forward


__all__ = [
    "S2ImageProcessor",
    "S2ImageProcessorPil",
    "S2VisionBackbone",
    "S2VisionConfig",
    "S2VisionForImageClassification",
    "S2VisionOutput",
    "S2VisionPreTrainedModel",
    "S2VisionWrapper",
    "multiscale_forward",
]
