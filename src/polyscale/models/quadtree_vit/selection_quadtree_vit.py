"""Best-first quadtree selection as one sort, and its reverse.

Vision Transformers with Mixed-Resolution Tokenization, arXiv 2304.00287; as in TomerRonen34/mixed-resolution-vit.

An image starts as a grid of its largest patches. Again and again, the live patch with the highest score is split into
its four children, until the budget is used up. Done one patch at a time, that is a loop over splits; here it is one
sort, exactly.

Every splittable node has a rank r: its place in the order (score, highest first; level, coarser first; raster). The
loop visits the nodes in the lexicographic order of key(v), which is the sequence of right-to-left maxima of the ranks
on the path from the root-level ancestor to v: once a node is expanded that ranks behind all of its path, everything
else on the frontier ranks behind it too, so its descendants that rank ahead of it are expanded next, in the same
manner. A prefix sorts first. A child's key is the part of its parent's key that exceeds r(child), then r(child). The
first k nodes in that order are the k splits.

Nodes are numbered level by level, coarsest first, in raster order within a level: that is also the order of tokens.
Node 0 stands above them: the whole image, whose split into the largest patches is always the first.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...utils.tracing import can_be_kept, is_traced, longest
from ...utils.validation import check_number


# Bits of an int64 that a packed key may use; longer keys are sorted in several passes.
KEY_BITS = 62
# Grids of images whose constants are kept.
MAX_TREES = 64


class QuadtreeTokens(NamedTuple):
    """Which patches an image is cut into: each field is (batch, num_tokens); level 0 has the largest patches."""

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
    """Refuses an image whose height or width (pixels) is no multiple of `multiple`, the config field `name`.

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
            f"{' and '.join(wrong)}. Resize or pad the image, as the image processor does, or choose another "
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
    try:
        if isinstance(num_tokens, bool):
            raise TypeError
        num_tokens = index(num_tokens)
    except TypeError:
        raise ValueError(f"`num_tokens` must be an int, got {num_tokens!r}.") from None
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


def check_budget_of_batch(
    num_tokens: int | Sequence[int], batch: torch.Tensor, allowed: tuple[int, int], round_down: bool = False
) -> list[int]:
    """The budget of all images of a batch, a list of one, or of each of them, where `num_tokens` is a list.

    `allowed` is the smallest and the largest budget.

    Raises:
        ValueError: for a list of another length than the batch has images; for what `check_token_budget` refuses.
    """
    if not isinstance(num_tokens, (list, tuple)):
        return [check_token_budget(num_tokens, *allowed, round_down)]
    if len(num_tokens) != len(batch):
        raise ValueError(
            f"`num_tokens` must be an int, or a list of one for each of the {len(batch)} images, got "
            f"{len(num_tokens)} of them."
        )
    return [check_token_budget(budget, *allowed, round_down) for budget in num_tokens]


def _check_scores(scores: Sequence[torch.Tensor]) -> None:
    if isinstance(scores, torch.Tensor) or not isinstance(scores, Sequence) or len(scores) == 0:
        raise ValueError(
            "`scores` must be a list of tensors (batch, rows, columns), one for each level but the finest, coarsest "
            f"first; got {type(scores).__name__ if not isinstance(scores, Sequence) else 'an empty list'}."
        )
    for level, score in enumerate(scores):
        if not isinstance(score, torch.Tensor) or score.ndim != 3 or score.is_complex():
            is_tensor = isinstance(score, torch.Tensor)
            got = f"{tuple(score.shape)} of {score.dtype}" if is_tensor else type(score).__name__
            raise ValueError(f"`scores[{level}]` must be a tensor of shape (batch, rows, columns), got {got}.")
        batch, rows, columns = scores[0].shape
        expected = (batch, rows << level, columns << level)
        if tuple(score.shape) != expected or 0 in expected:
            raise ValueError(
                f"`scores[{level}]` must have the shape {expected} (batch, rows, columns): each level's grid is twice "
                f"the one before; got {tuple(score.shape)}."
            )


def _check_values(flat_scores: torch.Tensor) -> None:
    # A look at the values waits for the device: only on the CPU.
    if flat_scores.device.type == "cpu" and not is_traced(flat_scores) and math.isnan(flat_scores.max()):
        raise ValueError("`scores` hold NaN: scores must be ordered, higher = split sooner.")


class SelectedNodes(NamedTuple):
    """The selection of `quadtree_tokens` as numbers of nodes.

    Attributes:
        nodes: (batch, num_tokens), 0 pads.
        mask: (batch, num_tokens), True for a real token; None where images have no token counts of their own.
        counts: real tokens of each image, where there is a mask and that is known without waiting for a device.
    """

    nodes: torch.Tensor
    mask: torch.Tensor | None = None
    counts: list[int] | None = None


class _Tree(NamedTuple):
    """What is known of every node of a tree: its number, that of its parent, and its level, row and column.

    The fields are (nodes,), (nodes,) and (nodes, 3). Node 0 has 0 in all of them.
    """

    numbers: torch.Tensor
    parents: torch.Tensor
    places: torch.Tensor


def _make_tree(rows: int, columns: int, levels: int, device: torch.device) -> _Tree:
    grid = torch.zeros(1, 1, dtype=torch.long, device=device)  # numbers of the nodes of one level
    parents, places = [grid.flatten()], [grid.expand(1, 3)]
    num_nodes = 1
    for level in range(levels):
        shape = (rows << level, columns << level)
        before = grid[:, None, :, None].expand(-1, 2 if level else rows, -1, 2 if level else columns).reshape(shape)
        grid = torch.arange(num_nodes, num_nodes + shape[0] * shape[1], device=device).view(shape)
        num_nodes += shape[0] * shape[1]
        row = torch.arange(shape[0], device=device)[:, None].expand(shape)
        column = torch.arange(shape[1], device=device).expand(shape)
        parents.append(before.flatten())
        places.append(torch.stack([torch.full_like(row, level), row, column], dim=-1).flatten(0, 1))
    return _Tree(torch.arange(num_nodes, device=device), torch.cat(parents), torch.cat(places))


_trees: dict[tuple, _Tree] = {}


def _tree_for(rows: int, columns: int, levels: int, tensor: torch.Tensor) -> _Tree:
    """The tree whose coarsest grid is (rows, columns), on the device of `tensor`; `levels` counts the finest too."""
    if is_traced(tensor):
        return _make_tree(rows, columns, levels, tensor.device)
    key = (rows, columns, levels, tensor.device)
    tree = _trees.get(key)
    if tree is None:
        # outside of inference mode, so that the cached tensors may later take part in a backward pass
        with torch.inference_mode(False):
            tree = _make_tree(rows, columns, levels, tensor.device)
        if can_be_kept(tree.numbers):
            if len(_trees) >= MAX_TREES:
                _trees.clear()
            _trees[key] = tree
    return tree


def _pack(entries: Sequence[torch.Tensor], base: int) -> list[torch.Tensor]:
    """The entries of keys, each below `base`, as few integers as hold them, in the same lexicographic order."""
    digits = max(1, int(KEY_BITS / math.log2(base)))  # entries that fit in one integer
    packed = []
    for start in range(0, len(entries), digits):
        key, *later = entries[start : start + digits]
        for entry in later:
            key = entry.add(key, alpha=base)
        packed.append(key)
    return packed


def _stable_order(values: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """Indices that sort each row; equal values keep their order."""
    # ONNX has no stable sort by name, but its TopK, which other sorts become, keeps the order of equal values.
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return values.sort(dim=1, descending=descending).indices
    return values.sort(dim=1, descending=descending, stable=True).indices


def _expansion_keys(flat_scores: torch.Tensor, levels: int, tree: _Tree) -> list[torch.Tensor]:
    """Integers (batch, 1 + scores) whose lexicographic order is that in which best-first expansion visits nodes."""
    batch, num_scores = flat_scores.shape
    # A stable sort breaks ties by the number of the node: coarser level first, then raster.
    order = _stable_order(flat_scores, descending=True) + 1
    places = tree.numbers[1 : num_scores + 1].expand_as(order)
    ranks = order.new_zeros(batch, num_scores + 1).scatter_(1, order, places)

    parents = tree.parents[: num_scores + 1].expand_as(ranks)
    ended = ranks[:, :1]  # 0, the rank of the whole image: fills keys that are shorter than others
    ancestors, entries = ranks, [ranks]
    for _ in range(levels - 1):
        ancestors = ancestors.gather(1, parents)
        is_behind = ancestors > entries[0]
        entries = [torch.where(is_behind, new, old) for new, old in pairwise([ancestors, *entries, ended])]
    return _pack(entries, num_scores + 1)


def _first_splits(flat_scores: torch.Tensor, counts: Sequence[int], levels: int, tree: _Tree) -> torch.Tensor:
    """(batch, 1 + scores), True for the whole image and the first nodes that best-first expansion splits.

    `counts` says how many of them: one number for all images, or one for each.
    """
    *later, last = _expansion_keys(flat_scores, levels, tree)
    if not later and len(counts) == 1:
        threshold = last.topk(counts[0] + 1, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
        return last <= threshold
    order = _stable_order(last)
    for key in reversed(later):
        order = order.gather(1, _stable_order(key.gather(1, order)))
    is_split = torch.zeros_like(last, dtype=torch.bool)
    if len(counts) == 1:
        return is_split.scatter_(1, order[:, : counts[0] + 1], True)
    is_first = torch.arange(order.shape[1], device=order.device) <= torch.tensor(counts, device=order.device)[:, None]
    return is_split.scatter_(1, order, is_first)


def _above_threshold(flat_scores: torch.Tensor, threshold: float, levels: int, tree: _Tree) -> torch.Tensor:
    """(batch, 1 + scores), True for the whole image, and where a node and all its ancestors exceed `threshold`."""
    above = torch.cat(
        [flat_scores.new_ones(flat_scores.shape[0], 1, dtype=torch.bool), flat_scores > threshold], dim=1
    )
    parents = tree.parents[: above.shape[1]].expand_as(above)
    for _ in range(levels - 1):
        above = above & above.gather(1, parents)
    return above


def select_nodes(
    scores: Sequence[torch.Tensor],
    num_tokens: int | Sequence[int] | None = None,
    split_threshold: float | None = None,
    round_down: bool = False,
) -> SelectedNodes:
    """The selection of `quadtree_tokens`; `num_tokens` may be a list, of one number for each image."""
    _check_scores(scores)
    _, rows, columns = scores[0].shape
    coarsest = rows * columns
    finest = coarsest << (2 * len(scores))
    if num_tokens is None and split_threshold is None:
        raise ValueError("Give `num_tokens` (a budget), `split_threshold` (each image its own), or both.")
    is_own = isinstance(num_tokens, (list, tuple))  # a budget for each image
    if num_tokens is not None:
        budgets = check_budget_of_batch(num_tokens, scores[0], (coarsest, finest), round_down)
        num_tokens = max(budgets)
    if split_threshold is not None:
        check_number("split_threshold", split_threshold)
        if isinstance(split_threshold, int):
            split_threshold = float(split_threshold)  # torch compares with no int above 64 bits

    flat_scores = torch.cat([score.flatten(1) for score in scores], dim=1).detach()
    _check_values(flat_scores)
    levels = len(scores)
    tree = _tree_for(rows, columns, levels + 1, flat_scores)
    if num_tokens is None:
        splits = _above_threshold(flat_scores, split_threshold, levels, tree)
    else:
        splits = _first_splits(flat_scores, [(budget - coarsest) // 3 for budget in budgets], levels, tree)
        if split_threshold is not None:
            # Nodes above the threshold with all their ancestors come first in the order, so a maximum only cuts its
            # end off.
            splits = splits & _above_threshold(flat_scores, split_threshold, levels, tree)

    is_split = torch.cat([splits, splits.new_zeros(splits.shape[0], finest)], dim=1)
    is_live = is_split.gather(1, tree.parents.expand_as(is_split)) ^ is_split
    mask = counts = None
    if split_threshold is not None or is_own:
        lengths = is_live.sum(dim=1)
        if split_threshold is None:
            counts = budgets
        elif num_tokens is None and is_traced(lengths):
            num_tokens = longest(lengths, "give `num_tokens` besides `split_threshold`, the most of an image")
        elif num_tokens is None:
            counts = lengths.tolist()
            num_tokens = max(counts)
        mask = torch.arange(num_tokens, device=lengths.device) < lengths[:, None]

    # The i-th live node goes to place i; all others to place 0, which is cut off.
    place = is_live.cumsum(dim=1) * is_live
    nodes = place.new_zeros(place.shape[0], num_tokens + 1).scatter_(1, place, tree.numbers.expand_as(place))
    return SelectedNodes(nodes[:, 1:], mask, counts)


def decode_nodes(nodes: torch.Tensor, rows: int, columns: int, levels: int) -> QuadtreeTokens:
    """Numbers of nodes -> level, row, column; level 0 has the grid (rows, columns), `levels` counts the finest too."""
    places = _tree_for(rows, columns, levels, nodes).places
    return QuadtreeTokens(*F.embedding(nodes, places).unbind(dim=-1))


def quadtree_tokens(
    scores: Sequence[torch.Tensor], num_tokens: int | None = None, split_threshold: float | None = None
) -> QuadtreeTokens | MaskedQuadtreeTokens:
    """Selects the patches of a quadtree best-first.

    The result is exactly that of splitting the patch of the highest score, one at a time.

    There is no loop over splits or images. With `num_tokens` the shapes are fixed, so it compiles and exports. Ties:
    the coarser level first, then raster order.

    Args:
        scores (`Sequence[torch.Tensor]`): one (batch, rows, columns) tensor per level, coarsest first, each grid twice
            the one before; higher = split sooner. The level of the smallest patches, which cannot split, has no
            scores.
        num_tokens (`int`, *optional*): tokens of every image: rows * columns of the coarsest grid + 3 k.
        split_threshold (`float`, *optional*): splits patches whose score is higher, so that each image has its own
            number of tokens, padded to the longest. With `num_tokens` too, that is the maximum, and all are padded to
            it.

    Returns:
        `QuadtreeTokens` (level, row, column), each (batch, num_tokens) int64, from coarse to fine, in raster order
        within a level; with `split_threshold` `MaskedQuadtreeTokens`, whose fourth field `mask` is True where a token
        is real.

    Raises:
        ValueError: for scores of wrong shapes, or with NaN on the CPU; a budget that no number of splits gives;
            neither a budget nor a threshold.

    Source: arXiv 2304.00287, section 3.
    """
    nodes, mask, _ = select_nodes(scores, num_tokens, split_threshold)
    tokens = decode_nodes(nodes, *scores[0].shape[1:], levels=len(scores) + 1)
    if mask is None:
        return tokens
    return MaskedQuadtreeTokens(*tokens, mask)


__all__ = [
    "MaskedQuadtreeTokens",
    "QuadtreeTokens",
    "SelectedNodes",
    "check_budget_of_batch",
    "check_multiple",
    "check_token_budget",
    "decode_nodes",
    "nearest_multiples",
    "quadtree_tokens",
    "select_nodes",
]
