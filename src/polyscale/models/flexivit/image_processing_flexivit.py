"""Image processor of FlexiViT, torchvision backend."""

from transformers import TorchvisionBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling

from ...utils.processor_input import FiniteImagesMixin


class FlexiViTImageProcessorMixin(FiniteImagesMixin):
    """The fields of both backends."""

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


class FlexiViTImageProcessor(FlexiViTImageProcessorMixin, TorchvisionBackend):
    """Images -> `pixel_values` (batch, channels, height, width): resize of the short side, centre crop, normalise.

    The defaults are timm's evaluation of `flexivit_*`: short side to 252 (crop ratio 0.95), crop of 240 x 240,
    bicubic, mean and standard deviation 0.5. Any `size` and `crop_size` work: the model takes every height and width.

    Raises:
        ValueError: for images with NaN or infinite values.
    """


__all__ = ["FlexiViTImageProcessor", "FlexiViTImageProcessorMixin"]
