"""Best-first quadtree selection as one sort, and its reverse.

Vision Transformers with Mixed-Resolution Tokenization, arXiv 2304.00287; as in TomerRonen34/mixed-resolution-vit.

A picture starts as a grid of its largest patches. Again and again, the live patch with the highest score is split into
its four children, until the budget is used up. Done one patch at a time, that is a loop over splits; here it is one
sort, exactly.

Every splittable node has a rank r: its place in the order (score, highest first; level, coarser first; raster). The
loop visits the nodes in the lexicographic order of key(v), which is the sequence of right-to-left maxima of the ranks
on the path from the root-level ancestor to v: once a node is expanded that ranks behind all of its path, everything
else on the frontier ranks behind it too, so its descendants that rank ahead of it are expanded next, in the same
manner. A prefix sorts first. A child's key is the part of its parent's key that exceeds r(child), then r(child). The
first k nodes in that order are the k splits.

Nodes are numbered level by level, coarsest first, in raster order within a level: that is also the order of tokens.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Bits of an int64 that a packed key may use; longer keys are sorted in several passes.
KEY_BITS = 62


class QuadtreeTokens(NamedTuple):
    """Which patches a picture is cut into: each field is (batch, num_tokens); level 0 has the largest patches."""

    level: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


class MaskedQuadtreeTokens(NamedTuple):
    """As `QuadtreeTokens`, padded to one length; `mask` is True where a token is real. Padding is 0."""

    level: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    mask: torch.Tensor


def nearest_multiples(length: int, multiple: int) -> tuple[int, int]:
    """The multiples of `multiple` next to `length`, below and above, at least one; for 224 and 64: 192 and 256."""
    below = max(length // multiple, 1) * multiple
    return below, below + multiple


def check_multiple(image_size: tuple[int, int], multiple: int, name: str) -> None:
    """Refuses a picture whose height or width (pixels) is no multiple of `multiple`, the config field `name`.

    Raises:
        ValueError: naming the nearest legal heights and widths.
    """
    wrong = [
        f"{axis} {length} (nearest: {' and '.join(map(str, nearest_multiples(length, multiple)))})"
        for axis, length in zip(("height", "width"), image_size, strict=True)
        if length % multiple or length < multiple
    ]
    if wrong:
        raise ValueError(
            f"`image_size` must be a multiple of `{name}` = {multiple} pixels in height and width, got "
            f"{' and '.join(wrong)}. Resize or pad the picture, as the image processor does, or choose another "
            f"`{name}`."
        )


def check_token_budget(num_tokens: int, coarsest: int, finest: int, round_down: bool = False) -> int:
    """`num_tokens` as an int, if some number of splits gives so many tokens.

    Args:
        num_tokens: the budget: `coarsest` + 3 k, at most `finest`.
        coarsest: tokens before the first split.
        finest: tokens when every patch is split to the smallest size.
        round_down: whether a budget that is not legal becomes the next legal one below.

    Raises:
        ValueError: for a budget that no number of splits gives; it names the two nearest legal ones.
    """
    if isinstance(num_tokens, bool) or not hasattr(num_tokens, "__index__"):
        raise ValueError(f"`num_tokens` must be an int, got {num_tokens!r}.")
    num_tokens = int(num_tokens)
    below = min(max(num_tokens - (num_tokens - coarsest) % 3, coarsest), finest)
    if num_tokens == below or (round_down and num_tokens > below):
        return below
    if coarsest == finest:
        raise ValueError(f"`num_tokens` must be {finest}, since no patch can be split; got {num_tokens}.")
    if num_tokens < coarsest:
        near = (coarsest, coarsest + 3)
    else:
        near = (finest - 3, finest) if num_tokens > finest else (below, below + 3)
    raise ValueError(
        f"`num_tokens` must be {coarsest} + 3 k (each split adds 3 tokens), from {coarsest} (no split) to {finest} "
        f"(all split); got {num_tokens}. The nearest legal budgets are {near[0]} and {near[1]}."
    )


def _check_scores(scores: Sequence[torch.Tensor]) -> None:
    if isinstance(scores, torch.Tensor) or not isinstance(scores, Sequence) or len(scores) == 0:
        raise ValueError(
            "`scores` must be a list of tensors (batch, rows, columns), one for each level but the finest, coarsest "
            f"first; got {type(scores).__name__ if not isinstance(scores, Sequence) else 'an empty list'}."
        )
    for level, score in enumerate(scores):
        if not isinstance(score, torch.Tensor) or score.ndim != 3:
            shape = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
            raise ValueError(f"`scores[{level}]` must be a tensor of shape (batch, rows, columns), got {shape}.")
        batch, rows, columns = scores[0].shape
        expected = (batch, rows << level, columns << level)
        if tuple(score.shape) != expected or 0 in expected:
            raise ValueError(
                f"`scores[{level}]` must have the shape {expected} (batch, rows, columns): each level's grid is twice "
                f"the one before; got {tuple(score.shape)}."
            )


def _check_values(flat_scores: torch.Tensor) -> None:
    # A look at the values waits for the device, and tracers have none: only for eager tensors on the CPU.
    if flat_scores.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flat_scores.isnan().any()):
        raise ValueError("`scores` hold NaN: scores must be ordered, higher = split sooner.")


def _enlarge(grid: torch.Tensor) -> torch.Tensor:
    """(batch, rows, columns) -> (batch, 2 rows, 2 columns): every node's value, at its four children."""
    batch, rows, columns = grid.shape
    return grid[:, :, None, :, None].expand(batch, rows, 2, columns, 2).reshape(batch, 2 * rows, 2 * columns)


def _per_level(flat: torch.Tensor, grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """(batch, nodes) -> one (batch, rows, columns) a level."""
    parts = flat.split([rows * columns for rows, columns in grids], dim=1)
    return [part.reshape(part.shape[0], *grid) for part, grid in zip(parts, grids, strict=True)]


def _pack(entries: list[torch.Tensor], depth: int, nodes: int) -> list[torch.Tensor]:
    """The entries of keys, up to `depth` of them, as few integers as hold them, in the same lexicographic order."""
    digits = max(1, int(KEY_BITS / math.log2(nodes + 1)))  # entries that fit in one integer
    packed = []
    for start in range(0, depth, digits):
        stop = min(start + digits, depth)
        key = entries[start] if start < len(entries) else torch.zeros_like(entries[0])
        for entry in entries[start + 1 : stop]:
            key = key * (nodes + 1) + entry
        missing = stop - max(min(stop, len(entries)), start + 1)
        packed.append(key * (nodes + 1) ** missing if missing else key)
    return packed


def _expansion_keys(flat_scores: torch.Tensor, grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Integers (batch, nodes) whose lexicographic order is that in which best-first expansion visits nodes."""
    nodes = flat_scores.shape[1]
    # A stable sort breaks ties by the number of the node: coarser level first, then raster.
    order = flat_scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(1, nodes + 1, device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter(1, order, places)

    packed_by_level = []
    entries: list[torch.Tensor] = []  # of the keys of the level before, largest first; 0 = the key has ended
    for rank in _per_level(ranks, grids):
        inherited = [_enlarge(entry) for entry in entries]
        entries = [torch.maximum(inherited[0], rank) if inherited else rank]
        for before, entry in pairwise([*inherited, None]):
            own = torch.where(before > rank, rank, 0)
            entries.append(own if entry is None else torch.where(entry > rank, entry, own))
        packed_by_level.append(_pack(entries, len(grids), nodes))
    return [torch.cat([key.flatten(1) for key in keys], dim=1) for keys in zip(*packed_by_level, strict=True)]


def _first_splits(flat_scores: torch.Tensor, grids: Sequence[tuple[int, int]], count: int) -> torch.Tensor:
    """(batch, nodes), True for the first `count` nodes that best-first expansion splits."""
    if count == 0 or count == flat_scores.shape[1]:
        return torch.full_like(flat_scores, count > 0, dtype=torch.bool)
    *later, last = _expansion_keys(flat_scores, grids)
    if not later:
        threshold = last.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
        return last <= threshold
    order = last.sort(dim=1, stable=True).indices
    for key in reversed(later):
        order = order.gather(1, key.gather(1, order).sort(dim=1, stable=True).indices)
    return torch.zeros_like(flat_scores, dtype=torch.bool).scatter(1, order[:, :count], True)


def _above_threshold(scores: Sequence[torch.Tensor], threshold: float) -> torch.Tensor:
    """(batch, nodes), True where the score of a node and those of all its ancestors exceed `threshold`."""
    reached = [scores[0] > threshold]
    for score in scores[1:]:
        reached.append(_enlarge(reached[-1]) & (score > threshold))
    return torch.cat([grid.flatten(1) for grid in reached], dim=1)


def select_nodes(
    scores: Sequence[torch.Tensor],
    num_tokens: int | None = None,
    split_threshold: float | None = None,
    round_down: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The selection of `quadtree_tokens` as numbers of nodes: (batch, num_tokens), and the mask or None."""
    _check_scores(scores)
    _, rows, columns = scores[0].shape
    coarsest = rows * columns
    finest = coarsest << (2 * len(scores))
    if num_tokens is None and split_threshold is None:
        raise ValueError("Give `num_tokens` (a budget), `split_threshold` (each picture its own), or both.")
    if num_tokens is not None:
        num_tokens = check_token_budget(num_tokens, coarsest, finest, round_down)
    if split_threshold is not None and split_threshold != split_threshold:
        raise ValueError("`split_threshold` is NaN: give a score above which patches are split.")

    grids = [tuple(score.shape[1:]) for score in scores]
    flat_scores = torch.cat([score.flatten(1) for score in scores], dim=1).detach()
    _check_values(flat_scores)
    mask = None
    if num_tokens is not None:
        splits = _first_splits(flat_scores, grids, (num_tokens - coarsest) // 3)
    if split_threshold is not None:
        # Nodes above the threshold with all their ancestors come first in the order, so a maximum only cuts its end
        # off.
        above = _above_threshold(scores, split_threshold)
        splits = above if num_tokens is None else above & splits
        lengths = coarsest + 3 * splits.sum(dim=1)
        if num_tokens is None:
            num_tokens = int(lengths.max())
        mask = torch.arange(num_tokens, device=splits.device) < lengths[:, None]

    split_grids = _per_level(splits, grids)
    live = [~split_grids[0]]
    for parent, split in pairwise(split_grids):
        live.append(_enlarge(parent) ^ split)
    live.append(_enlarge(split_grids[-1]))
    live = torch.cat([grid.flatten(1) for grid in live], dim=1)

    # The i-th live node goes to place i; all others to place 0, which is cut off.
    place = live.cumsum(dim=1) * live
    numbers = torch.arange(live.shape[1], device=live.device).expand_as(place)
    nodes = place.new_zeros(place.shape[0], num_tokens + 1).scatter(1, place, numbers)
    return nodes[:, 1:], mask


def _node_table(rows: int, columns: int, levels: int, device: torch.device) -> torch.Tensor:
    """Level, row and column of every node: (nodes, 3)"""
    grids = []
    for level in range(levels):
        shape = (rows << level, columns << level)
        row = torch.arange(shape[0], device=device)[:, None].expand(shape)
        column = torch.arange(shape[1], device=device).expand(shape)
        grids.append(torch.stack([torch.full_like(row, level), row, column], dim=-1).flatten(0, 1))
    return torch.cat(grids)


_node_tables: dict[tuple, torch.Tensor] = {}


def decode_nodes(nodes: torch.Tensor, rows: int, columns: int, levels: int) -> QuadtreeTokens:
    """Numbers of nodes -> level, row, column; level 0 has the grid (rows, columns), `levels` counts the finest too."""
    if torch.compiler.is_compiling():
        table = _node_table(rows, columns, levels, nodes.device)
    else:
        key = (rows, columns, levels, nodes.device)
        table = _node_tables.get(key)
        if table is None:
            # outside of inference mode, so that the cached tensor may later take part in a backward pass
            with torch.inference_mode(False):
                table = _node_table(rows, columns, levels, nodes.device)
            if type(table) is torch.Tensor and table.device.type != "meta":  # a tracer's stand-in must not be kept
                _node_tables[key] = table
    return QuadtreeTokens(*F.embedding(nodes, table).unbind(dim=-1))


def quadtree_tokens(
    scores: Sequence[torch.Tensor], num_tokens: int | None = None, split_threshold: float | None = None
) -> QuadtreeTokens | MaskedQuadtreeTokens:
    """Selects the patches of a quadtree best-first.

    The result is exactly that of splitting the patch of the highest score, one at a time.

    There is no loop over splits or pictures. With `num_tokens` the shapes are fixed, so it compiles and exports. Ties:
    the coarser level first, then raster order.

    Args:
        scores: one (batch, rows, columns) tensor a level, coarsest first, each grid twice the one before; higher =
            split sooner. The level of the smallest patches, which cannot split, has no scores.
        num_tokens: tokens of every picture: rows * columns of the coarsest grid + 3 k.
        split_threshold: splits patches whose score is higher, so that each picture has its own number of tokens,
            padded to the longest. With `num_tokens` too, that is the maximum, and all are padded to it.

    Returns:
        `QuadtreeTokens` (level, row, column), each (batch, num_tokens) int64, from coarse to fine, in raster order
        within a level; with `split_threshold` `MaskedQuadtreeTokens`, whose fourth field `mask` is True where a token
        is real.

    Raises:
        ValueError: for scores of wrong shapes, or with NaN on the CPU; a budget that no number of splits gives;
            neither a budget nor a threshold.

    Source: arXiv 2304.00287, section 3.
    """
    nodes, mask = select_nodes(scores, num_tokens, split_threshold)
    tokens = decode_nodes(nodes, *scores[0].shape[1:], levels=len(scores) + 1)
    if mask is None:
        return tokens
    return MaskedQuadtreeTokens(*(torch.where(mask, field, 0) for field in tokens), mask)


def _check_reverse(tokens, patch_centers, patch_sizes, image_size, min_patch_size, token_mask) -> None:
    if tokens.ndim != 3:
        raise ValueError(f"`tokens` must have the shape (batch, tokens, width), got {tuple(tokens.shape)}.")
    batch_and_tokens = tuple(tokens.shape[:2])
    if tuple(patch_centers.shape) != (*batch_and_tokens, 2):
        raise ValueError(
            f"`patch_centers` must have the shape {(*batch_and_tokens, 2)}, got {tuple(patch_centers.shape)}."
        )
    for name, value in (("patch_sizes", patch_sizes), ("token_mask", token_mask)):
        if value is not None and tuple(value.shape) != batch_and_tokens:
            raise ValueError(
                f"`{name}` must have the shape {batch_and_tokens} of `tokens` without prefix tokens, got "
                f"{tuple(value.shape)}."
            )
    if image_size[0] % min_patch_size or image_size[1] % min_patch_size:
        raise ValueError(
            f"`image_size` must be a multiple of `min_patch_size` in height and width, got {image_size} and "
            f"{min_patch_size}."
        )


def reverse_quadtree(
    tokens: torch.Tensor,
    patch_centers: torch.Tensor,
    patch_sizes: torch.Tensor,
    image_size: int | Sequence[int],
    min_patch_size: int,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copies each token over the area of its patch: tokens of a quadtree, in any order -> a dense map. Differentiable.

    Args:
        tokens: (batch, num_tokens, width), without prefix tokens.
        patch_centers: (batch, num_tokens, 2), (x, y) in pixels.
        patch_sizes: (batch, num_tokens) in pixels: `min_patch_size` times a power of two.
        image_size: (height, width) in pixels, or int.
        min_patch_size: size in pixels of a cell of the map.
        token_mask: (batch, num_tokens), True where a token is real; all are when None.

    Returns:
        (batch, width, height / min_patch_size, width / min_patch_size); 0 where no token lies.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    height, width = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    _check_reverse(tokens, patch_centers, patch_sizes, (height, width), min_patch_size, token_mask)
    rows, columns = height // min_patch_size, width // min_patch_size
    batch, num_tokens, channels = tokens.shape

    patch_sizes = patch_sizes.to(patch_centers.dtype)
    left, top = (patch_centers - patch_sizes[..., None] / 2).div(min_patch_size).round().long().unbind(dim=-1)
    cells = (patch_sizes / min_patch_size).round().long()  # side of a patch in cells
    if token_mask is not None:
        cells = torch.where(token_mask, cells, 0)

    # Which token (from 1; 0 = none) lies over each cell: written once a patch at the grid of its own size, then
    # enlarged.
    number = torch.arange(1, num_tokens + 1, device=tokens.device).expand(batch, -1)
    owner = torch.zeros(1, dtype=torch.long, device=tokens.device)
    side = 1
    while side <= max(rows, columns):
        grid_rows, grid_columns = -(-rows // side), -(-columns // side)
        place = (top // side) * grid_columns + left // side
        place = torch.where(cells == side, place, grid_rows * grid_columns)  # the last place is cut off
        owners = place.new_zeros(batch, grid_rows * grid_columns + 1).scatter(1, place, number)
        owners = owners[:, :-1].reshape(batch, grid_rows, 1, grid_columns, 1).expand(-1, -1, side, -1, side)
        owner = owner + owners.reshape(batch, grid_rows * side, grid_columns * side)[:, :rows, :columns]
        side *= 2

    padded = F.pad(tokens, (0, 0, 1, 0)).flatten(0, 1)  # (batch * (1 + tokens), channels), token 0 is zero
    first = torch.arange(batch, device=tokens.device)[:, None] * (num_tokens + 1)
    dense = padded.index_select(0, (owner.flatten(1) + first).flatten())
    return dense.view(batch, rows, columns, channels).permute(0, 3, 1, 2)


__all__ = [
    "MaskedQuadtreeTokens",
    "QuadtreeTokens",
    "check_multiple",
    "check_token_budget",
    "decode_nodes",
    "nearest_multiples",
    "quadtree_tokens",
    "reverse_quadtree",
    "select_nodes",
]
