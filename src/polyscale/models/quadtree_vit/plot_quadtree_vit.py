"""Draws a quadtree over its image, each patch at the resolution the model sees, as in arXiv 2304.00287."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from ...figures import make_grid, preprocess
from ...layers.token_budget import default_budgets_of
from ...utils.processors import seen_region


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DRAWN_SIDE = 360  # pixels of an image that goes on a figure's axis


def draw_quadtree(
    image: Image.Image | torch.Tensor,
    patch_centers: torch.Tensor,
    patch_sizes: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    *,
    min_patch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    line_color: tuple[int, int, int] = (255, 255, 255),
    scale: int = 2,
) -> Image.Image:
    """One image, cut as the model cut it.

    Args:
        image: a PIL image, or (channels, height, width) with values in [0, 1].
        patch_centers: (num_tokens, 2), (x, y) in pixels of the model's input: an output of the model, of one image.
        patch_sizes: (num_tokens,) in pixels.
        token_mask: (num_tokens,), True where a token is real; patches of size 0 are left out in any case.
        min_patch_size: side in pixels to which every patch is reduced; the smallest of `patch_sizes` when None.
        image_size: (height, width) of the model's input, to which `image` is resized; read from the patches when None.
        line_color: colour of the lines between patches.
        scale: pixels of the result per pixel of the input, so that lines stay thin.

    Returns:
        An RGB image of `scale` times the size of the model's input.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if patch_centers.ndim != 2 or patch_centers.shape[1] != 2 or patch_sizes.shape != patch_centers.shape[:1]:
        raise ValueError(
            "`patch_centers` and `patch_sizes` must have the shapes (num_tokens, 2) and (num_tokens,) of one image, "
            f"got {tuple(patch_centers.shape)} and {tuple(patch_sizes.shape)}."
        )
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu().float().clamp(0, 1).mul(255).round().byte()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    real = patch_sizes > 0 if token_mask is None else token_mask & (patch_sizes > 0)
    centers, sizes = patch_centers[real].float().cpu(), patch_sizes[real].cpu()
    if image_size is None:
        corner = (centers + sizes[:, None] / 2).amax(dim=0)
        image_size = (int(corner[1]), int(corner[0]))
    cell = min_patch_size or int(sizes.min())
    image = image.convert("RGB").resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (image_size[1] * scale, image_size[0] * scale))
    draw = ImageDraw.Draw(canvas)
    for (x, y), size in zip(centers.tolist(), sizes.tolist(), strict=True):
        left, top = round(x - size / 2), round(y - size / 2)
        patch = image.crop((left, top, left + size, top + size)).resize((cell, cell), Image.Resampling.BILINEAR)
        patch = patch.resize((size * scale, size * scale), Image.Resampling.NEAREST)
        canvas.paste(patch, (left * scale, top * scale))
        edge = (left * scale, top * scale, (left + size) * scale - 1, (top + size) * scale - 1)
        draw.rectangle(edge, outline=line_color, width=1)
    return canvas


@torch.no_grad()
def quadtree_image(
    model, processor, image: Image.Image, num_tokens: int | None = None, min_side: int = 0
) -> Image.Image:
    """An image as a Quadtree ViT sees it at a budget: each patch at the resolution it is embedded at.

    Args:
        model: a Quadtree ViT, with or without a head.
        processor: its image processor.
        image: the image.
        num_tokens: the budget; the config's when None.
        min_side: pixels that the longer side of the result has at least, so that lines stay thin in small images.
    """
    pixel_values = preprocess(image, processor, model)
    image_size = tuple(pixel_values.shape[-2:])
    tokens = model.base_model(pixel_values, num_tokens=num_tokens)
    return draw_quadtree(
        seen_region(image, processor),
        tokens.patch_centers[0],
        tokens.patch_sizes[0],
        None if tokens.token_mask is None else tokens.token_mask[0],
        min_patch_size=model.config.min_patch_size,
        image_size=image_size,
        scale=max(2, math.ceil(min_side / max(image_size))),
    )


def draw_quadtrees(model, processor, image: Image.Image, budgets: Sequence | None = None) -> "Figure":
    """An image as a Quadtree ViT sees it at several budgets (`quadtree_image`).

    Args:
        model: a Quadtree ViT, with or without a head.
        processor: its image processor.
        image: the image.
        budgets: numbers of tokens; the config's when None.

    Raises:
        ValueError: for a budget that the image does not allow.
    """
    budgets = default_budgets_of(model.config) if budgets is None else list(budgets)
    figure, axes = make_grid(1, len(budgets), cell=(2.8, 3.0))
    for axis, budget in zip(axes[0], budgets, strict=True):
        axis.imshow(quadtree_image(model, processor, image, budget))
        axis.set_title("as the model sees it" if budget is None else f"{budget} tokens", fontsize=9)
    return figure


def draw_patches(axis: "Axes", model, processor, image: Image.Image, num_tokens: int | None) -> None:
    """Draws an image as a Quadtree ViT sees it at a budget, on an axis of a figure."""
    axis.imshow(quadtree_image(model, processor, image, num_tokens, min_side=_DRAWN_SIDE))


__all__ = ["draw_patches", "draw_quadtree", "draw_quadtrees", "quadtree_image"]
