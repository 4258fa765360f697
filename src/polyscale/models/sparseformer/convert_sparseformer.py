"""Checkpoints of showlab/sparseformer, released or raw, in SparseFormer's terms."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ...utils.checkpoint_files import (
    check_state_dict,
    empty_model,
    load_state_dict_file,
    model_from_state_dict,
    rename_keys,
    unwrap_state_dict,
)
from ...utils.downloads import download_once
from .configuration_sparseformer import PRESETS, SparseFormerConfig
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .image_processing_sparseformer import SparseFormerImageProcessor
from .modeling_sparseformer import (
    SparseFormerForImageClassification,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerPreTrainedModel,
)
from .modeling_sparseformer_video import (
    SparseFormerForVideoClassification,
    SparseFormerVideoModel,
    SparseFormerVideoModelWithProjection,
)


RELEASES = "https://github.com/showlab/sparseformer/releases/download/v2.0.0-refactor/{name}_converted.pth"

# Of the authors' training code -> of their releases. First match wins, as in their conversion; None drops the tensor.
_RAW_RULES = (
    (r"(.*)tuo_proj(.*)", r"\1out_proj\2"),
    (r"token_roi\.weight", r"initial_roi.weight"),
    (r"token_embedding\.weight", r"initial_embedding.weight"),
    (r"(.*)ffn\.0\.(.+)", r"\1norm2.\2"),
    (r"(.*)ln_attn\.(.+)", r"\1norm1.\2"),
    (r"(.*)ffn\.1\.(.+)", r"\1mlp.fc1.\2"),
    (r"(.*)ffn\.3\.(.+)", r"\1mlp.fc2.\2"),
    (r"(.*)attn\.in_proj_(.+)", r"\1attn.qkv.\2"),
    (r"(.*)attn\.out_proj\.(.+)", r"\1attn.proj.\2"),
    (r"ln_post\.(.+)", r"norm.\1"),
    (r"head\.norm\.(.+)", r"norm.\1"),
    (r"global_embedding(.+)", r"cls_embedding\1"),
    (r"cls_head\.(.+)", r"proj.\1"),
    (r"head\.classifier\.(.+)", r"proj.\1"),
    (r"global_roi.*", None),
)
_THE_SAME = (r"(.+)", r"\1")

_TOP_RULES = (
    (r"feat_extractor\.conv1\.(.+)", r"features.convolution.\1"),
    (r"initial_roi\.weight", r"embeddings.rois"),
    (r"initial_embedding\.weight", r"embeddings.tokens"),
    (r"cls_embedding\.weight", r"embeddings.cls_token"),
    (r"norm\.(.+)", r"layernorm.\1"),
    (r"proj\.(.+)", r"{head}.\1"),
)

_LAYER_RULES = (
    (r"norm1\.(.+)", r"layernorm_before.\1"),
    (r"attn\.qkv\.(.+)", r"attention.qkv.\1"),
    (r"attn\.proj\.(.+)", r"attention.o_proj.\1"),
    (r"norm2\.(.+)", r"layernorm_after.\1"),
    (r"mlp\.(fc[12]\..+)", r"mlp.\1"),
    (r"adaptive_mixing\.m_beta", r"mixing.channel_bias"),
    (r"adaptive_mixing\.s_beta", r"mixing.spatial_bias"),
    (r"adaptive_mixing\.parameter_generator\.0\.(.+)", r"mixing.layernorm.\1"),
    (r"adaptive_mixing\.parameter_generator\.1\.(.+)", r"mixing.generator_in.\1"),
    (r"adaptive_mixing\.parameter_generator\.2\.(.+)", r"mixing.generator_out.\1"),
    (r"adaptive_mixing\.out_proj\.(.+)", r"mixing.o_proj.\1"),
    (r"roi_offset_bias", r"sampling.offset_bias"),
    (r"roi_offset_module\.0\.(.+)", r"sampling.layernorm.\1"),
    (r"roi_offset_module\.1\.(.+)", r"sampling.offsets.\1"),
    (r"roi_adjust_module\.0\.(.+)", r"roi_adjustment.layernorm.\1"),
    (r"roi_adjust_module\.1\.(.+)", r"roi_adjustment.{adjust}.\1"),
    (r"roi_adjust_module\.3\.(.+)", r"roi_adjustment.deltas.\1"),
    (r"pe_transition\.0\.(.+)", r"position_injection.layernorm.\1"),
    (r"pe_transition\.1\.(.+)", r"position_injection.projection.\1"),
    (r"stage_embedding\.weight", r"stage_embedding"),
)


class SparseFormerSource(NamedTuple):
    """A checkpoint of another library in SparseFormer's terms.

    `config.architectures` names the class that `state_dict` belongs to; `image_processor` is None where the source
    says nothing about it.
    """

    config: SparseFormerConfig
    state_dict: dict[str, torch.Tensor]
    image_processor: SparseFormerImageProcessor | None

    @property
    def model_class(self) -> type[SparseFormerPreTrainedModel]:
        return MODEL_CLASSES[self.config.architectures[0]]


MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (
        SparseFormerModel,
        SparseFormerForImageClassification,
        SparseFormerModelWithProjection,
        SparseFormerVideoModel,
        SparseFormerForVideoClassification,
        SparseFormerVideoModelWithProjection,
    )
}


def rename_raw(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the authors' training code (v1 or bootstrapped) -> names of their released `*_converted.pth`.

    Released checkpoints pass through unchanged.

    Raises:
        ValueError: for a bootstrapped checkpoint with half of its RoIs.
    """
    if "token_roi.weight" in state_dict:  # v1, whose stage embeddings are not used
        rules = ((r".*stage_embedding.*", None), *_RAW_RULES, _THE_SAME)
        return rename_keys(state_dict, rules, "The raw checkpoint")
    if "token_roi_cc.weight" not in state_dict:
        return dict(state_dict)
    if "token_roi_wh.weight" not in state_dict:
        raise ValueError("The raw bootstrapped checkpoint lacks 'token_roi_wh.weight'.")
    indices = [int(match[1]) for name in state_dict if (match := re.match(r"layers\.(\d+)\.", name))]
    first_block = max(indices, default=-1) + 1
    blocks = {int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))}
    after = [(rf"blocks\.{block}\.(.+)", rf"layers.{first_block + block}.\1") for block in blocks]
    renamed = rename_keys(state_dict, (*_RAW_RULES, _THE_SAME), "The raw checkpoint")
    renamed = rename_keys(renamed, (*after, _THE_SAME), "The raw checkpoint")
    center, size = renamed.pop("token_roi_cc.weight"), renamed.pop("token_roi_wh.weight")
    renamed["initial_roi.weight"] = torch.cat([center - size / 2, center + size / 2], dim=1)
    return renamed


def _official_layers(config: SparseFormerConfig) -> list[str]:
    """Our place of each entry of the official `layers`, which counts the linear layers between widths."""
    places = []
    for index, width in enumerate(config.widths):
        if index and width != config.widths[index - 1]:
            places.append(f"transitions.{index}")
        places.append(f"layers.{index}")
    return places


def rename_official(
    state_dict: dict[str, torch.Tensor], config: SparseFormerConfig, head: str = "head"
) -> dict[str, torch.Tensor]:
    """Names of a released checkpoint -> names of `SparseFormerModel`, the head's under `head`.

    Raises:
        ValueError: for names of an unknown layout, or more layers than `config` has.
    """
    places = _official_layers(config)
    rules = [(pattern, target.replace("{head}", head)) for pattern, target in _TOP_RULES]
    for index, place in enumerate(places):
        prefix = rf"layers\.{index}\."
        if place.startswith("transitions"):
            rules.append((prefix + r"(.+)", rf"{place}.\1"))
            continue
        adjust = "deltas" if config.roi_adjustment == "linear" else "hidden"
        rules += [
            (prefix + pattern, f"{place}.{target.replace('{adjust}', adjust)}") for pattern, target in _LAYER_RULES
        ]
    renamed = rename_keys(state_dict, rules, "The checkpoint")
    kernel = renamed.get("features.convolution.weight")
    if kernel is not None and kernel.ndim == 5 and kernel.shape[2] == 1:  # videos: frames are kept apart
        renamed["features.convolution.weight"] = kernel.squeeze(2)
    if config.roi_dimensions == 3:
        for index, (width, operations) in enumerate(zip(config.widths, config.operations, strict=True)):
            if "pe_inject" in operations:  # the official 3-D encoding is zero
                time = torch.zeros(width, 2 * (width // 4), dtype=kernel.dtype)
                renamed[f"layers.{index}.position_injection.time_projection.weight"] = time
    return renamed


def preset_image_processor(name: str) -> SparseFormerImageProcessor:
    """The image processor of a published variant: short side to 256, bilinear, crop of 224, its mean and deviation."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if "augreg" in name:
        mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    elif "clip" in name:
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    return SparseFormerImageProcessor(image_mean=list(mean), image_std=list(std))


def _shape_problem(config: SparseFormerConfig, state_dict: dict[str, torch.Tensor]) -> str | None:
    """Why the tensors do not fit `config`, or None."""
    try:
        _fit(config, state_dict, (), ())
    except ValueError as error:
        return str(error)
    return None


def infer_preset(state_dict: dict[str, torch.Tensor]) -> str:
    """The published variant that released tensors belong to, by their shapes.

    Raises:
        ValueError: if they fit none.
    """
    has_bias = "proj.bias" in state_dict
    for name in PRESETS:
        config = SparseFormerConfig.preset(name)
        rois, kernel = state_dict.get("initial_roi.weight"), state_dict.get("feat_extractor.conv1.weight")
        is_candidate = (
            rois is not None
            and kernel is not None
            and rois.shape == (config.num_latent_tokens, 4)
            and kernel.shape[0] == config.feature_width
            and has_bias == ("clip" not in name)
        )
        if is_candidate and _shape_problem(_with_head(config, state_dict), state_dict) is None:
            return name
    raise ValueError(
        "The checkpoint fits none of the published variants "
        f"({', '.join(PRESETS)}). Give the `config` that its model was made with."
    )


def _with_head(config: SparseFormerConfig, state_dict: dict[str, torch.Tensor]) -> SparseFormerConfig:
    """`config` with the number of classes, or the width of the projection, of the tensors."""
    head = state_dict.get("proj.weight")
    if head is None:
        return config
    if _is_projection(state_dict):
        config.projection_dim, config.projection_bias = head.shape[0], "proj.bias" in state_dict
    elif config.num_labels != head.shape[0]:
        config.num_labels = head.shape[0]
    return config


def _is_projection(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the head is a projection to image embeddings: that of CLIP variants has no bias."""
    return "proj.weight" in state_dict and "proj.bias" not in state_dict


def _fit(
    config: SparseFormerConfig,
    state_dict: dict[str, torch.Tensor],
    allow_missing: Sequence[str],
    allow_extra: Sequence[str],
    source: str = "the checkpoint",
) -> tuple[type[SparseFormerPreTrainedModel], dict[str, torch.Tensor]]:
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in allow_extra}
    is_video = config.roi_dimensions == 3
    if "proj.weight" not in state_dict:
        model_class, head = (SparseFormerVideoModel if is_video else SparseFormerModel), "head"
    elif _is_projection(state_dict):
        model_class = SparseFormerVideoModelWithProjection if is_video else SparseFormerModelWithProjection
        head = "projection"
    else:
        model_class = SparseFormerForVideoClassification if is_video else SparseFormerForImageClassification
        head = "head"
    renamed = rename_official(state_dict, config, head)
    if "proj.weight" in state_dict:
        renamed = {
            name if name.startswith(f"{head}.") else f"sparseformer.{name}": tensor for name, tensor in renamed.items()
        }
    model = empty_model(model_class, config)
    if allow_missing:
        fresh = model_class(config).state_dict()
        renamed |= {name: fresh[name] for name in allow_missing if name in fresh and name not in renamed}
    check_state_dict(renamed, model, source)
    return model_class, {name: tensor.detach().clone().contiguous() for name, tensor in renamed.items()}


def released_file(name: str) -> Path:
    """The local copy of a published variant's release file, downloaded at first use.

    Raises:
        ValueError: for an unknown name.
        ConnectionError: if it cannot be downloaded.
    """
    if name not in PRESETS:
        raise ValueError(f"`source` must be a file or one of {', '.join(PRESETS)}, got {name!r}.")
    return download_once(RELEASES.format(name=name), name)


def load_official(
    source: str | os.PathLike | dict[str, Any],
    config: SparseFormerConfig | str | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> SparseFormerSource:
    """Reads a checkpoint of showlab/sparseformer: `*_converted.pth`, raw v1 or raw bootstrapped, image or video.

    Args:
        source (`str`, `os.PathLike` or `dict`): a file, a published name (downloaded), or a state dict.
        config (`SparseFormerConfig` or `str`, *optional*): what the model was made with, or the name of a preset; the
            published variant that fits when `None`.
        allow_missing (`Sequence[str]`, *optional*, defaults to `()`): our names of tensors that may be absent; they
            start anew.
        allow_extra (`Sequence[str]`, *optional*, defaults to `()`): names of tensors in the source that may be left
            out.

    Returns:
        `SparseFormerSource`.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape, or a file wants more than `weights_only`.
        ConnectionError: if a published checkpoint cannot be downloaded.
    """
    if isinstance(source, dict):
        state_dict, label = unwrap_state_dict(source), "the checkpoint"
    else:
        is_name = str(source) in PRESETS
        path = released_file(str(source)) if is_name else Path(source)
        if path.is_dir():
            raise ValueError(
                f"`{source}` is a folder: expected a file of showlab/sparseformer. A ViT or FlexiViT becomes a "
                f"SparseFormer by training on images: `polyscale train IMAGES OUT --bootstrap-from {source}`."
            )
        config = str(source) if is_name and config is None else config
        state_dict, label = load_state_dict_file(path), f"`{path.name}`"
    state_dict = rename_raw(state_dict)
    is_video = "initial_roi.weight" in state_dict and state_dict["initial_roi.weight"].shape[-1] == 6
    if config is None:
        if is_video:
            raise ValueError(
                f"{label} is a video checkpoint: give the `config` (SparseFormerVideoConfig) of its model."
            )
        config = infer_preset(state_dict)
    image_processor = None
    if isinstance(config, str):
        image_processor = preset_image_processor(config)
        config = SparseFormerConfig.preset(config)
    if is_video and not isinstance(config, SparseFormerVideoConfig):
        raise ValueError(
            f"{label} is a video checkpoint, and `config` is of an image model: give SparseFormerVideoConfig."
        )
    config = _with_head(type(config).from_dict(config.to_dict()), state_dict)
    model_class, tensors = _fit(config, state_dict, allow_missing, allow_extra, label)
    config.architectures = [model_class.__name__]
    config.dtype = next(iter(tensors.values())).dtype
    return SparseFormerSource(config, tensors, image_processor)


def save_source(source: SparseFormerSource, out: str | os.PathLike) -> SparseFormerPreTrainedModel:
    """Writes the model of a converted checkpoint into the folder `out`; its image processor, if any, is not written.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another shape.
    """
    model = model_from_state_dict(source.model_class, source.config, source.state_dict, "the checkpoint")
    model.save_pretrained(out)
    return model


def convert_sparseformer(
    source: str | os.PathLike | dict[str, Any],
    out: str | os.PathLike,
    config: SparseFormerConfig | str | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> SparseFormerPreTrainedModel:
    """Writes a checkpoint of showlab/sparseformer, model and image processor, into the folder `out`, and returns the
    model.

    Arguments and errors: `load_official`.
    """
    converted = load_official(source, config, allow_missing, allow_extra)
    model = save_source(converted, out)
    (converted.image_processor or SparseFormerImageProcessor()).save_pretrained(out)
    return model


__all__ = [
    "MODEL_CLASSES",
    "RELEASES",
    "SparseFormerSource",
    "convert_sparseformer",
    "infer_preset",
    "load_official",
    "preset_image_processor",
    "released_file",
    "rename_official",
    "rename_raw",
    "save_source",
]
