"""Image processor of SparseFormer, PIL backend."""

from transformers import PilBackend

from ...utils.processor_input import FiniteImagesMixin
from .image_processing_sparseformer import SparseFormerPixelFields


class SparseFormerImageProcessorPil(FiniteImagesMixin, SparseFormerPixelFields, PilBackend):
    """The twin of `SparseFormerImageProcessor` by Pillow and NumPy: same fields, same results."""


__all__ = ["SparseFormerImageProcessorPil"]
