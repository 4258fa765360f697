"""LLaVA-1.5 with S2, in the layouts of haotian-liu/LLaVA, as a `LlavaForConditionalGeneration` of transformers.

Three layouts: LoRA (`adapter_config.json`, `adapter_model.*`, `non_lora_trainables.bin`, and a base language model
elsewhere), projector only (`mm_projector.bin`, and a base), and everything in one (`pytorch_model*.bin` or
`model*.safetensors`).

Memory: the language model is made once, without values, and filled tensor by tensor from files that are mapped, not
read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ...utils.checkpoint_files import load_torch_file
from ...utils.processors import check_processor
from ...utils.weight_files import fill_model, iterate_tensors, model_to_fill, read_json, reading_part
from .configuration_s2_vision import S2VisionConfig
from .image_processing_s2_vision import S2ImageProcessor


DEFAULT_SCALES = "336,672,1008"
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
# The `fit` of an image processor for the `image_aspect_ratio` of LLaVA; any other word means its centre crop.
FITS_OF_LLAVA = {"pad": "pad", "resize": "squash"}
_LORA_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_NOT_WEIGHTS = re.compile(r".*(rotary_emb\.inv_freq|position_ids)")
_RENAMES = (
    (r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.vision_model.\1"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    (r"(lm_head\.weight)", r"\1"),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] if message['content'] is not "
    "string else message['content'] }} "
    "{% else %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% elif "
    "part['type'] == 'text' %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def new_name(name: str) -> str | None:
    """The name in `LlavaForConditionalGeneration` of a tensor of LLaVA; None for what is no weight.

    Raises:
        ValueError: for a name of another layout.
    """
    if _NOT_WEIGHTS.fullmatch(name):
        return None
    for pattern, replacement in _RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise ValueError(f"The checkpoint holds {name!r}, which no LLaVA-1.5 model has.")


class LoraUpdates:
    """The low-rank updates of an adapter, added to base weights one at a time.

    Raises:
        ValueError: for adapters of other kinds (DoRA, trained biases, ranks by pattern).
    """

    def __init__(self, folder: Path):
        config = read_json(folder / "adapter_config.json")
        for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(name):
                raise ValueError(
                    f"`{folder / 'adapter_config.json'}` has `{name}`={config[name]!r}: only plain LoRA is converted."
                )
        for name in ("r", "lora_alpha"):
            if not isinstance(config.get(name), int | float) or not config[name] > 0:
                raise ValueError(f"`{folder / 'adapter_config.json'}`: `{name}` must be a number above 0.")
        rank = config["r"]
        self.scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        self.factors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._load(folder).items():
            match = _LORA_KEY.fullmatch(name)
            if match is None:
                raise ValueError(
                    f"`{folder}` holds the adapter tensor {name!r}: expected names that end in lora_A.weight or "
                    "lora_B.weight."
                )
            self.factors.setdefault(f"{match['name']}.weight", {})[match["side"]] = tensor

    @staticmethod
    def _load(folder: Path) -> dict[str, torch.Tensor]:
        if (folder / "adapter_model.safetensors").is_file():
            with safe_open(folder / "adapter_model.safetensors", framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return load_torch_file(folder / "adapter_model.bin")

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` with its update, computed in float32; each update can be had once."""
        factors = self.factors.pop(name, None)
        if factors is None:
            return weight
        if set(factors) != {"A", "B"}:
            raise ValueError(f"The adapter has only lora_{next(iter(factors))} of {name!r}.")
        return weight.float() + self.scaling * (factors["B"].float() @ factors["A"].float())

    def check_used(self) -> None:
        if self.factors:
            raise ValueError(f"The adapter updates {sorted(self.factors)[0]!r}, which the base model does not have.")


def s2_config(record: dict[str, Any], vision_config: PreTrainedConfig) -> S2VisionConfig:
    """The S2 config that LLaVA's config fields `s2` and `s2_scales` describe.

    Raises:
        ValueError: for a checkpoint without S2, or scales that are no numbers.
    """
    if not record.get("s2"):
        raise ValueError(
            "The checkpoint has no `s2: true` in its config.json: it is an ordinary LLaVA, which transformers "
            "converts itself."
        )
    text = str(record.get("s2_scales", DEFAULT_SCALES))
    try:
        sizes = sorted(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"`s2_scales` in config.json must be numbers with commas between them, got {text!r}."
        ) from error
    split = record.get("s2_max_split_size", sizes[0])
    index = record.get("s2_resize_output_to_scale_idx", 0)
    return S2VisionConfig(
        vision_config=vision_config, img_sizes=sizes, max_split_size=split, resize_output_to_idx=index
    )


def _check_supported(record: dict[str, Any], tower: S2VisionConfig) -> None:
    projector = record.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"`mm_projector_type` is {projector!r}: a LlavaForConditionalGeneration has the projector "
            "'mlp2x_gelu' and no other."
        )
    if record.get("mm_use_im_start_end"):
        raise ValueError("`mm_use_im_start_end` is true: LlavaProcessor puts no tokens around an image.")
    width = record.get("mm_hidden_size", tower.hidden_size)
    if width != tower.hidden_size:
        raise ValueError(
            f"`mm_hidden_size` is {width}, but {tower.num_scales} scales of {tower.vision_config.model_type!r} are "
            f"{tower.hidden_size} wide: is `vision_tower` the right one?"
        )


def _text_config(record: dict[str, Any], base: Path | None) -> LlamaConfig:
    if base is not None:
        with reading_part(base / "config.json", "fields"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if config.model_type != "llama":
            raise ValueError(f"`base` must be a Llama (LLaVA-1.5: Vicuna), got {config.model_type!r}.")
        return config
    known = LlamaConfig().to_dict()
    return LlamaConfig(
        **{
            name: value
            for name, value in record.items()
            if name in known and name not in ("model_type", "architectures")
        }
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with reading_part(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _trainables(source: Path) -> dict[str, torch.Tensor]:
    """What LLaVA saved beside an adapter or in place of a model: projector and the like, under the names of the
    model.
    """
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if (source / name).is_file():
            tensors = load_torch_file(source / name)
            tensors = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items()}
            if any(key.startswith("model.model.") for key in tensors):
                tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
            return tensors
    return {}


def _weights(source: Path, base: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights under LLaVA's names; of a name that comes twice the later one counts."""
    lora = LoraUpdates(source) if (source / "adapter_config.json").is_file() else None
    for name, tensor in iterate_tensors(source if base is None else base):
        yield name, tensor if lora is None else lora.apply(name, tensor)
    if lora is not None:
        lora.check_used()
    if base is not None:
        yield from _trainables(source).items()


def _base_folder(source: Path, base: str | None, record: dict[str, Any]) -> Path | None:
    is_partial = any((source / name).is_file() for name in ("adapter_config.json", "mm_projector.bin"))
    if not is_partial:
        return None
    if base is None and (source / "adapter_config.json").is_file():
        base = read_json(source / "adapter_config.json").get("base_model_name_or_path")
    if base is None or not Path(base).is_dir():
        raise ValueError(
            f"`source` {source} holds no language model: give the folder of its base (LLaVA-1.5: Vicuna) as `base`, "
            f"got {base!r}."
        )
    return Path(base)


def load_llava_s2(
    source: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Reads a LLaVA-1.5 with S2 in a layout of the original code.

    Args:
        source: folder of the checkpoint, with LLaVA's config.json.
        base: folder of the base language model, for a LoRA or a projector; that in the adapter's config when None.
        vision_tower: folder or name of the CLIP; that in the config (`mm_vision_tower`) when None.
        dtype: of the result; that in the config when None.

    Raises:
        ValueError: for another layout, parts that do not fit, or a pickle that holds more than tensors.
    """
    source = Path(source)
    record = read_json(source / "config.json")
    base = _base_folder(source, None if base is None else str(base), record)
    vision_name = str(vision_tower or record.get("mm_vision_tower"))
    with reading_part(Path(vision_name), "config"):
        vision_config = AutoConfig.from_pretrained(vision_name, trust_remote_code=False)
    vision_config = getattr(vision_config, "vision_config", None) or vision_config
    tower = s2_config(record, vision_config)
    _check_supported(record, tower)

    tokenizer = _tokenizer(source if base is None or (source / "tokenizer_config.json").is_file() else base)
    text_config = _text_config(record, base)
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    keeps_all = record.get("mm_vision_select_feature", "patch") == "cls_patch"
    if keeps_all and tower.num_prefix_tokens:
        raise ValueError(
            "`mm_vision_select_feature` is 'cls_patch' for a tower with CLS: its tokens are no grid, S2 cannot have "
            "been used."
        )
    drops_cls = tower.num_prefix_tokens == 1
    config = LlavaConfig(
        vision_config=tower,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=record.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if drops_cls else "full",
        image_seq_length=tower.num_tokens,
    )
    if dtype is None:
        name = str(record.get("torch_dtype") or record.get("dtype") or "float32").removeprefix("torch.")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"`torch_dtype` in {source / 'config.json'} is {name!r}, which is none.")
    model = model_to_fill(config, dtype)
    with reading_part(Path(vision_name), "weights"):
        clip, info = AutoModel.from_pretrained(
            vision_name, config=vision_config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
        if missing:
            raise ValueError(f"{len(missing)} are missing or have another shape, {missing[0]!r} among them")
    model.model.vision_tower.vision_model.load_state_dict(clip.state_dict())
    del clip
    tied = ("lm_head.weight",) if text_config.tie_word_embeddings else ()
    hint = ": is `vision_tower` the right one?"
    with reading_part(source, "weights"):
        fill_model(model, _weights(source, base), new_name, "model.vision_tower.", tied, hint)
    model.tie_weights()
    generation = base or source
    if (generation / "generation_config.json").is_file():
        with reading_part(generation / "generation_config.json", "settings"):
            model.generation_config = GenerationConfig.from_pretrained(generation)

    fit = FITS_OF_LLAVA.get(record.get("image_aspect_ratio"), "crop")
    image_processor = S2ImageProcessor.for_config(tower, _image_processor(vision_name), fit)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=tower.num_prefix_tokens,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    return model, processor


def _image_processor(vision_name: str):
    if Path(vision_name).is_dir() and not (Path(vision_name) / "preprocessor_config.json").is_file():
        return CLIPImageProcessor()
    with reading_part(Path(vision_name), "image processor"):
        processor = AutoImageProcessor.from_pretrained(vision_name, trust_remote_code=False)
        check_processor(processor)
    return processor


__all__ = ["FITS_OF_LLAVA", "IMAGE_TOKEN", "PAD_TOKEN", "load_llava_s2", "s2_config"]
