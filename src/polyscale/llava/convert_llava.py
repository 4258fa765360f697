"""`polyscale convert SOURCE OUT --to llava`: checkpoints of the original LLaVA and VILA code as LLaVA models of
transformers.
"""

import os
from pathlib import Path

import torch

from ..loading import checkpoint_folder
from ..models.s2_vision.convert_llava_s2_vision import load_llava_s2
from ..utils.weight_files import read_json
from .convert_vila import FILES, load_vila, to_dtype
from .vila_layout import is_vila


def is_original_llava(folder: Path) -> bool:
    """Whether a folder has a layout that `convert_llava` reads: that of VILA, or of haotian-liu/LLaVA with S2."""
    if is_vila(folder):
        return True
    try:
        record = read_json(folder / "config.json")
    except ValueError:
        return False
    return "mm_vision_tower" in record and bool(record.get("s2"))


def convert_llava(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    dtype: torch.dtype | str | None = None,
    conversation: str | None = None,
    image_aspect_ratio: str | None = None,
    token_order: str | None = None,
) -> None:
    """Writes a VILA-1.5, an NVILA or a LLaVA-1.5 with S2 as a `LlavaForConditionalGeneration` into the folder `out`.

    Args:
        source (`str` or `os.PathLike`): a folder in the layout of VILA, or of haotian-liu/LLaVA with S2; or the name
            of such a repository on the hub.
        out (`str` or `os.PathLike`): a folder that exists and is empty.
        base, vision_tower: of a LLaVA with S2: see `load_llava_s2`.
        dtype (`torch.dtype` or `str`, *optional*): of the result; that in the config when `None`.
        conversation, image_aspect_ratio, token_order: of a VILA: see `load_vila`.

    Raises:
        ValueError: for another layout, an option of the other layout, or parts that do not fit.
        OSError: if there is no such checkpoint.
    """
    folder = checkpoint_folder(source, "source", FILES)
    vila = {"conversation": conversation, "image_aspect_ratio": image_aspect_ratio, "token_order": token_order}
    llava = {"base": base, "vision_tower": vision_tower}
    own, others = (vila, llava) if is_vila(folder) else (llava, vila)
    wrong = [name for name, value in others.items() if value is not None]
    if wrong:
        kinds = ("VILA", "LLaVA with S2") if own is vila else ("LLaVA with S2", "VILA")
        raise ValueError(f"`{wrong[0]}` is an option for a {kinds[1]}, and `source` {source} is a {kinds[0]}.")
    if own is vila:
        model, processor = load_vila(folder, dtype=dtype, **vila)
    elif is_original_llava(folder):
        model, processor = load_llava_s2(folder, **llava, dtype=None if dtype is None else to_dtype(dtype))
    else:
        raise ValueError(
            f"`source` {source} is neither in the layout of VILA (config.json, and the folders llm, vision_tower and "
            "mm_projector) nor a LLaVA-1.5 of the original code with S2 (`s2` and `mm_vision_tower` in its "
            "config.json). An ordinary LLaVA is converted by transformers itself."
        )
    model.save_pretrained(out)
    processor.save_pretrained(out)


__all__ = ["convert_llava", "is_original_llava"]
