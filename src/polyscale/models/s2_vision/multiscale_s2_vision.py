"""When Do We Not Need Larger Vision Models? (S2, arXiv 2403.13043): any vision model at several scales.

Faithful to bfshi/scaling_on_scales (`s2wrapper`) on the square pictures it takes; pictures and tiles of other shapes
follow its `dev_any_shape` branch, with the token count that branch promises.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

import torch
import torch.nn.functional as F

from ...utils.validation import check_choice, to_pair


OUTPUT_SHAPES = ("bnc", "bchw")
UNEVEN = ("resize", "pad")


@dataclass(frozen=True)
class TilePlan:
    """How a picture becomes tiles of one size, at each scale.

    Args:
        sizes: (height, width) in pixels of the picture at each scale.
        tile: (height, width) in pixels of every tile.
        uneven: what becomes of a size that is no multiple of the tile: "resize" or "pad".
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

    def feature_grid(self, scale: int, features_per_tile: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of features that the picture itself covers at a scale: padding and enlargement of tiles
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
    """The tiles of a picture of `input_size` (height, width); arguments and errors as in `multiscale_forward`."""
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
    height, width = (int(side * scale) for side in input_size)
    if height < 1 or width < 1:
        raise ValueError(
            f"`scales` holds {scale!r}, which leaves an empty tile of a picture of {tuple(input_size)} "
            "pixels (height, width): "
            "use a larger scale or a larger picture."
        )
    return height, width


def resize_picture(picture: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, channels, *size): bicubic, computed in float32."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    resized = F.interpolate(picture.float(), size=size, mode="bicubic", antialias=antialias)
    return resized.to(picture.dtype)


def area_resize(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, width, rows, columns) -> (batch, width, *size): the mean over the area, computed in float32."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features.float(), size=size, mode="area").to(features.dtype)


def cut_tiles(picture: torch.Tensor, tile_grid: tuple[int, int]) -> torch.Tensor:
    """(batch, channels, height, width) -> (rows * columns * batch, channels, tile height, tile width), row by row."""
    rows, columns = tile_grid
    batch, channels, height, width = picture.shape
    tiles = picture.reshape(batch, channels, rows, height // rows, columns, width // columns)
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
    picture: torch.Tensor, size: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int]
) -> torch.Tensor:
    """What `resize_picture(picture, size)` shows at `corner` (top, left) over `extent`, without making the rest."""
    region, offset, part_size = [], [], []
    for old, new, start, length in zip(picture.shape[-2:], size, corner, extent, strict=True):
        first, last = _window(start, min(start + length, new), old, new)
        region.append(slice(first, last))
        offset.append(start - first * new // old)
        part_size.append((last - first) * new // old)
    part = resize_picture(picture[:, :, region[0], region[1]], tuple(part_size))
    return part[:, :, offset[0] : offset[0] + extent[0], offset[1] : offset[1] + extent[1]]


def _pad_to(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = picture.shape[-2:]
    if (height, width) == tuple(size):
        return picture
    return F.pad(picture, (0, size[1] - width, 0, size[0] - height))


def _whole_scale(picture: torch.Tensor, plan: TilePlan, scale: int, antialias: bool) -> torch.Tensor:
    """The picture at a scale, its sides multiples of the tile's."""
    rows, columns = plan.tile_grid(scale)
    full_size = (rows * plan.tile[0], columns * plan.tile[1])
    scaled = resize_picture(picture, plan.sizes[scale], antialias)
    return _pad_to(scaled, full_size) if plan.uneven == "pad" else resize_picture(scaled, full_size)


def _tiles_one_by_one(picture: torch.Tensor, plan: TilePlan, antialias: bool) -> Iterator[torch.Tensor]:
    """The tiles in the order of `cut_tiles`, scale by scale; each (batch, channels, *tile), made when it is asked
    for.
    """
    height, width = plan.tile
    for scale, size in enumerate(plan.sizes):
        rows, columns = plan.tile_grid(scale)
        even = size == (rows * height, columns * width)
        in_parts = not antialias and (even or plan.uneven == "pad")
        whole = None if in_parts else _whole_scale(picture, plan, scale, antialias)
        for row in range(rows):
            for column in range(columns):
                corner = (row * height, column * width)
                if whole is not None:
                    yield whole[:, :, corner[0] : corner[0] + height, corner[1] : corner[1] + width]
                else:
                    yield _pad_to(_resized_part(picture, size, corner, plan.tile), plan.tile)


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
        f"The model gives {num_tokens} tokens for a tile of {height} x {width} pixels, which is no grid. "
        "If some are prefix tokens (CLS, "
        "registers), say how many: `num_prefix_token` (`num_prefix_tokens` in a config)."
    )


class ScaleMerger:
    """Puts what a model says about tiles together again: one tensor over all scales.

    Args:
        plan: the tiles.
        batch: pictures.
        resize_output_to_idx: the scale whose feature grid the output has.
        num_prefix_token: tokens in front of each tile's that have no place; averaged over the tiles of a scale.
        features_per_tile: (rows, columns) of a tile's features; found from their number when None, or when they are
            others.
    """

    def __init__(
        self,
        plan: TilePlan,
        batch: int,
        resize_output_to_idx: int = 0,
        num_prefix_token: int = 0,
        features_per_tile: tuple[int, int] | None = None,
    ):
        self.plan = plan
        self.batch = batch
        self.target = resize_output_to_idx % len(plan.sizes)
        self.num_prefix_token = num_prefix_token
        self.features_per_tile = features_per_tile
        self._waiting: list[torch.Tensor] = []
        self._maps: list[torch.Tensor] = []
        self._prefixes: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """The next tiles' output, in the order of the tiles: tokens (n, tokens, width), maps (n, width, h, w) or
        vectors (n, width).
        """
        self._waiting.append(features)
        while len(self._maps) < len(self.plan.sizes):
            needed = self.plan.num_tiles(len(self._maps)) * self.batch
            if sum(part.shape[0] for part in self._waiting) < needed:
                return
            joined = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            self._waiting = [joined[needed:]]
            self._merge_scale(joined[:needed])

    def _merge_scale(self, features: torch.Tensor) -> None:
        scale = len(self._maps)
        if features.ndim == 2 or self.num_prefix_token:
            prefix = features if features.ndim == 2 else features[:, : self.num_prefix_token]
            prefix = prefix.unflatten(0, (-1, self.batch)).mean(dim=0)
            if features.ndim == 2:
                self._maps.append(prefix)
                return
            self._prefixes.append(prefix)
            features = features[:, self.num_prefix_token :]
        if features.ndim == 3:
            grid = self.features_per_tile
            if grid is None or grid[0] * grid[1] != features.shape[1]:
                grid = token_grid(features.shape[1], self.plan.tile)
            features = features.transpose(1, 2).unflatten(2, grid)
        per_tile = tuple(features.shape[-2:])
        features = join_tiles(features, self.plan.tile_grid(scale))
        if self.plan.uneven == "pad":
            rows, columns = self.plan.feature_grid(scale, per_tile)
            features = features[:, :, :rows, :columns]
        self._maps.append(area_resize(features, self.plan.feature_grid(self.target, per_tile)))

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The map (batch, scales * width, rows, columns) or vector (batch, scales * width), and the prefix tokens
        if any.
        """
        prefix = torch.cat(self._prefixes, dim=-1) if self._prefixes else None
        return torch.cat(self._maps, dim=1), prefix


def as_tokens(features: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """(batch, width, rows, columns) and (batch, prefix, width) -> (batch, prefix + rows * columns, width)"""
    tokens = features.flatten(2).transpose(1, 2)
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


def run_tiles(
    picture: torch.Tensor,
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
                [cut_tiles(_whole_scale(picture, plan, scale, antialias), plan.tile_grid(scale)) for scale in scales]
            )
        )
        return
    for tiles in _in_chunks(_tiles_one_by_one(picture, plan, antialias), tiles_per_forward):
        run(tiles)


def check_chunks(tiles_per_forward: int | None) -> None:
    if tiles_per_forward is not None and (isinstance(tiles_per_forward, bool) or tiles_per_forward < 1):
        raise ValueError(
            f"`tiles_per_forward` must be at least 1, or None for all at once, got {tiles_per_forward!r}."
        )


def check_scale_index(resize_output_to_idx: int, num_scales: int) -> None:
    if not -num_scales <= resize_output_to_idx < num_scales:
        raise ValueError(
            f"`resize_output_to_idx` must name one of the {num_scales} scales ({-num_scales} to "
            f"{num_scales - 1}), got "
            f"{resize_output_to_idx}."
        )


def features_of(output: object, output_shape: str) -> torch.Tensor:
    """The features in what a model returned: a tensor, a tuple that begins with it, or an output object of
    transformers.

    Raises:
        ValueError: for a classifier's logits, or features of another shape than `output_shape` says.
    """
    if not isinstance(output, torch.Tensor):
        named = output if isinstance(output, dict) else {}
        if "last_hidden_state" in named:
            output = named["last_hidden_state"]
        elif "feature_maps" in named:
            output = named["feature_maps"][-1]
        elif "logits" in named:
            raise ValueError(
                "`model` gives a classifier's logits where features are expected: pass the model without "
                "its head, or a function that returns "
                "the features (`lambda x: model(x, output_hidden_states=True).hidden_states[-1]`)."
            )
        elif isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
            output = output[0]
        else:
            raise ValueError(
                "`model` must return features: a tensor, or an output with `last_hidden_state`, got "
                f"{type(output).__name__}."
            )
    expected = {"bnc": 3, "bchw": 4}[output_shape]
    if output.ndim == 2:
        raise ValueError(
            "`model` gives a classifier's logits, or another single vector a picture, of shape "
            f"{tuple(output.shape)} where features are "
            "expected: (batch, tokens, width) or (batch, width, rows, columns). Pass the model without its head."
        )
    if output.ndim != expected:
        fitting = {3: "bnc", 4: "bchw"}.get(output.ndim)
        hint = f" Use `output_shape={fitting!r}`." if fitting else ""
        raise ValueError(
            f"`output_shape={output_shape!r}` expects features with {expected} dimensions, the model "
            f"gives {tuple(output.shape)}.{hint}"
        )
    return output


def multiscale_forward(
    model: Callable,
    input: torch.Tensor,
    scales: Sequence[float] | None = None,
    img_sizes: Sequence[int | Sequence[int]] | None = None,
    max_split_size: int | Sequence[int] | None = None,
    resize_output_to_idx: int = 0,
    num_prefix_token: int = 0,
    output_shape: str = "bnc",
    split_forward: bool = False,
    *,
    uneven: str = "resize",
    tiles_per_forward: int | None = None,
) -> torch.Tensor:
    """Features of a picture at several scales, concatenated on channels: the token count is that of one scale.

    Each scale is the input resized (bicubic, not antialiased), cut into tiles of `max_split_size`, and given to the
    model; the tiles' features are joined to one map a scale, and all maps resized ("area") to one grid. The
    arguments are those of `s2wrapper.forward`.

    Args:
        model: a function or model from pictures (n, channels, height, width) to features: (n, tokens, width) or (n,
            width, rows, columns), an output object with `last_hidden_state`, or a tuple that begins with one of these.
        input: pictures of shape (batch, channels, height, width), any height and width.
        scales: the scales, as factors of the input's height and width.
        img_sizes: in place of `scales`, the size in pixels at each scale: int (a square) or (height, width).
        max_split_size: size in pixels of the tiles, int or (height, width); the input's size when None.
        resize_output_to_idx: the scale (its place in the list) whose feature grid the output has.
        num_prefix_token: tokens in front of the model's output that have no place in the picture (CLS, registers).
            They are averaged over the tiles of a scale.
        output_shape: "bnc" (tokens: a ViT) or "bchw" (maps: a ConvNet); the model's output and this function's.
        split_forward: whether the tiles go through the model one place at a time (`batch` tiles): the memory of
            about one scale.
        uneven: how a size that is no multiple of `max_split_size` is cut, so that the model still sees tiles of that
            size: "resize" enlarges the scaled picture to whole tiles, "pad" adds zeros at its bottom and right. The
            feature grid is that of the scaled picture in both cases.
        tiles_per_forward: how many tiles go through the model at a time; all when None.

    Returns:
        (batch, num_prefix_token + tokens, scales * width), or (batch, scales * width, rows, columns).

    Raises:
        ValueError: for both or neither of `scales` and `img_sizes`, a scale that leaves an empty tile, a wrong
            choice or index, an input of another shape or without floating-point numbers, logits in place of
            features, and token counts that are no grid.

    Example:

    ```python
    >>> features = multiscale_forward(model, pictures, scales=[1, 2], num_prefix_token=1)
    ```
    """
    check_choice("output_shape", output_shape, OUTPUT_SHAPES)
    if num_prefix_token < 0 or (output_shape == "bchw" and num_prefix_token):
        raise ValueError(
            f"`num_prefix_token` must be at least 0, and 0 with `output_shape='bchw'`, got {num_prefix_token}."
        )
    if input.ndim != 4 or input.shape[0] == 0 or not input.is_floating_point():
        raise ValueError(
            "`input` must be floating-point pictures of shape (batch, channels, height, width), at least one, got "
            f"{tuple(input.shape)} of {input.dtype}."
        )
    check_chunks(tiles_per_forward)
    plan = plan_tiles(input.shape[-2:], scales, img_sizes, max_split_size, uneven)
    check_scale_index(resize_output_to_idx, len(plan.sizes))
    if split_forward and tiles_per_forward is None:
        tiles_per_forward = input.shape[0]

    merger = ScaleMerger(plan, input.shape[0], resize_output_to_idx, num_prefix_token)
    run_tiles(input, plan, lambda tiles: merger.add(features_of(model(tiles), output_shape)), tiles_per_forward)
    features, prefix = merger.result()
    return features if output_shape == "bchw" else as_tokens(features, prefix)


__all__ = [
    "OUTPUT_SHAPES",
    "UNEVEN",
    "ScaleMerger",
    "TilePlan",
    "area_resize",
    "as_tokens",
    "check_chunks",
    "check_scale_index",
    "cut_tiles",
    "features_of",
    "join_tiles",
    "multiscale_forward",
    "plan_tiles",
    "resize_picture",
    "run_tiles",
    "scale_list",
    "token_grid",
]
