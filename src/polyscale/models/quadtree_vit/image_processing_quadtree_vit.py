"""Image processor of Quadtree ViT, torchvision backend."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ...layers.image_checks import FiniteImagesMixin
from .image_sizes_quadtree_vit import LegalSizeMixin, QuadtreeViTImageProcessorKwargs


class QuadtreeViTImageProcessor(FiniteImagesMixin, LegalSizeMixin, TorchvisionBackend):
    """Pictures -> `pixel_values` (batch, channels, height, width), height and width multiples of `max_patch_size`.

    Args:
        fit: how a picture gets its legal size: "squash" (resized to `size`, whatever its shape; with `do_center_crop`,
            cropped to `crop_size` afterwards), "aspect" (to the legal height and width nearest to its own shape, of
            about the area of `size`, or of its shortest edge) or "pad" (its shape kept, as large as fits into `size`,
            the rest padded at the bottom and the right with the mean colour; with `do_resize=False`, padded to the
            next legal size).
        max_patch_size: side in pixels of the model's largest patches.
        size: {"height", "width"} in pixels, 256 x 256 by default.

    Raises:
        ValueError: for pictures with NaN or infinite values, an unknown `fit`, or a size that is not legal; it names
            the nearest legal ones.
    """

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


__all__ = ["QuadtreeViTImageProcessor"]
