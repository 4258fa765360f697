"""Checkpoints as S2: a plain vision model, a LLaVA-1.5 with S2, or the vision tower and projector of a VILA-1.5
with S2.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from ...utils.weight_files import iterate_tensors, read_json
from .convert_llava_s2_vision import load_llava_s2, s2_config
from .image_processing_s2_vision import S2ImageProcessor
from .modeling_s2_vision import S2VisionWrapper
from .projector_s2_vision import PROJECTOR_FILE, token_order_of


def _convert_vila(source: Path, out: Path) -> None:
    """VILA-1.5 with S2: the folders `vision_tower` (a SigLIP) and `mm_projector`, without the language model."""
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
    save_file(tensors, out / PROJECTOR_FILE, {"token_order": token_order_of(record, projector)})


def _save_image_processor(model: S2VisionWrapper, source: Path, out: Path, fit: str | None = None) -> None:
    has_processor = (source / "preprocessor_config.json").is_file()
    base = AutoImageProcessor.from_pretrained(source, trust_remote_code=False) if has_processor else None
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


__all__ = ["convert_s2_vision"]
