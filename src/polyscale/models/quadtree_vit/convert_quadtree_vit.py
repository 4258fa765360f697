"""Plain ViTs as Quadtree ViT: the sources of FlexiViT (transformers, timm, big_vision), with positions sampled at
patch centres.

>>> model, image_processor = load_quadtree_vit("google/vit-base-patch16-224", max_patch_size=32)
"""

import os
from typing import Any

import torch
from transformers.utils import logging

from ...layers.config_checks import field_names
from ...layers.resizing import pi_resize_patch_embed
from ...utils.checkpoint_files import model_from_state_dict
from ...utils.validation import to_pair
from ..flexivit.configuration_flexivit import FlexiViTConfig
from ..flexivit.convert_flexivit import load_flexivit_source
from .configuration_quadtree_vit import QuadtreeViTConfig
from .feature_scoring_quadtree_vit import FeatureBasedPatchScorer
from .image_processing_quadtree_vit import QuadtreeViTImageProcessor
from .modeling_projection_quadtree_vit import QuadtreeViTModelWithProjection
from .modeling_quadtree_vit import QuadtreeViTForImageClassification, QuadtreeViTModel, QuadtreeViTPreTrainedModel


logger = logging.get_logger(__name__)

_KERNEL = "embeddings.patch_embeddings.projection.weight"
_SCORER = "embeddings.patch_scorer."
# What comes on top of the model, as a source says it.
_CLASSES = {
    "head": QuadtreeViTForImageClassification,
    "projection": QuadtreeViTModelWithProjection,
    None: QuadtreeViTModel,
}
_SOURCE_OPTIONS = ("architecture", "model_args", "pretrained")
_LABEL_FIELDS = ("id2label", "label2id", "problem_type")
# What keeps most answers of the source (`benchmarks/better_tokens/better_tokens.py`). The second line is for sources
# that pool by the mean of their tokens: with a CLS token it is no better.
_BEST = {"reduction": "antialias", "patch_scorer": "embedding"}
_BEST_FOR_MEAN = {"merge_layer": 2, "area_attention": 1.0, "area_pooling": True}


def _quadtree_config(source: FlexiViTConfig, options: dict[str, Any]) -> QuadtreeViTConfig:
    """The source's encoder with learned positions, and patch sizes that cut its image size."""
    unknown = [name for name in options if name not in field_names(QuadtreeViTConfig)]
    if unknown:
        raise ValueError(f"Unknown options {unknown}: expected fields of QuadtreeViTConfig, such as `max_patch_size`.")
    fields = source.encoder_fields()
    fields |= {name: getattr(source, name) for name in _LABEL_FIELDS}
    patch_size = to_pair(source.base_patch_size, "base_patch_size")
    if patch_size[0] != patch_size[1]:
        raise ValueError(f"The source has patches of {patch_size} pixels; a quadtree needs square ones.")
    fields |= {
        "min_patch_size": patch_size[0],
        "position_embedding": "learned",
        "position_grid": source.position_grid,
        "prefix_positions": source.prefix_positions,
        "patch_bias": source.patch_bias,
        **_best_tokens(source.pooling, options),
        **options,
    }
    sides = to_pair(fields["image_size"], "image_size")
    smallest = fields["min_patch_size"]
    largest = next((smallest << n for n in (2, 1) if all(side % (smallest << n) == 0 for side in sides)), smallest)
    return QuadtreeViTConfig(**{"max_patch_size": largest, **fields})


def _best_tokens(pooling: str, options: dict[str, Any]) -> dict[str, Any]:
    """The way to choose and weigh patches for a pooling, as far as `options` leave it open."""
    best = {**_BEST, **(_BEST_FOR_MEAN if pooling == "mean" else {})}
    if options.get("split_threshold") is not None:
        best.pop("merge_layer", None)  # features have no threshold that is known
    chosen = {name: value for name, value in best.items() if name not in options}
    if chosen:
        words = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        logger.info(f"Converted with {words}, chosen for pooling={pooling!r}; the published ones on request.")
    return chosen


def _image_processor(source: object, config: QuadtreeViTConfig) -> QuadtreeViTImageProcessor:
    """The source's normalisation and resampling, and images of the model's size."""
    height, width = to_pair(config.image_size, "image_size")
    fields = {"size": {"height": height, "width": width}, "max_patch_size": config.max_patch_size}
    if source is not None:
        for name in ("image_mean", "image_std", "resample", "do_convert_rgb", "do_rescale", "rescale_factor"):
            fields[name] = getattr(source, name)
        crop_size = getattr(source, "crop_size", None)
        if source.do_center_crop and crop_size and (crop_size["height"], crop_size["width"]) == (height, width):
            fields |= {"size": dict(source.size), "crop_size": dict(crop_size), "do_center_crop": True}
    return QuadtreeViTImageProcessor(**fields)


def load_quadtree_vit(
    source: str | os.PathLike | torch.nn.Module, **options: Any
) -> tuple[QuadtreeViTPreTrainedModel, QuadtreeViTImageProcessor]:
    """Reads a plain ViT of another library as Quadtree ViT, in memory.

    With every patch split, the tokens are those of the source; with fewer, it works before any training. The way to
    choose patches follows the pooling of the source, and is not the published one: `reduction="antialias"`
    and `patch_scorer="embedding"`; for a mean over the tokens large patches take over after the second layer, by their
    features (`merge_layer=2`), and tokens count by their area (`area_attention=1.0`, `area_pooling=True`).

    Args:
        source: as in `polyscale.models.flexivit.convert_flexivit.load_flexivit_source`.
        options: `architecture`, `model_args` and `pretrained` as there; and fields of `QuadtreeViTConfig`.
            `min_patch_size` is the source's patch size (another one resizes the kernel by pseudo-inverse),
            `max_patch_size` four or two times that, as the image size allows. `patch_scorer="feature"` downloads the
            scorer's weights.

    Returns:
        (model in evaluation mode, image processor)

    Raises:
        ValueError: for a source that does not fit, or options that do not fit each other.
        OSError: if a file is missing, or something must be downloaded and cannot be.
    """
    loaded = load_flexivit_source(source, **{name: options.pop(name) for name in _SOURCE_OPTIONS if name in options})
    model_class = _CLASSES[loaded.head]
    config = _quadtree_config(loaded.config, options)
    config.architectures = [model_class.__name__]
    state_dict = {
        f"quadtree_vit.{name.removeprefix('flexivit.')}" if name.startswith("flexivit.") else name: tensor
        for name, tensor in loaded.state_dict.items()
    }
    prefix = "quadtree_vit." if loaded.head else ""
    kernel = state_dict[prefix + _KERNEL]
    if kernel.shape[-1] != config.min_patch_size:
        state_dict[prefix + _KERNEL] = pi_resize_patch_embed(
            kernel, config.min_patch_size, loaded.config.kernel_interpolation, loaded.config.kernel_antialias
        )
    if config.patch_scorer == "feature" and config.num_levels > 1:
        if config.scorer_backbone_config is not None:
            raise ValueError(
                "`scorer_backbone_config` has no weights here: convert first, then use `set_patch_scorer`."
            )
        scorer = FeatureBasedPatchScorer(
            config.min_patch_size, config.max_patch_size, stride=config.scorer_stride, error=config.scorer_error
        )
        state_dict |= {prefix + _SCORER + name: tensor for name, tensor in scorer.state_dict().items()}
    config.dtype = kernel.dtype
    model = model_from_state_dict(model_class, config, state_dict, "the source")
    return model, _image_processor(loaded.image_processor, config)


def convert_quadtree_vit(
    source: str | os.PathLike | torch.nn.Module, out: str | os.PathLike, **options: Any
) -> QuadtreeViTPreTrainedModel:
    """Writes model and image processor of a source to the folder `out`. Arguments: `load_quadtree_vit`."""
    model, image_processor = load_quadtree_vit(source, **options)
    model.save_pretrained(out)
    image_processor.save_pretrained(out)
    return model


__all__ = ["convert_quadtree_vit", "load_quadtree_vit"]
