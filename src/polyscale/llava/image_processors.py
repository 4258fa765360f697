"""The image processor of a vision tower inside a LLaVA model."""

from pathlib import Path

from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..layers.token_budget import TokenBudgetMixin
from ..models.auto import family_of
from ..utils.processors import output_size
from .layout import TokenLayout


def _own(config: PreTrainedConfig) -> BaseImageProcessor | None:
    """The image processor that lies beside the tower's checkpoint, if it is a local one."""
    folder = Path(getattr(config, "_name_or_path", "") or "")
    if not (folder / "preprocessor_config.json").is_file():
        return None
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def own_normalization(config: PreTrainedConfig) -> dict:
    """Mean and standard deviation of the image processor beside the tower's checkpoint, if it is a local one."""
    own = _own(config)
    return {name: getattr(own, name) for name in ("image_mean", "image_std") if getattr(own, name, None) is not None}


def resized(image_processor: BaseImageProcessor, size: tuple[int, int], **fields) -> BaseImageProcessor:
    """A copy of an image processor that gives images of (height, width) pixels, and has a `crop_size` that says so."""
    settings = image_processor.to_dict()
    for name in ("image_processor_type", "video_processor_type", "processor_class"):
        settings.pop(name, None)
    final = {"height": size[0], "width": size[1]}
    settings["crop_size"] = final
    shortest = (settings.get("size") or {}).get("shortest_edge")
    if settings.get("do_center_crop") and shortest:
        before = output_size(image_processor) or size
        settings["size"] = {"shortest_edge": max(round(shortest * min(size) / min(before)), max(size))}
    else:
        settings["size"] = final
    return type(image_processor)(**{**settings, **fields})


def tower_image_processor(
    config: PreTrainedConfig,
    layout: TokenLayout,
    old: BaseImageProcessor,
    given: BaseImageProcessor | None,
    fit: str | None,
) -> BaseImageProcessor:
    """The image processor for a tower.

    Args:
        config: the tower's.
        layout: its tokens.
        old: the model's image processor so far.
        given: the one that the user wants, or None.
        fit: how images become squares, for towers whose image processor has that choice.

    Raises:
        ValueError: if `given` makes images of another size than the tower's tokens are counted for.
    """
    fields = config.image_processor_fields() if isinstance(config, TokenBudgetMixin) else {}
    if given is not None:
        size = output_size(given)
        if size not in (None, layout.image_size):
            raise ValueError(
                f"`image_processor` gives images of {size} pixels (height, width), the tower's tokens are counted for "
                f"{layout.image_size}. Change one of them (`crop_size` or `size`, `config.image_size`)."
            )
        return resized(given, layout.image_size, **fields)
    family = family_of(config)
    own_class = None if family is None else family.image_processors.get("torchvision")
    if hasattr(own_class, "for_config"):
        return own_class.for_config(config, old, fit)
    if fit is not None:
        raise ValueError(f"`fit` must be None for a tower of type {config.model_type!r}, got {fit!r}.")
    own = _own(config) or (old if own_class is None else own_class())
    return resized(own, layout.image_size, **fields)


__all__ = ["own_normalization", "resized", "tower_image_processor"]
