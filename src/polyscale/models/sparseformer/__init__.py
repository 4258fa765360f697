from .configuration_sparseformer import SparseFormerConfig
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .image_processing_pil_sparseformer import SparseFormerImageProcessorPil
from .image_processing_sparseformer import SparseFormerImageProcessor
from .modeling_sparseformer import (
    SparseFormerForImageClassification,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerOpenCLIPVisual,
    SparseFormerPreTrainedModel,
)
from .modeling_sparseformer_video import (
    SparseFormerForVideoClassification,
    SparseFormerVideoModel,
    SparseFormerVideoModelWithProjection,
    SparseFormerVideoPreTrainedModel,
)
from .video_processing_sparseformer import SparseFormerVideoProcessor


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
