"""Image processor of FlexiViT, PIL backend."""

from transformers import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling

from ...utils.validation import FiniteImagesMixin


class FlexiViTImageProcessorPil(FiniteImagesMixin, PilBackend):
    """The twin of `FlexiViTImageProcessor` by Pillow and NumPy: same fields, same results."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"shortest_edge": 252}
    crop_size = {"height": 240, "width": 240}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["FlexiViTImageProcessorPil"]
