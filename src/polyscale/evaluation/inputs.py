"""Images of a data set as inputs of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..utils.images import read_image
from ..utils.processors import RESAMPLINGS, options_for_size, output_size, process_images
from ..utils.validation import check_choice, check_list


# (mean, standard deviation) of the channels that published models were trained with
IMAGE_STATISTICS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


def value_options(
    mean: str | Sequence[float] | None,
    std: str | Sequence[float] | None,
    interpolation: str | None,
    num_channels: int = 3,
) -> dict[str, Any]:
    """Arguments of an image processor's call for other statistics or another interpolation; none for `None`.

    Raises:
        ValueError: for an unknown name, or numbers that are no statistics of so many channels.
    """
    options: dict[str, Any] = {}
    for name, value, index in (("mean", mean, 0), ("std", std, 1)):
        if isinstance(value, str):
            check_choice(name, value, tuple(IMAGE_STATISTICS))
            value = IMAGE_STATISTICS[value][index]
        if value is not None:
            numbers = check_list(name, value, int | float, "numbers, one for each channel")
            values = [float(number) for number in numbers]
            if not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise ValueError(f"`{name}` must be finite{' and above 0' if name == 'std' else ''}, got {values}.")
            if len(values) != num_channels:
                raise ValueError(f"`{name}` must hold {num_channels} numbers, one for each channel, got {values}.")
            options[f"image_{name}"] = values
    if interpolation is not None:
        check_choice("interpolation", interpolation, tuple(RESAMPLINGS))
        options["resample"] = RESAMPLINGS[interpolation]
    return options


def size_options(
    processor: BaseImageProcessor, image_size: tuple[int, int] | None, crop_pct: float | None
) -> dict[str, Any]:
    """Arguments of an image processor's call for images of a size, its own when `None`.

    Raises:
        ValueError: for a size or a share that the processor cannot follow.
    """
    # a crop other than the processor's own still ends at the size that it makes
    target = image_size or (output_size(processor) if crop_pct is not None else None)
    if target is None and crop_pct is not None:
        raise ValueError("`crop_pct` needs `image_sizes`: the image processor has no size of its own.")
    return {} if target is None else options_for_size(processor, target, crop_pct)


def image_batches(split: Dataset, batch_size: int) -> Iterator[tuple[list, Callable[[int], str]]]:
    """The images of a data set, and the name of each by its place in its batch, for errors."""
    opens_itself = split.format["type"] == "custom"  # as `load_image_dataset` gives it
    files = split if opens_itself else split.cast_column("image", Image(decode=False))
    for start in range(0, len(files), batch_size):
        cells = files[start : start + batch_size]["image"]
        images = [
            cell if isinstance(cell, np.ndarray) else read_image(cell, _row_name(cell, start + index))
            for index, cell in enumerate(cells)
        ]
        yield images, partial(_stored_name, split, start)


def _stored_name(split: Dataset, start: int, index: int) -> str:
    return _row_name(split.with_format(None)[start + index]["image"], start + index)


def _row_name(value: Any, row: int) -> str:
    path = value.get("path") if isinstance(value, Mapping) else None
    return path or f"image {row} of the data"


def model_inputs(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence,
    name_of: Callable[[int], str],
    image_size: tuple[int, int] | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], tuple[int, int] | None]]:
    """Inputs of a model on its device and in its dtype, in as few batches as the sizes of the images allow.

    Yields:
        The places of some images in `images`, their tensors by name, and their (height, width) in pixels; `None` for
        tiles, which are cut by the shape of each image.

    Raises:
        ValueError: for images of another size than `image_size`, if that is given.
    """
    channels = getattr(model.config, "num_channels", 3)
    for indices, inputs in process_images(processor, images, channels, name_of, **options):
        inputs = {
            name: tensor.to(device=model.device, dtype=model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        shape = tuple(inputs["pixel_values"].shape)
        made = shape[-2:] if len(shape) == 4 else None
        if image_size is not None and made != image_size:
            raise ValueError(f"`image_sizes` {image_size} does not take effect: the image processor makes {made}.")
        yield indices, inputs, made


__all__ = ["IMAGE_STATISTICS", "image_batches", "model_inputs", "size_options", "value_options"]
