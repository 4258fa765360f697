"""Where the tokens of a SparseFormer look: their regions of interest and sampling points over an image.

Every function returns a `PIL.Image.Image`.
"""

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedModel

from ...figures import preprocess
from ...utils.processors import seen_region


_GAP = 4  # pixels between the cells of a grid
_MOST_HEIGHT = 4  # times the width of a cell: a longer image is drawn squashed, or its cells would be gigabytes
_FADE = 0.5  # how far the image below drawings goes towards white


def token_color(index: int) -> tuple[int, int, int]:
    """A colour of its own for each token: neighbours in the list differ most."""
    hue = (index * 0.618034) % 1.0
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.9, 0.85))


def _canvas(image: Image.Image, width: int) -> Image.Image:
    """The image at that width, faded, for drawings on it."""
    height = min(max(round(width * image.height / image.width), 1), _MOST_HEIGHT * width)
    image = image.convert("RGB").resize((width, height))
    return Image.blend(image, Image.new("RGB", image.size, "white"), _FADE)


def _grid(cells: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width, height = cells[0][0].size
    size = (len(cells[0]) * (width + _GAP) - _GAP, len(cells) * (height + _GAP) - _GAP)
    grid = Image.new("RGB", size, "white")
    for row, images in enumerate(cells):
        for column, image in enumerate(images):
            grid.paste(image, (column * (width + _GAP), row * (height + _GAP)))
    return grid


def draw_rois(
    image: Image.Image, rois: torch.Tensor, tokens: Sequence[int] | None = None, width: int = 336
) -> Image.Image:
    """Regions of interest over an image, each token in its colour.

    Args:
        image: what the model sees (see `seen_region`).
        rois: (tokens, 4), (left, top, right, bottom) in [0, 1]; of a video (tokens, 6), drawn without their time.
        tokens: indices of the tokens to draw; None for all.
        width: of the drawing in pixels.
    """
    canvas = _canvas(image, width)
    draw = ImageDraw.Draw(canvas)
    dimensions = rois.shape[-1] // 2
    for token in range(len(rois)) if tokens is None else tokens:
        left, top = rois[token, :2].tolist()
        right, bottom = rois[token, dimensions : dimensions + 2].tolist()
        box = (
            min(left, right) * canvas.width,
            min(top, bottom) * canvas.height,
            max(left, right) * canvas.width - 1,
            max(top, bottom) * canvas.height - 1,
        )
        draw.rectangle(box, outline=token_color(token), width=max(width // 168, 1))
    return canvas


def draw_sampling_points(
    image: Image.Image,
    points: torch.Tensor,
    rois: torch.Tensor | None = None,
    tokens: Sequence[int] | None = None,
    width: int = 336,
) -> Image.Image:
    """Sampling points over an image, each token in its colour; with `rois`, in their regions.

    Args:
        image: what the model sees (see `seen_region`).
        points: (tokens, points, 2 or 3), (x, y) in [0, 1] first.
        rois: as in `draw_rois`, or None.
        tokens: indices of the tokens to draw; None for all.
        width: of the drawing in pixels.
    """
    canvas = _canvas(image, width) if rois is None else draw_rois(image, rois, tokens, width)
    draw = ImageDraw.Draw(canvas)
    radius = max(width / 200, 1)
    for token in range(len(points)) if tokens is None else tokens:
        for x, y in (points[token, :, :2] * torch.tensor([canvas.width, canvas.height])).tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=token_color(token))
    return canvas


@torch.no_grad()
def draw_sparseformer(
    model: PreTrainedModel,
    processor,
    image: Image.Image,
    tokens: Sequence[int] | None = None,
    width: int = 224,
) -> Image.Image:
    """Where an image SparseFormer looks, sampling by sampling from left to right (repeats of a layer one by one).

    The first row shows the image and the regions of all tokens; each row below follows one token, with its
    sampling points.

    Args:
        model: a SparseFormer on images, with or without a head.
        processor: its image processor.
        image: of any height and width.
        tokens: indices of the tokens to follow; None for four of them, spread over the list.
        width: of a cell in pixels.

    Raises:
        ValueError: for a token that the model does not have.
    """
    num_tokens = model.config.num_tokens
    if tokens is None:
        tokens = sorted({round(step * (num_tokens - 1) / 3) for step in range(4)})
    wrong = [token for token in tokens if not 0 <= token < num_tokens]
    if wrong:
        raise ValueError(f"`tokens` must be indices from 0 to {num_tokens - 1}, got {wrong}.")
    outputs = model(preprocess(image, processor, model), output_sampling_points=True, output_sampling_rois=True)
    seen = seen_region(image, processor)
    steps = [
        (points[0].float().cpu(), rois[0].cpu())
        for points, rois in zip(outputs.sampling_points, outputs.sampling_rois, strict=True)
    ]
    height = _canvas(seen, width).height
    rows = [[seen.resize((width, height)), *(draw_rois(seen, rois, None, width) for _, rois in steps)]]
    for token in tokens:
        label = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(label).text((width // 8, height // 2), f"token {token}", fill=token_color(token))
        rows.append([label, *(draw_sampling_points(seen, points, rois, [token], width) for points, rois in steps)])
    return _grid(rows)


def draw_family(model: PreTrainedModel, processor, image: Image.Image, budgets: Sequence | None) -> Image.Image:
    """`draw_sparseformer` as the tools call it.

    Raises:
        ValueError: for budgets; the tokens belong to the weights.
    """
    if budgets is not None:
        raise ValueError(f"`budgets` must be None: the tokens of a SparseFormer belong to it, got {budgets}.")
    return draw_sparseformer(model, processor, image)


__all__ = ["draw_family", "draw_rois", "draw_sampling_points", "draw_sparseformer", "token_color"]
