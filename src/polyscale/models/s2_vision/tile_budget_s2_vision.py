"""S2 with a tile budget: of the higher scales only the most detailed tiles run, the others are filled.

All shapes follow from the budget alone, so that such a model compiles and exports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .multiscale_s2_vision import Part, TileFeatures, map_as_tokens, tokens_as_map
from .running_s2_vision import TileRunner
from .tiling_s2_vision import TilePlan, check_num_tiles, cut_tiles, join_tiles, resize_image, whole_scale


def detail_scores(images: Sequence[torch.Tensor], plan: TilePlan) -> torch.Tensor:
    """How much each tile of the higher scales shows that the first scale does not: (batch, tiles), mean squared
    difference of its pixels to the enlarged first scale.

    Args:
        images: the batch at each scale, (batch, channels, *whole tiles).
        plan: the tiles.
    """
    first = images[plan.first_scale]
    scores = []
    for scale in plan.higher_scales:
        enlarged = resize_image(first, tuple(images[scale].shape[-2:]))
        energy = (images[scale].float() - enlarged.float()).square().mean(dim=1, keepdim=True)
        tiles = cut_tiles(energy, plan.tile_grid(scale)).mean(dim=(1, 2, 3))  # (tiles * batch,)
        scores.append(tiles.unflatten(0, (-1, first.shape[0])).T)
    return torch.cat(scores, dim=1)


@dataclass(frozen=True)
class TileChoice:
    """Which tiles of the higher scales run.

    Args:
        order: (batch, tiles) the tiles' places, those that run in front.
        num_tiles: how many run.
    """

    order: torch.Tensor
    num_tiles: int

    @classmethod
    def best(cls, scores: torch.Tensor, num_tiles: int) -> "TileChoice":
        """The tiles with the highest of the scores (batch, tiles)."""
        return cls(scores.topk(scores.shape[1], dim=1).indices, min(num_tiles, scores.shape[1]))

    @property
    def mask(self) -> torch.Tensor:
        """(batch, tiles), True at tiles that run."""
        places = torch.arange(self.order.shape[1], device=self.order.device).expand_as(self.order)
        ranks = torch.zeros_like(self.order).scatter(1, self.order, places)
        return ranks < self.num_tiles

    def split(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles * batch, ...) -> those that run and the rest, (number * batch, ...) each, the best first."""
        by_image = tiles.unflatten(0, (-1, self.order.shape[0])).transpose(0, 1)
        sorted_tiles = _take(by_image, self.order).transpose(0, 1)
        return sorted_tiles[: self.num_tiles].flatten(0, 1), sorted_tiles[self.num_tiles :].flatten(0, 1)

    def join(self, run: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        batch = self.order.shape[0]
        sorted_tiles = torch.cat([run, rest]).unflatten(0, (-1, batch)).transpose(0, 1)
        places = torch.arange(self.order.shape[1], device=self.order.device).expand_as(self.order)
        ranks = torch.zeros_like(self.order).scatter(1, self.order, places)
        return _take(sorted_tiles, ranks).transpose(0, 1).flatten(0, 1)


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(batch, n, ...) and (batch, m) -> (batch, m, ...)"""
    index = places.reshape(*places.shape, *(1,) * (values.ndim - 2))
    return values.gather(1, index.expand(*places.shape, *values.shape[2:]))


def enlarged_tiles(
    parts: Mapping[Part, torch.Tensor | None],
    num_prefix_tokens: int,
    tile: tuple[int, int],
    coarse_grid: tuple[int, int] | None,
    grid: tuple[int, int],
) -> dict[Part, torch.Tensor | None]:
    """What a model says about tiles at a cheaper budget, with as many features as at the full one.

    Args:
        parts: the model's output, tokens (n, tokens, width) among it.
        num_prefix_tokens: tokens in front that have no place.
        tile: (height, width) of a tile in pixels.
        coarse_grid: (rows, columns) of its tokens; found from their number when `None`.
        grid: (rows, columns) that are wanted.
    """

    def enlarged(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.ndim != 3 or tensor.shape[1] == num_prefix_tokens + grid[0] * grid[1]:
            return tensor
        features = tokens_as_map(tensor[:, num_prefix_tokens:], tile, coarse_grid)
        return map_as_tokens(_resized_map(features, grid), tensor[:, :num_prefix_tokens])

    return {part: enlarged(tensor) for part, tensor in parts.items() if part[0] != "attentions"}


def first_scale_as_tiles(
    parts: Mapping[Part, torch.Tensor | None],
    plan: TilePlan,
    num_prefix_tokens: int,
    features_per_tile: tuple[int, int] | None,
) -> dict[Part, torch.Tensor | None]:
    """What the first scale says about the place of each tile of the higher scales: (tiles * batch, ...).

    Args:
        parts: the model's output for the tiles of the first scale.
        plan: the tiles.
        num_prefix_tokens: tokens in front that have no place; each tile gets the mean of those of the first scale.
        features_per_tile: (rows, columns) of a tile's features; found from their number when `None`.
    """
    first = plan.first_scale
    tiles_in_first = plan.num_tiles(first)
    num_tiles = sum(plan.num_tiles(scale) for scale in plan.higher_scales)

    def repeated(values: torch.Tensor) -> torch.Tensor:
        mean = values.unflatten(0, (tiles_in_first, -1)).mean(dim=0)
        return mean.expand(num_tiles, *mean.shape).flatten(0, 1)

    def spread(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.ndim == 2:
            return tensor if tensor is None else repeated(tensor)
        is_tokens = tensor.ndim == 3
        features = tokens_as_map(tensor[:, num_prefix_tokens:], plan.tile, features_per_tile) if is_tokens else tensor
        tiles = _map_as_tiles(features, plan)
        return map_as_tokens(tiles, repeated(tensor[:, :num_prefix_tokens])) if is_tokens else tiles

    return {part: spread(tensor) for part, tensor in parts.items() if part[0] != "attentions"}


def _map_as_tiles(features: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """Maps of the first scale's tiles -> maps of the tiles of the higher scales, (tiles * batch, width, h, w)."""
    first = plan.first_scale
    per_tile = tuple(features.shape[-2:])
    whole = join_tiles(features, plan.tile_grid(first))
    if plan.uneven == "pad":
        rows, columns = plan.feature_grid(first, per_tile)
        whole = whole[:, :, :rows, :columns]
    tiles = []
    for scale in plan.higher_scales:
        rows, columns = plan.tile_grid(scale)
        full = (rows * per_tile[0], columns * per_tile[1])
        covered = plan.feature_grid(scale, per_tile) if plan.uneven == "pad" else full
        enlarged = _resized_map(whole, covered)
        enlarged = F.pad(enlarged, (0, full[1] - covered[1], 0, full[0] - covered[0]))
        tiles.append(cut_tiles(enlarged, (rows, columns)))
    return torch.cat(tiles)


def _resized_map(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(features.float(), size=size, mode="bilinear", align_corners=False).to(features.dtype)


Parts = dict[Part, torch.Tensor | None]


def _slice(parts: Parts, start: int | None, stop: int | None) -> Parts:
    return {part: None if tensor is None else tensor[start:stop] for part, tensor in parts.items()}


def _filled(
    runner: TileRunner,
    rest: torch.Tensor,
    first_parts: Parts,
    choice: TileChoice,
    plan: TilePlan,
    tile_map: nn.Module | None,
) -> Parts:
    """What stands in for the tiles `rest`, which are outside of the budget."""
    config = runner.config
    coarse = config.coarse_budget(runner.options)
    if coarse is None:
        spread = first_scale_as_tiles(first_parts, plan, config.num_prefix_tokens, config.features_per_tile)
        if config.tile_fill == "map":
            spread = tile_map(spread, plan)
        return {part: None if tensor is None else choice.split(tensor)[1] for part, tensor in spread.items()}
    parts = runner.run_in_chunks(rest, choice.order.shape[0], **coarse)
    grid = config.features_per_tile
    return enlarged_tiles(parts, config.num_prefix_tokens, plan.tile, config.coarse_grid(coarse), grid)


def run_best_tiles(
    runner: TileRunner,
    features: TileFeatures,
    pixel_values: torch.Tensor,
    num_tiles: int,
    tile_scores: torch.Tensor | None,
    tile_map: nn.Module | None = None,
) -> torch.Tensor:
    """Runs the tiles of the first scale and the best `num_tiles` of the others, fills the rest, and gives all of them
    to `features`.

    Args:
        runner: the wrapped model.
        features: an empty collection.
        pixel_values: (batch, channels, height, width).
        num_tiles: how many tiles of the higher scales run.
        tile_scores: (batch, tiles of the higher scales); the detail of the tiles when `None`.
        tile_map: the maps of `tile_fill="map"`.

    Returns:
        (batch, tiles of the higher scales), True at those that ran.

    Raises:
        ValueError: for a number out of range, scores of another shape, or a fill that was not fitted.
    """
    plan, batch = features.plan, features.batch
    total = sum(plan.num_tiles(scale) for scale in plan.higher_scales)
    num_tiles = check_num_tiles(num_tiles, total)
    if num_tiles < total and runner.config.tile_fill == "map" and tile_map is None:
        raise ValueError(
            "`tile_fill='map'` needs maps, and this model has none: fit them with `polyscale.fit_tile_map(model, "
            "images)`, or choose another fill."
        )
    images = [whole_scale(pixel_values, plan, scale, runner.antialias) for scale in range(len(plan.sizes))]
    if tile_scores is None:
        tile_scores = detail_scores(images, plan)
    elif tuple(tile_scores.shape) != (batch, total):
        raise ValueError(
            f"`tile_scores` must have the shape (batch, tiles of the higher scales) = {(batch, total)}, got "
            f"{tuple(tile_scores.shape)}."
        )
    choice = TileChoice.best(tile_scores.to(pixel_values.device), num_tiles)
    tiles = torch.cat([cut_tiles(images[scale], plan.tile_grid(scale)) for scale in plan.higher_scales])
    chosen, rest = choice.split(tiles)
    first_tiles = cut_tiles(images[plan.first_scale], plan.tile_grid(plan.first_scale))
    ran = runner.run_in_chunks(torch.cat([first_tiles, chosen]), batch)
    first_parts, chosen_parts = _slice(ran, None, len(first_tiles)), _slice(ran, len(first_tiles), None)
    filled = (
        _filled(runner, rest, first_parts, choice, plan, tile_map) if num_tiles < total else _slice(chosen_parts, 0, 0)
    )
    higher = {
        part: None if tensor is None else choice.join(tensor, filled[part])
        for part, tensor in chosen_parts.items()
        if part[0] != "attentions"
    }
    start = 0
    for scale in range(len(plan.sizes)):
        if scale == plan.first_scale:
            features.add(first_parts)
            continue
        stop = start + plan.num_tiles(scale) * batch
        features.add(_slice(higher, start, stop))
        start = stop
    features.add({part: tensor for part, tensor in chosen_parts.items() if part[0] == "attentions"})
    return choice.mask


__all__ = ["TileChoice", "detail_scores", "enlarged_tiles", "first_scale_as_tiles", "run_best_tiles"]
