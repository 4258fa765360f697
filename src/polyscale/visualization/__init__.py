"""What a model looks at, drawn with matplotlib.

The functions that draw one family return a `matplotlib.figure.Figure` (`figure.savefig("picture.png")` writes it);
`show` draws any family and returns a picture.
"""

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from ..budgets import budget_argument
from ..checkpoints import resolve_checkpoint
from ..classification import default_budgets, format_budget, open_image
from ..layers.sizes import to_pair


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_PICTURES = 12
MAX_SIDE = 480  # pixels: what a cell of a figure can show


def make_grid(rows: int, columns: int, cell: tuple[float, float] = (2.0, 2.0)) -> tuple["Figure", np.ndarray]:
    """A figure of rows x columns empty axes of `cell` = (width, height) inches each, without ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * cell[0], rows * cell[1]), dpi=90, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def figure_to_image(figure: "Figure") -> Image.Image:
    """A figure as a picture."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def seen_region(image: Image.Image, processor) -> Image.Image:
    """The part of a picture that an image processor hands to the model, at the picture's own resolution."""
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or crop is None:
        return image
    width, height = image.size
    size = processor.size if getattr(processor, "do_resize", False) else None
    if size is not None and size["shortest_edge"]:
        scale_x = scale_y = size["shortest_edge"] / min(width, height)
    elif size is not None and size["height"] and size["width"]:
        scale_x, scale_y = size["width"] / width, size["height"] / height
    else:
        scale_x = scale_y = 1.0
    seen_width = min(width, crop["width"] / scale_x)
    seen_height = min(height, crop["height"] / scale_y)
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return image.crop((round(left), round(top), round(left + seen_width), round(top + seen_height)))


def draw_picture(axis: "Axes", image: Image.Image, **options) -> None:
    """Draws a picture, reduced to at most `MAX_SIDE` pixels; `options` go to `Axes.imshow`."""
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    axis.imshow(image, **options)


def preprocess(image: Image.Image, processor, model) -> torch.Tensor:
    """A picture as a model on its device takes it: (1, channels, height, width)."""
    pixel_values = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return pixel_values.to(device=model.device, dtype=model.dtype)


def draw_patch_grid(
    axis: "Axes",
    image: Image.Image,
    image_size: tuple[int, int],
    patch_size: int | Sequence[int],
    uneven: str = "crop",
) -> None:
    """Draws a picture with the patches that a FlexiViT cuts it into; what it drops is dimmed.

    Args:
        axis: where to draw.
        image: the picture, at any resolution.
        image_size: (height, width) of the model's input, in pixels.
        patch_size: in pixels of the model's input.
        uneven: the `uneven` of the model's config.
    """
    height, width = image_size
    patch_height, patch_width = to_pair(patch_size, "patch_size")
    draw_picture(axis, image, extent=(0, width, height, 0), interpolation="lanczos", aspect="equal")
    line = {"color": "white", "linewidth": 0.7, "alpha": 0.85}
    bottom = height // patch_height * patch_height if uneven == "crop" else height
    right = width // patch_width * patch_width if uneven == "crop" else width
    axis.vlines(np.arange(0, right + 1, patch_width), 0, bottom, **line)
    axis.hlines(np.arange(0, bottom + 1, patch_height), 0, right, **line)
    if right < width:
        axis.axvspan(right, width, color="black", alpha=0.6, linewidth=0)
    if bottom < height:
        axis.axhspan(bottom, height, xmax=right / width, color="black", alpha=0.6, linewidth=0)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def picture_drawer(model, processor) -> Callable[["Axes", Image.Image, object], None]:
    """A function (axis, image, budget) that draws a picture the way a model cuts it up at a budget.

    Families without a drawing of their own, and other people's models: the picture alone.
    """
    config = model.config

    def draw_flexivit_patches(axis: "Axes", image: Image.Image, patch_size) -> None:
        image_size = tuple(preprocess(image, processor, model).shape[-2:])
        patch_size = config.resolve_patch_size(patch_size)
        draw_patch_grid(axis, seen_region(image, processor), image_size, patch_size, config.uneven)

    def draw_quadtree_patches(axis: "Axes", image: Image.Image, num_tokens) -> None:
        axis.imshow(quadtree_picture(model, processor, image, num_tokens))

    def draw_alone(axis: "Axes", image: Image.Image, budget) -> None:
        draw_picture(axis, seen_region(image, processor))

    drawers = {"flexivit": draw_flexivit_patches, "quadtree_vit": draw_quadtree_patches}
    return drawers.get(config.model_type, draw_alone)


def draw_classification(model, processor, records: Sequence[dict]) -> "Figure":
    """What a model says of pictures: a row a picture (at most `MAX_PICTURES`), a column a budget.

    Args:
        model: the classifier.
        processor: its image processor.
        records: as `polyscale.classification.classify_images` returns them.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("`records` is empty: no picture was classified, so there is none to draw.")
    draw = picture_drawer(model, processor)
    is_patch_size = budget_argument(model.config) == "patch_size"
    files = list(dict.fromkeys(record["file"] for record in records))[:MAX_PICTURES]
    by_file = [[record for record in records if record["file"] == file] for file in files]
    figure, axes = make_grid(len(files), max(map(len, by_file)), cell=(2.0, 2.25))
    for row, of_file in zip(axes, by_file, strict=True):
        image = open_image(of_file[0]["file"])
        row[0].set_ylabel(os.path.basename(of_file[0]["file"]), fontsize=8)
        for axis, record in zip(row, of_file, strict=False):
            draw(axis, image, record["budget"])
            axis.set_xlabel(f"{record['label']}  {record['score']:.0%}", fontsize=10)
    for axis, record in zip(axes[0], by_file[0], strict=False):
        title = [f"patch size {format_budget(record['budget'])}"] if is_patch_size else []
        title += [f"{record['tokens']} tokens"] if record["tokens"] else []
        axis.set_title("\n".join(title), fontsize=9)
    return figure


def features_to_rgb(feature_maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Features as colours: the first three principal components, the same ones for all maps.

    Each map is centred on its own mean and counts as much as any other, whatever its number of tokens.

    Args:
        feature_maps: arrays (rows, columns, width); rows and columns may differ from map to map.

    Returns:
        Arrays (rows, columns, 3) in [0, 1].

    Raises:
        ValueError: for maps of different widths.
    """
    widths = {features.shape[-1] for features in feature_maps}
    if len(widths) != 1:
        raise ValueError(f"`feature_maps` must all have one width, got {sorted(widths)}.")
    centred = [
        (features - features.mean(axis=(0, 1), keepdims=True)).reshape(-1, features.shape[-1]).astype(np.float64)
        for features in feature_maps
    ]
    weighted = np.concatenate([tokens / np.sqrt(len(tokens)) for tokens in centred])
    components = np.linalg.svd(weighted, full_matrices=False)[2][:3].T  # (width, 3)
    # the sign of a component is arbitrary: its largest entry is made positive
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(components.shape[1])])
    projected = [tokens @ components for tokens in centred]
    low, high = np.percentile(np.concatenate(projected), [2, 98], axis=0)
    scale = np.where(high > low, high - low, 1.0)
    colours = [np.clip((tokens - low) / scale, 0, 1) for tokens in projected]
    return [
        np.pad(colour, ((0, 0), (0, 3 - colour.shape[1]))).reshape(*features.shape[:2], 3)
        for colour, features in zip(colours, feature_maps, strict=True)
    ]


@torch.no_grad()
def flexivit_features(model, pixel_values: torch.Tensor, patch_sizes: Sequence) -> list[np.ndarray]:
    """The last features of one picture at several patch sizes: arrays (rows, columns, hidden)."""
    feature_maps = []
    for patch_size in patch_sizes:
        hidden_states = model.base_model(pixel_values, patch_size=patch_size).last_hidden_state
        rows, columns = model.config.patch_grid_for(pixel_values.shape[-2:], patch_size)
        patches = hidden_states[0, model.config.num_prefix_tokens :]  # (rows * columns, hidden)
        feature_maps.append(patches.unflatten(0, (rows, columns)).float().cpu().numpy())
    return feature_maps


def draw_flexivit(model, processor, image: Image.Image, patch_sizes: Sequence | None = None) -> "Figure":
    """A picture at several patch sizes: above the patches, below the features as colours (`features_to_rgb`).

    Args:
        model: a FlexiViT, with or without a head.
        processor: its image processor.
        image: the picture.
        patch_sizes: in pixels of the model's input; those of its training when None.

    Raises:
        ValueError: for a patch size that the picture does not allow.
    """
    patch_sizes = default_budgets(model.config) if patch_sizes is None else list(patch_sizes)
    pixel_values = preprocess(image, processor, model)
    image_size = tuple(pixel_values.shape[-2:])
    colours = features_to_rgb(flexivit_features(model, pixel_values, patch_sizes))
    region = seen_region(image, processor)
    figure, axes = make_grid(2, len(patch_sizes), cell=(2.1, 2.2))
    for column, (patch_size, colour) in enumerate(zip(patch_sizes, colours, strict=True)):
        above, below = axes[:, column]
        draw_patch_grid(above, region, image_size, patch_size, model.config.uneven)
        tokens = model.config.num_tokens_for(image_size, patch_size)
        above.set_title(f"patch size {format_budget(patch_size)}\n{tokens} tokens", fontsize=9)
        below.imshow(colour, interpolation="nearest")
    axes[0, 0].set_ylabel("patches", fontsize=9)
    axes[1, 0].set_ylabel("features, as colours", fontsize=9)
    return figure


@torch.no_grad()
def draw_kernels(model, patch_sizes: Sequence, count: int = 8) -> "Figure":
    """Patch kernels of a FlexiViT, resized: a row a patch size, a column a filter (those of largest norm).

    Args:
        model: a FlexiViT whose pictures have one or three channels.
        patch_sizes: in pixels.
        count: how many filters.
    """
    patch_embeddings = model.base_model.embeddings.patch_embeddings
    stored = patch_embeddings.projection.weight
    strongest = stored.flatten(1).norm(dim=1).argsort(descending=True)[:count]
    figure, axes = make_grid(len(patch_sizes), len(strongest), cell=(1.1, 1.1))
    for row, patch_size in zip(axes, patch_sizes, strict=True):
        kernel = patch_embeddings.resized_kernel(to_pair(patch_size, "patch_size"))[strongest]
        for axis, pixels in zip(row, kernel.permute(0, 2, 3, 1).float().cpu().numpy(), strict=True):
            low, high = pixels.min(), pixels.max()  # of (height, width, channels)
            axis.imshow((pixels - low) / max(high - low, 1e-12), cmap="gray", interpolation="nearest")
        row[0].set_ylabel(format_budget(patch_size), fontsize=9)
    return figure


def draw_s2(model, processor, image: Image.Image, budgets: Sequence | None = None) -> "Figure":
    """A picture at every scale of an S2 model: above with its tiles, below the features as colours.

    Args:
        model: an S2 model.
        processor: its image processor.
        image: the picture.
        budgets: None; the scales belong to the checkpoint.

    Raises:
        ValueError: for budgets.
    """
    from .s2_vision import draw_tiles, scale_features

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


@torch.no_grad()
def quadtree_picture(model, processor, image: Image.Image, num_tokens: int | None = None) -> Image.Image:
    """A picture as a Quadtree ViT sees it at a budget: each patch at the resolution it is embedded at.

    Args:
        model: a Quadtree ViT, with or without a head.
        processor: its image processor.
        image: the picture.
        num_tokens: the budget; the config's when None.
    """
    from .quadtree_vit import draw_quadtree

    pixel_values = preprocess(image, processor, model)
    tokens = model.base_model(pixel_values, num_tokens=num_tokens)
    return draw_quadtree(
        seen_region(image, processor),
        tokens.patch_centers[0],
        tokens.patch_sizes[0],
        None if tokens.token_mask is None else tokens.token_mask[0],
        min_patch_size=model.config.min_patch_size,
        image_size=tuple(pixel_values.shape[-2:]),
    )


def draw_quadtrees(model, processor, image: Image.Image, budgets: Sequence | None = None) -> "Figure":
    """A picture as a Quadtree ViT sees it at several budgets (`quadtree_picture`).

    Args:
        model: a Quadtree ViT, with or without a head.
        processor: its image processor.
        image: the picture.
        budgets: numbers of tokens; the config's when None.

    Raises:
        ValueError: for a budget that the picture does not allow.
    """
    budgets = default_budgets(model.config) if budgets is None else list(budgets)
    figure, axes = make_grid(1, len(budgets), cell=(2.8, 3.0))
    for axis, budget in zip(axes[0], budgets, strict=True):
        axis.imshow(quadtree_picture(model, processor, image, budget))
        axis.set_title("as the model sees it" if budget is None else f"{budget} tokens", fontsize=9)
    return figure


def _draw_sparseformer(model, processor, image: Image.Image, budgets: Sequence | None) -> Image.Image:
    from .sparseformer import draw_sparseformer

    if budgets is not None:
        raise ValueError(f"`budgets` must be None: the tokens of a SparseFormer belong to it, got {budgets}.")
    return draw_sparseformer(model, processor, image)


# Who draws a family: a function (model, processor, image, budgets).
_DRAWINGS = {
    "flexivit": draw_flexivit,
    "quadtree_vit": draw_quadtrees,
    "s2_vision": draw_s2,
    "sparseformer": _draw_sparseformer,
}


def show(
    model: str | os.PathLike, image: str | os.PathLike | Image.Image, budgets: Sequence | None = None
) -> Image.Image:
    """What a model looks at in a picture, drawn in the manner of its family.

    FlexiViT: the patches and the features at several patch sizes. Quadtree ViT: the patches at several numbers of
    tokens, each as coarse as the model sees it. S2: the tiles and the features of each scale. SparseFormer: the
    regions of interest and the sampling points of its tokens, step by step.

    Args:
        model: name of a bundled checkpoint, local folder, or name on the hub.
        image: a picture, or its file.
        budgets: patch sizes of a FlexiViT, token counts of a Quadtree ViT; the model's own when None. The other
            families take none.

    Raises:
        ValueError: for a model of another family, a file that is no picture, or a budget that the model cannot take.
        OSError: if there is no such checkpoint.
    """
    source = resolve_checkpoint(model)
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in _DRAWINGS:
        raise ValueError(
            f"`model` is of type {config.model_type!r}, which has no drawing; those that have one: "
            f"{', '.join(_DRAWINGS)}."
        )
    if not isinstance(image, Image.Image):
        try:
            image = open_image(image)
        except ValueError as error:
            raise ValueError(f"`image` {os.fspath(image)!r} cannot be drawn: {error}.") from error
    network = AutoModel.from_pretrained(source).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    drawing = _DRAWINGS[config.model_type](network, processor, image, budgets)
    return drawing if isinstance(drawing, Image.Image) else figure_to_image(drawing)


__all__ = [
    "draw_classification",
    "draw_flexivit",
    "draw_kernels",
    "draw_patch_grid",
    "draw_picture",
    "draw_quadtrees",
    "draw_s2",
    "features_to_rgb",
    "figure_to_image",
    "flexivit_features",
    "make_grid",
    "picture_drawer",
    "preprocess",
    "quadtree_picture",
    "seen_region",
    "show",
]
