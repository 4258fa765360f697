"""VILA (arXiv 2312.07533) and NVILA (arXiv 2412.04468) as one `LlavaForConditionalGeneration` of transformers.

Faithful to NVlabs/VILA. Memory: the model is made once, without values; the vision tower is loaded in its place, and
the language model is filled tensor by tensor from files that are mapped, not read.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..layers.token_budget import TokenBudgetMixin
from ..loading import checkpoint_folder, quiet_loading
from ..models.s2_vision.configuration_s2_vision import S2VisionConfig
from ..models.s2_vision.convert_llava_s2_vision import FITS_OF_LLAVA, IMAGE_TOKEN, PAD_TOKEN
from ..models.s2_vision.image_processing_s2_vision import S2ImageProcessor
from ..utils.processors import check_processor
from ..utils.vision_configs import base_image_size
from ..utils.weight_files import fill_model, iterate_tensors, model_to_fill, reading_part, weight_files
from .adapters import LlavaAdapter
from .chat_templates import chat_template, conversation_for, stop_tokens
from .downsampled import DownsampledTowerConfig
from .layout import token_layout
from .packed import PackedTowerConfig
from .swap import set_config
from .vila_layout import PARTS, VilaLayout, projector_names


_MULTIPLE = 64  # of the rows of an embedding that has to grow
# What is downloaded of a checkpoint on the hub.
FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with reading_part(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def to_dtype(value: torch.dtype | str) -> torch.dtype:
    """Raises ValueError for a name that is no floating-point type."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16, got {value!r}.")
    return dtype


def _dtype(layout: VilaLayout) -> torch.dtype | str:
    names = (layout.record.get(name) for name in ("model_dtype", "torch_dtype", "dtype"))
    return next((name for name in names if name), None) or layout.text_config.dtype or torch.float32


def _config(layout: VilaLayout, tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    tower = layout.tower_config
    if isinstance(tower, TokenBudgetMixin):
        tower = PackedTowerConfig(vision_config=tower)
    tokens = token_layout(tower)
    text = layout.text_config
    if len(tokenizer) > text.vocab_size:
        text.vocab_size = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    text.pad_token_id = tokenizer.pad_token_id
    length = {} if tokens.image_seq_length is None else {"image_seq_length": tokens.image_seq_length}
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=layout.feature_layer,
        vision_feature_select_strategy=tokens.select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
        **length,
    )


def _load_vision(model: PreTrainedModel, config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> str:
    """Puts the vision model of a folder into its place in the LLaVA model, whose name is returned."""
    name, old = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is type(config)
    )
    with quiet_loading(), reading_part(folder, "weights"):
        loaded, info = AutoModel.from_pretrained(
            folder, config=old.config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    problems = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if problems:
        raise ValueError(
            f"`{folder}` lacks {len(problems)} weights of its {type(loaded).__name__}, or has them in another shape: "
            f"{sorted(problems)[0]!r} among them."
        )
    set_config(loaded, loaded.config, old.config)
    parent, _, place = name.rpartition(".")
    setattr(model.get_submodule(parent), place, loaded.eval())
    return f"{name}."


def _new_names(layout: VilaLayout, name: str) -> str | None:
    """The name in the LLaVA model of a tensor of a VILA checkpoint; `None` for what is no weight."""
    part, _, name = name.partition("/")
    if part == "llm":
        if name.endswith("rotary_emb.inv_freq"):
            return None
        return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
    tower = layout.tower_config
    downsamples = isinstance(tower, DownsampledTowerConfig)
    names = projector_names(tower.downsample if downsamples else 1, len(tower.stage_widths) if downsamples else 0)
    layer, _, kind = name.rpartition(".")
    if layer not in names:
        return name  # which the model does not have
    holder = "multi_modal_projector" if names[layer].startswith("linear_") else "vision_tower.tower"
    return f"model.{holder}.{names[layer]}.{kind}"


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("mm_projector", "llm"):
        for name, tensor in iterate_tensors(folder / part):
            yield f"{part}/{name}", tensor


def _generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> GenerationConfig:
    is_there = (folder / "generation_config.json").is_file()
    with reading_part(folder / "generation_config.json", "settings"):
        config = GenerationConfig.from_pretrained(folder) if is_there else GenerationConfig()
    ends = config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise ValueError(
            f"`{folder / 'generation_config.json'}`: `eos_token_id` must be an int or a list, got {ends}."
        )
    vocabulary = tokenizer.get_vocab()
    ends += [tokenizer.eos_token_id, *(vocabulary[token] for token in stop if token in vocabulary)]
    config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    config.pad_token_id = tokenizer.pad_token_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    try:
        config.validate(strict=True)
    except ValueError:  # a temperature without sampling, as old Vicunas have it: they are meant to sample
        config.do_sample = True
    return config


def _image_processor(layout: VilaLayout) -> BaseImageProcessor:
    folder = layout.folder / "vision_tower"
    with reading_part(folder / "preprocessor_config.json", "image processor"):
        base = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        check_processor(base)
    crops = bool(getattr(base, "do_center_crop", False))
    fit = FITS_OF_LLAVA.get(layout.image_aspect_ratio, "crop" if crops else "squash")
    tower = layout.tower_config
    scales = tower.vision_config if isinstance(tower, DownsampledTowerConfig) else tower
    if isinstance(scales, S2VisionConfig):
        return S2ImageProcessor.for_config(scales, base, fit)
    height, width = base_image_size(layout.vision_config)
    final = {"height": height, "width": width}
    settings = {**base.to_dict(), "do_convert_rgb": True}
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    if fit == "pad":
        shortest = {"size": {"shortest_edge": height}, "crop_size": final, "do_center_crop": True}
        return LlavaImageProcessor(**{**settings, **shortest, "do_pad": True})
    if fit == "crop":
        return type(base)(**{**settings, "size": {"shortest_edge": height}, "crop_size": final})
    return type(base)(**{**settings, "size": final, **({"do_center_crop": False} if crops else {})})


def load_vila(
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    conversation: str | None = None,
    image_aspect_ratio: str | None = None,
    token_order: str | None = None,
) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """Reads a VILA-1.5 (with S2 or without) or an NVILA in its published layout.

    The layers of its projector before the last two are part of the vision tower (`DownsampledTower`). A model with S2
    has the budgets of S2: `set_token_budget(model, processor, num_tiles=2)`, or in the call of the processor.

    Args:
        source (`str` or `os.PathLike`): a folder with config.json, `llm`, `vision_tower` and `mm_projector`, or the
            name of such a repository on the hub.
        dtype (`torch.dtype` or `str`, *optional*): of the result; that in the checkpoint's config when `None`.
        conversation (`str`, *optional*): the chat template: "vicuna_v1", "llama_3", "hermes-2", "qwen2", or
            "tokenizer" for the one that the tokenizer brings. When `None`, the one that the config names, else one
            that fits the tokenizer.
        image_aspect_ratio (`str`, *optional*): how images are brought to a square: "resize", "pad", or another word
            for what the vision tower's own image processor does; that in the config when `None`.
        token_order (`str`, *optional*): the order of the tokens after they were brought together: "rows" or
            "columns". When `None`, as the code that wrote the checkpoint did: by columns for the "mlp_downsample" of
            VILA-1.5, by rows for NVILA.

    Returns:
        `(LlavaForConditionalGeneration, ProcessorMixin)`: the model in evaluation mode and its processor.

    Raises:
        ValueError: for a folder that is incomplete, tensors that do not fit, a pickle that holds more than tensors,
            and for parts that a LLaVA model cannot have (InternViT, PS3, tiles as images of their own, ...), by name.
        OSError: if there is no such folder, and no such repository that can be reached.

    Example:

    ```python
    >>> model, processor = load_vila("VILA1.5-3b-s2")
    >>> inputs = processor(images=photograph, text="USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt")
    >>> answer = model.generate(**inputs, max_new_tokens=20)
    ```
    """
    layout = VilaLayout(checkpoint_folder(source, "source", FILES), image_aspect_ratio, token_order)
    for part in PARTS:
        weight_files(layout.folder / part)
    llm = layout.folder / "llm"
    before, after = layout.around_image
    tokenizer = _tokenizer(llm)
    name = conversation or layout.record.get("chat_template") or conversation_for(tokenizer, layout.is_new)
    template = chat_template(name, tokenizer, f"{before}{IMAGE_TOKEN}{after}")
    config = _config(layout, tokenizer)
    dtype = to_dtype(dtype or _dtype(layout))
    model = model_to_fill(config, dtype)
    filled = _load_vision(model, layout.vision_config, layout.folder / "vision_tower", dtype)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    with reading_part(layout.folder, "weights"):
        fill_model(model, _weights(layout.folder), lambda name: _new_names(layout, name), filled, tied)
    model.tie_weights()
    model.generation_config = _generation_config(llm, tokenizer, stop_tokens(name))

    tokenizer.chat_template = None
    plain = LlavaProcessor(_image_processor(layout), tokenizer, chat_template=template, image_token=IMAGE_TOKEN)
    tokens = token_layout(config.vision_config)
    return model, LlavaAdapter().make_processor(plain, config, tokens, plain.image_processor)


__all__ = ["FILES", "load_vila", "to_dtype"]
