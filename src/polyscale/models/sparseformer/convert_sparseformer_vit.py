"""Weights of plain ViTs for SparseFormers with custom operation lists."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ...vit_sources.common import FlexiViTSource
from ..flexivit.convert_flexivit import load_flexivit_source
from .modeling_sparseformer import SparseFormerModel, SparseFormerPreTrainedModel


# Parts of a FlexiViT's layer -> those of a SparseFormer's, which has query, key and value in one.
_PARTS = {
    "layernorm_before": "layernorm_before",
    "attention.o_proj": "attention.o_proj",
    "layernorm_after": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = tuple(f"attention.{name}_proj" for name in "qkv")
# Layer scales, and the linear layers in front of them.
_SCALED = {"attention_scale": "attention.o_proj", "mlp_scale": "mlp.fc2"}


@dataclass
class ViTLoadingReport:
    """What became of the weights of a ViT.

    Args:
        loaded: names of the SparseFormer's tensors that hold weights of the ViT.
        new: names of its other tensors: they have their initial values and want training.
        unused: names of the ViT's tensors, as a FlexiViT calls them, that have no place (patch embedding, positions,
            heads, blocks too many).
    """

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.new)} new, {len(self.unused)} of the ViT unused"]
        for title, names in (("new", self.new), ("unused", self.unused)):
            lines += [f"  {title}: {name}" for name in names]
        return "\n".join(lines)


def _block_tensors(source: FlexiViTSource, block: int) -> dict[str, torch.Tensor]:
    """A layer of a FlexiViT under the names of a SparseFormer's, layer scales multiplied into the linear layers."""
    prefix = f"{_base_prefix(source)}layers.{block}."
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in source.state_dict.items() if name.startswith(prefix)
    }
    converted = {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for theirs, ours in _PARTS.items() for kind in ("weight", "bias")
    }
    weights = [tensors[f"{name}.weight"] for name in _QKV]
    biases = [tensors.get(f"{name}.bias", weights[0].new_zeros(len(weights[0]))) for name in _QKV]
    converted |= {"attention.qkv.weight": torch.cat(weights), "attention.qkv.bias": torch.cat(biases)}
    for scale, linear in _SCALED.items():
        factor = tensors.get(f"{scale}.weight")
        if factor is not None:
            converted[f"{linear}.weight"] = converted[f"{linear}.weight"] * factor[:, None]
            converted[f"{linear}.bias"] = converted[f"{linear}.bias"] * factor
    return converted


def _base_prefix(source: FlexiViTSource) -> str:
    return "flexivit." if any(name.startswith("flexivit.") for name in source.state_dict) else ""


def _final_norm(source: FlexiViTSource) -> str:
    """The prefix of the last LayerNorm: in front of the pooling, or (CLIP, and ViTs that pool by mean) after it."""
    prefix = _base_prefix(source)
    is_first = f"{prefix}layernorm.weight" in source.state_dict
    return f"{prefix}layernorm." if is_first else f"{prefix}pooler.layernorm."


def _check_source(source: FlexiViTSource, model: SparseFormerPreTrainedModel, layers: list[int]) -> None:
    theirs, ours = source.config, model.config
    if theirs.mlp_type != "mlp":
        raise ValueError(
            f"The ViT has gated MLPs (`mlp_type` {theirs.mlp_type!r}): a SparseFormer's have two linear layers."
        )
    for layer in layers:
        width = ours.widths[layer]
        if width != theirs.hidden_size or int(ours.mlp_ratio * width) != theirs.intermediate_size:
            raise ValueError(
                f"Layer {layer} has the width {width} and {int(ours.mlp_ratio * width)} in its MLP, the ViT "
                f"{theirs.hidden_size} and {theirs.intermediate_size}: the SparseFormer needs the width and MLP ratio "
                "of the ViT in the layers that take its blocks."
            )
        if not {"attn", "mlp"} <= set(ours.operations[layer]):
            raise ValueError(f"Layer {layer} has no place for a block of the ViT: it lacks 'attn' or 'mlp'.")
        if ours.num_heads_for(width) != theirs.num_attention_heads:
            raise ValueError(
                f"Layer {layer} has {ours.num_heads_for(width)} attention heads, the ViT has "
                f"{theirs.num_attention_heads}: set `num_attention_heads`, or `attention_head_width`."
            )


def load_vit_weights(
    model: SparseFormerPreTrainedModel,
    source: str | os.PathLike | torch.nn.Module | FlexiViTSource,
    layers: Iterable[int] | None = None,
    blocks: Iterable[int] | None = None,
) -> ViTLoadingReport:
    """Puts the blocks of a ViT into layers of a SparseFormer, in place.

    Attention, MLP and their norms of a layer come from a block, the final norm from the ViT's. What a ViT does not
    have (RoIs, sampling, mixing, ...) keeps its initial values.

    Args:
        model (`SparseFormerPreTrainedModel`): with the width and heads of the ViT in those layers; its MLP activation
            is that of `config.hidden_act` (`"quick_gelu"` for OpenAI's CLIP).
        source (`torch.nn.Module`, `str` or `FlexiViTSource`): a live model of timm or transformers (ViT, DeiT, DINOv2,
            CLIP's vision part, FlexiViT), or anything else that `load_flexivit_source` reads.
        layers (`Iterable[int]`, *optional*): layers that take a block; all that have "attn" and "mlp" and the final
            width when `None`.
        blocks (`Iterable[int]`, *optional*): the ViT's blocks for them; the first ones, in order, when `None`.

    Returns:
        What was loaded, what is new, and what of the ViT was not used.

    Raises:
        ValueError: if there are fewer blocks than layers, or shapes differ.
    """
    if not isinstance(source, FlexiViTSource):
        source = load_flexivit_source(source)
    base = model if isinstance(model, SparseFormerModel) else model.sparseformer
    config = base.config
    if layers is None:
        layers = [
            index
            for index, operations in enumerate(config.operations)
            if {"attn", "mlp"} <= set(operations) and config.widths[index] == config.hidden_size
        ]
    layers = list(layers)
    blocks = list(range(len(layers))) if blocks is None else list(blocks)
    depth = source.config.num_hidden_layers
    if len(blocks) != len(layers) or any(not 0 <= block < depth for block in blocks):
        raise ValueError(
            f"`blocks` must name one of the ViT's {depth} blocks for each of the {len(layers)} layers {layers}, got "
            f"{blocks}."
        )
    _check_source(source, base, layers)
    prefix = _base_prefix(source)
    found = {
        f"layers.{layer}.{name}": tensor
        for layer, block in zip(layers, blocks, strict=True)
        for name, tensor in _block_tensors(source, block).items()
    }
    norm = _final_norm(source)
    if config.hidden_size == source.config.hidden_size:
        found |= {
            name.replace(norm, "layernorm."): tensor
            for name, tensor in source.state_dict.items()
            if name.startswith(norm)
        }
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)
    outer = "" if base is model else "sparseformer."
    loaded = [outer + name for name in found]
    used = (*(f"{prefix}layers.{block}." for block in blocks), norm)
    return ViTLoadingReport(
        loaded=loaded,
        new=[name for name, _ in model.named_parameters() if name not in set(loaded)],
        unused=[name.removeprefix(prefix) for name in source.state_dict if not name.startswith(used)],
    )


__all__ = ["ViTLoadingReport", "load_vit_weights"]
