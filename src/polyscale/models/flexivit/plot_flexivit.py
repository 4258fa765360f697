"""FlexiViT, drawn: the patches of each patch size, the features, the kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ...figures import draw_image, features_to_rgb, make_grid, preprocess
from ...layers.token_budget import default_budgets_of, format_budget
from ...utils.processors import seen_region
from ...utils.validation import to_pair


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_patch_grid(
    axis: "Axes",
    image: Image.Image,
    image_size: tuple[int, int],
    patch_size: int | Sequence[int],
    remainder: str = "crop",
) -> None:
    """Draws an image with the patches that a FlexiViT cuts it into; what it drops is dimmed.

    Args:
        axis: where to draw.
        image: at any resolution.
        image_size: (height, width) of the model's input, in pixels.
        patch_size: in pixels of the model's input.
        remainder: the `remainder` of the model's config.
    """
    height, width = image_size
    patch_height, patch_width = to_pair(patch_size, "patch_size")
    draw_image(axis, image, extent=(0, width, height, 0), interpolation="lanczos", aspect="equal")
    line = {"color": "white", "linewidth": 0.7, "alpha": 0.85}
    bottom = height // patch_height * patch_height if remainder == "crop" else height
    right = width // patch_width * patch_width if remainder == "crop" else width
    axis.vlines(np.arange(0, right + 1, patch_width), 0, bottom, **line)
    axis.hlines(np.arange(0, bottom + 1, patch_height), 0, right, **line)
    if right < width:
        axis.axvspan(right, width, color="black", alpha=0.6, linewidth=0)
    if bottom < height:
        axis.axhspan(bottom, height, xmax=right / width, color="black", alpha=0.6, linewidth=0)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


@torch.no_grad()
def flexivit_features(model, pixel_values: torch.Tensor, patch_sizes: Sequence) -> list[np.ndarray]:
    """The last features of one image at several patch sizes: arrays (rows, columns, hidden)."""
    feature_maps = []
    for patch_size in patch_sizes:
        hidden_states = model.base_model(pixel_values, patch_size=patch_size).last_hidden_state
        rows, columns = model.config.patch_grid_for(pixel_values.shape[-2:], patch_size)
        patches = hidden_states[0, model.config.num_prefix_tokens :]  # (rows * columns, hidden)
        feature_maps.append(patches.unflatten(0, (rows, columns)).float().cpu().numpy())
    return feature_maps


def draw_flexivit(model, processor, image: Image.Image, patch_sizes: Sequence | None = None) -> "Figure":
    """An image at several patch sizes: above the patches, below the features as colours (`features_to_rgb`).

    Args:
        model: a FlexiViT, with or without a head.
        processor: its image processor.
        image: to show.
        patch_sizes: in pixels of the model's input; those of its training when None.

    Raises:
        ValueError: for a patch size that the image does not allow.
    """
    patch_sizes = default_budgets_of(model.config) if patch_sizes is None else list(patch_sizes)
    pixel_values = preprocess(image, processor, model)
    image_size = tuple(pixel_values.shape[-2:])
    colours = features_to_rgb(flexivit_features(model, pixel_values, patch_sizes))
    region = seen_region(image, processor)
    figure, axes = make_grid(2, len(patch_sizes), cell=(2.1, 2.2))
    for column, (patch_size, colour) in enumerate(zip(patch_sizes, colours, strict=True)):
        above, below = axes[:, column]
        draw_patch_grid(above, region, image_size, patch_size, model.config.remainder)
        tokens = model.config.num_tokens_for(image_size, patch_size)
        above.set_title(f"patch size {format_budget(patch_size)}\n{tokens} tokens", fontsize=9)
        below.imshow(colour, interpolation="nearest")
    axes[0, 0].set_ylabel("patches", fontsize=9)
    axes[1, 0].set_ylabel("features, as colours", fontsize=9)
    return figure


def draw_patches(axis: "Axes", model, processor, image: Image.Image, patch_size) -> None:
    """Draws an image with the patches that a FlexiViT cuts it into at a patch size, on an axis of a figure."""
    image_size = tuple(preprocess(image, processor, model).shape[-2:])
    patch_size = model.config.resolve_patch_size(patch_size)
    draw_patch_grid(axis, seen_region(image, processor), image_size, patch_size, model.config.remainder)


@torch.no_grad()
def draw_kernels(model, patch_sizes: Sequence, count: int = 8) -> "Figure":
    """Patch kernels of a FlexiViT, resized: a row per patch size, a column per filter (those of largest norm).

    Args:
        model: a FlexiViT whose images have one or three channels.
        patch_sizes: in pixels.
        count: how many filters.
    """
    patch_embeddings = model.base_model.embeddings.patch_embeddings
    strongest = patch_embeddings.projection.weight.flatten(1).norm(dim=1).argsort(descending=True)[:count]
    figure, axes = make_grid(len(patch_sizes), len(strongest), cell=(1.1, 1.1))
    for row, patch_size in zip(axes, patch_sizes, strict=True):
        kernel = patch_embeddings.kernel_for(to_pair(patch_size, "patch_size"))[strongest]
        for axis, pixels in zip(row, kernel.permute(0, 2, 3, 1).float().cpu().numpy(), strict=True):
            low, high = pixels.min(), pixels.max()  # of (height, width, channels)
            axis.imshow((pixels - low) / max(high - low, 1e-12), cmap="gray", interpolation="nearest")
        row[0].set_ylabel(format_budget(patch_size), fontsize=9)
    return figure


__all__ = ["draw_flexivit", "draw_kernels", "draw_patch_grid", "draw_patches", "flexivit_features"]
