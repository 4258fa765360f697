"""When Do We Not Need Larger Vision Models? (S2, arXiv 2403.13043): any vision model at several scales.

From images to tiles. Faithful to bfshi/scaling_on_scales (`s2wrapper`) on the square images it takes; images and tiles
of other shapes follow its `dev_any_shape` branch, with the token count that branch promises.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

import torch
import torch.nn.functional as F

from ...utils.validation import MAX_SIDE, check_choice, check_int, to_pair


UNEVEN = ("resize", "pad")


@dataclass(frozen=True)
class TilePlan:
    """How an image becomes tiles of one size, at each scale.

    Args:
        sizes: (height, width) in pixels of the image at each scale.
        tile: (height, width) in pixels of every tile.
        uneven: how a size that is no multiple of the tile is cut: "resize" or "pad".
    """

    sizes: tuple[tuple[int, int], ...]
    tile: tuple[int, int]
    uneven: str = "resize"

    def tile_grid(self, scale: int) -> tuple[int, int]:
        """(rows, columns) of tiles at a scale."""
        return tuple(-(-side // tile) for side, tile in zip(self.sizes[scale], self.tile, strict=True))

    def num_tiles(self, scale: int) -> int:
        rows, columns = self.tile_grid(scale)
        return rows * columns

    @property
    def first_scale(self) -> int:
        """The place of the smallest scale. With a tile budget its tiles always run."""
        return min(range(len(self.sizes)), key=lambda scale: (self.num_tiles(scale), self.sizes[scale]))

    @property
    def higher_scales(self) -> list[int]:
        """The places of all other scales: their tiles share the tile budget."""
        return [scale for scale in range(len(self.sizes)) if scale != self.first_scale]

    def feature_grid(self, scale: int, features_per_tile: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of features that the image itself covers at a scale: padding and enlargement of tiles
        add none.
        """
        return tuple(
            -(-side * features // tile)
            for side, tile, features in zip(self.sizes[scale], self.tile, features_per_tile, strict=True)
        )


def plan_tiles(
    input_size: Sequence[int],
    scales: Sequence[float] | None = None,
    img_sizes: Sequence[int | Sequence[int]] | None = None,
    max_split_size: int | Sequence[int] | None = None,
    uneven: str = "resize",
) -> TilePlan:
    """The tiles of an image of `input_size` (height, width); arguments and errors as in `multiscale_forward`."""
    if (scales is None) == (img_sizes is None):
        given = "neither" if scales is None else "both"
        raise ValueError(f"Give either `scales` or `img_sizes`, not both and not neither: got {given}.")
    check_choice("uneven", uneven, UNEVEN)
    if img_sizes is not None:
        sizes = tuple(to_pair(size, "img_sizes") for size in scale_list(img_sizes, "img_sizes"))
    else:
        sizes = tuple(_scaled_size(input_size, scale) for scale in scale_list(scales, "scales"))
    tile = to_pair(tuple(input_size) if max_split_size is None else max_split_size, "max_split_size")
    return TilePlan(sizes, tile, uneven)


def scale_list(values: Sequence, name: str) -> list:
    """The entries of `scales` or `img_sizes`; a symbolic int of a tracer becomes a constant.

    Raises:
        ValueError: for anything but a sequence with at least one entry.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
        raise ValueError(f"`{name}` must be a list with one entry for each scale, got {values!r}.")
    return [index(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]


def _scaled_size(input_size: Sequence[int], scale: float) -> tuple[int, int]:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"`scales` must hold positive numbers, got {scale!r}.")
    if max(input_size) * scale > MAX_SIDE:
        raise ValueError(
            f"`scales` holds {scale!r}: {tuple(input_size)} pixels would be more than {MAX_SIDE} per side."
        )
    height, width = (int(side * scale) for side in input_size)
    if height < 1 or width < 1:
        raise ValueError(
            f"`scales` holds {scale!r}, which leaves an empty tile of an image of {tuple(input_size)} pixels (height, "
            "width): use a larger scale or a larger image."
        )
    return height, width


def resize_image(image: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, channels, *size): bicubic, computed in float32."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image.float(), size=size, mode="bicubic", antialias=antialias)
    return resized.to(image.dtype)


def area_resize(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, width, rows, columns) -> (batch, width, *size): the mean over the area, computed in float32."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features.float(), size=size, mode="area").to(features.dtype)


def cut_tiles(image: torch.Tensor, tile_grid: tuple[int, int]) -> torch.Tensor:
    """(batch, channels, height, width) -> (rows * columns * batch, channels, tile height, tile width), row by row."""
    rows, columns = tile_grid
    batch, channels, height, width = image.shape
    tiles = image.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return tiles.permute(2, 4, 0, 1, 3, 5).reshape(-1, channels, height // rows, width // columns)


def join_tiles(maps: torch.Tensor, tile_grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `cut_tiles`: (rows * columns * batch, width, h, w) -> (batch, width, rows * h, columns * w)."""
    rows, columns = tile_grid
    _, width, height, breadth = maps.shape
    grid = maps.reshape(rows, columns, -1, width, height, breadth)
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(-1, width, rows * height, columns * breadth)


def _window(start: int, stop: int, old: int, new: int) -> tuple[int, int]:
    """The part of a signal of length `old` from which a bicubic resize to `new` makes the entries from `start` to
    `stop`.

    It begins and ends where old and new pixels have a border in common, so that the part can be resized on its own.
    """
    step = old // math.gcd(old, new)
    taps = 3
    first = max(0, start * old // new - taps) // step * step
    last = -(-(-(-stop * old // new) + taps) // step) * step
    return first, min(last, old)


def _resized_part(
    image: torch.Tensor, size: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int]
) -> torch.Tensor:
    """What `resize_image(image, size)` shows at `corner` (top, left) over `extent`, without making the rest."""
    region, offset, part_size = [], [], []
    for old, new, start, length in zip(image.shape[-2:], size, corner, extent, strict=True):
        first, last = _window(start, min(start + length, new), old, new)
        region.append(slice(first, last))
        offset.append(start - first * new // old)
        part_size.append((last - first) * new // old)
    part = resize_image(image[:, :, region[0], region[1]], tuple(part_size))
    return part[:, :, offset[0] : offset[0] + extent[0], offset[1] : offset[1] + extent[1]]


def _pad_to(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    return F.pad(image, (0, size[1] - width, 0, size[0] - height))


def whole_scale(image: torch.Tensor, plan: TilePlan, scale: int, antialias: bool) -> torch.Tensor:
    """The image at a scale, its sides multiples of the tile's."""
    rows, columns = plan.tile_grid(scale)
    full_size = (rows * plan.tile[0], columns * plan.tile[1])
    scaled = resize_image(image, plan.sizes[scale], antialias)
    return _pad_to(scaled, full_size) if plan.uneven == "pad" else resize_image(scaled, full_size)


def _tiles_one_by_one(image: torch.Tensor, plan: TilePlan, antialias: bool) -> Iterator[torch.Tensor]:
    """The tiles in the order of `cut_tiles`, scale by scale; each (batch, channels, *tile), made when it is asked
    for.
    """
    height, width = plan.tile
    for scale, size in enumerate(plan.sizes):
        rows, columns = plan.tile_grid(scale)
        even = size == (rows * height, columns * width)
        in_parts = not antialias and (even or plan.uneven == "pad")
        whole = None if in_parts else whole_scale(image, plan, scale, antialias)
        for row in range(rows):
            for column in range(columns):
                corner = (row * height, column * width)
                if whole is not None:
                    yield whole[:, :, corner[0] : corner[0] + height, corner[1] : corner[1] + width]
                else:
                    yield _pad_to(_resized_part(image, size, corner, plan.tile), plan.tile)


def _in_chunks(tiles: Iterator[torch.Tensor], chunk: int) -> Iterator[torch.Tensor]:
    """Tensors of any batch size -> tensors of batch size `chunk`, the last one smaller where it does not come out
    even.
    """
    waiting, count = [], 0
    for tile in tiles:
        waiting.append(tile)
        count += tile.shape[0]
        while count >= chunk:
            joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            yield joined[:chunk]
            waiting, count = [joined[chunk:]], count - chunk
    if count:
        yield torch.cat(waiting)


def token_grid(num_tokens: int, tile: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tokens of a tile of (height, width) pixels, patches taken to be square.

    Raises:
        ValueError: if the tokens are no such grid.
    """
    height, width = tile
    if height == width:
        side = math.isqrt(num_tokens)
        if side * side == num_tokens:
            return side, side
    else:
        patch = max(1, math.isqrt(height * width // max(num_tokens, 1)))
        for size in (patch, patch + 1, patch - 1):
            for grid in ((height // size, width // size), (-(-height // size), -(-width // size))) if size else ():
                if grid[0] * grid[1] == num_tokens:
                    return grid
    raise ValueError(
        f"The model gives {num_tokens} tokens for a tile of {height} x {width} pixels, which is no grid. If some are "
        "prefix tokens (CLS, registers), say how many: `num_prefix_token` (`num_prefix_tokens` in a config)."
    )


def run_tiles(
    image: torch.Tensor,
    plan: TilePlan,
    run: Callable[[torch.Tensor], None],
    tiles_per_forward: int | None = None,
    antialias: bool = False,
) -> None:
    """Gives every tile of every scale to `run`: all at once, or `tiles_per_forward` at a time, made when they are
    needed.
    """
    if tiles_per_forward is None:
        scales = range(len(plan.sizes))
        run(
            torch.cat(
                [cut_tiles(whole_scale(image, plan, scale, antialias), plan.tile_grid(scale)) for scale in scales]
            )
        )
        return
    for tiles in _in_chunks(_tiles_one_by_one(image, plan, antialias), tiles_per_forward):
        run(tiles)


def check_chunks(tiles_per_forward: int | None) -> None:
    if tiles_per_forward is not None:
        check_int("tiles_per_forward", tiles_per_forward, 1)


def check_num_tiles(num_tiles: int, total: int) -> int:
    """A tile budget as an int; raises ValueError for one that is none of the `total` tiles of the higher scales."""
    num_tiles = check_int("num_tiles", num_tiles)
    if not 0 <= num_tiles <= total:
        raise ValueError(
            f"`num_tiles` must be between 0 and {total}, the tiles of the scales above the smallest, got "
            f"{num_tiles!r}."
        )
    return num_tiles


def check_scale_index(resize_output_to_idx: int, num_scales: int) -> None:
    if not -num_scales <= check_int("resize_output_to_idx", resize_output_to_idx) < num_scales:
        raise ValueError(
            f"`resize_output_to_idx` must name one of the {num_scales} scales ({-num_scales} to {num_scales - 1}), "
            f"got {resize_output_to_idx}."
        )


__all__ = [
    "UNEVEN",
    "TilePlan",
    "area_resize",
    "check_chunks",
    "check_num_tiles",
    "check_scale_index",
    "cut_tiles",
    "join_tiles",
    "plan_tiles",
    "resize_image",
    "run_tiles",
    "scale_list",
    "token_grid",
    "whole_scale",
]
