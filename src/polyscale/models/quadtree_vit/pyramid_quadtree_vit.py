"""Maps of a quadtree's levels: embeddings of all patches of all sizes, and tokens taken out of such maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_quadtree_vit import QuadtreeViTConfig
from .scoring_quadtree_vit import reduce_image


class PatchAggregation(nn.Module):
    """What the smallest parts of a large patch add to its embedding (APT, arXiv 2510.18091).

    The embeddings of the parts go through one 2 x 2 convolution per halving, then through a linear layer that starts
    at zero, so that an untrained one adds nothing.
    """

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        self.merge = nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings of the patches of each size, largest first, (batch, rows, columns, hidden): the same, with what
        the smallest ones add to the others."""
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


__all__ = [
    "PatchAggregation",
    "embedding_pyramid",
    "feature_pyramid",
    "feature_scores",
    "take_nodes",
]
