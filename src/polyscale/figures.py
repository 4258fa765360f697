"""What a model looks at, drawn with matplotlib.

The functions that draw one family return a `matplotlib.figure.Figure` (`figure.savefig("drawing.png")` writes it);
`show` draws any family and returns a `PIL.Image.Image`.
"""

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from .layers.budget_choice import distinct_budgets
from .layers.token_budget import budget_argument_of, format_budget, parse_budget
from .loading import load_base_model, load_config
from .models.auto import families, family_of
from .utils.images import open_pixels, to_rgb
from .utils.outputs import check_output
from .utils.processors import process_images, seen_region
from .utils.text import no_math
from .utils.validation import check_list, check_path


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_PICTURES = 12
DRAWING_SUFFIXES = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
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
    """A figure as an image."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def check_image_output(path: str | os.PathLike) -> None:
    """Refuses a place where no drawing can be written, before anything was worked for.

    Raises:
        ValueError: for a suffix that names no kind of image, or a place where nothing can be written.
    """
    if os.path.splitext(path)[1].lower() not in DRAWING_SUFFIXES:
        raise ValueError(f"`output` {os.fspath(path)} must end in one of {', '.join(DRAWING_SUFFIXES)}.")
    check_output(path)


def draw_image(axis: "Axes", image: Image.Image, **options) -> None:
    """Draws an image, reduced to at most `MAX_SIDE` pixels; `options` go to `Axes.imshow`."""
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    axis.imshow(image, **options)


def preprocess(image: Image.Image | np.ndarray, processor, model) -> torch.Tensor:
    """An image, or an array of it, as a model on its device takes it: (1, channels, height, width)."""
    ((_, inputs),) = process_images(processor, [image], getattr(model.config, "num_channels", 3))
    return inputs["pixel_values"].to(device=model.device, dtype=model.dtype)


def image_drawer(model, processor) -> Callable[["Axes", Image.Image, object], None]:
    """A function (axis, image, budget) that draws an image the way a model cuts it up at a budget.

    Families without a drawing of their own, and other people's models: the image alone.
    """
    family = family_of(model.config)
    draw = None if family is None else family.function("budget_drawing")
    if draw is None:
        return lambda axis, image, budget: draw_image(axis, seen_region(image, processor))
    return lambda axis, image, budget: draw(axis, model, processor, image, budget)


def budget_lines(config: PreTrainedConfig, budget: object, tokens: Sequence[int]) -> list[str]:
    """A budget in one or two lines: the argument and its value, and last the tokens of images, or their range.

    A budget that is a number of tokens is said once.
    """
    argument, few, many = budget_argument_of(config), min(tokens), max(tokens)
    says_more = budget is not None and not (argument == "num_tokens" and budget == few == many)
    lines = [f"{argument.replace('_', ' ')} {format_budget(budget, config)}"] if says_more else []
    return [*lines, f"{few} tokens" if few == many else f"{few} to {many} tokens"]


def draw_classification(model, processor, records: Sequence[dict]) -> "Figure":
    """What a model says of images: one row per image (at most `MAX_PICTURES`), one column per budget.

    Args:
        model: the classifier.
        processor: its image processor.
        records: as `polyscale.classification.classify_images` returns them.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("`records` is empty: no image was classified, so there is none to draw.")
    draw = image_drawer(model, processor)
    files = list(dict.fromkeys(record["file"] for record in records))[:MAX_PICTURES]
    by_file = [[record for record in records if record["file"] == file] for file in files]
    figure, axes = make_grid(len(files), max(map(len, by_file)), cell=(2.0, 2.25))
    for row, of_file in zip(axes, by_file, strict=True):
        image = open_pixels(of_file[0]["file"])
        row[0].set_ylabel(no_math(os.path.basename(of_file[0]["file"])), fontsize=8)
        for axis, record in zip(row, of_file, strict=False):
            draw(axis, image, record["budget"])
            axis.set_xlabel(f"{no_math(record['label'])}  {record['score']:.0%}", fontsize=10)
    for axis, record in zip(axes[0], by_file[0], strict=False):
        axis.set_title("\n".join(budget_lines(model.config, record["budget"], [record["tokens"]])), fontsize=9)
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


def show(
    model: str | os.PathLike,
    image: str | os.PathLike | Image.Image,
    budgets: Sequence | None = None,
    *,
    device: str | None = "cpu",
    image_size: int | tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> Image.Image:
    """What a model looks at in an image, drawn in the manner of its family.

    FlexiViT: the patches and the features at several patch sizes. Quadtree ViT: the patches at several numbers of
    tokens, each as coarse as the model sees it. S2: the tiles and the features of each scale. SparseFormer: the
    regions of interest and the sampling points of its tokens, step by step.

    Args:
        model (`str` or `os.PathLike`): name of a bundled checkpoint, local folder, or name on the hub.
        image (`str`, `os.PathLike` or `PIL.Image.Image`): an image, or its file.
        budgets (`Sequence`, *optional*): values of the model's budget argument, as texts that a user types or as they
            are (patch sizes of a FlexiViT, token counts of a Quadtree ViT, lists of scales of S2); the model's own
            when `None`.
        device (`str`, *optional*, defaults to `"cpu"`): where the model runs.
        image_size (`int` or `(height, width)`, *optional*): in pixels, that the model sees the image at; its own when
            `None`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.

    Raises:
        ValueError: for a model of another family, a file that is no image, or a budget or size that the model cannot
            take or that comes twice.
        OSError: if there is no such checkpoint.
    """
    opened = to_rgb(image) if isinstance(image, Image.Image) else open_pixels(check_path("image", image))
    config = load_config(model, trust_remote_code=trust_remote_code)
    family = family_of(config)
    if family is None or family.drawing is None:
        drawn = ", ".join(name for name, other in families().items() if other.drawing is not None)
        raise ValueError(
            f"`model` is of type {config.model_type!r}, which has no drawing; those that have one: {drawn}."
        )
    network, processor = load_base_model(model, device, image_size=image_size, trust_remote_code=trust_remote_code)
    if budgets is not None:
        budgets = [
            parse_budget(network.config, budget) if isinstance(budget, str) else budget
            for budget in check_list("budgets", budgets, what="budgets")
        ]
        budgets = distinct_budgets(budgets)
    drawing = family.function("drawing")(network, processor, opened, budgets)
    return drawing if isinstance(drawing, Image.Image) else figure_to_image(drawing)


__all__ = [
    "budget_lines",
    "check_image_output",
    "draw_classification",
    "draw_image",
    "features_to_rgb",
    "figure_to_image",
    "image_drawer",
    "make_grid",
    "preprocess",
    "show",
]
