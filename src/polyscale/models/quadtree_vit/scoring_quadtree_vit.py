"""Patch scorers: how much a picture loses where a patch is kept at a low resolution (arXiv 2304.00287, section 3.2).

Faithful to TomerRonen34/mixed-resolution-vit, `mixed_res/patch_scorers`. A scorer maps normalised pixels to one score
a patch for each size that can be split: higher = split sooner.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoBackbone, PreTrainedModel
from transformers.utils.generic import maybe_autocast

from ...utils.validation import check_choice
from .configuration_quadtree_vit import PATCH_SCORERS, SCORER_ERRORS, QuadtreeViTConfig, count_levels
from .selection_quadtree_vit import check_multiple


def resize_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, without antialias: (batch, channels, height, width) -> (batch, channels, *size)."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=False)


def reduce_bilinear(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`resize_bilinear` to 1 / factor of the size, for an even factor: the mean of the 4 middle pixels of a cell."""
    first = factor // 2 - 1
    rows = images[:, :, first::factor].lerp(images[:, :, first + 1 :: factor], 0.5)
    return rows[..., first::factor].lerp(rows[..., first + 1 :: factor], 0.5)


class PatchScorer(nn.Module):
    """The base of scorers: checks the pixels, and computes without gradients, in float32.

    Args:
        min_patch_size: side in pixels of the smallest patches, which have no score.
        max_patch_size: side in pixels of the largest.
    """

    def __init__(self, min_patch_size: int = 16, max_patch_size: int = 64):
        super().__init__()
        self.min_patch_size = min_patch_size
        self.max_patch_size = max_patch_size
        self.num_levels = count_levels(min_patch_size, max_patch_size)

    @property
    def scored_patch_sizes(self) -> list[int]:
        """Sides in pixels of the patches that can be split, largest first."""
        return [self.max_patch_size >> level for level in range(self.num_levels - 1)]

    def blurred(self, pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
        """The picture as patches of `patch_size` see it: reduced as they are, and enlarged again."""
        height, width = pixel_values.shape[-2:]
        factor = patch_size // self.min_patch_size
        return resize_bilinear(resize_bilinear(pixel_values, (height // factor, width // factor)), (height, width))

    def score(self, pixel_values: torch.Tensor, patch_scores: object) -> list[torch.Tensor]:
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
        return {"patch_scorer": "pixel_blur"}

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        return [self._score_of(pixel_values, size) for size in self.scored_patch_sizes]

    def _score_of(self, pixel_values: torch.Tensor, size: int) -> torch.Tensor:
        """The blurred picture is made and compared one set of columns at a time: memory traffic is what this costs."""
        batch, channels, height, width = pixel_values.shape
        factor = size // self.min_patch_size
        half = factor // 2
        # Buffers are freed and used again as soon as possible: fresh memory costs more than what is done with it.
        small = F.pad(reduce_bilinear(pixel_values, factor), (1, 1, 1, 1), mode="replicate")
        # Between the centres of two rows of the small picture lie `factor` rows of the large one.
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
        seed: the same seed gives the same scores in every call, on every device; new ones in every call when None.
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
    """Scores that the caller gives: one map a level, or one map for all levels, averaged to their grids."""

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
        shapes = [tuple(getattr(score, "shape", ())) for score in patch_scores]
        if shapes != grids:
            raise ValueError(
                f"`patch_scores` must be tensors of shapes {grids} (batch, rows, columns), largest patches first; got "
                f"{shapes}."
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


class ShuffleNetFeatures(nn.Module):
    """ShuffleNetV2 x0.5 without its head: stride 32, or its first part of stride 16 (torchvision's parameter names).

    Args:
        stride: 32 or 16.
        pretrained: whether torchvision downloads its ImageNet weights.

    Raises:
        ValueError: for another stride.
        OSError: if the weights cannot be downloaded.
    """

    def __init__(self, stride: int = 32, pretrained: bool = False):
        super().__init__()
        check_choice("stride", stride, (32, 16))
        self.stride = stride
        from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

        try:
            network = shufflenet_v2_x0_5(weights=ShuffleNet_V2_X0_5_Weights.DEFAULT if pretrained else None)
        except (OSError, RuntimeError) as error:
            raise OSError(
                "The weights of the 'feature' scorer (torchvision's ShuffleNetV2 x0.5) could not be downloaded: "
                f"{error}. Put {ShuffleNet_V2_X0_5_Weights.DEFAULT.url} into torch.hub's checkpoint folder, give a "
                f"network of your own, or load a checkpoint that holds the scorer."
            ) from error
        names = ["conv1", "maxpool", "stage2", "stage3"] + (["stage4", "conv5"] if stride == 32 else [])
        for name in names:
            self.add_module(name, getattr(network, name))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        for stage in self.children():
            pixel_values = stage(pixel_values)
        return pixel_values


class FeatureBasedPatchScorer(PatchScorer):
    """Loss of meaning: how far a small network's features of the blurred picture are from those of the sharp one.

    The network is frozen, and stays in evaluation mode when the model around it trains.

    Args:
        min_patch_size: side in pixels of the smallest patches.
        max_patch_size: side in pixels of the largest.
        network: a module that maps pixels to features (batch, width, rows, columns), or a transformers backbone (its
            last feature map is used); the paper's ShuffleNetV2 x0.5 when None.
        stride: stride in pixels of ShuffleNetV2: 32 or 16. Other networks show theirs in their output.
        error: "mse" or "cosine" (negative cosine similarity).
        pretrained: whether ShuffleNetV2 gets its pretrained weights, which torchvision downloads.

    Raises:
        ValueError: for a stride too coarse for the smallest patches that have scores, those of twice `min_patch_size`.
        OSError: if the pretrained weights cannot be downloaded.
    """

    def __init__(
        self,
        min_patch_size: int = 16,
        max_patch_size: int = 64,
        network: nn.Module | None = None,
        stride: int = 32,
        error: str = "mse",
        pretrained: bool = True,
    ):
        super().__init__(min_patch_size, max_patch_size)
        check_choice("error", error, SCORER_ERRORS)
        self.error = error
        if network is None:
            self._check_stride(stride)
            network = ShuffleNetFeatures(stride, pretrained)
        self.network = network.requires_grad_(False).eval()

    def _check_stride(self, stride: float) -> None:
        finest = 2 * self.min_patch_size
        if stride > finest or finest % stride:
            raise ValueError(
                f"The stride of the 'feature' scorer's network, {stride:g} pixels, is too coarse for the smallest "
                f"patches: it must divide {finest}, twice `min_patch_size` = {self.min_patch_size}. Use a network of "
                f"a smaller stride (ShuffleNetV2 has 32 and 16), or larger patches."
            )

    def config_fields(self) -> dict[str, object]:
        fields = {"patch_scorer": "feature", "scorer_error": self.error}
        if isinstance(self.network, ShuffleNetFeatures):
            return {**fields, "scorer_stride": self.network.stride, "scorer_backbone_config": None}
        if isinstance(self.network, PreTrainedModel) and hasattr(self.network, "out_features"):
            return {**fields, "scorer_backbone_config": self.network.config}
        raise ValueError(
            f"The network of this scorer, {type(self.network).__name__}, cannot be rebuilt from a config: use "
            f"ShuffleNetV2 or a transformers backbone for a scorer that is saved with a model, or give its scores as "
            f"`patch_scores`."
        )

    def train(self, mode: bool = True) -> "FeatureBasedPatchScorer":
        super().train(mode)
        self.network.eval().requires_grad_(
            False
        )  # `from_pretrained` makes parameters anew, and ends with a call of this
        return self

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, width, rows, columns), float32."""
        features = self.network(pixel_values.to(next(self.network.parameters()).dtype))
        feature_maps = getattr(features, "feature_maps", None)
        return (features if feature_maps is None else feature_maps[-1]).float()

    def score(self, pixel_values: torch.Tensor, patch_scores: object = None) -> list[torch.Tensor]:
        batch, _, height, width = pixel_values.shape
        sharp = self.features(pixel_values)
        self._check_stride(height / sharp.shape[-2])
        scores = []
        for size in self.scored_patch_sizes:
            blurred = self.features(self.blurred(pixel_values, size))
            if self.error == "mse":
                error = (blurred - sharp).square().mean(dim=1)
            else:
                error = -F.cosine_similarity(blurred, sharp, dim=1)
            scores.append(average_to_grid(error, (batch, height // size, width // size), "features"))
        return scores


def make_patch_scorer(config: QuadtreeViTConfig) -> PatchScorer:
    """The scorer that `config` names, without pretrained weights: those are in the checkpoint."""
    check_choice("patch_scorer", config.patch_scorer, PATCH_SCORERS)
    sizes = (config.min_patch_size, config.max_patch_size)
    if config.patch_scorer == "random":
        return RandomPatchScorer(*sizes, seed=config.scorer_seed)
    if config.patch_scorer == "precomputed":
        return PrecomputedPatchScorer(*sizes)
    if config.patch_scorer == "pixel_blur":
        return PixelBlurPatchScorer(*sizes)
    backbone_config = config.scorer_backbone_config
    return FeatureBasedPatchScorer(
        *sizes,
        network=None if backbone_config is None else AutoBackbone.from_config(backbone_config),
        stride=config.scorer_stride,
        error=config.scorer_error,
        pretrained=False,
    )


__all__ = [
    "FeatureBasedPatchScorer",
    "PatchScorer",
    "PixelBlurPatchScorer",
    "PrecomputedPatchScorer",
    "RandomPatchScorer",
    "ShuffleNetFeatures",
    "make_patch_scorer",
    "reduce_bilinear",
    "resize_bilinear",
]
