"""Mean and standard deviation of the channels that published models were trained with, by name."""

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)


IMAGE_STATISTICS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


__all__ = ["IMAGE_STATISTICS"]
