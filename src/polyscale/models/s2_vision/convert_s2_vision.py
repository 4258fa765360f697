"""Checkpoints as S2: a plain vision model, a LLaVA-1.5 with S2, or the vision tower and projector of a VILA-1.5
with S2.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor

from .convert_llava_s2_vision import iterate_tensors, load_llava_s2, read_json, s2_config
from .image_processing_s2_vision import S2ImageProcessor
from .modeling_s2_vision import S2VisionWrapper


PROJECTOR_FILE = "mm_projector.safetensors"


def space_to_depth(tokens: torch.Tensor) -> torch.Tensor:
    """A square grid of tokens (batch, rows * columns, width) -> each 2 x 2 of them as one, (batch, ..., 4 *
    width); odd grids get zeros after them.
    """
    batch, count, width = tokens.shape
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"`tokens` must be a square grid, got {count} tokens.")
    grid = tokens.reshape(batch, side, side, width)
    if side % 2:
        grid = nn.functional.pad(grid, (0, 0, 0, 1, 0, 1))
    half = (side + 1) // 2
    grid = grid.reshape(batch, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, half * half, 4 * width)


class DownsampleProjector(nn.Module):
    """VILA's projector "mlp_downsample": 2 x 2 tokens as one, LayerNorm, two linear layers. (batch, tokens,
    width) -> (batch, tokens / 4, text width)
    """

    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.linear_1(self.layernorm(space_to_depth(features)))
        return self.linear_2(nn.functional.gelu(hidden))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "DownsampleProjector":
        """The projector that `convert_s2_vision` wrote beside a VILA tower."""
        tensors = load_file(Path(folder) / PROJECTOR_FILE)
        text_width, width = tensors["linear_1.weight"].shape
        projector = cls(width // 4, text_width).to(tensors["linear_1.weight"].dtype)
        projector.load_state_dict(tensors)
        return projector


def _convert_vila(source: Path, out: Path) -> None:
    """VILA-1.5 with S2: the folders `vision_tower` (a SigLIP) and `mm_projector`; the language model stays what
    it is.
    """
    record = read_json(source / "config.json")
    projector = read_json(source / "mm_projector" / "config.json").get("mm_projector_type")
    if projector not in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        raise ValueError(
            f"`mm_projector_type` of {source} is {projector!r}: only 'mlp_downsample' is public for VILA-1.5 with S2."
        )
    vision = source / "vision_tower"
    plain = S2VisionWrapper.from_vision_pretrained(vision, scales=[1])
    config = s2_config(record, plain.vision_model.config)
    options = {name: getattr(config, name) for name in ("img_sizes", "max_split_size", "resize_output_to_idx")}
    model = S2VisionWrapper.from_vision_model(plain.vision_model, **options)
    names = {"layers.1": "layernorm", "layers.2": "linear_1", "layers.4": "linear_2"}
    tensors = {}
    for name, tensor in iterate_tensors(source / "mm_projector"):
        layer, _, kind = name.rpartition(".")
        if layer not in names:
            raise ValueError(
                f"`{source / 'mm_projector'}` holds {name!r}, which the projector {projector!r} does not have."
            )
        tensors[f"{names[layer]}.{kind}"] = tensor.contiguous()
    width = tensors["layernorm.weight"].shape[0]
    if width != 4 * model.config.hidden_size:
        raise ValueError(
            f"The projector of {source} reads {width} channels, four tokens of the tower have "
            f"{4 * model.config.hidden_size}."
        )
    model.save_pretrained(out)
    _save_image_processor(model, vision, out, "squash")
    save_file(tensors, out / PROJECTOR_FILE)


def _save_image_processor(model: S2VisionWrapper, source: Path, out: Path, fit: str | None = None) -> None:
    base = AutoImageProcessor.from_pretrained(source) if (source / "preprocessor_config.json").is_file() else None
    S2ImageProcessor.for_config(model.config, base, fit).save_pretrained(out)


def convert_s2_vision(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> None:
    """Writes a checkpoint as S2 into the folder `out`.

    Args:
        source: the folder of a LLaVA-1.5 with S2 (LoRA, projector or everything), of a VILA-1.5 with S2, or of a
            plain vision model.
        out: a folder that exists and is empty.
        base: of a LLaVA LoRA, the folder of its language model.
        vision_tower: of a LLaVA, the folder of its CLIP.
        dtype: of a LLaVA, that of the result.
        overrides: for a plain vision model, fields of `S2VisionConfig`: `scales` (`[1, 2]` by default), ...

    Raises:
        ValueError: for another layout, or parts that do not fit.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise ValueError(f"`source` {source} must be a folder with a config.json.")
    record = read_json(source / "config.json")
    if (source / "mm_projector").is_dir() and (source / "vision_tower").is_dir():
        return _convert_vila(source, out)
    if "mm_vision_tower" in record:
        model, processor = load_llava_s2(source, base, vision_tower, dtype)
        model.save_pretrained(out)
        processor.save_pretrained(out)
        return None
    if overrides.get("scales") is None and overrides.get("img_sizes") is None:
        overrides["scales"] = [1, 2]
    model = S2VisionWrapper.from_vision_pretrained(source, **overrides)
    model.save_pretrained(out)
    _save_image_processor(model, source, out)
    return None


__all__ = ["DownsampleProjector", "convert_s2_vision", "space_to_depth"]
