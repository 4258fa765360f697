"""Golden models, tiny configs and plain implementations for the tests of SparseFormer."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from polyscale.models.sparseformer import (
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerForVideoClassification,
    SparseFormerVideoConfig,
)
from polyscale.models.sparseformer.convert_sparseformer import load_official


FIXTURES = Path(__file__).parents[2] / "fixtures"
V1_OPERATIONS = [["attn", "roi_adj", "sampling_m", "mlp"], ["attn", "roi_adj", "sampling_m", "mlp"], ["attn", "mlp"]]
BOOTSTRAPPED = {
    "shared_token_embedding": True,
    "cls_token_layer": 2,
    "num_attention_heads": None,
    "layer_norm_eps": 1e-5,
    "roi_adjustment": "mlp",
    "roi_drop_path": False,
    "mixing_bias": False,
    "generator_width": 128,
    "sampling_padding": "border",
    "transition_norm": False,
    "stage_embedding": True,
    "pooling": "cls",
}


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(FIXTURES / f"sparseformer_{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def golden_config(name: str, meta: dict) -> SparseFormerConfig:
    fields = {
        "feature_width": meta.get("conv_dim", 8),
        "num_latent_tokens": meta["num_latent_tokens"],
        "num_sampling_points": meta.get("num_sampling_points", 4),
        "widths": meta["widths"],
        "repeats": meta["repeats"],
        "num_labels": meta.get("num_labels", 11),
    }
    if name == "v1":
        return SparseFormerConfig(**fields, operations=meta["ops"])
    if name == "video":
        return SparseFormerVideoConfig(**fields, operations=V1_OPERATIONS, replicates=meta["replicates"])
    fields |= {**BOOTSTRAPPED, "operations": meta["ops"]}
    return SparseFormerConfig(**fields, hidden_act="quick_gelu" if name == "btsp_clip" else "gelu")


def golden_model(name: str):
    """The golden model in eval mode, its pixels (batch first, frames before channels) and its tensors."""
    meta, tensors = load_golden(name)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    source = load_official(state, golden_config(name, meta))
    model = source.model_class(source.config)
    model.load_state_dict(source.state_dict)
    pixels = tensors["input"].transpose(1, 2) if name == "video" else tensors["input"]
    return model.eval(), pixels, tensors


def tiny_config(kind: str = "v1", **overrides) -> SparseFormerConfig:
    """A config of width 16 to 32: "v1", "bootstrapped" or "video"."""
    fields = {
        "image_size": 32,
        "feature_width": 8,
        "num_latent_tokens": 5,
        "num_sampling_points": 4,
        "widths": [16, 32, 32],
        "repeats": [2, 1, 1],
        "operations": V1_OPERATIONS,
        "num_attention_heads": 4,
        "projection_dim": 12,
        "num_labels": 3,
        "initializer_range": 0.2,
    }
    if kind == "bootstrapped":
        operations = [
            ["sampling_m", "pe_inject", "attn", "mlp", "roi_adj"],
            ["sampling_m", "pe_inject"],
            ["attn", "mlp"],
        ]
        fields |= {**BOOTSTRAPPED, "operations": operations, "attention_head_width": 8, "generator_width": 8}
    if kind == "video":
        return SparseFormerVideoConfig(**{**fields, "replicates": 2, "num_frames": 3, **overrides})
    return SparseFormerConfig(**{**fields, **overrides})


def make_model(model_class, config, seed: int = 0):
    """In eval mode, with every zero initial weight replaced, so that each path matters."""
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() and "bias" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def make_classifier(kind: str, **overrides):
    """A classifier and two of its inputs."""
    model_class = SparseFormerForVideoClassification if kind == "video" else SparseFormerForImageClassification
    shape = (2, 3, 3, 24, 20) if kind == "video" else (2, 3, 24, 20)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return make_model(model_class, tiny_config(kind, **overrides)), pixels


def values_and_gradients(model, pixels, **options):
    model.zero_grad()
    torch.manual_seed(2)  # of the stochastic depth
    outputs = model(pixels, **options)
    outputs.logits.square().sum().backward()
    return outputs.logits, outputs.rois, {name: parameter.grad for name, parameter in model.named_parameters()}


def watch(module) -> list[tuple[int, ...]]:
    """The shapes that a module gives from now on."""
    shapes = []
    module.register_forward_hook(
        lambda module, inputs, outputs: shapes.append(tuple((outputs[0] if type(outputs) is tuple else outputs).shape))
    )
    return shapes


def sample_plainly(features: torch.Tensor, points: torch.Tensor, padding: str) -> torch.Tensor:
    """Multilinear interpolation, cell by cell: features (..., rows, columns, channels), points (points, axes)."""
    sizes = list(reversed(features.shape[:-1]))  # x, y, time
    results = []
    for point in points:
        position = [float(value) * size - 0.5 for value, size in zip(point, sizes, strict=True)]
        if padding == "border":
            position = [min(max(value, 0.0), size - 1) for value, size in zip(position, sizes, strict=True)]
        total = torch.zeros(features.shape[-1], dtype=features.dtype)
        for corner in range(2 ** len(sizes)):
            cell, weight = [], 1.0
            for axis, value in enumerate(position):
                upper = corner >> axis & 1
                low = math.floor(value)
                cell.append(low + upper)
                weight *= value - low if upper else 1 - (value - low)
            if all(0 <= index < size for index, size in zip(cell, sizes, strict=True)):
                total = total + weight * features[tuple(reversed(cell))]
        results.append(total)
    return torch.stack(results)


def encode_plainly(rois: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """The encoding of each side of a RoI, number by number."""
    frequencies = [math.exp(math.log(128) * index / max(num_frequencies - 1, 1)) for index in range(num_frequencies)]
    rows = []
    for roi in rois.reshape(-1, rois.shape[-1]):
        row = []
        for side in roi.tolist():
            row += [math.sin(side * math.pi * frequency) for frequency in frequencies[0::2]]
            row += [math.cos(side * math.pi * frequency) for frequency in frequencies[1::2]]
        rows.append(row)
    return torch.tensor(rows).reshape(*rois.shape[:-1], -1)
