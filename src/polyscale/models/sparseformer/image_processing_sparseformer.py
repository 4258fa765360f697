"""Image processor of SparseFormer, torchvision backend."""

from transformers import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ...utils.processor_input import FiniteImagesMixin


class SparseFormerPixelFields:
    """The fields of both image processors and of the video processor."""

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


class SparseFormerImageProcessor(FiniteImagesMixin, SparseFormerPixelFields, TorchvisionBackend):
    """Images -> `pixel_values` (batch, channels, height, width): resize of the short side, centre crop, normalise.

    The defaults are the evaluation of SparseFormer v1: short side to 256, crop of 224 x 224, bilinear, ImageNet's mean
    and standard deviation. Any `size` and `crop_size` work, and `do_center_crop=False` keeps the whole image: the
    model takes every height and width.

    Raises:
        ValueError: for images with NaN or infinite values.
    """


__all__ = ["SparseFormerImageProcessor", "SparseFormerPixelFields"]
