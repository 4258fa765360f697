"""Image processor of FlexiViT, PIL backend."""

from transformers import PilBackend

from .image_processing_flexivit import FlexiViTImageProcessorMixin


class FlexiViTImageProcessorPil(FlexiViTImageProcessorMixin, PilBackend):
    """The twin of `FlexiViTImageProcessor` by Pillow and NumPy: same fields, same results."""


__all__ = ["FlexiViTImageProcessorPil"]
