"""Image processor of S2, torchvision backend."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers import BatchFeature, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from ...utils.processor_input import FiniteImagesMixin
from ...utils.validation import check_choice, to_pair
from .configuration_s2_vision import S2VisionConfig
from .dynamic_tiling_s2_vision import dynamic_tile_grid


FITS = ("squash", "crop", "pad")


class S2ImageProcessorKwargs(ImagesKwargs, total=False):
    """
    fit: "squash" (to `crop_size`, whatever the aspect ratio), "crop" (short side to `crop_size`, then centre crop)
        or "pad" (to a square with the mean colour, then to `crop_size`).
    tile_size: with Dynamic-S2, the side of a tile in pixels; None without.
    tile_multiples: with Dynamic-S2, the side of each scale's square, in tiles.
    max_tiles: with Dynamic-S2, the most tiles in the last scale.
    """

    fit: str
    tile_size: int
    tile_multiples: list[int]
    max_tiles: int


def _base_settings(base: BaseImageProcessor) -> dict:
    """What a base model's image processor does to values: its mean, standard deviation, resampling and so on."""
    names = ("image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb", "resample")
    return {name: getattr(base, name) for name in names if getattr(base, name, None) is not None}


def _with_crop_size(options: dict) -> dict:
    """Options of a processor that makes images of its `crop_size`, where they name `size` alone."""
    if options.get("size") is None or options.get("crop_size") is not None:
        return options
    return {**options, "crop_size": options["size"]}


class S2ImageProcessorMixin(FiniteImagesMixin):
    """What both backends of the S2 image processor share; a backend says how images are padded, resized,
    cropped and normalised.
    """

    valid_kwargs = S2ImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 448, "width": 448}
    crop_size = {"height": 448, "width": 448}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    fit = "squash"
    tile_size = None
    tile_multiples = None
    max_tiles = 12

    def __init__(self, **kwargs):
        super().__init__(**_with_crop_size(kwargs))

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        return super().preprocess(images, *args, **_with_crop_size(kwargs))

    @classmethod
    def for_config(
        cls, config: S2VisionConfig, base: BaseImageProcessor | None = None, fit: str | None = None, **kwargs
    ):
        """The image processor of an S2 model.

        Args:
            config: the S2 config; images come out at its largest scale, or as tiles with `config.dynamic`.
            base: the wrapped model's own image processor, for mean, standard deviation, rescaling and resampling.
            fit: "squash", "crop" or "pad"; as the base does ("crop" if it crops, else "squash") when None.
            kwargs: other fields of the processor.
        """
        if fit is None:
            fit = "crop" if getattr(base, "do_center_crop", False) else "squash"
        check_choice("fit", fit, FITS)
        settings = _base_settings(base) if base is not None else {}
        if config.dynamic:
            tile = config.tile_size[0]
            settings.update(
                tile_size=tile,
                tile_multiples=[round(multiple) for multiple in config.scale_multiples],
                max_tiles=config.max_tiles,
            )
        height, width = to_pair(config.image_size, "image_size")
        final = {"height": height, "width": width}
        return cls(**{**settings, "size": final, "crop_size": final, "fit": fit, **kwargs})

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the images made; `None` with Dynamic-S2 or `do_resize=False`."""
        if self.tile_size is not None or not self.do_resize:
            return None
        return self.crop_size.height, self.crop_size.width

    def options_for_size(self, image_size: tuple[int, int], crop_pct: float | None = None) -> dict:
        """Arguments of a call that bring images to (height, width) = `image_size`.

        Raises:
            ValueError: with Dynamic-S2, whose tiles follow each image's shape; for a `crop_pct`, which `fit` replaces.
        """
        if self.tile_size is not None:
            raise ValueError(
                f"The image processor cuts images into tiles of {self.tile_size} pixels by their shape (Dynamic-S2): "
                f"the size {image_size} cannot be asked for."
            )
        if crop_pct is not None:
            raise ValueError(f"`crop_pct` cannot be followed: the image processor crops as `fit={self.fit!r}` says.")
        final = dict(zip(("height", "width"), image_size, strict=True))
        return {"size": final, "crop_size": final, "do_resize": True}

    def seen_region(self, image: Image.Image) -> Image.Image:
        """The part of an RGB image that the model sees, at the image's own resolution."""
        if self.fit == "crop" and self.tile_size is None:
            return ImageOps.fit(image, (min(image.size),) * 2)
        if self.fit == "pad" and self.tile_size is None:
            colour = tuple(int(255 * value) for value in self.image_mean)
            return ImageOps.pad(image, (max(image.size),) * 2, color=colour)
        return image

    def tile_grid_for(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of tiles in the last scale of an image of (height, width) pixels, with Dynamic-S2."""
        if self.tile_size is None:
            raise ValueError("`tile_grid_for` belongs to Dynamic-S2: this processor has no `tile_size`.")
        return dynamic_tile_grid(image_size, self.tile_multiples[-1], self.max_tiles, self.tile_size)

    def _fitted(self, image, fit: str, size: SizeDict, resample, fill: Sequence[float]):
        """One image (channels, height, width) -> `size`; `fill` is the colour of padding, in values of the image."""
        target = SizeDict(height=size.height, width=size.width)
        if fit == "pad":
            image = self._pad_to_square(image, fill)
        if fit != "crop" or (size.height != size.width):
            return self.resize(image, target, resample=resample)
        return self.center_crop(self.resize(image, SizeDict(shortest_edge=size.height), resample=resample), target)

    def _cut(
        self, image, tile_size: int, tile_multiples: Sequence[int], max_tiles: int, resample
    ) -> tuple[list, tuple[int, int]]:
        """One image -> its tiles (Dynamic-S2), scale by scale, row by row; and (height, width) in pixels of its
        last scale.
        """
        rows, columns = dynamic_tile_grid(image.shape[-2:], tile_multiples[-1], max_tiles, tile_size)
        tiles = []
        for grid in [(multiple, multiple) for multiple in tile_multiples[:-1]] + [(rows, columns)]:
            target = SizeDict(height=grid[0] * tile_size, width=grid[1] * tile_size)
            scaled = self.resize(image, target, resample=resample)
            tiles += [
                scaled[:, row * tile_size : (row + 1) * tile_size, column * tile_size : (column + 1) * tile_size]
                for row in range(grid[0])
                for column in range(grid[1])
            ]
        return tiles, (rows * tile_size, columns * tile_size)

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        crop_size: SizeDict,
        resample,
        fit: str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        tile_size: int | None = None,
        tile_multiples: Sequence[int] | None = None,
        max_tiles: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Images -> `pixel_values` (batch, channels, height, width).

        With Dynamic-S2: `pixel_values` (batch, most tiles of an image, channels, tile, tile), zeros after the
        tiles of an image that has fewer, so that images of all shapes fit in one batch; and `image_sizes` (batch,
        2), the size of its last scale in pixels.
        """
        check_choice("fit", fit, FITS)

        def normalized(image):
            return self._normalized(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        if tile_size is None:
            if do_resize:
                means = image_mean if isinstance(image_mean, list | tuple) else [image_mean] * len(images[0])
                fill = [value / rescale_factor if do_rescale else value for value in means] if fit == "pad" else []
                images = [self._fitted(image, fit, crop_size, resample, fill) for image in images]
            return BatchFeature({"pixel_values": [normalized(image) for image in images]}, tensor_type=return_tensors)

        stacks, sizes = [], []
        for image in images:
            tiles, size = self._cut(image, tile_size, tile_multiples, max_tiles, resample)
            stacks.append(self._stack([normalized(tile) for tile in tiles]))
            sizes.append(size)
        most = sum(multiple**2 for multiple in tile_multiples[:-1]) + max_tiles
        stacks = [self._with_empty_tiles(tiles, most) for tiles in stacks]
        return BatchFeature({"pixel_values": stacks, "image_sizes": sizes}, tensor_type=return_tensors)


class S2ImageProcessor(S2ImageProcessorMixin, TorchvisionBackend):
    """Images -> `pixel_values` at the largest scale of an S2 model, or its tiles with Dynamic-S2.

    Best made with `S2ImageProcessor.for_config(config, base)`. The fields are those of the base model's processor,
    `size` and `crop_size` (both: the largest scale), and `fit`, `tile_size`, `tile_multiples` and `max_tiles`.

    Raises:
        ValueError: for images with NaN or infinite values, or an unknown `fit`.
    """

    def _pad_to_square(self, image: torch.Tensor, fill: Sequence[float]) -> torch.Tensor:
        height, width = image.shape[-2:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        fill = [value if image.is_floating_point() else int(value) for value in fill]
        return tvF.pad(image, [left, top, side - width - left, side - height - top], fill=fill)

    def _normalized(self, image, do_rescale, rescale_factor, do_normalize, image_mean, image_std) -> torch.Tensor:
        return self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

    def _stack(self, tiles: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tiles)

    def _with_empty_tiles(self, tiles: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat([tiles, tiles.new_zeros(count - len(tiles), *tiles.shape[1:])])


__all__ = ["FITS", "S2ImageProcessor", "S2ImageProcessorKwargs", "S2ImageProcessorMixin"]
