from .configuration_quadtree_vit import QuadtreeViTConfig
from .gradcam_quadtree_vit import gradcam_oracle
from .image_processing_pil_quadtree_vit import QuadtreeViTImageProcessorPil
from .image_processing_quadtree_vit import QuadtreeViTImageProcessor
from .modeling_quadtree_vit import (
    QuadtreeViTBackbone,
    QuadtreeViTForImageClassification,
    QuadtreeViTModel,
    QuadtreeViTPreTrainedModel,
)
from .scoring_quadtree_vit import (
    FeatureBasedPatchScorer,
    PixelBlurPatchScorer,
    PrecomputedPatchScorer,
    RandomPatchScorer,
)
from .tokenizing_quadtree_vit import QuadtreeTokenizer, VanillaTokenizer


__all__ = [
    "FeatureBasedPatchScorer",
    "PixelBlurPatchScorer",
    "PrecomputedPatchScorer",
    "QuadtreeTokenizer",
    "QuadtreeViTBackbone",
    "QuadtreeViTConfig",
    "QuadtreeViTForImageClassification",
    "QuadtreeViTImageProcessor",
    "QuadtreeViTImageProcessorPil",
    "QuadtreeViTModel",
    "QuadtreeViTPreTrainedModel",
    "RandomPatchScorer",
    "VanillaTokenizer",
    "gradcam_oracle",
]
