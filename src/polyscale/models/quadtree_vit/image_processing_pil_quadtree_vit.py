"""Image processor of Quadtree ViT, PIL backend."""

from transformers import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ...utils.validation import FiniteImagesMixin
from .image_processing_quadtree_vit import LegalSizeMixin, QuadtreeViTImageProcessorKwargs


class QuadtreeViTImageProcessorPil(FiniteImagesMixin, LegalSizeMixin, PilBackend):
    """The twin of `QuadtreeViTImageProcessor` by Pillow and NumPy: same fields, same results."""

    valid_kwargs = QuadtreeViTImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 256, "width": 256}
    crop_size = {"height": 256, "width": 256}
    fit = "squash"
    max_patch_size = 64
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["QuadtreeViTImageProcessorPil"]
