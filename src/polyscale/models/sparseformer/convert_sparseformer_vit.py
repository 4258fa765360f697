"""Weights of ViTs (timm, transformers, polyscale) for SparseFormers with custom operation lists."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .modeling_sparseformer import SparseFormerModel, SparseFormerPreTrainedModel


# Parts of a block under their names in timm; transformers' ViT, DINOv2 and CLIP, and polyscale's encoder.
_PARTS = (
    ("norm1", r"norm1|layernorm_before|layer_norm1"),
    ("norm2", r"norm2|layernorm_after|layer_norm2"),
    ("qkv", r"attn\.qkv"),
    ("q", r"attention\.q_proj|self_attn\.q_proj|attention\.attention\.query"),
    ("k", r"attention\.k_proj|self_attn\.k_proj|attention\.attention\.key"),
    ("v", r"attention\.v_proj|self_attn\.v_proj|attention\.attention\.value"),
    ("o", r"attn\.proj|attention\.o_proj|self_attn\.out_proj|attention\.output\.dense"),
    ("fc1", r"mlp\.fc1|intermediate\.dense"),
    ("fc2", r"mlp\.fc2|output\.dense"),
    ("scale1", r"ls1|layer_scale1|attention_scale"),
    ("scale2", r"ls2|layer_scale2|mlp_scale"),
)
_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layers|layer)\.(\d+)\.(.+)\.(weight|bias|gamma|lambda1)")
_FINAL_NORM = re.compile(
    r"(?:vit\.|flexivit\.|vision_model\.|dinov2\.)?(?:norm|layernorm|post_layernorm)\.(weight|bias)"
)
_TARGETS = {"norm1": "layernorm_before", "norm2": "layernorm_after", "qkv": "attention.qkv", "o": "attention.o_proj"}


@dataclass
class ViTLoadingReport:
    """What became of the weights of a ViT.

    Args:
        loaded: names of the SparseFormer's tensors that hold weights of the ViT.
        new: names of its other tensors: they have their initial values and want training.
        unused: names of the ViT's tensors that have no place (patch embedding, positions, heads, blocks too many).
    """

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.new)} new, {len(self.unused)} of the ViT unused"]
        for title, names in (("new", self.new), ("unused", self.unused)):
            lines += [f"  {title}: {name}" for name in names]
        return "\n".join(lines)


def read_vit_blocks(state_dict: dict[str, torch.Tensor]) -> tuple[list[dict[str, torch.Tensor]], set[str]]:
    """The transformer blocks of a ViT, each a dict from "norm1.weight", "qkv.bias", "o.weight", "fc1.weight", ... to
    tensors.

    Layer scales are multiplied into the linear layers in front of them. The second result holds the names that were
    read.

    Raises:
        ValueError: if there are no blocks, or they are of another make (gated MLPs).
    """
    parts: dict[int, dict[str, torch.Tensor]] = {}
    used = set()
    for name, tensor in state_dict.items():
        match = _BLOCK.fullmatch(name)
        part = match and next((part for part, pattern in _PARTS if re.fullmatch(pattern, match[2])), None)
        if part is None:
            continue
        kind = "bias" if match[3] == "bias" else "weight"
        parts.setdefault(int(match[1]), {})[f"{part}.{kind}"] = tensor
        used.add(name)
    if not parts or sorted(parts) != list(range(len(parts))):
        raise ValueError(
            "The checkpoint holds no transformer blocks of a ViT: names such as 'blocks.0.attn.qkv.weight' (timm) or "
            "'layers.0.attention.q_proj.weight' (transformers), counted from 0, were expected."
        )
    return [_standard_block(parts[index]) for index in range(len(parts))], used


def _standard_block(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    block = dict(block)
    for kind in ("weight", "bias"):
        separate = [block.pop(f"{part}.{kind}", None) for part in "qkv"]
        if separate[0] is not None and kind == "bias":  # DeiT III and others: keys without a bias
            separate = [torch.zeros_like(separate[0]) if tensor is None else tensor for tensor in separate]
        if all(tensor is not None for tensor in separate):
            block[f"qkv.{kind}"] = torch.cat(separate)
    missing = sorted({f"{part}.weight" for part in ("qkv", "o", "fc1", "fc2")} - set(block))
    if missing:
        raise ValueError(
            f"A block of the ViT has no {', '.join(missing)}: attention with query, key and value and an MLP of "
            "two linear layers were expected."
        )
    for scale, linear in (("scale1", "o"), ("scale2", "fc2")):
        factor = block.pop(f"{scale}.weight", None)
        if factor is not None:
            block[f"{linear}.weight"] = block[f"{linear}.weight"] * factor[:, None]
            block[f"{linear}.bias"] = block[f"{linear}.bias"] * factor
    return block


def _set(tensors: dict[str, torch.nn.Parameter], name: str, value: torch.Tensor, origin: str) -> None:
    if tensors[name].shape != value.shape:
        raise ValueError(
            f"{origin} is {tuple(value.shape)} and {name!r} {tuple(tensors[name].shape)}: the SparseFormer needs the "
            "width and MLP ratio of the ViT in the layers that take its blocks."
        )
    with torch.no_grad():
        tensors[name].copy_(value)


def load_vit_weights(
    model: SparseFormerPreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    layers: Iterable[int] | None = None,
    blocks: Iterable[int] | None = None,
) -> ViTLoadingReport:
    """Puts the blocks of a ViT into layers of a SparseFormer, in place.

    Attention, MLP and their norms of a layer come from a block, the final norm from the ViT's. What a ViT does not
    have (RoIs, sampling, mixing, ...) keeps its initial values.

    Args:
        model: with the width of the ViT in those layers; its MLP activation is that of `config.hidden_act`
            ("quick_gelu" for OpenAI's CLIP).
        state_dict: of a ViT, CLIP vision tower or DINOv2 of timm or transformers, or of a polyscale FlexiViT.
        layers: indices of the layers that take a block; None for all that have "attn" and "mlp" and the final width.
        blocks: indices of the ViT's blocks for them; None for the first ones, in order.

    Returns:
        What was loaded, what is new, and what of the ViT was not used.

    Raises:
        ValueError: if there are fewer blocks than layers, or shapes differ.
    """
    base = model if isinstance(model, SparseFormerModel) else model.sparseformer
    config = base.config
    found, used = read_vit_blocks(state_dict)
    if layers is None:
        layers = [
            index
            for index, operations in enumerate(config.operations)
            if {"attn", "mlp"} <= set(operations) and config.widths[index] == config.hidden_size
        ]
    layers = list(layers)
    blocks = list(range(len(layers))) if blocks is None else list(blocks)
    if len(blocks) != len(layers) or any(not 0 <= block < len(found) for block in blocks):
        raise ValueError(
            f"`blocks` must name one of the ViT's {len(found)} blocks for each of the {len(layers)} layers {layers}, "
            "got "
            f"{blocks}."
        )
    tensors = dict(base.named_parameters())
    report = ViTLoadingReport()
    for layer, block in zip(layers, blocks, strict=True):
        for name, value in found[block].items():
            part, kind = name.rsplit(".", 1)
            target = f"layers.{layer}.{_TARGETS.get(part, f'mlp.{part}')}.{kind}"
            if target not in tensors:
                raise ValueError(f"Layer {layer} has no place for the ViT's {name!r}: {target!r} does not exist.")
            _set(tensors, target, value, f"The ViT's {name!r} of block {block}")
            report.loaded.append(target)
    for name, value in state_dict.items():
        match = _FINAL_NORM.fullmatch(name)
        if match:
            _set(tensors, f"layernorm.{match[1]}", value, f"The ViT's {name!r}")
            report.loaded.append(f"layernorm.{match[1]}")
            used.add(name)
    prefix = "" if base is model else "sparseformer."
    report.loaded = [prefix + name for name in report.loaded]
    report.new = [name for name, _ in model.named_parameters() if name not in set(report.loaded)]
    skipped = {index for index in range(len(found)) if index not in blocks}
    report.unused = [
        name for name in state_dict if name not in used or ((m := _BLOCK.fullmatch(name)) and int(m[1]) in skipped)
    ]
    return report


__all__ = ["ViTLoadingReport", "load_vit_weights", "read_vit_blocks"]
