"""Image processor of Quadtree ViT, torchvision backend; the PIL backend shares the sizes made here."""

import math

from PIL import Image, ImageOps
from transformers import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from ...utils.processor_input import FiniteImagesMixin
from ...utils.processors import plain_options_for_size, plain_seen_region
from ...utils.validation import check_choice
from .selection_quadtree_vit import check_multiple


FITS = ("squash", "crop", "pad", "aspect")


class QuadtreeViTImageProcessorKwargs(ImagesKwargs, total=False):
    """
    fit (`str`):
        How an image gets its legal size: "squash", "crop", "pad" or "aspect".
    max_patch_size (`int`):
        Side in pixels of the largest patches: height and width become multiples of it.
    """

    fit: str
    max_patch_size: int


def _up_to_multiple(length: int, multiple: int) -> int:
    return max(-(-length // multiple), 1) * multiple


def fitted_size(height: int, width: int, size: SizeDict, fit: str, max_patch_size: int) -> tuple[int, int]:
    """(height, width) in pixels that an image is resized to by "crop", "pad" or "aspect".

    "crop": the smallest size that covers `size`. "pad": the largest size that fits into `size`. "aspect": the
    multiples of `max_patch_size` nearest to the image enlarged or reduced to the area of `size`, or to its shortest
    edge.

    Raises:
        ValueError: if `size` lacks what `fit` needs.
    """
    if fit == "aspect" and size.shortest_edge:
        scale = size.shortest_edge / min(height, width)
    elif not (size.height and size.width):
        raise ValueError(f"`size` must have 'height' and 'width' for `fit={fit!r}`, got {dict(size)}.")
    elif fit == "aspect":
        scale = math.sqrt(size.height * size.width / (height * width))
    elif fit == "crop":
        scale = max(size.height / height, size.width / width)
        return max(round(height * scale), size.height), max(round(width * scale), size.width)
    else:
        scale = min(size.height / height, size.width / width)
        return max(round(height * scale), 1), max(round(width * scale), 1)
    return tuple(max(round(length * scale / max_patch_size), 1) * max_patch_size for length in (height, width))


class LegalSizeMixin:
    """Brings images to multiples of `max_patch_size`; goes in front of transformers' torchvision or PIL backend."""

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

    def __init__(self, **kwargs):
        size = kwargs.get("size")
        if kwargs.get("crop_size") is None and isinstance(size, (dict, SizeDict)) and "height" in dict(size):
            kwargs["crop_size"] = dict(size)
        super().__init__(**kwargs)
        check_choice("fit", self.fit, FITS)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the images made; `None` where that depends on the image."""
        if not self.do_resize or self.fit == "aspect":
            return None
        size = self.crop_size if self.do_center_crop and self.fit == "squash" else self.size
        return (size.height, size.width) if size.height and size.width else None

    def options_for_size(self, image_size: tuple[int, int], crop_pct: float | None = None) -> dict:
        """Arguments of a call that bring images to (height, width) = `image_size`.

        Raises:
            ValueError: with `fit="aspect"`, whose sizes follow each image's shape; for a `crop_pct` with `fit="crop"`
                or "pad", which say themselves what is cut off.
        """
        if self.fit == "aspect":
            raise ValueError(
                f"The image processor has `fit='aspect'`, which sizes each image by its shape: {image_size} cannot "
                "be asked for. Set `fit='squash'`, `'crop'` or `'pad'` in its preprocessor_config.json."
            )
        if self.fit == "squash":
            return plain_options_for_size(self, image_size, crop_pct)
        if crop_pct is not None:
            raise ValueError(f"`crop_pct` cannot be followed: the image processor crops as `fit={self.fit!r}` says.")
        return {"size": dict(zip(("height", "width"), image_size, strict=True)), "do_resize": True}

    def seen_region(self, image: Image.Image) -> Image.Image:
        """The part of an RGB image that the model sees, at the image's own resolution."""
        if self.fit != "crop" or not self.do_resize:
            return plain_seen_region(image, self)
        scale = min(image.height / self.size.height, image.width / self.size.width)
        return ImageOps.fit(image, (round(self.size.width * scale), round(self.size.height * scale)))

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        size: SizeDict,
        resample: object,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        fit: str,
        max_patch_size: int,
        return_tensors: object,
        **kwargs,
    ) -> BatchFeature:
        check_choice("fit", fit, FITS)
        if max_patch_size < 1:
            raise ValueError(f"`max_patch_size` must be at least 1 pixel, got {max_patch_size}.")
        if do_resize:
            images = [self._resize_to_fit(image, size, resample, fit, max_patch_size) for image in images]
        images = super()._preprocess(
            images,
            do_resize=False,
            size=size,
            resample=resample,
            do_pad=False,
            pad_size=None,
            return_tensors=None,
            **kwargs,
        )["pixel_values"]
        # After normalisation, so that padding with 0 is the mean colour and adds the weakest edge.
        if fit == "pad" or do_pad:
            target = pad_size or (size if do_resize and size.height else None)
            images = [self._pad_to(image, target, max_patch_size) for image in images]
        for image in images:
            check_multiple(tuple(image.shape[-2:]), max_patch_size, "max_patch_size")
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"The images have the sizes {sizes} after `fit={fit!r}` and cannot be one batch: process them one "
                f"at a time, or use `fit='squash'`, `'crop'` or `'pad'`."
            )
        return BatchFeature(data={"pixel_values": images}, tensor_type=return_tensors)

    def _resize_to_fit(self, image, size: SizeDict, resample: object, fit: str, max_patch_size: int):
        if fit == "squash":
            return self.resize(image=image, size=size, resample=resample)
        height, width = fitted_size(*image.shape[-2:], size, fit, max_patch_size)
        image = self.resize(image=image, size=SizeDict(height=height, width=width), resample=resample)
        return self.center_crop(image, size) if fit == "crop" else image

    def _pad_to(self, image, target: SizeDict | None, max_patch_size: int):
        if target is None:
            height, width = (_up_to_multiple(length, max_patch_size) for length in image.shape[-2:])
            target = SizeDict(height=height, width=width)
        return self.pad([image], pad_size=target)[0]


class QuadtreeViTImageProcessor(FiniteImagesMixin, LegalSizeMixin, TorchvisionBackend):
    """Images -> `pixel_values` (batch, channels, height, width), height and width multiples of `max_patch_size`.

    Args:
        fit: how an image gets its legal size: "squash" (resized to `size`, whatever its shape; with `do_center_crop`,
            cropped to `crop_size` afterwards), "crop" (its shape kept, as small as covers `size`, then a centre crop),
            "pad" (its shape kept, as large as fits into `size`, the rest padded at the bottom and the right with the
            mean colour; with `do_resize=False`, padded to the next legal size) or "aspect" (to the legal height and
            width nearest to its own shape, of about the area of `size`, or of its shortest edge).
        max_patch_size: side in pixels of the model's largest patches.
        size: {"height", "width"} in pixels, 256 x 256 by default.

    Raises:
        ValueError: for images with NaN or infinite values, an unknown `fit`, or a size that is not legal; it names
            the nearest legal ones.
    """


__all__ = ["FITS", "LegalSizeMixin", "QuadtreeViTImageProcessor", "QuadtreeViTImageProcessorKwargs", "fitted_size"]
