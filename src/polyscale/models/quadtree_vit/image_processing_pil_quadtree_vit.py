"""Image processor of Quadtree ViT, PIL backend."""

from transformers import PilBackend

from ...utils.processor_input import FiniteImagesMixin
from .image_processing_quadtree_vit import LegalSizeMixin, QuadtreeViTImageProcessorKwargs


class QuadtreeViTImageProcessorPil(FiniteImagesMixin, LegalSizeMixin, PilBackend):
    """The twin of `QuadtreeViTImageProcessor` by Pillow and NumPy: same fields, same results."""

    valid_kwargs = QuadtreeViTImageProcessorKwargs


__all__ = ["QuadtreeViTImageProcessorPil"]
