"""How images come to a model in training, evaluation and use: one image processor, its size, mean and deviation."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from transformers import IMAGE_PROCESSOR_MAPPING, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from ..utils.processors import processor_for_size
from .recipe import TrainingRecipe
from .transforms import ProcessorTransform


_LARGEST_DEFAULT = 224  # pixels


def default_image_size(shapes: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """A square for images of these shapes: no larger than most of them, and at most 224 pixels."""
    side = int(median(min(shape[:2]) for shape in shapes))
    step = 32 if side >= 32 else 8
    side = min(max(side // step * step, 8), _LARGEST_DEFAULT)
    return side, side


def make_image_processor(recipe: TrainingRecipe, config: PreTrainedConfig) -> BaseImageProcessor:
    """A new processor of a family: resize to `recipe.image_size`, the recipe's mean and standard deviation.

    What it shares with the model's config by name (the patch sizes that an image must fit) is taken from there.

    Raises:
        ValueError: for a family of transformers whose processor makes no images of that size.
    """
    processor_class = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
    height, width = recipe.image_size
    fields = {"image_mean": list(recipe.image_mean), "image_std": list(recipe.image_std)}
    if recipe.num_channels != 3:
        fields["do_convert_rgb"] = False
    if hasattr(processor_class, "for_config"):
        return processor_class.for_config(config, **fields)
    own = processor_class.valid_kwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
    shared = {name: getattr(config, name) for name in own if hasattr(config, name)}
    size = {"height": height, "width": width}
    by_sides = {"size": size, "crop_size": size, "do_center_crop": False}
    for sizes in (by_sides, {"size": {"shortest_edge": height}}):  # some know a square by its edge alone
        processor = processor_class(**shared, **fields, **sizes)
        try:
            if _size_made(processor, recipe.num_channels) == (height, width):
                return processor
        except Exception:  # of transformers, for a size that the processor does not know
            continue
    raise ValueError(
        f"`image_size` {height} x {width} is nothing that {processor_class.__name__}, the image processor of the "
        f"family {config.model_type!r}, can make. Take a square, or another family."
    )


def adopt_processing(
    recipe: TrainingRecipe, processor: BaseImageProcessor, config: PreTrainedConfig
) -> tuple[TrainingRecipe, BaseImageProcessor]:
    """The recipe with the processing of a checkpoint, and its processor with what the recipe says otherwise.

    Raises:
        ValueError: for a processor that gives images of several sizes, or tiles.
    """
    changes = {}
    if recipe.image_size is not None:
        processor = processor_for_size(processor, tuple(recipe.image_size))
    for name in ("image_mean", "image_std"):
        if getattr(recipe, name) is not None:
            changes[name] = list(getattr(recipe, name))
    if changes:
        processor = type(processor).from_dict({**processor.to_dict(), **changes})
    channels = getattr(config, "num_channels", 3)
    if recipe.num_channels not in (None, channels):
        raise ValueError(f"`num_channels` must be that of the checkpoint, {channels}, got {recipe.num_channels}.")
    mean, std = processor.image_mean, processor.image_std
    if processor.do_normalize is False or mean is None or std is None:
        mean, std = (0.0,) * channels, (1.0,) * channels
    if channels != 3 and processor.do_convert_rgb:
        processor.do_convert_rgb = False
    recipe = replace(
        recipe,
        image_size=_size_made(processor, channels),
        num_channels=channels,
        image_mean=tuple(mean),
        image_std=tuple(std),
    )
    return recipe, processor


def _size_made(processor: BaseImageProcessor, channels: int) -> tuple[int, int]:
    """(height, width) of what a processor makes of any image."""
    transform = ProcessorTransform(processor, channels)
    made = [transform(torch.zeros(*shape, channels, dtype=torch.uint8).numpy()) for shape in ((96, 96), (96, 160))]
    if made[0].ndim != 3 or made[0].shape != made[1].shape:
        raise ValueError(
            "The checkpoint's image processor gives images of different sizes, or tiles, which cannot be one batch: "
            "give `image_size`, or another checkpoint."
        )
    return tuple(made[0].shape[-2:])


__all__ = ["adopt_processing", "default_image_size", "make_image_processor"]
