"""The image processor of a vision tower inside a LLaVA model."""

from pathlib import Path

from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..models.flexivit import FlexiViTImageProcessor
from ..models.quadtree_vit import QuadtreeViTImageProcessor
from ..models.s2_vision import S2ImageProcessor
from ..models.sparseformer import SparseFormerImageProcessor
from ..utils.processors import output_size
from .layout import TokenLayout


_CLASSES = {
    "flexivit": FlexiViTImageProcessor,
    "quadtree_vit": QuadtreeViTImageProcessor,
    "sparseformer": SparseFormerImageProcessor,
}


def _own(config: PreTrainedConfig) -> BaseImageProcessor | None:
    """The image processor that lies beside the tower's checkpoint, if it is a local one."""
    folder = Path(getattr(config, "_name_or_path", "") or "")
    if not (folder / "preprocessor_config.json").is_file():
        return None
    return AutoImageProcessor.from_pretrained(folder)


def resized(image_processor: BaseImageProcessor, size: tuple[int, int], **fields) -> BaseImageProcessor:
    """A copy of an image processor that gives pictures of (height, width) pixels, and has a `crop_size` that says
    so.
    """
    settings = image_processor.to_dict()
    for name in ("image_processor_type", "processor_class"):
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
    old: BaseImageProcessor | None,
    given: BaseImageProcessor | None,
    fit: str | None,
) -> BaseImageProcessor:
    """The image processor for a tower.

    Args:
        config: the tower's.
        layout: its tokens.
        old: the model's image processor so far.
        given: the one that the user wants, or None.
        fit: of an S2 tower, how pictures are brought to a square.

    Raises:
        ValueError: if `given` makes pictures of another size than the tower's tokens are counted for.
    """
    inner = config.vision_config if config.model_type == "polyscale_packed_tower" else config
    if given is not None:
        if output_size(given) not in (None, layout.image_size) and not getattr(inner, "dynamic", False):
            raise ValueError(
                f"`image_processor` gives pictures of {output_size(given)} pixels (height, width), the "
                "tower's tokens are counted for "
                f"{layout.image_size}. Change one of them (`crop_size` or `size`, `config.image_size`)."
            )
        return given if getattr(inner, "dynamic", False) else resized(given, layout.image_size)
    if inner.model_type == "s2_vision":
        return S2ImageProcessor.for_config(inner, old, fit)
    own = _own(inner)
    if own is None and inner.model_type in _CLASSES:
        own = _CLASSES[inner.model_type]()
    if own is None:
        own = old
    if inner.model_type == "quadtree_vit":
        return resized(own, layout.image_size, max_patch_size=inner.max_patch_size)
    return resized(own, layout.image_size)


__all__ = ["resized", "tower_image_processor"]
