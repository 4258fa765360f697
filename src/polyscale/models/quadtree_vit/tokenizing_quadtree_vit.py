"""Tokenizers: pixels -> embedded tokens with positions and prefix tokens (arXiv 2304.00287, sections 3.1 and 3.3).

Faithful to TomerRonen34/mixed-resolution-vit, `mixed_res/tokenization`: every patch is reduced to the smallest size
and goes through one patch embedding; sinusoidal positions of the patch centre, in units of the smallest patch; CLS has
no position.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.encoder import PrefixTokens
from ...layers.quadtree import check_multiple, check_token_budget, decode_nodes, select_nodes
from ...layers.resizing import resize_abs_pos_embed
from ...layers.sizes import check_pixel_values
from .configuration_quadtree_vit import QuadtreeViTConfig
from .scoring_quadtree_vit import PatchScorer, PrecomputedPatchScorer, make_patch_scorer, reduce_bilinear


class TokenizerOutput(NamedTuple):
    """Tokens of a batch of pictures.

    Fields:
        embeddings: (batch, num_prefix_tokens + num_tokens, hidden).
        patch_centers: (batch, num_tokens, 2), (x, y) in pixels; 0 for padding.
        patch_sizes: (batch, num_tokens) in pixels; 0 for padding.
        token_mask: (batch, num_tokens), True for a real token.
        is_padded: whether pictures have token counts of their own, so that attention needs the mask.
        split_scores: one (batch, rows, columns) tensor for each size of patch that can be split, largest first.
    """

    embeddings: torch.Tensor
    patch_centers: torch.Tensor
    patch_sizes: torch.Tensor
    token_mask: torch.Tensor
    is_padded: bool
    split_scores: tuple[torch.Tensor, ...]


def sinusoid(positions: torch.Tensor, width: int) -> torch.Tensor:
    """(positions,) -> (positions, width), float32: the sine at each frequency, then the cosine at each."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class QuadtreeViTPatchEmbeddings(nn.Module):
    """Embeds patches that are all of the smallest size; the kernel is that of a plain ViT."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        size = config.min_patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=config.patch_bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels * size * size) -> (batch, tokens, hidden)"""
        kernel = self.projection.weight.flatten(1)
        return F.linear(patches.to(kernel.dtype), kernel, self.projection.bias)


class PatchTokenizer(nn.Module):
    """What both tokenizers share: embedding, positions and prefix tokens."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = QuadtreeViTPatchEmbeddings(config)
        self.prefix_tokens = PrefixTokens(config)
        if config.position_embedding == "learned":
            rows, columns = config.position_grid
            num_positions = config.num_position_prefix_tokens + rows * columns
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        else:
            self.position_embeddings = None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """Every patch of the smallest size: (batch, channels, height, width) -> (batch, patches, pixels of a patch)"""
        size = self.config.min_patch_size
        batch, channels, height, width = images.shape
        patches = images.view(batch, channels, height // size, size, width // size, size)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)

    def sinusoidal_positions(self, centers: torch.Tensor, patch_grid: tuple[int, int]) -> torch.Tensor:
        """Positions of centres (batch, tokens, 2), (x, y) in units of the smallest patch: (batch, tokens, hidden)"""
        halves = []
        for axis, length in enumerate(reversed(patch_grid)):
            # Every centre is a multiple of a half: few different values, however many tokens there are.
            values = torch.arange(1, 2 * length, device=centers.device) / 2
            table = sinusoid(values, self.config.hidden_size // 2)
            halves.append(F.embedding((2 * centers[..., axis]).long() - 1, table))
        return torch.cat(halves, dim=-1)

    def learned_positions(self, nodes: torch.Tensor | None, patch_grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The learned grid, sampled at the patch centres: (batch or 1, tokens, hidden)

        Args:
            nodes: numbers of the patches, counted through all levels; every patch in order when None.
            patch_grids: (rows, columns) of each level.
        """
        grid = self.position_embeddings[:, self.config.num_position_prefix_tokens :]
        levels = [
            resize_abs_pos_embed(
                grid,
                patch_grid,
                old_size=self.config.position_grid,
                num_prefix_tokens=0,
                interpolation="bilinear",
                antialias=False,
            )
            for patch_grid in patch_grids
        ]
        table = torch.cat(levels, dim=1)
        return table if nodes is None else F.embedding(nodes, table[0])

    def assemble(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Patches (batch, tokens, pixels) and positions (batch or 1, tokens, hidden) -> tokens with prefix tokens."""
        tokens = self.patch_embeddings(patches)
        tokens = tokens + positions.to(tokens.dtype)
        prefix = self.prefix_tokens(tokens.shape[0])
        if prefix is None:
            return self.dropout(tokens)
        num_placed = self.config.num_position_prefix_tokens
        if num_placed:
            placed = prefix[:, :num_placed] + self.position_embeddings[:, :num_placed]
            prefix = torch.cat([placed, prefix[:, num_placed:]], dim=1)
        return self.dropout(torch.cat([prefix, tokens], dim=1))

    def check_channels(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """(height, width), after a check of the shape."""
        check_pixel_values(pixel_values, self.config.num_channels)
        return tuple(pixel_values.shape[-2:])


class VanillaTokenizer(PatchTokenizer):
    """All patches of the smallest size: the tokenizer of a plain ViT, and the control of `QuadtreeTokenizer`.

    Positions are those of patch centres, so that its tokens are those of a `QuadtreeTokenizer` with every patch split;
    the published one takes the top left corner of a patch, half a patch away.

    Args:
        config: `max_patch_size`, the budget and the scorer do not matter.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | None = None,
        split_threshold: float | None = None,
        patch_scores: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> TokenizerOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), height and width multiples of `min_patch_size`.
            num_tokens: refused unless it is the number of patches.
            split_threshold: without effect, as no patch can be split.
            patch_scores: without effect.

        Raises:
            ValueError: for a wrong shape, size or budget.
        """
        height, width = self.check_channels(pixel_values)
        size = self.config.min_patch_size
        check_multiple((height, width), size, "min_patch_size")
        rows, columns = height // size, width // size
        if num_tokens is not None:
            check_token_budget(num_tokens, rows * columns, rows * columns, self.config.round_num_tokens)

        patches = self.cut(pixel_values)
        numbers = torch.arange(rows * columns, device=pixel_values.device)
        column = numbers % columns
        row = torch.div(numbers, columns, rounding_mode="floor")
        centers = torch.stack([column, row], dim=-1)[None] + 0.5
        if self.position_embeddings is None:
            positions = self.sinusoidal_positions(centers, (rows, columns))
        else:
            positions = self.learned_positions(None, [(rows, columns)])
        embeddings = self.assemble(patches, positions)
        batch = pixel_values.shape[0]
        return TokenizerOutput(
            embeddings=embeddings,
            patch_centers=(centers * size).expand(batch, -1, -1),
            patch_sizes=torch.full_like(numbers, size).expand(batch, -1),
            token_mask=torch.ones_like(numbers, dtype=torch.bool).expand(batch, -1),
            is_padded=False,
            split_scores=(),
        )


class QuadtreeTokenizer(PatchTokenizer):
    """Small patches where the picture is busy, large ones elsewhere: pixels -> embedded tokens.

    Args:
        config: sizes, budget, scorer, width and positions; the encoder's fields do not matter.
    """

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.patch_scorer: PatchScorer = make_patch_scorer(config)
        self.precomputed_scorer = PrecomputedPatchScorer(config.min_patch_size, config.max_patch_size)

    def resolve_budget(
        self, num_tokens: int | None, split_threshold: float | None
    ) -> tuple[int | None, float | int | None]:
        """The budget of this call: what the call gives, or, when it gives neither, both as the config says."""
        if num_tokens is None and split_threshold is None:
            return self.config.num_tokens, self.config.split_threshold
        return num_tokens, split_threshold

    def patches_of(self, pixel_values: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Cuts out the selected patches, reduced to the smallest size: (batch, tokens, channels * size * size)"""
        factors = [1 << shift for shift in range(self.config.num_levels - 1, 0, -1)]
        pyramid = [reduce_bilinear(pixel_values, factor) for factor in factors] + [pixel_values]
        patches = torch.cat([self.cut(image) for image in pyramid], dim=1)  # (batch, nodes, pixels)
        batch, num_nodes = patches.shape[:2]
        first = torch.arange(batch, device=nodes.device)[:, None] * num_nodes
        selected = patches.flatten(0, 1).index_select(0, (nodes + first).flatten())
        return selected.view(batch, nodes.shape[1], -1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | None = None,
        split_threshold: float | None = None,
        patch_scores: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> TokenizerOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), height and width multiples of `max_patch_size`.
            num_tokens: tokens of every picture: (height / max) (width / max) + 3 k. With `split_threshold`, the
                maximum, to which all are padded.
            split_threshold: splits patches whose score is higher; padded to the longest picture.
            patch_scores: used instead of the scorer's: one (batch, rows, columns) tensor for each size of patch that
                can be split, largest first; or one map (batch, height, width), averaged to each grid.

        Raises:
            ValueError: for a wrong shape, size or budget, or scores of a wrong shape.
        """
        height, width = self.check_channels(pixel_values)
        config = self.config
        rows, columns = config.patch_grid_for((height, width))
        num_tokens, split_threshold = self.resolve_budget(num_tokens, split_threshold)
        if num_tokens is not None:
            check_token_budget(num_tokens, *config.num_tokens_range((height, width)), config.round_num_tokens)

        scorer = self.patch_scorer if patch_scores is None else self.precomputed_scorer
        scores = scorer(pixel_values, patch_scores)
        nodes, mask = select_nodes(scores, num_tokens, split_threshold, config.round_num_tokens)
        level, row, column = decode_nodes(nodes, rows, columns, config.num_levels)
        cells = torch.ones_like(level)  # side of each patch in units of the smallest
        for index in range(config.num_levels - 1):
            cells = torch.where(level <= index, 2 * cells, cells)  # no shift or power, which some exporters lack
        sizes = cells * config.min_patch_size
        centers = (torch.stack([column, row], dim=-1) + 0.5) * cells[..., None]

        patches = self.patches_of(pixel_values.float(), nodes)
        patch_grids = [(rows << index, columns << index) for index in range(config.num_levels)]
        if self.position_embeddings is None:
            positions = self.sinusoidal_positions(centers, patch_grids[-1])
        else:
            positions = self.learned_positions(nodes, patch_grids)
        embeddings = self.assemble(patches, positions)

        centers = centers * config.min_patch_size
        if mask is not None:
            sizes = torch.where(mask, sizes, 0)
            centers = torch.where(mask[..., None], centers, 0.0)
        return TokenizerOutput(
            embeddings=embeddings,
            patch_centers=centers,
            patch_sizes=sizes,
            token_mask=torch.ones_like(nodes, dtype=torch.bool) if mask is None else mask,
            is_padded=mask is not None,
            split_scores=tuple(scores),
        )


__all__ = ["PatchTokenizer", "QuadtreeTokenizer", "TokenizerOutput", "VanillaTokenizer"]
