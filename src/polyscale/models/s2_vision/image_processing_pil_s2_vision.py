"""Image processor of S2, PIL backend."""

from collections.abc import Sequence

import numpy as np
from transformers import PilBackend

from .image_processing_s2_vision import S2ImageProcessorKwargs, S2ImageProcessorMixin


class S2ImageProcessorPil(S2ImageProcessorMixin, PilBackend):
    """The twin of `S2ImageProcessor` on PIL and NumPy: same fields, same results up to the rounding of resized
    pixels.
    """

    valid_kwargs = S2ImageProcessorKwargs

    def _pad_to_square(self, image: np.ndarray, fill: Sequence[float]) -> np.ndarray:
        channels, height, width = image.shape
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = np.empty((channels, side, side), dtype=image.dtype)
        square[:] = np.array(fill).astype(image.dtype)[:, None, None]
        square[:, top : top + height, left : left + width] = image
        return square

    def _normalized(self, image, do_rescale, rescale_factor, do_normalize, image_mean, image_std) -> np.ndarray:
        if do_rescale:
            image = self.rescale(image, rescale_factor)
        return self.normalize(image, image_mean, image_std) if do_normalize else image

    def _stack(self, tiles: list[np.ndarray]) -> np.ndarray:
        return np.stack(tiles)

    def _with_empty_tiles(self, tiles: np.ndarray, count: int) -> np.ndarray:
        return np.concatenate([tiles, np.zeros((count - len(tiles), *tiles.shape[1:]), dtype=tiles.dtype)])


__all__ = ["S2ImageProcessorPil"]
