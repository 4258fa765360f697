"""What a VILA or NVILA checkpoint in its published layout says about itself, and what of it cannot be carried over.

The layout (NVlabs/VILA): a config.json, and the folders `llm`, `vision_tower` and `mm_projector`, each a checkpoint.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..models.s2_vision.configuration_s2_vision import S2VisionConfig
from ..models.s2_vision.projector_s2_vision import is_nvila, token_order_of
from ..utils.validation import check_choice
from ..utils.vision_configs import base_num_prefix_tokens
from ..utils.weight_files import iterate_tensors, read_json, reading_part
from .downsampled import DownsampledTowerConfig


PARTS = ("llm", "vision_tower", "mm_projector")
TEXT_MODELS = ("llama", "qwen2")
VISION_MODELS = ("siglip_vision_model", "clip_vision_model")
_ENCODER = "BasicImageEncoder"
# Projectors: how many tokens become one on each side, and the widths of the layers before the last two.
_PROJECTORS: dict[str, tuple[int, Callable[[int], list[int]]]] = {
    "mlp2x_gelu": (1, lambda width: []),
    "mlp_downsample": (2, lambda width: []),
    "mlp_downsample_2x2_fix": (2, lambda width: []),
    "mlp_downsample_3x3_fix": (3, lambda width: [3 * width]),
    "mlp_downsample_3x3_s2": (3, lambda width: [3 * width, width, width // 3]),
    "mlp_downsample_3x3_s2_new": (3, lambda width: [4 * width, 2 * width, width, width // 3]),
}


def is_vila(folder: Path) -> bool:
    """Whether a folder has the layout of VILA, or a part of it."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = {}
    named = isinstance(record, dict) and "llm_cfg" in record
    return named or all((folder / part).is_dir() for part in ("vision_tower", "mm_projector"))


def _check_parts(folder: Path) -> None:
    files = ["config.json", *(f"{part}/config.json" for part in PARTS), "vision_tower/preprocessor_config.json"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"`source` {folder} is no whole VILA checkpoint: {', '.join(missing)} is missing. Expected a folder with "
            f"config.json and the folders {', '.join(PARTS)}, each with a config.json and weights."
        )


@dataclass
class VilaLayout:
    """A checkpoint in the layout of VILA, read without its weights.

    Args:
        folder: of the checkpoint.
        image_aspect_ratio: in place of the one in its config.
        token_order: in place of the one that follows from the age of its config.

    Attributes:
        record: its config.json.
        vision_config: of the SigLIP or CLIP.
        text_config: of the language model.
        tower_config: of the tower as it is inside the LLaVA model: with S2, and with its tokens brought together.
        feature_layer: the layer of that tower which LLaVA reads.

    Raises:
        ValueError: for half a layout, and for what a LlavaForConditionalGeneration cannot do, by its name.
    """

    folder: Path
    image_aspect_ratio: str | None = None
    token_order: str | None = None
    record: dict[str, Any] = field(init=False)
    vision_config: PreTrainedConfig = field(init=False)
    text_config: PreTrainedConfig = field(init=False)
    tower_config: PreTrainedConfig = field(init=False)
    feature_layer: int = field(init=False)

    def __post_init__(self):
        _check_parts(self.folder)
        self.record = read_json(self.folder / "config.json")
        if self.image_aspect_ratio is None:
            self.image_aspect_ratio = self.record.get("image_aspect_ratio")
        if not isinstance(self.image_aspect_ratio, str | None):
            raise ValueError(f"`image_aspect_ratio` must be text, got {self.image_aspect_ratio!r}.")
        if self.token_order is not None:
            check_choice("token_order", self.token_order, ("rows", "columns"))
        self._check_supported()
        self.text_config = self._part_config("llm", TEXT_MODELS, "language model")
        self.vision_config = self._part_config("vision_tower", VISION_MODELS, "vision tower")
        self._check_features()
        self._leave_out_head()
        with reading_part(self.folder / "config.json", "fields"):
            tower = self._tower()
        self.feature_layer = self.record.get("mm_vision_select_layer", -2)
        count = self.vision_config.num_hidden_layers + 1
        if not isinstance(self.feature_layer, int) or not -count <= self.feature_layer < count:
            raise ValueError(
                f"`mm_vision_select_layer` in config.json is {self.feature_layer!r}: the vision tower has {count - 1} "
                "layers."
            )
        factor, stages = _PROJECTORS[self.projector]
        width = self.record.get("mm_hidden_size") or tower.hidden_size
        if width != tower.hidden_size:
            raise ValueError(
                f"`mm_hidden_size` in config.json is {width}, but the tower's features are {tower.hidden_size} wide."
            )
        if factor > 1:
            tower = DownsampledTowerConfig(
                vision_config=tower,
                vision_feature_layer=self.feature_layer,
                downsample=factor,
                token_order=self.token_order or token_order_of(self.record, self.projector),
                stage_widths=stages(width),
            )
            self.feature_layer = -1
        self.tower_config = tower

    @property
    def is_dynamic(self) -> bool:
        """Whether it is an NVILA with Dynamic-S2."""
        return bool(self.record.get("dynamic_s2"))

    @property
    def projector(self) -> str:
        """The kind of its projector."""
        return str(read_json(self.folder / "mm_projector" / "config.json").get("mm_projector_type"))

    @property
    def is_new(self) -> bool:
        """Whether it is of the age of NVILA."""
        return is_nvila(self.record)

    @property
    def around_image(self) -> tuple[str, str]:
        """Texts in front of an image and after it."""
        encoder = self.record.get("image_encoder") or {}
        try:
            settings = json.loads(encoder) if isinstance(encoder, str) else encoder
            is_known = settings.get("_target_", _ENCODER).rpartition(".")[2] == _ENCODER
        except (ValueError, AttributeError):
            is_known = False
        if not is_known:
            raise ValueError(f"`image_encoder` in config.json is {encoder!r}: only {_ENCODER!r} is converted.")
        end = settings.get("end_tokens", "\n")
        return settings.get("start_tokens") or "", "" if end is None else end

    def _part_config(self, part: str, known: Sequence[str], what: str) -> PreTrainedConfig:
        record = read_json(self.folder / part / "config.json")
        kind = record.get("model_type")
        if kind not in known:
            raise ValueError(f"The {what} of {self.folder} is a {kind!r}: only {' and '.join(known)} are converted.")
        if record.get("quantization_config"):
            raise ValueError(
                f"The {what} of {self.folder} is quantized (`quantization_config`): convert the checkpoint with full "
                "weights, and quantize the result."
            )
        with reading_part(self.folder / part / "config.json", "fields"):
            return AutoConfig.from_pretrained(self.folder / part, trust_remote_code=False)

    def _check_supported(self) -> None:
        record = self.record
        if record.get("ps3") or record.get("look_close_mode"):
            raise ValueError(
                "`ps3` is true in config.json: a tower that looks again after the prompt is not converted."
            )
        if record.get("mm_use_im_start_end"):
            raise ValueError("`mm_use_im_start_end` is true: LlavaProcessor puts no tokens around an image.")
        if self.projector not in _PROJECTORS:
            raise ValueError(
                f"`mm_projector_type` is {self.projector!r}: the projector of a LlavaForConditionalGeneration ends "
                f"with two linear layers, as those of {', '.join(_PROJECTORS)} do."
            )
        if self.is_dynamic and "dynamic_s2" not in str(self.image_aspect_ratio):
            raise ValueError(
                f"`dynamic_s2` is true and `image_aspect_ratio` is {self.image_aspect_ratio!r}: Dynamic-S2 needs "
                "'dynamic_s2', which cuts images into tiles."
            )
        if not self.is_dynamic and "dynamic" in str(self.image_aspect_ratio):
            raise ValueError(
                f"`image_aspect_ratio` is {self.image_aspect_ratio!r}: tiles that become several images in the prompt "
                "are not converted. `image_aspect_ratio='resize'` converts the model with one tile per image, as "
                "it sees the images of a prompt with several."
            )
        if not re.fullmatch(r"\d+( *, *\d+)*", str(record.get("s2_scales"))) and (record.get("s2") or self.is_dynamic):
            raise ValueError(
                "`s2_scales` in config.json must be numbers with commas between them, got "
                f"{record.get('s2_scales')!r}."
            )

    def _check_features(self) -> None:
        """Refuses a choice of features whose tokens are no grid."""
        choice = self.record.get("mm_vision_select_feature") or "patch"
        prefix = base_num_prefix_tokens(self.vision_config)
        if {"patch": 1, "cls_patch": 0}.get(choice) != prefix:
            raise ValueError(
                f"`mm_vision_select_feature` is {choice!r} for a {self.vision_config.model_type!r} with {prefix} "
                "tokens in front of its patches: what it selects is no grid."
            )

    def _leave_out_head(self) -> None:
        """A SigLIP may come without its pooling head, which no LLaVA reads."""
        if getattr(self.vision_config, "vision_use_head", False):
            names = (name for name, _ in iterate_tensors(self.folder / "vision_tower"))
            self.vision_config.vision_use_head = any("head." in name for name in names)

    def _tower(self) -> PreTrainedConfig:
        """The vision model, at several scales where the checkpoint wants them."""
        record = self.record
        if not record.get("s2") and not self.is_dynamic:
            return self.vision_config
        sizes = sorted(int(size) for size in str(record["s2_scales"]).split(","))
        index = record.get("s2_resize_output_to_scale_idx") or 0
        options = {"vision_config": self.vision_config, "img_sizes": sizes, "resize_output_to_idx": index}
        if not self.is_dynamic:
            split = record.get("s2_max_split_size") or sizes[0]
            return S2VisionConfig(**options, max_split_size=split, antialias=False)
        if index % len(sizes) != len(sizes) - 1:
            raise ValueError(
                f"`s2_resize_output_to_scale_idx` is {index} with `dynamic_s2`: only the last scale, which has the "
                "shape of the image, is converted."
            )
        return S2VisionConfig(
            **options, max_split_size=sizes[0], dynamic=True, max_tiles=record.get("max_tiles") or 12
        )


def projector_names(factor: int, num_stages: int) -> dict[str, str]:
    """Names in `DownsampledTower` and in the projector of LLaVA for the layers of a projector of VILA.

    Args:
        factor: how many tokens it brings together on each side.
        num_stages: linear layers with a norm after them.

    Returns:
        `dict[str, str]`: "layers.1" -> "norms.0" (of the tower), "layers.2" -> "linear_1" (of the projector).
    """
    if factor == 1:
        return {"layers.0": "linear_1", "layers.2": "linear_2"}
    names = {}
    for stage in range(num_stages + 1):
        names[f"layers.{1 + 3 * stage}"] = f"norms.{stage}"
        names[f"layers.{2 + 3 * stage}"] = f"linears.{stage}" if stage < num_stages else "linear_1"
    return {**names, f"layers.{4 + 3 * num_stages}": "linear_2"}


__all__ = ["PARTS", "VilaLayout", "is_vila", "projector_names"]
