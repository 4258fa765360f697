"""Patch scorers: how much an image loses where a patch is kept at a low resolution (arXiv 2304.00287, section 3.2).

Faithful to TomerRonen34/mixed-resolution-vit, `mixed_res/patch_scorers`. A scorer maps normalised pixels to one score
per patch for each size that can be split: higher = split sooner.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.transformers_internals import maybe_autocast
from ...utils.validation import check_choice
from .configuration_quadtree_vit import REDUCTIONS, count_levels
from .selection_quadtree_vit import check_multiple


def resize_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, without antialias: (batch, channels, height, width) -> (batch, channels, *size)."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=False)


def reduce_bilinear(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`resize_bilinear` to 1 / factor of the size, for an even factor: the mean of the 4 middle pixels of a cell."""
    first = factor // 2 - 1
    rows = images[:, :, first::factor].lerp(images[:, :, first + 1 :: factor], 0.5)
    return rows[..., first::factor].lerp(rows[..., first + 1 :: factor], 0.5)


def reduce_image(images: torch.Tensor, factor: int, reduction: str) -> torch.Tensor:
    """Images at 1 / factor of their size, for an even factor.

    Args:
        images (`torch.Tensor`): (batch, channels, height, width).
        factor (`int`): even.
        reduction (`str`): "bilinear" (as published: the mean of the 4 middle pixels of a cell) or "antialias" (every
            pixel counts: a triangle of twice the cell's width).
    """
    if reduction == "bilinear":
        return reduce_bilinear(images, factor)
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


class PatchScorer(nn.Module):
    """The base of scorers: checks the pixels, and computes without gradients, in float32.

    A scorer of your own overrides `score` and `config_fields`, and is made known by `register_patch_scorer`.

    Args:
        min_patch_size (`int`, *optional*, defaults to 16): side in pixels of the smallest patches, which have no
            score.
        max_patch_size (`int`, *optional*, defaults to 64): side in pixels of the largest.
        reduction (`str`, *optional*, defaults to `"bilinear"`): how images are made smaller: `"bilinear"` or
            `"antialias"`.

    Attributes:
        reads_embeddings (`bool`): whether it scores the model's patch embeddings (`score_embeddings`), not pixels.
    """

    reads_embeddings = False

    def __init__(self, min_patch_size: int = 16, max_patch_size: int = 64, reduction: str = "bilinear"):
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self.min_patch_size = min_patch_size
        self.max_patch_size = max_patch_size
        self.num_levels = count_levels(min_patch_size, max_patch_size)

    @property
    def scored_patch_sizes(self) -> list[int]:
        """Sides in pixels of the patches that can be split, largest first."""
        return [self.max_patch_size >> level for level in range(self.num_levels - 1)]

    def blurred(self, pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
        """The image as patches of `patch_size` see it: reduced as they are, and enlarged again."""
        height, width = pixel_values.shape[-2:]
        factor = patch_size // self.min_patch_size
        return resize_bilinear(reduce_image(pixel_values, factor, self.reduction), (height, width))

    def score(self, pixel_values: torch.Tensor, patch_scores: object) -> list[torch.Tensor]:
        """The scores of checked pixels, (batch, channels, height, width) in float32: see `forward`."""
        raise NotImplementedError

    def forward(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised.
            patch_scores: only for `PrecomputedPatchScorer`; ignored by the others.

        Returns:
            One (batch, rows, columns) float32 tensor for each size of patch that can be split, largest first.

        Raises:
            ValueError: for another number of dimensions, or a height or width that is no multiple of `max_patch_size`.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, channels, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        check_multiple(tuple(pixel_values.shape[-2:]), self.max_patch_size, "max_patch_size")
        with torch.no_grad(), maybe_autocast(pixel_values.device.type, enabled=False):
            return self.score(pixel_values.float().contiguous(), patch_scores)

    def config_fields(self) -> dict[str, object]:
        """The fields of `QuadtreeViTConfig` that rebuild this scorer."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"min_patch_size={self.min_patch_size}, max_patch_size={self.max_patch_size}"


class PixelBlurPatchScorer(PatchScorer):
    """Loss of pixels: sqrt(mean squared error between the sharp and the blurred patch * patch size)."""

    def config_fields(self) -> dict[str, object]:
        return {"patch_scorer": "pixel_blur", "reduction": self.reduction}

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        return [self._score_of(pixel_values, size) for size in self.scored_patch_sizes]

    def _score_of(self, pixel_values: torch.Tensor, size: int) -> torch.Tensor:
        """The blurred image is made and compared one set of columns at a time: memory traffic is what this costs."""
        batch, channels, height, width = pixel_values.shape
        factor = size // self.min_patch_size
        half = factor // 2
        # Buffers are freed and used again as soon as possible: fresh memory costs more than what is done with it.
        small = F.pad(reduce_image(pixel_values, factor, self.reduction), (1, 1, 1, 1), mode="replicate")
        # Between the centres of two rows of the small image lie `factor` rows of the large one.
        weights = (torch.arange(factor, device=small.device)[:, None] + 0.5) / factor
        rows = small[:, :, :-1, None].lerp(small[:, :, 1:, None], weights).flatten(2, 3)[:, :, half:-half]
        del small
        total = error = None
        for phase in range(factor):  # columns phase, phase + factor, ...; the errors of phase 0 become the total
            first, weight = divmod(phase + half, factor)
            left, right = (rows.narrow(3, start, width // factor) for start in (first, first + 1))
            error = torch.lerp(left, right, (weight + 0.5) / factor, out=error if phase > 1 else None)
            error.sub_(pixel_values[..., phase::factor])
            total = error.square_() if total is None else total.addcmul_(error, error)
        sums = total.view(batch, channels, height // size, size, width // size, size // factor).sum(dim=3)
        return (sums.sum(dim=(1, 4)) / (channels * size)).sqrt()  # the mean over size^2, times size


class RandomPatchScorer(PatchScorer):
    """Random scores in [0, 1).

    Args:
        seed (`int`, *optional*): the same seed gives the same scores in every call, on every device; new ones in every
            call when `None`.
    """

    def __init__(self, min_patch_size: int = 16, max_patch_size: int = 64, seed: int | None = None):
        super().__init__(min_patch_size, max_patch_size)
        self.seed = seed

    def config_fields(self) -> dict[str, object]:
        return {"patch_scorer": "random", "scorer_seed": self.seed}

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        batch, _, height, width = pixel_values.shape
        scores = []
        for size in self.scored_patch_sizes:
            shape = (batch, height // size, width // size)
            if self.seed is None:
                scores.append(torch.rand(shape, device=pixel_values.device))
            else:
                scores.append(_hashed(shape, self.seed + size, pixel_values.device))
        return scores


def _hashed(shape: tuple[int, int, int], seed: int, device: torch.device) -> torch.Tensor:
    """Numbers in [0, 1) that depend only on the place and the seed: no generator, so that it compiles and exports."""
    batch, rows, columns = shape
    place = torch.arange(rows * columns, device=device).view(rows, columns)
    bits = torch.arange(batch, device=device)[:, None, None] * 0x9E3779B1 + place * 0x85EBCA6B + seed * 0xC2B2AE35
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> 16)) * multiplier
    bits = bits & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) >> 8).float() / 2**24


class PrecomputedPatchScorer(PatchScorer):
    """Scores that the caller gives: one map per level, or one map for all levels, averaged to their grids."""

    def config_fields(self) -> dict[str, object]:
        return {"patch_scorer": "precomputed"}

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        batch, _, height, width = pixel_values.shape
        grids = [(batch, height // size, width // size) for size in self.scored_patch_sizes]
        if patch_scores is None:
            raise ValueError(
                f"`patch_scores` is required by the 'precomputed' scorer: a list of tensors of shapes {grids} (batch, "
                f"rows, columns), largest patches first."
            )
        if isinstance(patch_scores, torch.Tensor):
            patch_scores = [average_to_grid(patch_scores, grid, "patch_scores") for grid in grids]
        shapes = None
        if isinstance(patch_scores, list | tuple):
            shapes = [tuple(s.shape) if isinstance(s, torch.Tensor) else type(s).__name__ for s in patch_scores]
        if shapes != grids:
            raise ValueError(
                f"`patch_scores` must be tensors of shapes {grids} (batch, rows, columns), largest patches first; got "
                f"{type(patch_scores).__name__ if shapes is None else shapes}."
            )
        return [score.to(pixel_values.device, torch.float32) for score in patch_scores]


def average_to_grid(scores: torch.Tensor, grid: tuple[int, int, int], name: str) -> torch.Tensor:
    """A map (batch, height, width) averaged to `grid` (batch, rows, columns), whose multiple it must be.

    Raises:
        ValueError: if it is not.
    """
    batch, rows, columns = grid
    shape = tuple(scores.shape)
    if scores.ndim != 3 or shape[0] != batch or shape[1] % rows or shape[2] % columns or 0 in shape:
        raise ValueError(
            f"`{name}` must have the shape (batch, height, width) with height and width multiples of the grid, {grid} "
            f"(batch, rows, columns); got {shape}."
        )
    if shape == tuple(grid):
        return scores
    return F.avg_pool2d(scores.float(), (shape[1] // rows, shape[2] // columns))


class EmbeddingPatchScorer(PatchScorer):
    """Spread of the model's own patch embeddings: what the four parts of a patch differ in, as the model sees them.

    The sum over the channels of the variance of the embeddings of its four parts, times its size in smallest patches.
    It has no weights and no network of its own: the embeddings of all patches of all sizes are computed once, and
    those of the patches that are kept become the tokens.
    """

    reads_embeddings = True

    def config_fields(self) -> dict[str, object]:
        return {"patch_scorer": "embedding"}

    @torch.no_grad()
    def score_embeddings(self, embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            embeddings (`Sequence[torch.Tensor]`): of the patches of each size, largest first, (batch, rows, columns,
                hidden).

        Returns:
            One (batch, rows, columns) float32 tensor for each size of patch that can be split, largest first.
        """
        scores = []
        for size, parts in zip(self.scored_patch_sizes, embeddings[1:], strict=True):
            batch, rows, columns, width = parts.shape
            four = parts.float().view(batch, rows // 2, 2, columns // 2, 2, width)
            mean = four.mean(dim=(2, 4), keepdim=True)
            spread = (four - mean).square().mean(dim=(2, 4)).sum(dim=-1)
            scores.append(spread * (size // self.min_patch_size))
        return scores


class EntropyPatchScorer(PatchScorer):
    """Entropy of the grey levels of a patch, in bits (Accelerating Vision Transformers with Adaptive Patch Sizes, APT,
    arXiv 2510.18091): 512 bins over [0, 255]. The paper splits above 5.5 (two sizes of patch), or 6.0 and 4.0 (three).

    Args:
        image_mean (`float` or `Sequence[float]`, *optional*, defaults to 0.5): of the normalisation of `pixel_values`,
            which is undone: a number, or one per channel.
        image_std (`float` or `Sequence[float]`, *optional*, defaults to 0.5): likewise.
    """

    NUM_BINS = 512

    def __init__(
        self,
        min_patch_size: int = 16,
        max_patch_size: int = 64,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
    ):
        super().__init__(min_patch_size, max_patch_size)
        self.image_mean, self.image_std = image_mean, image_std

    def config_fields(self) -> dict[str, object]:
        return {
            "patch_scorer": "entropy",
            "scorer_image_mean": self.image_mean,
            "scorer_image_std": self.image_std,
        }

    def _grey(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width), normalised -> (batch, height, width), 0 to 255."""
        mean, std = (
            torch.tensor(values, device=pixel_values.device).reshape(-1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        pixels = pixel_values * std + mean
        if pixels.shape[1] == 3:
            weights = pixels.new_tensor([0.299, 0.587, 0.114])
            return 255 * (pixels * weights[:, None, None]).sum(dim=1)
        return 255 * pixels.mean(dim=1)

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        bins = (self._grey(pixel_values) * (self.NUM_BINS / 256)).long().clamp(0, self.NUM_BINS - 1)
        batch, height, width = bins.shape
        size = 2 * self.min_patch_size  # the smallest patches that have a score; larger ones add their histograms up
        cells = bins.view(batch, height // size, size, width // size, size).transpose(2, 3).flatten(3)
        counts = torch.zeros(*cells.shape[:3], self.NUM_BINS, device=bins.device)
        counts = counts.scatter_add(3, cells, torch.ones_like(cells, dtype=counts.dtype))
        scores = []
        for _ in self.scored_patch_sizes:
            shares = counts / counts.sum(dim=-1, keepdim=True)
            scores.insert(0, -torch.special.xlogy(shares, shares).sum(dim=-1) / math.log(2))
            if len(scores) < self.num_levels - 1:
                batch, rows, columns, _ = counts.shape
                counts = counts.view(batch, rows // 2, 2, columns // 2, 2, self.NUM_BINS).sum(dim=(2, 4))
        return scores


__all__ = [
    "EmbeddingPatchScorer",
    "EntropyPatchScorer",
    "PatchScorer",
    "PixelBlurPatchScorer",
    "PrecomputedPatchScorer",
    "RandomPatchScorer",
    "average_to_grid",
    "reduce_bilinear",
    "reduce_image",
    "resize_bilinear",
]
