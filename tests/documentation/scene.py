"""What the documentation's snippets name, tiny: checkpoints in folders with the hub's names, images."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import polyscale
from polyscale import SparseFormerConfig, SparseFormerImageProcessor, SparseFormerModelWithProjection

from ..llava.llava_tiny import CHAT, TEXT, make_text_config, make_tokenizer
from ..llava.test_convert import WORDS, write_lora
from ..llava.vila_tiny import S2, write_vila
from ..tiny_checkpoints import save_tiny_flexivit, save_tiny_sparseformer


CLASSES = ("bird", "cat", "dog")
ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def _photograph(name: str) -> Image.Image:
    file = next(file for file in polyscale.sample_photographs() if file.name.startswith(name))
    return Image.open(file).convert("RGB")


def write_images(root: Path) -> None:
    """`photograph.jpg`; `photographs/` with a folder for each class; `unlabelled/` without."""
    _photograph("cat").resize((320, 240)).save(root / "photograph.jpg")
    (root / "unlabelled").mkdir()
    for label in CLASSES:
        (root / "photographs" / label).mkdir(parents=True)
        image = _photograph(label).resize((64, 64))
        for index in range(8):
            crop = image.crop((4 * index, 2 * index, 4 * index + 32, 2 * index + 32))
            crop.save(root / "photographs" / label / f"{index}.png")
            if index < 2:
                crop.save(root / "unlabelled" / f"{label}_{index}.png")
    (root / "labels.json").write_text(json.dumps({label: f"LABEL_{index}" for index, label in enumerate(CLASSES)}))


def write_vit(folder: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(**ENCODER, image_size=224, patch_size=16, num_labels=len(CLASSES))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def _clip_vision(image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**ENCODER, image_size=image_size, patch_size=patch_size)


def _clip_images(image_size: int) -> CLIPImageProcessor:
    crop = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop)


def write_clip(folder: Path, image_size: int, patch_size: int) -> None:
    torch.manual_seed(0)
    text = {**ENCODER, "vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = _clip_vision(image_size, patch_size).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPProcessor(_clip_images(image_size), make_tokenizer()).save_pretrained(folder)


def write_llava(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=_clip_vision(336, 14), text_config=make_text_config(), image_token_index=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        _clip_images(336),
        make_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)


def write_paligemma(folder: Path) -> None:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**ENCODER, image_size=224, patch_size=14, vision_use_head=False)
    text = GemmaConfig(**TEXT, head_dim=12)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=4, projection_dim=24, hidden_size=24
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = SiglipImageProcessor(size={"height": 224, "width": 224}, image_seq_length=256)
    PaliGemmaProcessor(image_processor, make_tokenizer(), chat_template=CHAT).save_pretrained(folder)


def write_llava_lora(root: Path) -> None:
    """`llava-v1.5-7b-s2-lora` in the layout of the original code, its base language model and its CLIP."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(make_text_config(vocab_size=len(WORDS))).eval()
    base.save_pretrained(root / "vicuna-7b-v1.5")
    make_tokenizer(WORDS).save_pretrained(root / "vicuna-7b-v1.5")
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    clip = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=32, patch_size=8))
    clip.save_pretrained(root / "clip-vit-large-patch14-336")
    _clip_images(32).save_pretrained(root / "clip-vit-large-patch14-336")
    shapes = {"0.weight": (24, 48), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)}
    projector = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_lora((root, base, clip, projector))
    (root / "llava-lora").rename(root / "llava-v1.5-7b-s2-lora")


def write_sparseformers(root: Path) -> None:
    save_tiny_sparseformer(root / "sparseformer-v1-tiny")
    looking = ["attn", "roi_adj", "sampling_m", "mlp"]
    config = SparseFormerConfig(
        feature_width=8,
        num_latent_tokens=9,
        num_sampling_points=4,
        num_attention_heads=2,
        widths=[16, 16],
        repeats=[1, 1],
        operations=[looking, ["attn", "mlp"]],
        projection_dim=512,
    )
    SparseFormerModelWithProjection(config).save_pretrained(root / "sparseformer-clip-base")
    SparseFormerImageProcessor().save_pretrained(root / "sparseformer-clip-base")


def write_timm(folder: Path) -> None:
    """A folder as timm writes it for the hub."""
    import timm

    args = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": len(CLASSES)}
    model = timm.create_model("vit_base_patch16_224", pretrained=False, **args)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"architecture": "vit_base_patch16_224", "num_classes": len(CLASSES), "model_args": args}
    (folder / "config.json").write_text(json.dumps(record))


def write_scene(root: Path) -> Path:
    """Everything, in a new folder."""
    root.mkdir()
    write_images(root)
    write_vit(root / "google" / "vit-base-patch16-224")
    write_clip(root / "openai" / "clip-vit-base-patch16", 224, 16)
    write_clip(root / "openai" / "clip-vit-large-patch14-336", 336, 14)
    write_llava(root / "llava-hf" / "llava-1.5-7b-hf")
    write_paligemma(root / "google" / "paligemma-3b-mix-224")
    write_llava_lora(root)
    write_vila(root / "VILA1.5-3b-s2", S2)
    write_sparseformers(root)
    write_timm(root / "vit_base_patch16_224")
    save_tiny_flexivit(
        root / "my-model",
        id2label=dict(enumerate(CLASSES)),
        label2id={label: index for index, label in enumerate(CLASSES)},
    )
    polyscale.convert_checkpoint(str(root / "google" / "vit-base-patch16-224"), root / "my-flexivit")
    return root


def copy_scene(scene: Path, out: Path, without: tuple[str, ...] = ()) -> Path:
    """The scene for one page, without what its own snippets make."""
    shutil.copytree(scene, out)
    for name in without:
        shutil.rmtree(out / name)
    return out


__all__ = ["copy_scene", "write_scene"]
