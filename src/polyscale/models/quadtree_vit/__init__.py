from ..auto import register_family
from .configuration_quadtree_vit import QuadtreeViTConfig
from .feature_scoring_quadtree_vit import FeatureBasedPatchScorer
from .gradcam_quadtree_vit import gradcam_oracle
from .image_processing_pil_quadtree_vit import QuadtreeViTImageProcessorPil
from .image_processing_quadtree_vit import QuadtreeViTImageProcessor
from .modeling_projection_quadtree_vit import QuadtreeViTModelWithProjection
from .modeling_quadtree_vit import (
    QuadtreeViTBackbone,
    QuadtreeViTForImageClassification,
    QuadtreeViTModel,
    QuadtreeViTPreTrainedModel,
)
from .patch_scorers_quadtree_vit import register_patch_scorer
from .scoring_quadtree_vit import (
    EmbeddingPatchScorer,
    EntropyPatchScorer,
    PatchScorer,
    PixelBlurPatchScorer,
    PrecomputedPatchScorer,
    RandomPatchScorer,
)
from .tokenizing_quadtree_vit import QuadtreeTokenizer, VanillaTokenizer


register_family(
    QuadtreeViTConfig,
    QuadtreeViTModel,
    classifier=QuadtreeViTForImageClassification,
    backbone=QuadtreeViTBackbone,
    image_processors={"torchvision": QuadtreeViTImageProcessor, "pil": QuadtreeViTImageProcessorPil},
    converter=f"{__name__}.convert_quadtree_vit:convert_quadtree_vit",
    exporters={"flexivit": f"{__name__}.export_quadtree_vit:export_flexivit"},
    drawing=f"{__name__}.plot_quadtree_vit:draw_quadtrees",
    budget_drawing=f"{__name__}.plot_quadtree_vit:draw_patches",
    training_config=f"{__name__}.training_quadtree_vit:training_config",
    projection=QuadtreeViTModelWithProjection,
)


__all__ = [
    "EmbeddingPatchScorer",
    "EntropyPatchScorer",
    "FeatureBasedPatchScorer",
    "PatchScorer",
    "PixelBlurPatchScorer",
    "PrecomputedPatchScorer",
    "QuadtreeTokenizer",
    "QuadtreeViTBackbone",
    "QuadtreeViTConfig",
    "QuadtreeViTForImageClassification",
    "QuadtreeViTImageProcessor",
    "QuadtreeViTImageProcessorPil",
    "QuadtreeViTModel",
    "QuadtreeViTModelWithProjection",
    "QuadtreeViTPreTrainedModel",
    "RandomPatchScorer",
    "VanillaTokenizer",
    "gradcam_oracle",
    "register_patch_scorer",
]
