"""Image processor of SparseFormer, PIL backend."""

from transformers import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ...utils.validation import FiniteImagesMixin


class SparseFormerImageProcessorPil(FiniteImagesMixin, PilBackend):
    """The twin of `SparseFormerImageProcessor` by Pillow and NumPy: same fields, same results."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["SparseFormerImageProcessorPil"]
