"""Checkpoints that a recipe names, read whole or refused in one line, as every tool reads them."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..loading import checkpoint_source, load_checkpoint, load_image_processor
from .recipe import TrainingRecipe


def load_whole(
    argument: str,
    name: str,
    auto_class: type,
    recipe: TrainingRecipe,
    source: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A model with all of its weights, in float32.

    Args:
        argument: what gave the name, for errors.
        name: a bundled name, a folder or a hub name.
        auto_class: of transformers.
        recipe: says whether the checkpoint may run code.
        source: where it lies, if not where its name says.
        config: in place of its own.

    Raises:
        ValueError: if it cannot be read, or lacks tensors.
    """
    return load_checkpoint(
        source or checkpoint_source(name, argument),
        auto_class,
        trust_remote_code=recipe.trust_remote_code,
        argument=argument,
        dtype=torch.float32,
        **({} if config is None else {"config": config}),
    )


def load_processor(argument: str, name: str, recipe: TrainingRecipe) -> BaseImageProcessor:
    """The image processor of a checkpoint."""
    return load_image_processor(name, trust_remote_code=recipe.trust_remote_code, argument=argument)


__all__ = ["load_processor", "load_whole"]
