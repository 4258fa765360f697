"""Tiny VILA checkpoints in the published layout, with random weights."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .llava_tiny import make_tokenizer


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "a", "cat", "?", "USER:", "ASSISTANT:"]
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# As the code of VILA-1.5 wrote it (transformers 4.36), fields of training left out.
VILA_15 = {
    "architectures": ["LlavaLlamaModel"],
    "model_type": "llava_llama",
    "drop_path_rate": 0.0,
    "hidden_size": 24,
    "image_aspect_ratio": "resize",
    "interpolate_mode": "linear",
    "mm_hidden_size": 16,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "cls_patch",
    "mm_vision_select_layer": -2,
    "model_dtype": "torch.float32",
    "num_video_frames": 8,
    "resume_path": "./vila",
    "s2": False,
    "s2_max_split_size": 336,
    "s2_scales": "336,672,1008",
    "vision_resolution": -1,
}
S2 = {"s2": True, "s2_scales": "24,48", "s2_max_split_size": 24, "mm_hidden_size": 32}
# As the code of NVILA wrote it (transformers 4.46).
NVILA = {
    **{name: value for name, value in VILA_15.items() if name != "s2"},
    "dynamic_s2": True,
    "image_aspect_ratio": "dynamic_s2",
    "s2_scales": "24,48",
    "s2_max_split_size": 24,
    "s2_resize_output_to_scale_idx": -1,
    "min_tiles": 1,
    "max_tiles": 6,
    "mm_hidden_size": 32,
    "chat_template": None,
    "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
    "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
}


def make_qwen2_tokenizer() -> Qwen2Tokenizer:
    """Bytes, as Qwen2 has them, without merges; and the special tokens of NVILA."""
    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|im_start|>", "<|im_end|>", "<vila/sentinel>", "<image>", "<vila/video>"]
    return Qwen2Tokenizer(vocab=vocabulary, eos_token="<|im_end|>", additional_special_tokens=special)


def projector_tensors(kind: str, width: int, text_width: int) -> dict[str, torch.Tensor]:
    """The weights of a projector under the names of the official code, `nn.Sequential` with gaps."""
    if kind == "mlp2x_gelu":
        sizes = {0: (text_width, width), 2: (text_width, text_width)}
    elif kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        sizes = {1: (4 * width,), 2: (text_width, 4 * width), 4: (text_width, text_width)}
    else:
        widths = {"mlp_downsample_3x3_fix": [9, 3], "mlp_downsample_3x3_s2": [9, 3, 1, 1 / 3]}[kind]
        widths = [math.floor(width * factor) for factor in widths]
        sizes, place = {1: widths[:1]}, 2
        for before, after in pairwise(widths):
            sizes |= {place: (after, before), place + 2: (after,)}
            place += 3
        sizes |= {place: (text_width, widths[-1]), place + 2: (text_width, text_width)}
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for place, shape in sizes.items():
        tensors[f"layers.{place}.weight"] = 0.3 * torch.randn(*shape, generator=generator)
        tensors[f"layers.{place}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    return tensors


def shard(folder: Path, weights: dict[str, torch.Tensor], count: int = 3, kind: str = "safetensors") -> None:
    """Writes weights in shards, with their index."""
    suffix, stem = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    names, places = sorted(weights), {}
    for index in range(count):
        file = f"{stem}-{index + 1:05}-of-{count:05}.{suffix}"
        part = {name: weights[name].detach().clone() for name in names[index::count]}
        save_file(part, folder / file, {"format": "pt"}) if suffix != "bin" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    record = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(record))


def write_vila(
    folder: Path,
    record: dict | None = None,
    projector: str = "mlp_downsample",
    vision: str = "siglip",
    text: str = "llama",
    shards: str | None = "safetensors",
    words: list[str] = WORDS,
    **text_fields,
):
    """A checkpoint; returns its language model, its vision model and the tensors of its projector."""
    torch.manual_seed(0)
    record = {**VILA_15, **(record or {})}
    for part in ("llm", "vision_tower", "mm_projector"):
        (folder / part).mkdir(parents=True)
    tokenizer = make_tokenizer(words) if text == "llama" else make_qwen2_tokenizer()
    tokenizer.save_pretrained(folder / "llm")
    size = len(words) if text == "llama" else 256  # the published Qwen2 has no rows for <image> and its like
    fields = {**TEXT, "vocab_size": size, **text_fields}
    if text == "llama":
        llm = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    else:
        llm = Qwen2ForCausalLM(Qwen2Config(**fields)).eval()
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    llm.tie_weights()
    llm.config.save_pretrained(folder / "llm")
    settings = {**fields, "model_type": text, "architectures": [type(llm).__name__], "torch_dtype": "float32"}
    (folder / "llm" / "config.json").write_text(json.dumps({**settings, "tokenizer_padding_side": "right"}))
    old = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (folder / "llm" / "generation_config.json").write_text(json.dumps(old))
    weights = dict(llm.named_parameters())
    if shards is None:
        save_file({name: value.detach() for name, value in weights.items()}, folder / "llm" / "model.safetensors")
    else:
        shard(folder / "llm", weights, kind=shards)

    if vision == "siglip":
        tower, processor = SiglipVisionModel(SiglipVisionConfig(**VISION)), SiglipImageProcessor
        processor(size={"height": 24, "width": 24}).save_pretrained(folder / "vision_tower")
    else:
        tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
        crop = {"height": 24, "width": 24}
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=crop).save_pretrained(folder / "vision_tower")
    tower.eval().save_pretrained(folder / "vision_tower")
    published = {
        f"vision_model.{name.removeprefix('vision_model.')}": value.detach().clone()
        for name, value in tower.named_parameters()
    }
    save_file(published, folder / "vision_tower" / "model.safetensors", {"format": "pt"})

    tensors = projector_tensors(projector, record["mm_hidden_size"], fields["hidden_size"])
    save_file(tensors, folder / "mm_projector" / "model.safetensors")
    (folder / "mm_projector" / "config.json").write_text(
        json.dumps({"mm_projector_type": projector, "model_type": "v2l_projector"})
    )
    record |= {"llm_cfg": settings, "vision_tower_cfg": {}, "mm_projector_cfg": {"mm_projector_type": projector}}
    (folder / "config.json").write_text(json.dumps(record))
    return llm, tower, tensors
