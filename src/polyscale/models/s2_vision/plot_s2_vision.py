"""S2, drawn: the tiles of each scale, and what the features of each scale say, as PIL images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from ...figures import features_to_rgb, make_grid, preprocess
from ...layers.token_budget import budget_kwargs, default_budgets_of, format_budget
from ...utils.processors import seen_region
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
def scale_features(model: S2VisionWrapper, pixel_values: torch.Tensor, **budget) -> list[torch.Tensor]:
    """The features of each scale at its own resolution, before they are resized to one grid.

    Args:
        model: an S2 model.
        pixel_values: (1, channels, height, width).
        budget: `scales` or `img_sizes` in place of the configured ones.

    Returns:
        One (width, rows, columns) per scale.
    """
    config = model.config
    plan = config.plan_for(tuple(pixel_values.shape[-2:]), **budget)

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
        model: an S2 model, with or without a head.
        processor: its image processor.
        image (`PIL.Image.Image`): the image.
        budgets (`Sequence`, *optional*): lists of scales (of sizes, where the config has `img_sizes`), each as many as
            configured; two rows for each. The config's when `None`.

    Raises:
        ValueError: for scales that the model cannot take.
    """
    model = model.base_model
    budgets = default_budgets_of(model.config) if budgets is None else list(budgets)
    pixel_values = preprocess(image, processor, model)
    if pixel_values.ndim == 5:
        raise ValueError("A Dynamic-S2 model cuts each image into tiles of its own, which are not drawn.")
    size = tuple(pixel_values.shape[-2:])
    chosen = [budget_kwargs(model.config, budget) for budget in budgets]
    plans = [model.config.plan_for(size, **budget) for budget in chosen]
    figure, axes = make_grid(2 * len(budgets), model.config.num_scales, cell=(2.6, 2.7))
    for row, (budget, plan) in enumerate(zip(chosen, plans, strict=True)):
        features = scale_features(model, pixel_values, **budget)
        maps = [scale.permute(1, 2, 0).float().cpu().numpy() for scale in features]
        above, below = axes[2 * row], axes[2 * row + 1]
        for scale, colour in enumerate(features_to_rgb(maps)):
            above[scale].imshow(draw_tiles(seen_region(image, processor), plan, scale))
            height, width = plan.sizes[scale]
            rows, columns = plan.tile_grid(scale)
            tiles = rows * columns
            title = f"{width} x {height} pixels\n{tiles} tile{'s' if tiles > 1 else ''}"
            above[scale].set_title(title, fontsize=9)
            below[scale].imshow(colour, interpolation="nearest")
        named = f"\n{format_budget(budgets[row], model.config)}" if len(budgets) > 1 else ""
        above[0].set_ylabel(f"tiles{named}", fontsize=9)
        below[0].set_ylabel(f"features, as colours{named}", fontsize=9)
    return figure


__all__ = ["draw_s2", "draw_tiles", "scale_features"]
