"""Maps of a quadtree's levels: embeddings of all patches of all sizes, and tokens taken out of such maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.tracing import is_traced
from ...utils.validation import check_int, check_tensor, to_pair
from .configuration_quadtree_vit import QuadtreeViTConfig
from .scoring_quadtree_vit import reduce_image


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero (`QuadtreeViTPreTrainedModel._init_weights`)."""


class PatchAggregation(nn.Module):
    """What the smallest parts of a large patch add to its embedding (APT, arXiv 2510.18091).

    The embeddings of the parts go through one 2 x 2 convolution per halving, then through a linear layer that starts
    at zero, so that an untrained one adds nothing.
    """

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        self.merge = nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.output = ZeroLinear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of the patches of each size, (batch, rows, columns, hidden), largest first -> the same shapes,
        with what the smallest patches add to the others.
        """
        enriched = [embeddings[-1]]
        parts = embeddings[-1].permute(0, 3, 1, 2)  # (batch, hidden, rows, columns)
        for larger in reversed(embeddings[:-1]):
            parts = self.merge(parts)
            enriched.insert(0, larger + self.output(parts.permute(0, 2, 3, 1)))
        return enriched


def embedding_pyramid(
    projection: nn.Module, pixel_values: torch.Tensor, levels: int, reduction: str
) -> list[torch.Tensor]:
    """Embeddings of all patches of each size, largest first: (batch, rows, columns, hidden).

    Args:
        projection (`nn.Module`): embeds an image cut into smallest patches, (batch, hidden, rows, columns).
        pixel_values (`torch.Tensor`): (batch, channels, height, width).
        levels (`int`): number of sizes.
        reduction (`str`): how images are made smaller, see `reduce_image`.
    """
    images = [reduce_image(pixel_values, 1 << shift, reduction) for shift in range(levels - 1, 0, -1)]
    dtype = projection.weight.dtype
    return [projection(image.to(dtype)).permute(0, 2, 3, 1) for image in (*images, pixel_values)]


def feature_pyramid(features: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Means of the features of each patch's smallest parts, largest patches first.

    Args:
        features (`torch.Tensor`): of all smallest patches, (batch, rows, columns, hidden).
        levels (`int`): number of sizes of patches.

    Returns:
        One (batch, rows, columns, hidden) per size.
    """
    maps = [features]
    for _ in range(levels - 1):
        batch, rows, columns, width = maps[0].shape
        maps.insert(0, maps[0].reshape(batch, rows // 2, 2, columns // 2, 2, width).mean(dim=(2, 4)))
    return maps


@torch.no_grad()
def feature_scores(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """How different the directions are of the four parts of each patch: 1 - the length of the mean of unit vectors.

    Args:
        maps (`Sequence[torch.Tensor]`): features of the patches of each size, largest first.

    Returns:
        One (batch, rows, columns) float32 tensor for each size of patch that can be split, largest first.
    """
    scores = []
    for parts in maps[1:]:
        batch, rows, columns, width = parts.shape
        four = F.normalize(parts.float(), dim=-1).reshape(batch, rows // 2, 2, columns // 2, 2, width)
        scores.append(1 - four.mean(dim=(2, 4)).norm(dim=-1))
    return scores


def take_nodes(maps: Sequence[torch.Tensor], nodes: torch.Tensor) -> torch.Tensor:
    """The tokens of patches out of maps of all levels: (batch, tokens, hidden), 0 for padding.

    Args:
        maps (`Sequence[torch.Tensor]`): (batch, rows, columns, hidden) for each size of patch, largest first.
        nodes (`torch.Tensor`): (batch, tokens), numbers of the patches from 1 through all levels, 0 = padding.
    """
    table = torch.cat([level.flatten(1, 2) for level in maps], dim=1)
    table = F.pad(table, (0, 0, 1, 0))  # node 0
    return table.gather(1, nodes[..., None].expand(-1, -1, table.shape[-1]))


def _check_reverse(tokens, patch_centers, patch_sizes, image_size, min_patch_size, token_mask) -> None:
    check_tensor("tokens", tokens, ("batch", "tokens", "width"))
    check_tensor("patch_centers", patch_centers, ("batch", "tokens", "2"))
    check_tensor("patch_sizes", patch_sizes, ("batch", "tokens"), floating=False)
    check_int("min_patch_size", min_patch_size, 1)
    if token_mask is not None and (not isinstance(token_mask, torch.Tensor) or token_mask.dtype != torch.bool):
        raise ValueError(f"`token_mask` must be a tensor of booleans of shape (batch, tokens), got {token_mask!r}.")
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


def _check_places(
    patch_centers: torch.Tensor,
    patch_sizes: torch.Tensor,
    place: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grid: tuple[int, int],
    min_patch_size: int,
    token_mask: torch.Tensor | None,
) -> None:
    """Refuses patches that are none of a quadtree: of another size, outside of the image, or between the places of
    patches of their size. `place` is (top, left, side) of each in cells of `grid`. Padding has the size 0, or a mask.
    """
    top, left, side = place
    step = side.clamp(min=1)
    is_size = (side * min_patch_size == patch_sizes) & (step & (step - 1) == 0)
    is_inside = (top >= 0) & (top < grid[0]) & (left >= 0) & (left < grid[1])
    middles = (torch.stack([left, top], dim=-1) + side[..., None] / 2) * min_patch_size
    is_there = ((patch_centers - middles).abs() <= min_patch_size / 4).all(dim=-1)  # halves round large numbers
    fits = is_size & is_inside & is_there & (top % step == 0) & (left % step == 0)
    is_wrong = (patch_sizes != 0) & ~fits
    is_wrong = is_wrong if token_mask is None else is_wrong & token_mask
    if is_wrong.any():
        image, token = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`patch_sizes` must be {min_patch_size} (`min_patch_size`) times a power of two, and `patch_centers` in "
            f"the middle of such patches of the image; got the size {patch_sizes[image, token].item():g} at "
            f"{patch_centers[image, token].tolist()} for token {token} of image {image}."
        )


def _check_apart(
    owner: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor, torch.Tensor], grid: tuple[int, int]
) -> None:
    """Refuses patches that lie over one another: they own fewer cells, (batch, rows, columns), than they have."""
    top, left, side = place
    areas = torch.minimum(side, grid[0] - top) * torch.minimum(side, grid[1] - left)
    is_wrong = owner.flatten(1).count_nonzero(dim=1) < areas.where(side != 0, 0).sum(dim=1)
    if is_wrong.any():
        raise ValueError(
            "`patch_centers` and `patch_sizes` must be those of a quadtree: patches lie over one another in image "
            f"{int(is_wrong.nonzero()[0])}."
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
        tokens (`torch.Tensor` of shape `(batch, num_tokens, width)`): without prefix tokens.
        patch_centers (`torch.Tensor` of shape `(batch, num_tokens, 2)`): (x, y) in pixels.
        patch_sizes (`torch.Tensor` of shape `(batch, num_tokens)`): in pixels: `min_patch_size` times a power of two.
        image_size (`int` or `(height, width)`): in pixels.
        min_patch_size (`int`): size in pixels of a cell of the map.
        token_mask (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*): True where a token is real; all are
            when `None`.

    Returns:
        (batch, width, height / min_patch_size, width / min_patch_size); 0 where no token lies.

    Raises:
        ValueError: for shapes that do not fit together; on the CPU also for patches that are none of a quadtree.
    """
    height, width = to_pair(image_size, "image_size")
    _check_reverse(tokens, patch_centers, patch_sizes, (height, width), min_patch_size, token_mask)
    # A look at the values waits for the device: only on the CPU.
    has_values = tokens.device.type == "cpu" and not (is_traced(patch_centers) or torch.jit.is_tracing())
    return dense_map(tokens, patch_centers, patch_sizes, (height, width), min_patch_size, token_mask, has_values)


def dense_map(
    tokens: torch.Tensor,
    patch_centers: torch.Tensor,
    patch_sizes: torch.Tensor,
    image_size: tuple[int, int],
    min_patch_size: int,
    token_mask: torch.Tensor | None = None,
    check_values: bool = False,
) -> torch.Tensor:
    """`reverse_quadtree` of what is known to fit together, as what a model says of its own tokens."""
    rows, columns = image_size[0] // min_patch_size, image_size[1] // min_patch_size
    batch, num_tokens, channels = tokens.shape

    patch_sizes = patch_sizes.to(patch_centers.dtype)
    left, top = (patch_centers - patch_sizes[..., None] / 2).div(min_patch_size).round().long().unbind(dim=-1)
    cells = (patch_sizes / min_patch_size).round().long()  # side of a patch in cells
    if token_mask is not None:
        cells = torch.where(token_mask, cells, 0)
    if check_values:
        corners = (top, left, cells)
        _check_places(patch_centers, patch_sizes, corners, (rows, columns), min_patch_size, token_mask)

    # Which token (from 1; 0 = none) lies over each cell: written once per patch at the grid of its own size, then
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
    if check_values:
        _check_apart(owner, corners, (rows, columns))

    padded = F.pad(tokens, (0, 0, 1, 0)).flatten(0, 1)  # (batch * (1 + tokens), channels), token 0 is zero
    first = torch.arange(batch, device=tokens.device)[:, None] * (num_tokens + 1)
    dense = padded.index_select(0, (owner.flatten(1) + first).flatten())
    return dense.view(batch, rows, columns, channels).permute(0, 3, 1, 2)


__all__ = [
    "PatchAggregation",
    "ZeroLinear",
    "dense_map",
    "embedding_pyramid",
    "feature_pyramid",
    "feature_scores",
    "reverse_quadtree",
    "take_nodes",
]
