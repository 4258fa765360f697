from ..auto import register_family
from .configuration_sparseformer import SparseFormerConfig
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .image_processing_pil_sparseformer import SparseFormerImageProcessorPil
from .image_processing_sparseformer import SparseFormerImageProcessor
from .modeling_sparseformer import (
    SparseFormerForImageClassification,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerPreTrainedModel,
)
from .modeling_sparseformer_video import (
    SparseFormerForVideoClassification,
    SparseFormerVideoModel,
    SparseFormerVideoModelWithProjection,
    SparseFormerVideoPreTrainedModel,
)
from .open_clip_sparseformer import SparseFormerOpenCLIPVisual
from .video_processing_sparseformer import SparseFormerVideoProcessor


register_family(
    SparseFormerConfig,
    SparseFormerModel,
    classifier=SparseFormerForImageClassification,
    image_processors={"torchvision": SparseFormerImageProcessor, "pil": SparseFormerImageProcessorPil},
    converter=f"{__name__}.convert_sparseformer:convert_sparseformer",
    drawing=f"{__name__}.plot_sparseformer:draw_family",
    training_callbacks=(f"{__name__}.callbacks_sparseformer:LossScaleCallback",),
    training_config=f"{__name__}.training_sparseformer:training_config",
    projection=SparseFormerModelWithProjection,
)
register_family(
    SparseFormerVideoConfig,
    SparseFormerVideoModel,
    video_classifier=SparseFormerForVideoClassification,
    video_processor=SparseFormerVideoProcessor,
    training_callbacks=(f"{__name__}.callbacks_sparseformer:LossScaleCallback",),
    converter=f"{__name__}.convert_sparseformer_video:convert_sparseformer_video",
    projection=SparseFormerVideoModelWithProjection,
)


__all__ = [
    "SparseFormerConfig",
    "SparseFormerForImageClassification",
    "SparseFormerForVideoClassification",
    "SparseFormerImageProcessor",
    "SparseFormerImageProcessorPil",
    "SparseFormerModel",
    "SparseFormerModelWithProjection",
    "SparseFormerOpenCLIPVisual",
    "SparseFormerPreTrainedModel",
    "SparseFormerVideoConfig",
    "SparseFormerVideoModel",
    "SparseFormerVideoModelWithProjection",
    "SparseFormerVideoPreTrainedModel",
    "SparseFormerVideoProcessor",
]
