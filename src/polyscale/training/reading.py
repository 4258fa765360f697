"""Checkpoints of others, read whole or refused in one line."""

from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..checkpoints import resolve_checkpoint
from ..loading import quiet_loading, reading
from .recipe import TrainingRecipe


def check_place(argument: str, source: str) -> None:
    """Raises ValueError for what looks like a path and leads nowhere."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).exists():
        raise ValueError(f"`{argument}`: there is no folder {source!r}.")


def load_whole(
    argument: str,
    name: str,
    auto_class: type,
    recipe: TrainingRecipe,
    source: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A model with all of its weights.

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
    check_place(argument, name)
    source = source or resolve_checkpoint(name)
    options = {} if config is None else {"config": config}
    with reading(argument, name), quiet_loading():
        model, info = auto_class.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=recipe.trust_remote_code,
            **options,
        )
    if info["missing_keys"]:
        kind = "no trained image classifier" if auto_class is AutoModelForImageClassification else "no whole model"
        raise ValueError(
            f"`{argument}` {name!r} holds {kind}: {len(info['missing_keys'])} tensors are missing, such as "
            f"{sorted(info['missing_keys'])[0]!r}."
        )
    return model


def load_processor(argument: str, name: str, recipe: TrainingRecipe) -> BaseImageProcessor:
    """The image processor of a checkpoint."""
    with reading(argument, name):
        return AutoImageProcessor.from_pretrained(resolve_checkpoint(name), trust_remote_code=recipe.trust_remote_code)


__all__ = ["check_place", "load_processor", "load_whole"]
