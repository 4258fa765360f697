"""A Quadtree ViT as a FlexiViT: the same encoder on patches of one size, which are then of any size.

With every patch split, a Quadtree ViT is a plain ViT of its smallest patches, and the FlexiViT gives its outputs. What
chooses and weighs patches of several sizes (the scorer, `merge_layer`, the weights by area) has no effect there, and
no place in a FlexiViT.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import logging

from ...utils.weight_files import check_weight_files, quiet_loading
from ...vit_sources.common import ORDINARY_KERNEL, FlexiViTSource, make_source
from ...vit_sources.transformers_vit import convert_image_processor
from ..flexivit.convert_flexivit import flexivit_from_source
from .configuration_quadtree_vit import QuadtreeViTConfig
from .modeling_projection_quadtree_vit import QuadtreeViTModelWithProjection
from .modeling_quadtree_vit import QuadtreeViTForImageClassification, QuadtreeViTModel, QuadtreeViTPreTrainedModel


logger = logging.get_logger(__name__)

_CLASSES = {
    one.__name__: one for one in (QuadtreeViTModel, QuadtreeViTForImageClassification, QuadtreeViTModelWithProjection)
}
_LABEL_FIELDS = ("id2label", "label2id", "problem_type")
_POSITIONS = "embeddings.position_embeddings"
# What chooses patches, and what it does with large ones: none of it is read where all patches are the smallest.
_FOR_LARGE_PATCHES = ("embeddings.patch_scorer.", "embeddings.precomputed_scorer.", "embeddings.aggregation.")


def _load(source: str | os.PathLike) -> tuple[QuadtreeViTPreTrainedModel, Any]:
    """The model of a folder and its image processor, None where it has none."""
    check_weight_files(Path(source))
    config = QuadtreeViTConfig.from_pretrained(source)
    named = (config.architectures or ["QuadtreeViTModel"])[0]
    if named not in _CLASSES:
        raise ValueError(f"`source` {source} is a {named}, which cannot become a FlexiViT. What can: {[*_CLASSES]}.")
    with quiet_loading():
        model, info = _CLASSES[named].from_pretrained(source, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        names = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise ValueError(f"The weights of `source` {source} do not fit its config: {', '.join(names[:8])}.")
    names = ("preprocessor_config.json", "processor_config.json")
    has_processor = any((Path(source) / name).is_file() for name in names)
    return model, AutoImageProcessor.from_pretrained(source) if has_processor else None


def _check_has_no_more(model: QuadtreeViTPreTrainedModel) -> None:
    """Refuses what training put into large patches: a FlexiViT would lose it."""
    aggregation = getattr(model.base_model.embeddings, "aggregation", None)
    if aggregation is not None and any(bool(parameter.any()) for parameter in aggregation.output.parameters()):
        raise ValueError(
            "The Quadtree ViT cannot become a FlexiViT, which does not have: a trained branch for large patches "
            "(large_patch_embedding='aggregate')."
        )


def _position_fields(model: QuadtreeViTPreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config's fields about positions; sinusoids are written into the tensors as a learned grid."""
    config, tokenizer = model.config, model.base_model.embeddings
    fields = {"position_interpolation": "bilinear", "position_antialias": False}
    if config.position_embedding == "learned":
        return fields | {"position_grid": config.position_grid, "prefix_positions": config.prefix_positions}
    rows, columns = config.feature_grid_for()
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centers = 2 * torch.stack([column, row], dim=-1).flatten(0, 1)[None] + 1
    tensors[_POSITIONS] = tokenizer.sinusoidal_positions(centers.to(model.device), max(rows, columns))
    logger.warning(
        f"Sinusoidal positions become a learned grid of {rows} x {columns}: outputs are equal for images of "
        f"{config.image_size} pixels, where nothing is resized."
    )
    return fields | {"position_grid": [rows, columns], "prefix_positions": "none"}


@torch.no_grad()
def flexivit_source_of(source: str | os.PathLike | PreTrainedModel, **overrides: Any) -> FlexiViTSource:
    """A Quadtree ViT as FlexiViT, in memory.

    Args:
        source (`str`, `os.PathLike` or `PreTrainedModel`): a folder, or a model with or without a head.
        overrides: fields of `FlexiViTConfig` to set otherwise, such as `patch_size`.

    Returns:
        `FlexiViTSource`: config, tensors and image processor; with classifier or projection where the source has one.

    Raises:
        ValueError: for another class, or a trained branch for large patches, which a FlexiViT does not have.
    """
    model, processor = (source, None) if isinstance(source, PreTrainedModel) else _load(source)
    if type(model).__name__ not in _CLASSES:
        raise ValueError(f"A {type(model).__name__} cannot become a FlexiViT. What can: {', '.join(_CLASSES)}.")
    _check_has_no_more(model)
    config = model.config
    tensors = {name.removeprefix("quadtree_vit."): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FOR_LARGE_PATCHES)}
    fields = config.encoder_fields()
    fields |= {name: getattr(config, name) for name in _LABEL_FIELDS}
    fields |= {"base_patch_size": config.min_patch_size, "patch_bias": config.patch_bias, **ORDINARY_KERNEL}
    fields |= _position_fields(model, tensors)
    if processor is not None:
        processor = convert_image_processor(processor, config.image_size, config.num_channels)
    return make_source(fields, tensors, processor, type(model).__name__, overrides)


def export_flexivit(source: str | os.PathLike | PreTrainedModel, out: str | os.PathLike, **options: Any) -> None:
    """Writes a Quadtree ViT as a FlexiViT to the folder `out`. Arguments: `flexivit_source_of`."""
    converted = flexivit_source_of(source, **options)
    flexivit_from_source(converted).save_pretrained(out)
    if converted.image_processor is not None:
        converted.image_processor.save_pretrained(out)


__all__ = ["export_flexivit", "flexivit_source_of"]
