"""From pixels to the tokens of a FlexiViT: patches of any size, positions on their grid, prefix tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.encoder import PrefixTokens
from ...layers.freezing import FreezableMixin, takes_gradients
from ...layers.patch_projection import PatchProjection, project_patches
from ...layers.resizing import KernelResize, resize_abs_pos_embed
from ...utils.validation import check_pixel_values, to_pair
from .configuration_flexivit import FlexiViTConfig


# An int or (height, width) in pixels, or a list of one (height, width) for each image of a batch.
PatchSize = int | Sequence[int] | Sequence[Sequence[int]]


class FlexiViTPatchEmbeddings(FreezableMixin, nn.Module):
    """Cuts an image into patches of any size and embeds them with the kernel resized to that size."""

    def __init__(self, config: FlexiViTConfig):
        super().__init__()
        self.config = config
        self.kernel_size = to_pair(config.base_patch_size, "base_patch_size")
        self.projection = PatchProjection(
            config.num_channels, config.hidden_size, self.kernel_size, stride=self.kernel_size, bias=config.patch_bias
        )

    @property
    def resize(self) -> KernelResize:
        """How the config says that the kernel is resized."""
        return KernelResize(self.config.resize_method, self.config.kernel_interpolation, self.config.kernel_antialias)

    def kernel_for(self, patch_size: tuple[int, int]) -> torch.Tensor:
        """The kernel of a patch size: (hidden, channels, *patch_size)."""
        return self.projection.kernel_for(patch_size, self.resize)

    def forward(self, pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, rows * columns, hidden)"""
        if self.config.remainder == "pad":
            height, width = pixel_values.shape[-2:]
            pixel_values = F.pad(pixel_values, (0, -width % patch_size[1], 0, -height % patch_size[0]))
        patches = project_patches(self.projection, pixel_values, patch_size, self.kernel_size, self.resize)
        return patches.flatten(2).transpose(1, 2)  # of (batch, hidden, rows, columns)


class FlexiViTEmbeddings(FreezableMixin, nn.Module):
    """Patch embeddings, positions on the patch grid, prefix tokens."""

    frozen_tensors = ("frozen_positions",)

    def __init__(self, config: FlexiViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = FlexiViTPatchEmbeddings(config)
        self.prefix_tokens = PrefixTokens(config)
        rows, columns = config.position_grid
        num_positions = config.num_position_prefix_tokens + rows * columns
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # Set by `polyscale.training.PatchSizeCallback` for the length of an optimiser step.
        self.step_patch_size: int | Sequence[int] | None = None

    def train(self, mode: bool = True) -> "FlexiViTEmbeddings":
        """Evaluation ends the size of a step that never ended, one with an exception. Training does not: a `Trainer`
        that resumes begins a step before it sets the mode.
        """
        if not mode:
            self.step_patch_size = None
        return super().train(mode)

    def draw_patch_size(self) -> int | Sequence[int]:
        """One of `config.train_patch_sizes`, drawn with `config.train_patch_size_probs` from torch's CPU generator."""
        sizes = self.config.train_patch_sizes
        probs = self.config.train_patch_size_probs
        weights = torch.tensor(probs if probs is not None else [1.0] * len(sizes), device="cpu")
        return sizes[int(torch.multinomial(weights, 1))]

    def resolve_patch_size(self, patch_size: int | Sequence[int] | None) -> tuple[int, int]:
        """The patch size of this call: the given one; in training the step's or a drawn one; else the config's."""
        if patch_size is None and self.training and self.config.train_patch_sizes is not None:
            patch_size = self.step_patch_size if self.step_patch_size is not None else self.draw_patch_size()
        return self.config.resolve_patch_size(patch_size)

    def position_embeddings_for(self, patch_grid: tuple[int, int]) -> torch.Tensor:
        """Positions for a grid of (rows, columns): (1, num_position_prefix_tokens + rows * columns, hidden)."""
        frozen = self.frozen_positions
        way = (patch_grid, self.config.position_interpolation, self.config.position_antialias)
        if frozen is not None and way == self.frozen_way and not takes_gradients(self.position_embeddings):
            return frozen
        return resize_abs_pos_embed(
            self.position_embeddings,
            patch_grid,
            old_size=self.config.position_grid,
            num_prefix_tokens=self.config.num_position_prefix_tokens,
            interpolation=self.config.position_interpolation,
            antialias=self.config.position_antialias,
        )

    @torch.no_grad()
    def freeze(self, patch_size: tuple[int, int], patch_grid: tuple[int, int]) -> None:
        """Keeps the kernel of a patch size and the positions of a grid; a frozen budget asks for it."""
        self.patch_embeddings.projection.freeze(patch_size, self.patch_embeddings.resize)
        self.frozen_positions = None
        self.frozen_positions = self.position_embeddings_for(patch_grid).clone()
        self.frozen_way = (patch_grid, self.config.position_interpolation, self.config.position_antialias)

    def forward(
        self, pixel_values: torch.Tensor, patch_size: PatchSize | None = None
    ) -> tuple[torch.Tensor, tuple[int, int] | list[tuple[int, int]]]:
        """(batch, channels, height, width) -> tokens (batch, prefix + rows * columns, hidden), and (rows, columns).

        With patch sizes that differ from image to image: padded to the longest, and a list, (rows, columns) of each.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        sizes = self.config.patch_sizes_of(patch_size, pixel_values.shape[0]) or [self.resolve_patch_size(patch_size)]
        grids = [self.config.patch_grid_for(pixel_values.shape[-2:], size) for size in sizes]

        pixel_values = pixel_values.to(self.position_embeddings.dtype)
        if len(sizes) == 1 or len(set(sizes)) == 1:
            return self.embed(pixel_values, sizes[0], grids[0]), grids[0]
        places = {size: [place for place, own in enumerate(sizes) if own == size] for size in sizes}
        parts = [self.embed(pixel_values[own], size, grids[own[0]]) for size, own in places.items()]
        longest = max(tokens.shape[1] for tokens in parts)
        tokens = torch.cat([F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens in parts])
        order = [place for own in places.values() for place in own]
        return tokens[[order.index(place) for place in range(len(order))]], grids

    def embed(
        self, pixel_values: torch.Tensor, patch_size: tuple[int, int], patch_grid: tuple[int, int]
    ) -> torch.Tensor:
        """All tokens of images at one patch size: (batch, prefix + rows * columns, hidden)"""
        tokens = self.patch_embeddings(pixel_values, patch_size)
        prefix = self.prefix_tokens(tokens.shape[0])
        positions = self.position_embeddings_for(patch_grid)
        num_unplaced = self.config.num_prefix_tokens - self.config.num_position_prefix_tokens
        if prefix is None:
            tokens = tokens + positions
        elif num_unplaced == 0:
            tokens = torch.cat([prefix, tokens], dim=1) + positions
        else:
            placed = prefix.shape[1] - num_unplaced
            tokens = torch.cat(
                [prefix[:, :placed] + positions[:, :placed], prefix[:, placed:], tokens + positions[:, placed:]], dim=1
            )
        return self.dropout(tokens)


__all__ = ["FlexiViTEmbeddings", "FlexiViTPatchEmbeddings", "PatchSize"]
