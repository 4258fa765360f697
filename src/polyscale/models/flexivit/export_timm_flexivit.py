"""A FlexiViT at one budget as a folder of timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...utils.checkpoint_files import rename_keys
from ...utils.processors import RESAMPLINGS
from .export_flexivit import (
    TIMM_ACTIVATIONS,
    UNKNOWN_TO_TIMM,
    PlainViT,
    Source,
    gather_registers,
    missing_parts,
    plain_vit,
    processor_fields,
    put_prefix_positions,
)


_AFFINE = r"\.(weight|bias)"
_RULES = [
    (r"cls_token", "cls_token"),
    (r"distillation_token", "dist_token"),
    (r"register_tokens", "reg_token"),
    (r"position_embeddings", "pos_embed"),
    (r"patch_embeddings\.projection" + _AFFINE, r"patch_embed.proj.\1"),
    (r"pre_layernorm" + _AFFINE, r"norm_pre.\1"),
    (r"layernorm" + _AFFINE, r"norm.\1"),
    (r"pooler\.layernorm" + _AFFINE, r"fc_norm.\1"),
    (r"pooler\.attention\.probe", "attn_pool.latent"),
    (r"pooler\.attention\.q_proj" + _AFFINE, r"attn_pool.q.\1"),
    (r"pooler\.attention\.kv" + _AFFINE, r"attn_pool.kv.\1"),
    (r"pooler\.attention\.o_proj" + _AFFINE, r"attn_pool.proj.\1"),
    (r"pooler\.attention\.layernorm" + _AFFINE, r"attn_pool.norm.\1"),
    (r"pooler\.attention\.(fc[12])" + _AFFINE, r"attn_pool.mlp.\1.\2"),
    (r"projection" + _AFFINE, r"head.\1"),
    (r"head\.classifier" + _AFFINE, r"head.\1"),
    (r"head\.distillation_classifier" + _AFFINE, r"head_dist.\1"),
    (r"layers\.(\d+)\.layernorm_before" + _AFFINE, r"blocks.\1.norm1.\2"),
    (r"layers\.(\d+)\.layernorm_after" + _AFFINE, r"blocks.\1.norm2.\2"),
    (r"layers\.(\d+)\.attention\.(qkv)" + _AFFINE, r"blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.attention\.o_proj" + _AFFINE, r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.attention_scale\.weight", r"blocks.\1.ls1.gamma"),
    (r"layers\.(\d+)\.mlp_scale\.weight", r"blocks.\1.ls2.gamma"),
    (r"layers\.(\d+)\.mlp\.(fc1|fc2)" + _AFFINE, r"blocks.\1.mlp.\2.\3"),
    (r"layers\.(\d+)\.mlp\.down_proj" + _AFFINE, r"blocks.\1.mlp.fc2.\2"),
]


def _join(tensors: dict[str, torch.Tensor], num_layers: int) -> None:
    """Puts what timm keeps as one matrix together: queries, keys and values; gate and value of a gated MLP; keys and
    values of attention pooling.
    """
    joined = {"attention.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"]}
    joined["mlp.fc1"] = ["mlp.gate_proj", "mlp.up_proj"]
    for layer in range(num_layers):
        for name, parts in joined.items():
            for leaf in ("weight", "bias"):
                names = [f"layers.{layer}.{part}.{leaf}" for part in parts]
                if names[0] in tensors:
                    tensors[f"layers.{layer}.{name}.{leaf}"] = torch.cat([tensors.pop(part) for part in names])
    for leaf in ("weight", "bias"):
        names = [f"pooler.attention.{name}_proj.{leaf}" for name in "kv"]
        if names[0] in tensors:
            tensors[f"pooler.attention.kv.{leaf}"] = torch.cat([tensors.pop(part) for part in names])


def _architecture(vit: PlainViT) -> str:
    """An architecture of timm that has the kinds of modules; the sizes are arguments."""
    if vit.is_timm_clip:
        return "vit_base_patch16_clip_224"
    if vit.config.use_distillation_head and vit.has_head:
        return "deit_base_distilled_patch16_224"
    return "vit_giant_patch14_dinov2" if vit.config.mlp_type == "swiglu" else "vit_base_patch16_224"


def _model_args(vit: PlainViT, num_registers: int) -> dict[str, Any]:
    config = vit.config
    is_gated = config.mlp_type == "swiglu"
    args = {
        "img_size": list(vit.image_size),
        "patch_size": list(vit.patch_size),
        "in_chans": config.num_channels,
        "num_classes": config.projection_dim if vit.has_projection else config.num_labels if vit.has_head else 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _mlp_ratio(config.hidden_size, config.intermediate_size * (2 if is_gated else 1)),
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale_init_value,
        "class_token": config.use_cls_token,
        "no_embed_class": True,
        "reg_tokens": num_registers,
        "pre_norm": config.pre_norm,
        "final_norm": config.final_norm or config.fc_norm,
        "fc_norm": config.fc_norm,
        "global_pool": {"cls": "token", "attention": "map"}.get(config.pooling, "avg"),
        "pool_include_prefix": config.pooling == "attention",  # whose query reads them too
        "dynamic_img_size": False,
    }
    if not is_gated:
        args["act_layer"] = TIMM_ACTIVATIONS[config.hidden_act]
    return args


def _mlp_ratio(width: int, inner: int) -> float:
    """The ratio of which timm makes `int(width * ratio)`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def _pretrained_cfg(vit: PlainViT, num_classes: int) -> dict[str, Any]:
    """timm's record of the image processing: a resize of the short side by the crop ratio, and a centre crop."""
    height, width = vit.image_size
    record = {"input_size": [vit.config.num_channels, height, width], "fixed_input_size": True, "pool_size": None}
    record |= {"num_classes": num_classes, "first_conv": "patch_embed.proj", "classifier": "head"}
    if vit.config.use_distillation_head and vit.has_head:
        record["classifier"] = ["head", "head_dist"]
    if vit.image_processor is None:
        return record
    fields = processor_fields(vit)
    names = {number: name for name, number in RESAMPLINGS.items()}
    record |= {
        "mean": list(fields["image_mean"]),
        "std": list(fields["image_std"]),
        "interpolation": names.get(fields["resample"], "bicubic"),
    }
    shortest = fields["size"].get("shortest_edge")
    if shortest is None or not fields["do_center_crop"]:
        return record | {"crop_pct": 1.0, "crop_mode": "squash"}
    return record | {"crop_pct": min(height, width) / shortest, "crop_mode": "center"}


def export_timm(
    source: Source,
    out: str | os.PathLike,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
) -> None:
    """Writes a FlexiViT at one budget to the folder `out` as a model of timm with equal outputs.

    Arguments: `polyscale.models.flexivit.export_flexivit.export_vit`.

    Raises:
        ValueError: if timm lacks a part of it, naming that, or the patch does not fit the image.
    """
    vit = plain_vit(source, image_size, patch_size)
    lacks = missing_parts(vit, UNKNOWN_TO_TIMM)
    if lacks:
        raise ValueError(f"The FlexiViT cannot become a ViT of timm, which does not have: {'; '.join(lacks)}.")
    tensors = dict(vit.tensors)
    is_distilled = vit.config.use_distillation_head and vit.has_head
    num_registers = 0 if is_distilled else gather_registers(vit, tensors)
    args = _model_args(vit, num_registers)
    if is_distilled:
        put_prefix_positions(tensors, 2)
        del args["no_embed_class"]
    bias = tensors.get("patch_embeddings.projection.bias")
    kernel = tensors["patch_embeddings.projection.weight"]
    if vit.config.pre_norm and bias is not None:  # timm's patch embedding has no bias then
        tensors["position_embeddings"] = tensors["position_embeddings"] + tensors.pop(
            "patch_embeddings.projection.bias"
        )
    elif not vit.config.pre_norm and bias is None:
        tensors["patch_embeddings.projection.bias"] = kernel.new_zeros(kernel.shape[0])
    if vit.has_projection and not vit.config.projection_bias:  # timm's has one
        projection = tensors["projection.weight"]
        tensors["projection.bias"] = projection.new_zeros(len(projection))
    _join(tensors, vit.config.num_hidden_layers)
    state_dict = rename_keys(tensors, _RULES, "the FlexiViT")

    record = {
        "architecture": _architecture(vit),
        "num_classes": args["num_classes"],
        "num_features": vit.config.hidden_size,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": _pretrained_cfg(vit, args["num_classes"]),
    }
    if vit.has_head:
        record["label_names"] = [vit.config.id2label[index] for index in range(vit.config.num_labels)]
    out = Path(out)
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})


__all__ = ["export_timm"]
