"""Tokenizers: pixels -> embedded tokens with positions and prefix tokens (arXiv 2304.00287, sections 3.1 and 3.3).

Faithful to TomerRonen34/mixed-resolution-vit, `mixed_res/tokenization`: every patch is reduced to the smallest size
and goes through one patch embedding; sinusoidal positions of the patch centre, in units of the smallest patch; CLS has
no position.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.encoder import PrefixTokens
from ...layers.patch_projection import PatchProjection
from ...layers.resizing import resize_abs_pos_embed
from ...utils.validation import check_pixel_values
from .configuration_quadtree_vit import QuadtreeViTConfig
from .patch_scorers_quadtree_vit import check_unchanged, make_patch_scorer, scorer_fields
from .positions_quadtree_vit import sinusoid
from .pyramid_quadtree_vit import (
    PatchAggregation,
    embedding_pyramid,
    feature_pyramid,
    feature_scores,
    take_nodes,
)
from .scoring_quadtree_vit import PatchScorer, PrecomputedPatchScorer, reduce_image
from .selection_quadtree_vit import (
    QuadtreeTokens,
    SelectedNodes,
    check_budget_of_batch,
    check_multiple,
    decode_nodes,
    select_nodes,
)


class TokenizerOutput(NamedTuple):
    """Tokens of a batch of images.

    Fields:
        embeddings: (batch, num_prefix_tokens + num_tokens, hidden).
        patch_centers: (batch, num_tokens, 2), (x, y) in pixels; 0 for padding.
        patch_sizes: (batch, num_tokens) in pixels; 0 for padding.
        token_mask: (batch, num_tokens), True for a real token.
        is_padded: whether images have token counts of their own, so that attention needs the mask.
        counts: real tokens of each image, where they are padded and that is known without waiting for a device.
        split_scores: one (batch, rows, columns) tensor for each size of patch that can be split, largest first.
    """

    embeddings: torch.Tensor
    patch_centers: torch.Tensor
    patch_sizes: torch.Tensor
    token_mask: torch.Tensor
    is_padded: bool
    counts: list[int] | None
    split_scores: tuple[torch.Tensor, ...]


class QuadtreeViTPatchEmbeddings(nn.Module):
    """Embeds patches that are all of the smallest size; the kernel is that of a plain ViT."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        size = config.min_patch_size
        self.patch_shape = (config.num_channels, size, size)
        self.projection = PatchProjection(
            config.num_channels, config.hidden_size, size, stride=size, bias=config.patch_bias
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels * size * size) -> (batch, tokens, hidden)"""
        tokens = self.projection(patches.reshape(-1, *self.patch_shape))  # (batch * tokens, hidden, 1, 1)
        return tokens.flatten(1).unflatten(0, patches.shape[:2])


class PatchTokenizer(nn.Module):
    """What both tokenizers share: from selected patches to tokens.

    Args:
        config (`QuadtreeViTConfig`): its patch sizes, budget, scorer and positions, not the encoder's fields.
    """

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = QuadtreeViTPatchEmbeddings(config)
        self.prefix_tokens = PrefixTokens(config)
        # Kept as a number: tracers do not follow the property of the config, which asks that of its base class.
        self.num_placed_prefix_tokens = config.num_position_prefix_tokens
        if config.position_embedding == "learned":
            rows, columns = config.position_grid
            num_positions = self.num_placed_prefix_tokens + rows * columns
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        else:
            self.position_embeddings = None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def cut(self, images: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Cuts out patches of the smallest size: (batch, tokens, channels * size * size)

        Args:
            images: (batch, channels, height, width).
            row: of the patch in the grid of such patches, (batch, tokens); so is `column`.
        """
        size = self.config.min_patch_size
        batch, channels, height, width = images.shape
        columns = width // size
        # A patch is channels * size runs of neighbouring pixels: whole runs are copied, and only those of the patches.
        image = torch.arange(batch, device=images.device)[:, None] * (channels * height)
        channel = torch.arange(channels, device=images.device)[:, None] * height
        lines = (channel + torch.arange(size, device=images.device)).flatten()
        first = (image + row * size) * columns + column
        return F.embedding(first[..., None] + lines * columns, images.reshape(-1, size)).flatten(2)

    def patches_of(self, pixel_values: torch.Tensor, tokens: QuadtreeTokens, levels: int) -> torch.Tensor:
        """Cuts out the selected patches, reduced to the smallest size: (batch, tokens, channels * size * size)

        Args:
            pixel_values: (batch, channels, height, width).
            tokens: from coarse to fine, behind places for the prefix tokens; level `levels` - 1 has the smallest.
        """
        level, row, column = tokens
        patches = self.cut(pixel_values, row, column)
        for index in range(levels - 1):
            reduced = reduce_image(pixel_values, 1 << (levels - 1 - index), self.config.reduction)
            # Patches of this size and larger come first, and without overlap there are no more than cells of the grid.
            cells = reduced.shape[-2] * reduced.shape[-1] // self.config.min_patch_size**2
            count = cells + self.config.num_prefix_tokens
            is_here = level[:, :count] == index
            coarse = self.cut(reduced, row[:, :count] * is_here, column[:, :count] * is_here)
            coarse = torch.where(is_here[..., None], coarse, patches[:, :count])
            patches = torch.cat([coarse, patches[:, count:]], dim=1)  # no assignment: patches may carry a gradient
        return patches

    def sinusoidal_positions(self, centers: torch.Tensor, length: int) -> torch.Tensor:
        """Positions of patch centres: (batch, tokens, 2) -> (batch, tokens, hidden)

        Args:
            centers: (x, y) in halves of the smallest patch, integers: few different values, however many tokens.
            length: the longer side of the image in units of the smallest patch.
        """
        values = torch.arange(2 * length, device=centers.device) / 2
        table = sinusoid(values, self.config.hidden_size // 2)
        return F.embedding(centers, table.to(self.patch_embeddings.projection.weight.dtype)).flatten(2)

    def learned_positions(self, nodes: torch.Tensor, patch_grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The learned grid, sampled at the patch centres: (batch, tokens, hidden)

        Args:
            nodes: numbers of the patches, counted from 1 through all levels.
            patch_grids: (rows, columns) of each level.
        """
        grid = self.position_embeddings[:, self.num_placed_prefix_tokens :]
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
        table = torch.cat([grid[:, :1], *levels], dim=1)[0]
        return F.embedding(nodes, table.to(self.patch_embeddings.projection.weight.dtype))

    def assemble(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Adds their positions to embedded patches, and puts the prefix tokens over the first of them.

        Args:
            embedded: (batch, num_prefix_tokens + num_tokens, hidden).
            positions: (batch, num_prefix_tokens + num_tokens, hidden).
        """
        tokens = embedded + positions
        prefix = self.prefix_tokens(tokens.shape[0])
        if prefix is not None:
            num_placed = self.num_placed_prefix_tokens
            if num_placed:
                placed = prefix[:, :num_placed] + self.position_embeddings[:, :num_placed]
                prefix = torch.cat([placed, prefix[:, num_placed:]], dim=1)
            tokens = torch.cat([prefix, tokens[:, prefix.shape[1] :]], dim=1)
        return self.dropout(tokens)

    def place(
        self,
        nodes: torch.Tensor,
        selected: SelectedNodes,
        scores: Sequence[torch.Tensor],
        patch_grids: Sequence[tuple[int, int]],
    ) -> tuple[dict[str, Any], QuadtreeTokens, torch.Tensor]:
        """Where patches are, their tokens still to come.

        Args:
            nodes: (batch, num_prefix_tokens + num_tokens), counted from 1 through the levels, 0 = none.
            selected: the same without places for the prefix tokens.
            scores: what they were chosen by.
            patch_grids: (rows, columns) of each level.

        Returns:
            The fields of the output but `embeddings`; level, row and column of all nodes; their centres in halves of
            the smallest patch, (batch, num_prefix_tokens + num_tokens, 2).
        """
        size, num_prefix, mask = self.config.min_patch_size, self.config.num_prefix_tokens, selected.mask
        decoded = decode_nodes(nodes, *patch_grids[0], len(patch_grids))
        level, row, column = decoded
        cells = torch.ones_like(level)  # side of each patch in units of the smallest
        for index in range(len(patch_grids) - 1):
            cells = torch.where(level <= index, 2 * cells, cells)  # no shift or power, which some exporters lack
        centers = (2 * torch.stack([column, row], dim=-1) + 1) * cells[..., None]
        patch_centers = centers[:, num_prefix:] * (size / 2)
        patch_sizes = cells[:, num_prefix:] * size
        if mask is not None:
            patch_centers, patch_sizes = patch_centers * mask[..., None], patch_sizes * mask
        placed = {
            "patch_centers": patch_centers,
            "patch_sizes": patch_sizes,
            "token_mask": torch.ones_like(patch_sizes, dtype=torch.bool) if mask is None else mask,
            "is_padded": mask is not None,
            "counts": selected.counts,
            "split_scores": tuple(scores),
        }
        return placed, decoded, centers

    def patch_grids_of(self, image_size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
        """(rows, columns) of each level for an image of (height, width), largest patches first."""
        rows, columns = (side // self.config.min_patch_size for side in image_size)
        return [(rows >> shift, columns >> shift) for shift in range(levels - 1, -1, -1)]

    def embed(
        self,
        pixel_values: torch.Tensor,
        selected: SelectedNodes,
        scores: Sequence[torch.Tensor],
        levels: int,
        maps: Sequence[torch.Tensor] | None = None,
    ) -> TokenizerOutput:
        """Tokens of the selected patches, whose nodes are counted from 1 through `levels` levels; with `maps`, the
        embeddings of all patches of each level, they are taken from there.
        """
        patch_grids = self.patch_grids_of(tuple(pixel_values.shape[-2:]), levels)
        # Prefix tokens get places among the patches from the start: no second copy of all tokens puts them in front.
        nodes = F.pad(selected.nodes, (self.config.num_prefix_tokens, 0))
        placed, decoded, centers = self.place(nodes, selected, scores, patch_grids)
        if self.position_embeddings is None:
            positions = self.sinusoidal_positions(centers, max(patch_grids[-1]))
        else:
            positions = self.learned_positions(nodes, patch_grids)
        if maps is None:
            embedded = self.patch_embeddings(self.patches_of(pixel_values, decoded, levels))
        else:
            embedded = take_nodes(maps, nodes)
        return TokenizerOutput(self.assemble(embedded, positions), **placed)

    def check_channels(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """(height, width), after a check of the shape."""
        check_pixel_values(pixel_values, self.config.num_channels)
        return tuple(pixel_values.shape[-2:])


class VanillaTokenizer(PatchTokenizer):
    """All patches of the smallest size: the tokenizer of a plain ViT, and the control of `QuadtreeTokenizer`.

    Positions are those of patch centres, so that its tokens are those of a `QuadtreeTokenizer` with every patch split;
    the published one takes the top left corner of a patch, half a patch away. Of the config, `max_patch_size`, the
    budget and the scorer do not matter.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> TokenizerOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), sides multiples of `min_patch_size`.
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
            check_budget_of_batch(num_tokens, pixel_values, (rows * columns,) * 2, self.config.round_num_tokens)

        nodes = torch.arange(1, rows * columns + 1, device=pixel_values.device).expand(pixel_values.shape[0], -1)
        return self.embed(pixel_values, SelectedNodes(nodes), (), levels=1)


class QuadtreeTokenizer(PatchTokenizer):
    """Small patches where the image is busy, large ones elsewhere: pixels -> embedded tokens."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.patch_scorer: PatchScorer = make_patch_scorer(config)
        self.scorer_fields = scorer_fields(config)
        self.precomputed_scorer = PrecomputedPatchScorer(config.min_patch_size, config.max_patch_size)
        self.aggregation = PatchAggregation(config) if config.large_patch_embedding == "aggregate" else None

    def resolve_budget(
        self, num_tokens: int | Sequence[int] | None, split_threshold: float | None
    ) -> tuple[int | Sequence[int] | None, float | int | None]:
        """The budget of this call: what the call gives, or, when it gives neither, both as the config says."""
        if num_tokens is None and split_threshold is None:
            return self.config.num_tokens, self.config.split_threshold
        return num_tokens, split_threshold

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> TokenizerOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), height and width multiples of `max_patch_size`.
            num_tokens: tokens of every image: (height / max) (width / max) + 3 k; or a list, of one number for each.
                With `split_threshold`, the maximum, to which all are padded.
            split_threshold: splits patches whose score is higher; padded to the longest image.
            patch_scores: used instead of the scorer's: one (batch, rows, columns) tensor for each size of patch that
                can be split, largest first; or one map (batch, height, width), averaged to each grid.

        Raises:
            ValueError: for a wrong shape, size or budget, or scores of a wrong shape.
        """
        config, (height, width) = self.config, self.check_channels(pixel_values)
        check_unchanged(self.scorer_fields, config)
        check_multiple((height, width), config.max_patch_size, "max_patch_size")
        num_tokens, split_threshold = self.resolve_budget(num_tokens, split_threshold)
        if num_tokens is not None:
            allowed = config.num_tokens_range((height, width))
            check_budget_of_batch(num_tokens, pixel_values, allowed, config.round_num_tokens)

        pixel_values = pixel_values.float().contiguous()
        if config.merge_layer:
            return self.all_smallest(pixel_values)
        scorer = self.patch_scorer if patch_scores is None else self.precomputed_scorer
        maps = None
        if scorer.reads_embeddings or self.aggregation is not None:
            projection = self.patch_embeddings.projection
            maps = embedding_pyramid(projection, pixel_values, config.num_levels, config.reduction)
        scores = scorer.score_embeddings(maps) if scorer.reads_embeddings else scorer(pixel_values, patch_scores)
        selected = select_nodes(scores, num_tokens, split_threshold, config.round_num_tokens)
        if self.aggregation is not None:
            maps = self.aggregation(maps)
        return self.embed(pixel_values, selected, scores, config.num_levels, maps)

    def all_smallest(self, pixel_values: torch.Tensor) -> TokenizerOutput:
        """Tokens of all smallest patches: what `merge` starts from."""
        grids = self.patch_grids_of(tuple(pixel_values.shape[-2:]), self.config.num_levels)
        first = 1 + sum(rows * columns for rows, columns in grids[:-1])
        count = grids[-1][0] * grids[-1][1]
        nodes = torch.arange(first, first + count, device=pixel_values.device).expand(pixel_values.shape[0], -1)
        return self.embed(pixel_values, SelectedNodes(nodes), (), self.config.num_levels)

    def merge(
        self,
        hidden_states: torch.Tensor,
        image_size: tuple[int, int],
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> TokenizerOutput:
        """Puts large patches in the place of smallest ones whose features are alike (`config.merge_layer`).

        Args:
            hidden_states: (batch, num_prefix_tokens + smallest patches, hidden), after some layers.
            image_size: (height, width) in pixels.
            num_tokens, split_threshold, patch_scores: as in `forward`; without scores, those of the features.

        Returns:
            The tokens that go on: a large patch is the mean of its smallest parts.
        """
        config, num_prefix = self.config, self.config.num_prefix_tokens
        num_tokens, split_threshold = self.resolve_budget(num_tokens, split_threshold)
        grids = self.patch_grids_of(image_size, config.num_levels)
        maps = feature_pyramid(hidden_states[:, num_prefix:].unflatten(1, grids[-1]), config.num_levels)
        if patch_scores is None:
            scores = feature_scores(maps)
        else:
            pixels = hidden_states.new_empty((hidden_states.shape[0], 1, *image_size))
            scores = self.precomputed_scorer(pixels, patch_scores)
        selected = select_nodes(scores, num_tokens, split_threshold, config.round_num_tokens)
        placed, _, _ = self.place(F.pad(selected.nodes, (num_prefix, 0)), selected, scores, grids)
        tokens = torch.cat([hidden_states[:, :num_prefix], take_nodes(maps, selected.nodes)], dim=1)
        return TokenizerOutput(tokens, **placed)


__all__ = ["PatchTokenizer", "QuadtreeTokenizer", "TokenizerOutput", "VanillaTokenizer"]
