"""S2, drawn: the tiles of each scale, and what the features of each scale say, as PIL images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from ...figures import features_to_rgb, make_grid, preprocess, seen_region
from .modeling_s2_vision import S2VisionWrapper
from .multiscale_s2_vision import multiscale_forward
from .tiling_s2_vision import TilePlan


if TYPE_CHECKING:
    from matplotlib.figure import Figure


LINE = (255, 64, 0)


def draw_tiles(image: Image.Image, plan: TilePlan, scale: int, max_side: int = 480) -> Image.Image:
    """An image at one scale, with the borders of its tiles.

    Args:
        image: the image, of any size.
        plan: its tiles: `config.plan_for((height, width))`.
        scale: the scale, by its place.
        max_side: longest side of the drawing in pixels.
    """
    height, width = plan.sizes[scale]
    factor = min(1.0, max_side / max(height, width))
    drawn = image.convert("RGB").resize((max(1, round(width * factor)), max(1, round(height * factor))))
    pen = ImageDraw.Draw(drawn)
    rows, columns = plan.tile_grid(scale)
    padded = plan.uneven == "pad"
    steps = (
        (plan.tile[0] if padded else height / rows) * factor,
        (plan.tile[1] if padded else width / columns) * factor,
    )
    for row in range(rows + 1):
        y = min(round(row * steps[0]), drawn.height - 1)
        pen.line([(0, y), (drawn.width, y)], fill=LINE, width=2)
    for column in range(columns + 1):
        x = min(round(column * steps[1]), drawn.width - 1)
        pen.line([(x, 0), (x, drawn.height)], fill=LINE, width=2)
    return drawn


@torch.no_grad()
def scale_features(model: S2VisionWrapper, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The features of each scale at its own resolution, before they are resized to one grid.

    Args:
        model: an S2 model.
        pixel_values: (1, channels, height, width).

    Returns:
        One (width, rows, columns) a scale.
    """
    config = model.config
    plan = config.plan_for(tuple(pixel_values.shape[-2:]))

    maps = []
    for size in plan.sizes:
        features = multiscale_forward(
            model.vision_model,
            pixel_values,
            img_sizes=[size],
            max_split_size=plan.tile,
            num_prefix_token=config.num_prefix_tokens,
            output_shape=config.output_shape,
            uneven=config.uneven,
        )[0]
        if config.output_shape == "bnc":
            grid = TilePlan((size,), plan.tile, plan.uneven).feature_grid(0, config.features_per_tile)
            features = features[config.num_prefix_tokens :].T.unflatten(1, grid)
        maps.append(features)
    return maps


def draw_s2(model, processor, image: Image.Image, budgets: Sequence | None = None) -> "Figure":
    """An image at every scale of an S2 model: above with its tiles, below the features as colours.

    Args:
        model: an S2 model.
        processor: its image processor.
        image: the image.
        budgets: None; the scales belong to the checkpoint.

    Raises:
        ValueError: for budgets.
    """
    if budgets is not None:
        raise ValueError(f"`budgets` must be None: the scales of an S2 model belong to its checkpoint, got {budgets}.")
    pixel_values = preprocess(image, processor, model)
    plan = model.config.plan_for(tuple(pixel_values.shape[-2:]))
    maps = [features.permute(1, 2, 0).float().cpu().numpy() for features in scale_features(model, pixel_values)]
    figure, axes = make_grid(2, len(maps), cell=(2.6, 2.7))
    for scale, colour in enumerate(features_to_rgb(maps)):
        above, below = axes[:, scale]
        above.imshow(draw_tiles(seen_region(image, processor), plan, scale))
        height, width = plan.sizes[scale]
        rows, columns = plan.tile_grid(scale)
        tiles = rows * columns
        above.set_title(f"{width} x {height} pixels\n{tiles} tile{'s' if tiles > 1 else ''}", fontsize=9)
        below.imshow(colour, interpolation="nearest")
    axes[0, 0].set_ylabel("tiles", fontsize=9)
    axes[1, 0].set_ylabel("features, as colours", fontsize=9)
    return figure


__all__ = ["draw_s2", "draw_tiles", "scale_features"]
