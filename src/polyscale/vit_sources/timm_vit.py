"""timm's `vit_*`, `deit_*` and `flexivit_*` as FlexiViT.

What a model is made of is read from its modules, not from its name; a part that FlexiViT does not have is refused.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..models.flexivit.image_processing_flexivit import FlexiViTImageProcessor
from ..utils.checkpoint_files import rename_keys
from ..utils.processors import RESAMPLINGS
from .common import (
    FLEXIVIT_KERNEL,
    ORDINARY_KERNEL,
    FlexiViTSource,
    imagenet_labels,
    label_maps,
    make_image_processor,
    make_source,
)
from .timm_parts import activation_name, attention_pooling, check_supported, is_absent, layer_norms, mlp_kind


logger = logging.get_logger(__name__)

_AFFINE = r"\.(weight|bias)"
_RULES = [
    (r"cls_token", "embeddings.prefix_tokens.cls_token"),
    (r"dist_token", "embeddings.prefix_tokens.distillation_token"),
    (r"reg_token", "embeddings.prefix_tokens.register_tokens"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj" + _AFFINE, r"embeddings.patch_embeddings.projection.\1"),
    (r"norm_pre" + _AFFINE, r"pre_layernorm.\1"),
    (r"blocks\.(\d+)\.norm1" + _AFFINE, r"layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2" + _AFFINE, r"layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.([qkv]_proj)" + _AFFINE, r"layers.\1.attention.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj" + _AFFINE, r"layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.ls1\.gamma", r"layers.\1.attention_scale.weight"),
    (r"blocks\.(\d+)\.ls2\.gamma", r"layers.\1.mlp_scale.weight"),
    (r"blocks\.(\d+)\.mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)" + _AFFINE, r"layers.\1.mlp.\2.\3"),
    (r"norm" + _AFFINE, r"layernorm.\1"),
    (r"fc_norm" + _AFFINE, r"pooler.layernorm.\1"),
    (r"attn_pool\.latent", "pooler.attention.probe"),
    (r"attn_pool\.([qkv]_proj)" + _AFFINE, r"pooler.attention.\1.\2"),
    (r"attn_pool\.proj" + _AFFINE, r"pooler.attention.o_proj.\1"),
    (r"attn_pool\.norm" + _AFFINE, r"pooler.attention.layernorm.\1"),
    (r"attn_pool\.mlp\.(fc[12])" + _AFFINE, r"pooler.attention.\1.\2"),
    (r"head" + _AFFINE, r"head.classifier.\1"),
    (r"head_dist" + _AFFINE, r"head.distillation_classifier.\1"),
]


def import_timm() -> Any:
    """The module timm, or an ImportError that says how to get it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError("Converting from timm needs timm: pip install timm.") from error
    return timm


def is_timm_model(model: nn.Module) -> bool:
    """Whether a module is one of timm's, without importing timm."""
    return any(base.__module__.split(".")[0] == "timm" for base in type(model).__mro__)


def is_timm_name(name: str) -> bool:
    """Whether timm knows an architecture by this name, with or without a tag of weights."""
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name.split(".")[0])


def _config_fields(model: nn.Module, architecture: str) -> dict[str, Any]:
    block, patch_embed = model.blocks[0], model.patch_embed
    has_distillation = getattr(model, "dist_token", None) is not None
    kind = mlp_kind(block)
    is_flexivit = "flexivit" in architecture
    eps = next(norm.eps for norm in layer_norms(model) if not is_absent(norm))
    # What timm itself does when the size of the image changes: at run time, or when it loads the weights.
    bicubic = model.dynamic_img_size or not is_flexivit
    if attention_pooling(model) is not None:
        pooling = "attention"
    else:
        pooling = "mean" if model.global_pool == "avg" or model.cls_token is None else "cls"
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc2.in_features,
        "mlp_type": "mlp" if kind == "mlp" else "swiglu",
        "hidden_act": activation_name(block) if kind == "mlp" else "silu",
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": eps,
        "layer_scale_init_value": None if is_absent(block.ls1) else float(getattr(block.ls1, "init_values", 1e-5)),
        "drop_path_rate": float(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0),
        "pre_norm": not is_absent(model.norm_pre),
        "final_norm": not is_absent(model.norm),
        "fc_norm": not is_absent(model.fc_norm),
        "pooling": pooling,
        "use_cls_token": model.cls_token is not None,
        "use_distillation_token": has_distillation,
        "use_distillation_head": has_distillation and isinstance(model.head_dist, nn.Linear),
        "num_register_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "prefix_positions": "none" if model.no_embed_class else "all",
        "num_channels": patch_embed.proj.in_channels,
        "image_size": list(patch_embed.img_size),
        "base_patch_size": list(patch_embed.patch_size),
        "position_grid": list(patch_embed.grid_size),
        "patch_bias": patch_embed.proj.bias is not None,
        "remainder": "pad" if patch_embed.dynamic_img_pad else "crop",
        "position_interpolation": "bicubic" if bicubic else "bilinear",
        "position_antialias": bicubic,
        **(FLEXIVIT_KERNEL if is_flexivit else ORDINARY_KERNEL),
    }


def _split_fused(state_dict: dict[str, torch.Tensor], packed_mlp: bool) -> dict[str, torch.Tensor]:
    """Matrices that timm keeps as one (queries, keys, values; gate and value of a packed SwiGLU) as several."""
    split = {}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(".attn.qkv"):
            parent = module.removesuffix("qkv")
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{parent}{projection}_proj.{leaf}"] = part
        elif module == "attn_pool.kv":
            for projection, part in zip("kv", tensor.chunk(2), strict=True):
                split[f"attn_pool.{projection}_proj.{leaf}"] = part
        elif module == "attn_pool.q":
            split[f"attn_pool.q_proj.{leaf}"] = tensor
        elif packed_mlp and module.endswith(".mlp.fc1"):
            parent = module.removesuffix("fc1")
            split[f"{parent}gate_proj.{leaf}"], split[f"{parent}up_proj.{leaf}"] = tensor.chunk(2)
        else:
            split[name] = tensor
    return split


def _name_swiglu(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {".mlp.fc1_g.": ".mlp.gate_proj.", ".mlp.fc1_x.": ".mlp.up_proj.", ".mlp.fc2.": ".mlp.down_proj."}
    named = {}
    for name, tensor in state_dict.items():
        for old, new in ours.items():
            name = name.replace(old, new)
        named[name] = tensor
    return named


def timm_image_processor(
    pretrained_cfg: dict[str, Any], image_size: tuple[int, int], num_channels: int
) -> FlexiViTImageProcessor:
    """timm's evaluation transform as an image processor: the short side to size / crop ratio, then a centre crop.

    Args:
        pretrained_cfg: timm's record of mean, std, crop ratio and mode, and interpolation.
        image_size: (height, width) of the model, in pixels.
        num_channels: of the model.
    """
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg={"num_classes": None, **pretrained_cfg})
    mean, std = list(data["mean"]), list(data["std"])
    if len(mean) != num_channels:
        mean, std = [sum(mean) / len(mean)] * num_channels, [sum(std) / len(std)] * num_channels
    height, width = (math.floor(side / data["crop_pct"]) for side in image_size)
    if data["crop_mode"] == "border":
        logger.warning("timm's crop mode 'border' (longest side, padded) is converted as a centre crop.")
    squash = data["crop_mode"] == "squash" or height != width
    return make_image_processor(
        num_channels,
        image_mean=mean,
        image_std=std,
        resample=RESAMPLINGS.get(data["interpolation"], RESAMPLINGS["bicubic"]),
        size={"height": height, "width": width} if squash else {"shortest_edge": height},
        crop_size={"height": image_size[0], "width": image_size[1]},
    )


def _labels(pretrained_cfg: dict[str, Any], num_labels: int) -> list[str] | None:
    names = pretrained_cfg.get("label_names")
    descriptions = pretrained_cfg.get("label_descriptions")
    if names and len(names) == num_labels:
        return [descriptions.get(name, name) if isinstance(descriptions, dict) else name for name in names]
    return imagenet_labels(num_labels)


def _is_projection(model: nn.Module, architecture: str, pretrained_cfg: dict[str, Any]) -> bool:
    """Whether the "head" of a model is CLIP's projection to the space of its texts: as wide as that of published
    weights of the architecture, which are no list of classes.
    """
    if "_clip_" not in architecture or pretrained_cfg.get("label_names"):
        return False
    from timm.models import get_arch_pretrained_cfgs

    published = {cfg.num_classes for cfg in get_arch_pretrained_cfgs(architecture.partition(".")[0]).values()}
    width = model.head.out_features
    return width in published and imagenet_labels(width) is None


def _as_projection(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The classifier of a state dict as CLIP's projection, and the config's fields; timm gives it a bias of zeros."""
    weight, bias = state_dict.pop("head.classifier.weight"), state_dict.pop("head.classifier.bias", None)
    has_bias = bias is not None and bool(bias.any())
    state_dict["projection.weight"] = weight
    if has_bias:
        state_dict["projection.bias"] = bias
    return state_dict, {"projection_dim": weight.shape[0], "projection_bias": has_bias}


def source_from_timm_model(
    model: nn.Module, pretrained_cfg: dict[str, Any] | None = None, **overrides: Any
) -> FlexiViTSource:
    """A live timm model as FlexiViT.

    Args:
        model: a `VisionTransformer` of timm, plain or distilled.
        pretrained_cfg: timm's record of its preprocessing; the model's own by default.
        overrides: config fields to set otherwise.

    Raises:
        ValueError: if it has a part that FlexiViT does not have, naming it.
    """
    pretrained_cfg = dict(pretrained_cfg or getattr(model, "pretrained_cfg", None) or {})
    architecture = pretrained_cfg.get("architecture") or ""
    source = f"timm's {architecture or type(model).__name__}"
    check_supported(model, source)
    fields = _config_fields(model, architecture)
    kind = mlp_kind(model.blocks[0])
    state_dict = _split_fused(model.state_dict(), packed_mlp=kind == "packed")
    if kind != "mlp":
        state_dict = _name_swiglu(state_dict)
    state_dict = rename_keys(state_dict, _RULES, source)
    if not is_absent(model.head) and _is_projection(model, architecture, pretrained_cfg):
        state_dict, projection = _as_projection(state_dict)
        fields |= projection
    elif not is_absent(model.head):
        num_labels = model.head.out_features
        fields |= label_maps(_labels(pretrained_cfg, num_labels), num_labels)
    processor = timm_image_processor(pretrained_cfg, tuple(model.patch_embed.img_size), fields["num_channels"])
    return make_source(fields, state_dict, processor, source, overrides)


def load_timm_name(name: str, pretrained: bool = True, **overrides: Any) -> FlexiViTSource:
    """A model of timm by name ("vit_base_patch16_224.augreg_in21k") or hub name ("hf-hub:timm/...") as FlexiViT.

    Args:
        name: of the architecture, with or without a tag of weights.
        pretrained: whether to load published weights; otherwise they are random.
        overrides: config fields to set otherwise.

    Raises:
        ConnectionError: if the weights are neither in the cache nor can be downloaded.
        ValueError: for a model that does not convert.
    """
    timm = import_timm()
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"timm's weights of `{name}` cannot be loaded: they are not in the local cache, and the hub does not "
            f"answer or has none ({type(error).__name__}: {error}). With a network this downloads them; without one, "
            "give the path of a local checkpoint."
        ) from error
    return source_from_timm_model(model, **overrides)


__all__ = [
    "import_timm",
    "is_timm_model",
    "is_timm_name",
    "load_timm_name",
    "source_from_timm_model",
    "timm_image_processor",
]
