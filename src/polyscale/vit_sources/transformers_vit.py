"""ViT, DeiT, DINOv2 and the vision parts of CLIP and SigLIP of transformers as FlexiViT.

The source is loaded by its own class, which knows its older weight names; its tensors are then renamed.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.flexivit.image_processing_flexivit import FlexiViTImageProcessor
from ..models.flexivit.modeling_flexivit import FlexiViTForImageClassification, FlexiViTModel, FlexiViTPreTrainedModel
from ..models.flexivit.modeling_projection_flexivit import FlexiViTModelWithProjection
from ..utils.checkpoint_files import check_hub_name, rename_keys
from ..utils.validation import to_pair
from ..utils.weight_files import check_weight_files, quiet_loading
from .common import ORDINARY_KERNEL, FlexiViTSource, label_maps, make_image_processor, make_source
from .timm_vit import load_timm_name


logger = logging.get_logger(__name__)

_LAYER_TENSORS = r"(attention\.[qkvo]_proj|mlp\.(?:fc1|fc2|gate_proj|up_proj|down_proj))\.(weight|bias)"
_AFFINE = r"\.(weight|bias)"

_COMMON_RULES = [
    (r"embeddings\.(cls_token|distillation_token|register_tokens)", r"embeddings.prefix_tokens.\1"),
    (r"embeddings\.mask_token", None),  # takes the place of patches in masked pre-training only
    (r"embeddings\.(position_embeddings|patch_embeddings\.projection\.(?:weight|bias))", r"embeddings.\1"),
    (r"layernorm" + _AFFINE, r"layernorm.\1"),
    (r"(?:cls_)?classifier" + _AFFINE, r"head.classifier.\1"),
    (r"distillation_classifier" + _AFFINE, r"head.distillation_classifier.\1"),
]
_VIT_RULES = [
    *_COMMON_RULES,
    (r"layers\.(\d+)\." + _LAYER_TENSORS, r"layers.\1.\2.\3"),
    (r"layers\.(\d+)\.(layernorm_before|layernorm_after)" + _AFFINE, r"layers.\1.\2.\3"),
    (r"pooler\.dense" + _AFFINE, r"pooler.dense.\1"),
]
_DINOV2_RULES = [
    *_COMMON_RULES,
    (r"encoder\.layer\.(\d+)\." + _LAYER_TENSORS, r"layers.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.norm1" + _AFFINE, r"layers.\1.layernorm_before.\2"),
    (r"encoder\.layer\.(\d+)\.norm2" + _AFFINE, r"layers.\1.layernorm_after.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale1\.lambda1", r"layers.\1.attention_scale.weight"),
    (r"encoder\.layer\.(\d+)\.layer_scale2\.lambda1", r"layers.\1.mlp_scale.weight"),
]
_CLIP_RULES = [
    (r"embeddings\.class_embedding", "embeddings.prefix_tokens.cls_token"),
    (r"embeddings\.patch_embedding\.weight", "embeddings.patch_embeddings.projection.weight"),
    (r"embeddings\.position_embedding\.weight", "embeddings.position_embeddings"),
    (r"pre_layrnorm" + _AFFINE, r"pre_layernorm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)" + _AFFINE, r"layers.\1.attention.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj" + _AFFINE, r"layers.\1.attention.o_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.(fc[12])" + _AFFINE, r"layers.\1.mlp.\2.\3"),
    (r"encoder\.layers\.(\d+)\.layer_norm1" + _AFFINE, r"layers.\1.layernorm_before.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm2" + _AFFINE, r"layers.\1.layernorm_after.\2"),
    (r"post_layernorm" + _AFFINE, r"pooler.layernorm.\1"),
    (r"visual_projection\.weight", "projection.weight"),
    (r"classifier" + _AFFINE, r"head.classifier.\1"),
]

_SIGLIP_RULES = [
    (r"embeddings\.patch_embedding" + _AFFINE, r"embeddings.patch_embeddings.projection.\1"),
    (r"head\.attention\.([qkvo]_proj)" + _AFFINE, r"pooler.attention.\1.\2"),
    (r"head\.probe", "pooler.attention.probe"),
    (r"head\.layernorm" + _AFFINE, r"pooler.attention.layernorm.\1"),
    (r"head\.mlp\.(fc[12])" + _AFFINE, r"pooler.attention.\1.\2"),
    (r"post_layernorm" + _AFFINE, r"layernorm.\1"),
    *_CLIP_RULES,
]

# Classes that convert, by model type; the first is taken where a config names none.
SUPPORTED_CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "clip": ("CLIPModel", "CLIPForImageClassification"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel", "SiglipForImageClassification"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "flexivit": ("FlexiViTModel", "FlexiViTForImageClassification", "FlexiViTModelWithProjection"),
}
_OWN_CLASSES = {
    one.__name__: one for one in (FlexiViTModel, FlexiViTForImageClassification, FlexiViTModelWithProjection)
}


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    image_size, patch_size = to_pair(config.image_size, "image_size"), to_pair(config.patch_size, "patch_size")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"`head_dim={head_dim}` is not supported: the heads must fill `hidden_size` together.")
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": getattr(config, "initializer_range", 0.02),
        "num_channels": config.num_channels,
        "image_size": list(image_size),
        "base_patch_size": list(patch_size),
        "position_grid": [image_size[0] // patch_size[0], image_size[1] // patch_size[1]],
        "prefix_positions": "cls",
        "position_interpolation": "bicubic",
        "position_antialias": False,
        **ORDINARY_KERNEL,
    }


def _vit_fields(config: PreTrainedConfig, class_name: str, has_pooler: bool) -> dict[str, Any]:
    fields = {
        **_shared_fields(config),
        "intermediate_size": config.intermediate_size,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
    }
    if has_pooler:
        fields |= {
            "pooling": "pooler",
            "pooler_output_size": config.pooler_output_size,
            "pooler_act": config.pooler_act,
        }
    if config.model_type == "deit":
        fields["use_distillation_token"] = True
        fields["use_distillation_head"] = class_name.endswith("WithTeacher")
    return fields


def _dinov2_fields(config: PreTrainedConfig, class_name: str) -> dict[str, Any]:
    intermediate_size = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:  # two thirds of it, rounded up to a multiple of 8
        intermediate_size = (int(intermediate_size * 2 / 3) + 7) // 8 * 8
    with_registers = config.model_type == "dinov2_with_registers"
    return {
        **_shared_fields(config),
        "intermediate_size": intermediate_size,
        "mlp_type": "swiglu" if config.use_swiglu_ffn else "mlp",
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "layer_scale_init_value": config.layerscale_value,
        "num_register_tokens": config.num_register_tokens if with_registers else 0,
        "position_antialias": with_registers,  # the one of the two that antialiases, as in transformers
        "pooling": "cls_mean" if class_name.endswith("ForImageClassification") else "cls",
    }


def _clip_fields(config: PreTrainedConfig, class_name: str) -> dict[str, Any]:
    has_head = class_name == "CLIPForImageClassification"
    return {
        **_shared_fields(config),
        "intermediate_size": config.intermediate_size,
        "attention_probs_dropout_prob": config.attention_dropout or 0.0,
        "patch_bias": False,
        "pre_norm": True,
        "final_norm": False,
        "fc_norm": not has_head,  # the classifier reads the mean of the patches as they leave the last layer
        "pooling": "mean" if has_head else "cls",
    }


def _siglip_fields(config: PreTrainedConfig, class_name: str) -> dict[str, Any]:
    # Without a head, as in PaliGemma and Gemma 3, nothing is pooled there: the mean stands in.
    is_mean = class_name == "SiglipForImageClassification" or not getattr(config, "vision_use_head", True)
    return {
        **_shared_fields(config),
        "intermediate_size": config.intermediate_size,
        "attention_probs_dropout_prob": config.attention_dropout or 0.0,
        "use_cls_token": False,
        "prefix_positions": "none",
        "pooling": "mean" if is_mean else "attention",
    }


def _siglip_part(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of SigLIP's vision part, queries, keys and values of its head apart."""
    vision = getattr(model, "vision_model", model)
    state_dict = dict(vision.state_dict())
    state_dict["embeddings.position_embedding.weight"] = state_dict["embeddings.position_embedding.weight"][None]
    if type(model).__name__ == "SiglipForImageClassification":  # reads the mean of the patches, not the head
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
        return vision.config, {
            **state_dict,
            **{f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()},
        }
    if not getattr(vision, "use_head", True):
        return vision.config, state_dict
    for kind in ("weight", "bias"):
        parts = state_dict.pop(f"head.attention.in_proj_{kind}").chunk(3)
        state_dict |= {f"head.attention.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        state_dict[f"head.attention.o_proj.{kind}"] = state_dict.pop(f"head.attention.out_proj.{kind}")
    return vision.config, state_dict


def _vision_part(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of a source without its text part, base prefix removed."""
    config, class_name = model.config, type(model).__name__
    if config.model_type in ("clip", "clip_vision_model"):
        vision = getattr(model, "vision_model", model)
        state_dict = dict(vision.state_dict())
        state_dict["embeddings.class_embedding"] = state_dict["embeddings.class_embedding"][None, None]
        state_dict["embeddings.position_embedding.weight"] = state_dict["embeddings.position_embedding.weight"][None]
        if class_name == "CLIPForImageClassification":
            state_dict = {name: t for name, t in state_dict.items() if not name.startswith("post_layernorm.")}
            state_dict |= {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
        elif class_name != "CLIPVisionModel":
            state_dict["visual_projection.weight"] = model.visual_projection.weight
        return vision.config, state_dict
    if config.model_type in ("siglip", "siglip_vision_model"):
        return _siglip_part(model)
    prefix = f"{model.base_model_prefix}."
    return config, {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}


def source_from_hf_model(
    model: PreTrainedModel,
    image_processor: FlexiViTImageProcessor | None = None,
    has_pooler: bool = True,
    **overrides: Any,
) -> FlexiViTSource:
    """A live model of transformers as FlexiViT.

    Args:
        model: one of `SUPPORTED_CLASSES`.
        image_processor: handed on.
        has_pooler: False drops a ViT pooler that the checkpoint did not hold.
        overrides: config fields to set otherwise.

    Raises:
        ValueError: for a class that does not convert.
    """
    class_name = type(model).__name__
    if class_name not in {name for names in SUPPORTED_CLASSES.values() for name in names}:
        raise ValueError(
            f"A {class_name} cannot become a FlexiViT.{_foreign_positions(model.config)} What converts: "
            f"{', '.join(name for names in SUPPORTED_CLASSES.values() for name in names)}."
        )
    if isinstance(model, FlexiViTPreTrainedModel):
        return _own_source(model, image_processor, overrides)
    model_type = model.config.model_type
    config, state_dict = _vision_part(model)
    if not has_pooler:
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("pooler.")}
    if model_type in ("vit", "deit"):
        rules, fields = _VIT_RULES, _vit_fields(config, class_name, "pooler.dense.weight" in state_dict)
    elif model_type in ("dinov2", "dinov2_with_registers"):
        rules, fields = _DINOV2_RULES, _dinov2_fields(config, class_name)
    elif model_type in ("siglip", "siglip_vision_model"):
        rules, fields = _SIGLIP_RULES, _siglip_fields(config, class_name)
    else:
        rules, fields = _CLIP_RULES, _clip_fields(config, class_name)
        fields["projection_dim"] = model.config.projection_dim
    state_dict = rename_keys(state_dict, rules, class_name)
    if "head.classifier.weight" in state_dict:
        labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        fields |= label_maps(labels, model.config.num_labels)
        fields["problem_type"] = model.config.problem_type
    return make_source(fields, state_dict, image_processor, class_name, overrides)


def _own_source(
    model: PreTrainedModel, image_processor: FlexiViTImageProcessor | None, overrides: dict[str, Any]
) -> FlexiViTSource:
    state_dict = {name.removeprefix("flexivit."): tensor for name, tensor in model.state_dict().items()}
    fields = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("model_type", "architectures", "dtype", "transformers_version")
    }
    return make_source(fields, state_dict, image_processor, type(model).__name__, overrides)


def convert_image_processor(processor: Any, image_size: Any, num_channels: int = 3) -> FlexiViTImageProcessor:
    """An image processor of transformers as FlexiViT's, with the same sizes, resampling, mean and std."""
    fields = {}
    for name in ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample"):
        value = getattr(processor, name, None)
        if value is not None:
            fields[name] = value
    height, width = to_pair(image_size, "image_size")
    size = getattr(processor, "size", None) or {"height": height, "width": width}
    fields["size"] = {side: length for side, length in dict(size).items() if length is not None}
    fields["do_center_crop"] = bool(getattr(processor, "do_center_crop", False))
    crop_size = getattr(processor, "crop_size", None) if fields["do_center_crop"] else None
    # A processor of LLaVA asks for `crop_size` even where nothing is cropped.
    uncropped = fields["size"] if "height" in fields["size"] else {"height": height, "width": width}
    fields["crop_size"] = dict(crop_size) if crop_size else uncropped
    return make_image_processor(num_channels, **fields)


def _load_image_processor(source: str, config: PreTrainedConfig) -> FlexiViTImageProcessor | None:
    vision = getattr(config, "vision_config", config)
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).split(". ")[0]
        logger.warning(f"`{source}` has no image processor that can be read, so none is converted: {reason}.")
        return None
    if isinstance(processor, FlexiViTImageProcessor):
        return processor
    return convert_image_processor(processor, vision.image_size, vision.num_channels)


def _foreign_positions(config: PreTrainedConfig) -> str:
    """What a config says about positions that FlexiViT does not have, as a sentence; "" where it says none."""
    vision = getattr(config, "vision_config", config)
    relative = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_rel_pos")
    parts = []
    if any(getattr(vision, name, None) is not None for name in ("rope_theta", "rope_parameters")):
        parts.append("rotary positions (RoPE)")
    if any(getattr(vision, name, False) for name in relative):
        parts.append("a relative position bias")
    return f" FlexiViT does not have: {'; '.join(parts)}." if parts else ""


def _class_of(config: PreTrainedConfig, source: str) -> type[PreTrainedModel]:
    classes = SUPPORTED_CLASSES.get(config.model_type)
    if classes is None:
        raise ValueError(
            f"`{source}` is a model of type {config.model_type!r}, which cannot become a FlexiViT."
            f"{_foreign_positions(config)} What converts: {', '.join(SUPPORTED_CLASSES)}."
        )
    named = (config.architectures or [classes[0]])[0]
    every_class = {name for names in SUPPORTED_CLASSES.values() for name in names}
    if named not in every_class:
        raise ValueError(f"`{source}` is a {named}, which cannot become a FlexiViT. What converts: {classes}.")
    return _OWN_CLASSES.get(named) or getattr(transformers, named)


def _check_loading(info: dict[str, Any], source: str) -> bool:
    """Whether a pooler came with the checkpoint; anything else missing, left over or misshapen is an error."""
    pooler = [name for name in info["missing_keys"] if ".pooler." in f".{name}"]
    missing = sorted(set(info["missing_keys"]) - set(pooler))
    # A classifier of ViT reads CLS itself: a pooler in its checkpoint is a left-over that its own class ignores too.
    unexpected = sorted(name for name in info["unexpected_keys"] if ".pooler." not in f".{name}")
    mismatched = sorted(str(name) for name in info["mismatched_keys"])
    problems = [
        f"{what}: {', '.join(names[:8])}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shapes", mismatched))
        if names
    ]
    if problems:
        raise ValueError(f"The weights of `{source}` do not fit its config; {'; '.join(problems)}.")
    if pooler:
        logger.warning(f"`{source}` holds no weights for its pooler; `pooler_output` is the CLS token instead.")
    return not pooler


def load_hf_source(source: str | Path, **overrides: Any) -> FlexiViTSource:
    """A folder or hub name of transformers as FlexiViT.

    Raises:
        ValueError: for a model that does not convert, or weights that do not fit its config.
        OSError: if it is neither a folder nor found on the hub (for instance without a network).
    """
    source = str(source)
    if Path(source).exists():
        check_weight_files(Path(source))
    else:
        check_hub_name(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"`{source}` is no local checkpoint, no name that timm knows and no released `.npz`, and it cannot be "
            f"loaded from the hub: {error}"
        ) from error
    if config.model_type == "timm_wrapper" and not Path(source).exists():  # a repository of timm on the hub
        return load_timm_name(f"hf-hub:{source}", **overrides)
    model_class = _class_of(config, source)
    try:
        # tensors of other shapes are reported in `info`, where they are refused by name
        with quiet_loading():
            model, info = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights of `{source}` are refused: they are a pickle that holds more than tensors, and unpickling "
            f"such objects can run code on this machine. (torch: {str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of `{source}` cannot be loaded: {error}") from error
    has_pooler = _check_loading(info, source)
    return source_from_hf_model(model, _load_image_processor(source, config), has_pooler, **overrides)


__all__ = ["SUPPORTED_CLASSES", "convert_image_processor", "load_hf_source", "source_from_hf_model"]
