"""timm's `vit_*`, `deit_*` and `flexivit_*` as FlexiViT.

What a model is made of is read from its modules, not from its name; a part that FlexiViT does not have is refused.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..models.flexivit.image_processing_flexivit import FlexiViTImageProcessor
from ..utils.checkpoint_files import rename_keys
from .common import (
    FLEXIVIT_KERNEL,
    ORDINARY_KERNEL,
    RESAMPLINGS,
    FlexiViTSource,
    imagenet_labels,
    label_maps,
    make_image_processor,
    make_source,
)


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
# Activation classes of torch and timm by the names that transformers gives them.
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}


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


def _layer_norms(model: nn.Module) -> Iterator[nn.Module]:
    for block in model.blocks:
        yield from (block.norm1, block.norm2)
    yield from (model.norm_pre, model.norm, model.fc_norm)
    yield getattr(_attention_pooling(model), "norm", None)


def _attention_pooling(model: nn.Module) -> nn.Module | None:
    return getattr(model, "attn_pool", None)


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _activation_name(block: nn.Module) -> str | None:
    """Of the MLP of a block, or of attention pooling."""
    activation = block.mlp.act
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_pytorch_tanh"
    return _ACTIVATIONS.get(type(activation).__name__)


def _mlp_kind(block: nn.Module) -> str | None:
    """ "mlp", "swiglu" (timm's SwiGLU), "packed" (gate and value in one matrix), or None for another one."""
    kind, mlp = type(block.mlp).__name__, block.mlp
    if kind == "Mlp":
        return "mlp"
    if kind == "SwiGLU" and isinstance(mlp.act, nn.SiLU):
        return "swiglu"
    if kind == "GluMlp" and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last:
        return "packed"
    return None


def _unsupported_block_parts(block: nn.Module) -> Iterator[str]:
    if type(block).__name__ != "Block":
        yield f"blocks of type {type(block).__name__}"
        return
    if type(block.attn).__name__ != "Attention":
        yield f"attention of type {type(block.attn).__name__}"
        return
    attention = block.attn
    if not _is_absent(attention.q_norm) or not _is_absent(attention.k_norm):
        yield "normalised queries and keys (qk_norm)"
    if not _is_absent(getattr(attention, "norm", None)):
        yield "a norm inside the attention (scale_attn_norm)"
    if not _is_absent(getattr(attention, "gate", None)):
        yield "gated attention"
    if attention.proj.bias is None:
        yield "projections without bias (proj_bias=False)"
    if attention.num_heads * attention.head_dim != attention.proj.out_features:
        yield "heads that do not fill the width (attn_head_dim)"
    if _mlp_kind(block) is None:
        yield f"an MLP of type {type(block.mlp).__name__} with {type(block.mlp.act).__name__}"
    elif _mlp_kind(block) == "mlp" and _activation_name(block) is None:
        yield f"the activation {type(block.mlp.act).__name__}"
    if not _is_absent(getattr(block.mlp, "norm", None)):
        yield "a norm inside the MLP (scale_mlp_norm)"


def _unsupported_pooling_parts(model: nn.Module) -> Iterator[str]:
    """What timm's attention pooling has that ours, which is SigLIP's, does not."""
    pool, block = model.attn_pool, model.blocks[0]
    if type(pool).__name__ != "AttentionPoolLatent":
        yield f"attention pooling of type {type(pool).__name__} (global_pool={model.global_pool!r})"
        return
    if model.num_prefix_tokens and not model.pool_include_prefix:
        yield "attention pooling that leaves prefix tokens out (pool_include_prefix=False)"
    if pool.pos_embed is not None:
        yield "positions in the attention pooling (pos_embed)"
    if pool.latent_len != 1:
        yield f"attention pooling with {pool.latent_len} queries (latent_len)"
    if not isinstance(pool.q, nn.Linear) or pool.q.bias is None:
        yield "attention pooling without a projection of its query, or a bias in it (q_proj, qkv_bias)"
    if not _is_absent(pool.q_norm) or not _is_absent(pool.k_norm):
        yield "normalised queries and keys in the attention pooling (qk_norm)"
    if pool.num_heads != block.attn.num_heads:
        yield f"attention pooling with {pool.num_heads} heads, the blocks {block.attn.num_heads} (num_heads)"
    if pool.mlp is None or _is_absent(pool.norm):
        yield "attention pooling without an MLP or its norm"
    elif (_mlp_kind(pool), _activation_name(pool)) != ("mlp", _activation_name(block)):
        yield "attention pooling with another kind of MLP than the blocks"
    elif pool.mlp.fc2.in_features != block.mlp.fc2.in_features:
        yield "attention pooling with an MLP of another width than the blocks (mlp_ratio)"


def _unsupported_parts(model: nn.Module) -> Iterator[str]:
    """What a timm model has that FlexiViT does not, by timm's names."""
    if type(model).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        yield f"the architecture {type(model).__name__}"
        return
    if type(model.patch_embed).__name__ != "PatchEmbed":
        yield f"patch embeddings of type {type(model.patch_embed).__name__}"
    elif not _is_absent(model.patch_embed.norm):
        yield "a norm in the patch embedding (embed_norm_layer)"
    if model.pos_embed is None:
        yield "no learned positions (pos_embed)"
    if _attention_pooling(model) is not None:
        yield from _unsupported_pooling_parts(model)
    elif model.global_pool not in ("token", "avg", ""):
        yield f"pooling global_pool={model.global_pool!r}"
    elif model.global_pool == "" and not _is_absent(model.head):
        yield "a classifier on every token (global_pool='')"
    if model.global_pool == "avg" and model.pool_include_prefix and model.num_prefix_tokens:
        yield "pooling over prefix tokens (pool_include_prefix)"
    for block in model.blocks:
        yield from _unsupported_block_parts(block)
    norms = [norm for norm in _layer_norms(model) if not _is_absent(norm)]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            yield f"norms of type {type(norm).__name__}"
        elif norm.weight is None or norm.bias is None:
            yield "norms without weight or bias"
    if len({getattr(norm, "eps", None) for norm in norms}) > 1:
        yield "norms with different epsilons"
    if len({_is_absent(getattr(block, scale, None)) for block in model.blocks for scale in ("ls1", "ls2")}) > 1:
        yield "layer scale in some layers only"


def check_supported(model: nn.Module, source: str) -> None:
    """Raises ValueError naming each part of a timm model that FlexiViT does not have."""
    parts = list(dict.fromkeys(_unsupported_parts(model)))
    if parts:
        raise ValueError(f"{source} cannot become a FlexiViT, which does not have: {'; '.join(parts)}.")


def _config_fields(model: nn.Module, architecture: str) -> dict[str, Any]:
    block, patch_embed = model.blocks[0], model.patch_embed
    has_distillation = getattr(model, "dist_token", None) is not None
    mlp_kind = _mlp_kind(block)
    is_flexivit = "flexivit" in architecture
    eps = next(norm.eps for norm in _layer_norms(model) if not _is_absent(norm))
    # What timm itself does when the size of the image changes: at run time, or when it loads the weights.
    bicubic = model.dynamic_img_size or not is_flexivit
    if _attention_pooling(model) is not None:
        pooling = "attention"
    else:
        pooling = "mean" if model.global_pool == "avg" or model.cls_token is None else "cls"
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc2.in_features,
        "mlp_type": "mlp" if mlp_kind == "mlp" else "swiglu",
        "hidden_act": _activation_name(block) if mlp_kind == "mlp" else "silu",
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": eps,
        "layer_scale_init_value": None if _is_absent(block.ls1) else float(getattr(block.ls1, "init_values", 1e-5)),
        "drop_path_rate": float(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0),
        "pre_norm": not _is_absent(model.norm_pre),
        "final_norm": not _is_absent(model.norm),
        "fc_norm": not _is_absent(model.fc_norm),
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
    mlp_kind = _mlp_kind(model.blocks[0])
    state_dict = _split_fused(model.state_dict(), packed_mlp=mlp_kind == "packed")
    if mlp_kind != "mlp":
        state_dict = _name_swiglu(state_dict)
    state_dict = rename_keys(state_dict, _RULES, source)
    if not _is_absent(model.head) and _is_projection(model, architecture, pretrained_cfg):
        state_dict, projection = _as_projection(state_dict)
        fields |= projection
    elif not _is_absent(model.head):
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
    "check_supported",
    "import_timm",
    "is_timm_model",
    "is_timm_name",
    "load_timm_name",
    "source_from_timm_model",
    "timm_image_processor",
]
