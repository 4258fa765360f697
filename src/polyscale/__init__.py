"""Vision models that let their user choose, at run time, how many visual tokens to spend on an image.

Importing polyscale registers every family with the Auto classes of transformers:

    >>> import polyscale
    >>> from transformers import AutoModelForImageClassification, pipeline
    >>> model = AutoModelForImageClassification.from_pretrained(polyscale.bundled_checkpoint("flexivit-tiny200"))
"""

from importlib import import_module

from .utils import quiet as _quiet  # noqa: F401 (before all that it silences)


# isort: split
from . import dual_encoders as _dual_encoders  # noqa: F401 (registers them)
from .layers.resizing import interpolate_resize_patch_embed, pi_resize_patch_embed, resize_abs_pos_embed
from .llava import packed as _packed  # noqa: F401 (registers what a saved LLaVA with packed tokens needs)
from .models.auto import register_family
from .models.flexivit import (
    FlexiViTBackbone,
    FlexiViTConfig,
    FlexiViTForImageClassification,
    FlexiViTImageProcessor,
    FlexiViTImageProcessorPil,
    FlexiViTModel,
    FlexiViTModelWithProjection,
)
from .models.quadtree_vit import (
    FeatureBasedPatchScorer,
    PatchScorer,
    PixelBlurPatchScorer,
    PrecomputedPatchScorer,
    QuadtreeTokenizer,
    QuadtreeViTBackbone,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    QuadtreeViTImageProcessorPil,
    QuadtreeViTModel,
    QuadtreeViTModelWithProjection,
    RandomPatchScorer,
    VanillaTokenizer,
    gradcam_oracle,
    register_patch_scorer,
)
from .models.quadtree_vit.pyramid_quadtree_vit import reverse_quadtree
from .models.quadtree_vit.selection_quadtree_vit import quadtree_tokens
from .models.s2_vision import (
    S2ImageProcessor,
    S2ImageProcessorPil,
    S2VisionBackbone,
    S2VisionConfig,
    S2VisionForImageClassification,
    S2VisionWrapper,
    fit_tile_map,
    multiscale_forward,
)
from .models.sparseformer import (
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerForVideoClassification,
    SparseFormerImageProcessor,
    SparseFormerImageProcessorPil,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerVideoConfig,
    SparseFormerVideoModel,
    SparseFormerVideoModelWithProjection,
    SparseFormerVideoProcessor,
)


__version__ = "0.2.0"

# Imported at first use: what they need is not needed by a model.
_LAZY = {
    "BudgetPolicy": ".budget_policy",
    "calibrate_policy": ".budget_policy",
    "classify_with_policy": ".budget_policy",
    "PatchSizeCallback": ".models.flexivit.callbacks_flexivit",
    "bundled_checkpoint": ".checkpoints",
    "convert_checkpoint": ".conversion",
    "apply_token_merging": ".token_merging",
    "convert_patch_embed": ".conversion",
    "remove_token_merging": ".token_merging",
    "sample_photographs": ".assets",
    "set_token_budget": ".llava",
    "swap_vision_tower": ".towers",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "BudgetPolicy",
    "FeatureBasedPatchScorer",
    "FlexiViTBackbone",
    "FlexiViTConfig",
    "FlexiViTForImageClassification",
    "FlexiViTImageProcessor",
    "FlexiViTImageProcessorPil",
    "FlexiViTModel",
    "FlexiViTModelWithProjection",
    "PatchScorer",
    "PatchSizeCallback",
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
    "RandomPatchScorer",
    "S2ImageProcessor",
    "S2ImageProcessorPil",
    "S2VisionBackbone",
    "S2VisionConfig",
    "S2VisionForImageClassification",
    "S2VisionWrapper",
    "SparseFormerConfig",
    "SparseFormerForImageClassification",
    "SparseFormerForVideoClassification",
    "SparseFormerImageProcessor",
    "SparseFormerImageProcessorPil",
    "SparseFormerModel",
    "SparseFormerModelWithProjection",
    "SparseFormerVideoConfig",
    "SparseFormerVideoModel",
    "SparseFormerVideoModelWithProjection",
    "SparseFormerVideoProcessor",
    "VanillaTokenizer",
    "apply_token_merging",
    "bundled_checkpoint",
    "calibrate_policy",
    "classify_with_policy",
    "convert_checkpoint",
    "convert_patch_embed",
    "fit_tile_map",
    "gradcam_oracle",
    "interpolate_resize_patch_embed",
    "multiscale_forward",
    "pi_resize_patch_embed",
    "quadtree_tokens",
    "register_family",
    "register_patch_scorer",
    "remove_token_merging",
    "resize_abs_pos_embed",
    "reverse_quadtree",
    "sample_photographs",
    "set_token_budget",
    "swap_vision_tower",
]
