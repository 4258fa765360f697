"""Checkpoints of others, read whole or refused in one line."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..checkpoints import available_checkpoints, resolve_checkpoint
from .recipe import TrainingRecipe


@contextmanager
def readable(argument: str, source: str) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is read into a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`{argument}` {source!r} cannot be loaded: it is neither a bundled checkpoint "
            f"({', '.join(available_checkpoints())}) nor a complete one in a folder or on the hub. {reason}"
        ) from error
    except (SafetensorError, RuntimeError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{argument}` {source!r} is damaged or of another kind: {reason}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers prints a table of the tensors that do not fit; here they are looked at and spoken of."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_place(argument: str, source: str) -> None:
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
    with readable(argument, name), quiet_loading():
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
    with readable(argument, name):
        return AutoImageProcessor.from_pretrained(resolve_checkpoint(name), trust_remote_code=recipe.trust_remote_code)


__all__ = ["check_place", "load_processor", "load_whole", "quiet_loading", "readable"]
