"""S2, drawn: the tiles of each scale, and what the features of each scale say, as PIL images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..models.s2_vision import S2VisionWrapper
from ..models.s2_vision.multiscale import TilePlan, multiscale_forward


GAP = 8  # pixels between pictures beside each other
LINE = (255, 64, 0)


def beside(pictures: Sequence[Image.Image], height: int | None = None) -> Image.Image:
    """Pictures in a row on white, aligned at the top; all of `height` pixels if that is given."""
    if not pictures:
        raise ValueError("`pictures` is empty: give at least one.")
    if height is not None:
        pictures = [
            picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures
        ]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), (255, 255, 255))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


def draw_tiles(image: Image.Image, plan: TilePlan, scale: int, max_side: int = 480) -> Image.Image:
    """A picture at one scale, with the borders of its tiles.

    Args:
        image: the picture, of any size.
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


def draw_scales(image: Image.Image, plan: TilePlan, max_side: int = 360) -> Image.Image:
    """All scales of a picture beside each other, in proportion, with their tiles."""
    largest = max(max(size) for size in plan.sizes)
    sides = [max(1, round(max_side * max(size) / largest)) for size in plan.sizes]
    return beside([draw_tiles(image, plan, scale, side) for scale, side in enumerate(sides)])


def features_to_rgb(features: torch.Tensor, size: int | tuple[int, int] = 240) -> Image.Image:
    """A feature map as colours: its first three principal components as red, green and blue.

    Args:
        features: (width, rows, columns).
        size: (height, width) of the drawing in pixels, or int for its longest side.

    Raises:
        ValueError: for another number of dimensions, or fewer than three channels or places.
    """
    if features.ndim != 3 or min(features.shape[0], features.shape[1] * features.shape[2]) < 3:
        raise ValueError(
            "`features` must have the shape (width, rows, columns), at least three of width and of places, got "
            f"{tuple(features.shape)}."
        )
    values = features.detach().double().cpu().flatten(1).T  # (places, width)
    values = values - values.mean(dim=0)
    directions = torch.linalg.svd(values, full_matrices=False).Vh[:3]
    # the sign of a component is arbitrary: its largest entry is made positive, so that drawings can be compared
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    components = values @ (directions * largest.sign()).T
    low, high = components.amin(dim=0), components.amax(dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).reshape(*features.shape[1:], 3)
    picture = Image.fromarray((255 * colours).round().numpy().astype(np.uint8))
    if isinstance(size, int):
        factor = size / max(picture.size)
        size = (max(1, round(picture.height * factor)), max(1, round(picture.width * factor)))
    return picture.resize((size[1], size[0]), Image.Resampling.NEAREST)


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


def draw_scale_features(model: S2VisionWrapper, pixel_values: torch.Tensor, height: int = 240) -> Image.Image:
    """The features of each scale as colours, beside each other: see `features_to_rgb` and `scale_features`."""
    return beside([features_to_rgb(features) for features in scale_features(model, pixel_values)], height)


__all__ = ["beside", "draw_scale_features", "draw_scales", "draw_tiles", "features_to_rgb", "scale_features"]
