"""A FlexiViT at one budget as a plain ViT of transformers; what `export_timm_flexivit.py` shares.

Kernel and positions are resized once; positions of prefix tokens are added to these tokens, and a bias of the patch
embedding that the other library lacks to the positions.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ...layers.token_budget import plain_size
from ...utils.checkpoint_files import check_state_dict, rename_keys
from ...utils.validation import to_pair
from .configuration_flexivit import FlexiViTConfig
from .convert_flexivit import flexivit_from_source, load_flexivit_source


Source = str | os.PathLike | torch.nn.Module

_AFFINE = r"\.(weight|bias)"
_LINEAR = r"(attention\.[qkvo]_proj|mlp\.(?:fc1|fc2|gate_proj|up_proj|down_proj))"
_SHARED_RULES = [
    (r"(cls_token|register_tokens|position_embeddings)", r"embeddings.\1"),
    (r"(patch_embeddings\.projection\.(?:weight|bias))", r"embeddings.\1"),
    (r"layernorm" + _AFFINE, r"layernorm.\1"),
]
_VIT_RULES = [
    *_SHARED_RULES,
    (r"(layers\.\d+\.layernorm_(?:before|after)" + _AFFINE + ")", r"\1"),
    (r"(layers\.\d+\." + _LINEAR + _AFFINE + ")", r"\1"),
]
_DINOV2_RULES = [
    *_SHARED_RULES,
    (r"layers\.(\d+)\." + _LINEAR + _AFFINE, r"encoder.layer.\1.\2.\3"),
    (r"layers\.(\d+)\.layernorm_before" + _AFFINE, r"encoder.layer.\1.norm1.\2"),
    (r"layers\.(\d+)\.layernorm_after" + _AFFINE, r"encoder.layer.\1.norm2.\2"),
    (r"layers\.(\d+)\.attention_scale\.weight", r"encoder.layer.\1.layer_scale1.lambda1"),
    (r"layers\.(\d+)\.mlp_scale\.weight", r"encoder.layer.\1.layer_scale2.lambda1"),
]
# Activations and epsilon that timm can name.
TIMM_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
TIMM_EPSILON, TIMM_CLIP_EPSILON = 1e-6, 1e-5


class PlainViT(NamedTuple):
    """A FlexiViT at one budget.

    `tensors` have the model's names without those of its parts: `cls_token`, not `embeddings.prefix_tokens.cls_token`;
    positions are in the prefix tokens, and `position_embeddings` are (1, rows * columns, hidden), of the patches.
    """

    config: FlexiViTConfig
    has_head: bool
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    patch_grid: tuple[int, int]
    tensors: dict[str, torch.Tensor]
    image_processor: Any

    @property
    def has_projection(self) -> bool:
        return "projection.weight" in self.tensors

    @property
    def is_timm_clip(self) -> bool:
        """Whether timm's CLIP has the kinds of modules: their epsilon is another one than that of its other ViTs."""
        has_another = self.config.mlp_type == "swiglu" or (self.config.use_distillation_head and self.has_head)
        return self.config.layer_norm_eps == TIMM_CLIP_EPSILON and not has_another

    @property
    def registers(self) -> list[str]:
        """Prefix tokens that nothing reads but attention, in their order."""
        names = ["register_tokens"] if self.config.use_distillation_head else ["distillation_token", "register_tokens"]
        return [name for name in names if name in self.tensors]


@torch.no_grad()
def plain_vit(
    source: Source, image_size: int | Sequence[int] | None, patch_size: int | Sequence[int] | None
) -> PlainViT:
    """Reads a source as FlexiViT and resizes it to one budget. Arguments: `export_vit`."""
    loaded = load_flexivit_source(source)
    model, config = flexivit_from_source(loaded), loaded.config
    patch_size = config.resolve_patch_size(patch_size)
    image_size = to_pair(config.image_size if image_size is None else image_size, "image_size")
    patch_grid = config.patch_grid_for(image_size, patch_size)
    embeddings = model.base_model.embeddings
    tensors = {}
    for name, tensor in model.state_dict().items():
        for part in (f"{model.base_model_prefix}.", "embeddings.", "prefix_tokens."):
            name = name.removeprefix(part)
        tensors[name] = tensor
    tensors["patch_embeddings.projection.weight"] = embeddings.patch_embeddings.kernel_for(patch_size)
    positions = embeddings.position_embeddings_for(patch_grid)
    place = 0
    for name in ("cls_token", "distillation_token", "register_tokens"):
        if name in tensors and place < config.num_position_prefix_tokens:
            count = tensors[name].shape[1]
            tensors[name] = tensors[name] + positions[:, place : place + count]
            place += count
    tensors["position_embeddings"] = positions[:, place:]
    return PlainViT(
        config,
        loaded.config.architectures == ["FlexiViTForImageClassification"],
        image_size,
        patch_size,
        patch_grid,
        tensors,
        loaded.image_processor,
    )


def _lacks(vit: PlainViT) -> dict[str, str]:
    """What a FlexiViT has that some plain ViT does not, by a short name."""
    config = vit.config
    uneven = any(side % patch for side, patch in zip(vit.image_size, vit.patch_size, strict=True))
    parts = {
        "pad": (config.remainder == "pad" and uneven, f"zeros around an image of {vit.image_size} (remainder='pad')"),
        "projection": (vit.has_projection, "CLIP's projection (projection_dim)"),
        "cls": (not config.use_cls_token, "no CLS token (use_cls_token=False)"),
        "registers": (bool(vit.registers), "registers or a distillation token (num_register_tokens)"),
        "distilled": (config.use_distillation_head and vit.has_head, "a second classifier (use_distillation_head)"),
        "scale": (config.layer_scale_init_value is not None, "a layer scale (layer_scale_init_value)"),
        "swiglu": (config.mlp_type == "swiglu", "a gated MLP (mlp_type='swiglu')"),
        "pre_norm": (config.pre_norm, "a LayerNorm before the first layer (pre_norm)"),
        "final_norm": (not config.final_norm, "no LayerNorm after the last layer (final_norm=False)"),
        "fc_norm": (config.fc_norm, "a LayerNorm after pooling (fc_norm)"),
        "both_norms": (config.fc_norm and config.final_norm, "LayerNorms before and after pooling (fc_norm)"),
        "pooler": (config.pooling == "pooler", "a pooler between CLS and classifier (pooling='pooler')"),
        "pooling": (vit.has_head and config.pooling != "cls", f"pooling {config.pooling!r}"),
        "attention": (config.pooling == "attention", "attention pooling (pooling='attention')"),
        "gated_attention": (
            config.pooling == "attention" and config.mlp_type == "swiglu",
            "attention pooling among gated MLPs (mlp_type='swiglu')",
        ),
        "cls_mean": (vit.has_head and config.pooling == "cls_mean", "pooling 'cls_mean'"),
        "oblong": (
            vit.image_size[0] != vit.image_size[1] or vit.patch_grid[0] != vit.patch_grid[1],
            f"an image that is no square ({vit.image_size}, {vit.patch_grid} patches)",
        ),
        "mlp_width": (
            _dinov2_mlp_ratio(config) is None,
            f"an MLP of width {config.intermediate_size} for {config.hidden_size} (intermediate_size)",
        ),
        "activation": (
            config.mlp_type == "mlp" and config.hidden_act not in TIMM_ACTIVATIONS,
            f"the activation {config.hidden_act!r}",
        ),
        "epsilon": (
            config.layer_norm_eps != (TIMM_CLIP_EPSILON if vit.is_timm_clip else TIMM_EPSILON),
            f"layer_norm_eps={config.layer_norm_eps}",
        ),
    }
    return {name: text for name, (is_there, text) in parts.items() if is_there}


_UNKNOWN_TO_BOTH = ("projection", "pad", "cls", "distilled", "pre_norm", "final_norm", "fc_norm", "attention")
_UNKNOWN_TO_VIT = (*_UNKNOWN_TO_BOTH, "registers", "scale", "swiglu")
_UNKNOWN_TO_DINOV2 = (*_UNKNOWN_TO_BOTH, "pooler", "oblong", "mlp_width")
UNKNOWN_TO_TIMM = ("pad", "both_norms", "pooler", "gated_attention", "cls_mean", "activation", "epsilon")


def missing_parts(vit: PlainViT, unknown: Sequence[str]) -> list[str]:
    lacks = _lacks(vit)
    return [lacks[name] for name in unknown if name in lacks]


def _missing_in_vit(vit: PlainViT) -> list[str]:
    # A pooler is part of a model without a head; a classifier of transformers' ViT reads CLS itself.
    return missing_parts(vit, (*_UNKNOWN_TO_VIT, "pooling"))


def _dinov2_mlp_ratio(config: FlexiViTConfig) -> int | None:
    """The whole number that gives DINOv2 an MLP of this width, None where none does."""
    for ratio in range(1, 33):
        width = config.hidden_size * ratio
        if config.mlp_type == "swiglu":  # two thirds of it, rounded up to a multiple of 8
            width = (int(width * 2 / 3) + 7) // 8 * 8
        if width == config.intermediate_size:
            return ratio
    return None


def _shared_fields(vit: PlainViT) -> dict[str, Any]:
    config = vit.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "qkv_bias", "layer_norm_eps")
    names += ("initializer_range", "num_channels", "hidden_dropout_prob", "attention_probs_dropout_prob")
    fields = {name: getattr(config, name) for name in names}
    if vit.has_head:
        fields |= {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    return fields | {"image_size": plain_size(vit.image_size), "patch_size": plain_size(vit.patch_size)}


def gather_registers(vit: PlainViT, tensors: dict[str, torch.Tensor]) -> int:
    """Puts all registers into `register_tokens`; how many there are."""
    if not vit.registers:
        return 0
    tensors["register_tokens"] = torch.cat([tensors.pop(name) for name in vit.registers], dim=1)
    return tensors["register_tokens"].shape[1]


def put_prefix_positions(tensors: dict[str, torch.Tensor], count: int) -> None:
    """Puts `count` zeros in front of the positions: those of prefix tokens are in the tokens already."""
    positions = tensors["position_embeddings"]
    zeros = positions.new_zeros(1, count, positions.shape[-1])
    tensors["position_embeddings"] = torch.cat([zeros, positions], dim=1)


def _save(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    rules,
    out,
    **kwargs,
) -> None:
    """Builds a model of transformers from renamed tensors and saves it."""
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("head.", "pooler."))}
    state_dict = rename_keys(tensors, rules, "the FlexiViT")
    prefix = f"{model_class.base_model_prefix}." if any(name.startswith("head.") for name in head) else ""
    state_dict = {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}
    state_dict |= {name.removeprefix("head."): tensor for name, tensor in head.items()}
    dtype = next(iter(state_dict.values())).dtype
    model = model_class(config, **kwargs).to(dtype)
    check_state_dict(state_dict, model, "the FlexiViT")
    model.load_state_dict(state_dict)
    model.save_pretrained(out)


def _save_vit(vit: PlainViT, out: str | os.PathLike) -> None:
    tensors = dict(vit.tensors)
    put_prefix_positions(tensors, 1)
    _fill_patch_bias(vit, tensors)
    config = ViTConfig(**_shared_fields(vit), intermediate_size=vit.config.intermediate_size)
    if vit.has_head:
        _save(ViTForImageClassification, config, tensors, _VIT_RULES, out)
        return
    has_pooler = vit.config.pooling == "pooler"
    config.pooler_output_size, config.pooler_act = vit.config.pooled_size, vit.config.pooler_act
    _save(ViTModel, config, tensors, _VIT_RULES, out, add_pooling_layer=has_pooler)


def _save_dinov2(vit: PlainViT, out: str | os.PathLike) -> None:
    tensors, width = dict(vit.tensors), vit.config.hidden_size
    fields = _shared_fields(vit) | {
        "mlp_ratio": _dinov2_mlp_ratio(vit.config),
        "use_swiglu_ffn": vit.config.mlp_type == "swiglu",
        "drop_path_rate": vit.config.drop_path_rate,
        "layerscale_value": 1.0 if vit.config.layer_scale_init_value is None else vit.config.layer_scale_init_value,
    }
    num_registers = gather_registers(vit, tensors)
    put_prefix_positions(tensors, 1)
    _fill_patch_bias(vit, tensors)
    if vit.config.layer_scale_init_value is None:
        for layer in range(vit.config.num_hidden_layers):
            for name in ("attention_scale", "mlp_scale"):
                tensors[f"layers.{layer}.{name}.weight"] = torch.ones(width, dtype=tensors["layernorm.weight"].dtype)
    if vit.has_head:  # DINOv2's classifier reads CLS and the mean of the patches: what ours does not read weighs zero
        weight = tensors["head.classifier.weight"]
        zeros = torch.zeros_like(weight)
        halves = {"cls": [weight, zeros], "mean": [zeros, weight], "cls_mean": [weight]}[vit.config.pooling]
        tensors["head.classifier.weight"] = torch.cat(halves, dim=1)
    if num_registers:
        model_class = Dinov2WithRegistersForImageClassification if vit.has_head else Dinov2WithRegistersModel
        config = Dinov2WithRegistersConfig(**fields, num_register_tokens=num_registers)
        tensors["mask_token"] = torch.zeros(1, width, dtype=tensors["layernorm.weight"].dtype)
        rules = [*_DINOV2_RULES, (r"mask_token", "embeddings.mask_token")]
    else:
        model_class = Dinov2ForImageClassification if vit.has_head else Dinov2Model
        config, rules = Dinov2Config(**fields, use_mask_token=False), _DINOV2_RULES
    _save(model_class, config, tensors, rules, out)


def _fill_patch_bias(vit: PlainViT, tensors: dict[str, torch.Tensor]) -> None:
    if not vit.config.patch_bias:
        kernel = tensors["patch_embeddings.projection.weight"]
        tensors["patch_embeddings.projection.bias"] = kernel.new_zeros(kernel.shape[0])


def processor_fields(vit: PlainViT) -> dict[str, Any]:
    """Fields of the image processor, with sizes scaled so that it makes images of the exported size."""
    processor = vit.image_processor
    names = ("do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    fields = {name: getattr(processor, name) for name in (*names, "do_convert_rgb", "resample")}
    size, crop = dict(processor.size), dict(processor.crop_size)
    made = (crop["height"], crop["width"]) if fields["do_center_crop"] else (size.get("height"), size.get("width"))
    height, width = vit.image_size
    if made == (height, width) or None in made:
        return fields | {"size": size, "crop_size": {"height": height, "width": width}}
    factors = {"height": height / made[0], "width": width / made[1], "shortest_edge": min(height, width) / min(made)}
    size = {side: round(length * factors[side]) for side, length in size.items() if length is not None}
    return fields | {"size": size, "crop_size": {"height": height, "width": width}}


def export_vit(
    source: Source,
    out: str | os.PathLike,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
) -> None:
    """Writes a FlexiViT at one budget to the folder `out` as a plain model of transformers with equal outputs.

    It is a ViT where that has all parts, else a DINOv2.

    Args:
        source (`str`, `os.PathLike` or `torch.nn.Module`): a FlexiViT, or what can become one.
        out (`str` or `os.PathLike`): an empty folder.
        image_size (`int` or `(height, width)`, *optional*): in pixels; `config.image_size` when `None`.
        patch_size (`int` or `(height, width)`, *optional*): in pixels; as the config says when `None`.

    Raises:
        ValueError: if neither has all parts, naming what is missing, or the patch does not fit the image.
    """
    vit = plain_vit(source, image_size, patch_size)
    lacks_vit, lacks_dinov2 = _missing_in_vit(vit), missing_parts(vit, _UNKNOWN_TO_DINOV2)
    if lacks_vit and lacks_dinov2:
        hint = "" if missing_parts(vit, UNKNOWN_TO_TIMM) else " timm has all of it: convert to 'timm'."
        raise ValueError(
            f"The FlexiViT cannot become a ViT of transformers, which does not have: {'; '.join(lacks_vit)}. Nor a "
            f"DINOv2, which does not have: {'; '.join(lacks_dinov2)}.{hint}"
        )
    (_save_dinov2 if lacks_vit else _save_vit)(vit, out)
    if vit.image_processor is not None:
        BitImageProcessor(**processor_fields(vit)).save_pretrained(out)


__all__ = ["PlainViT", "export_vit", "plain_vit"]
