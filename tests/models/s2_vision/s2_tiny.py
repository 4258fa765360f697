"""Registration of S2 and tiny models to wrap."""

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from polyscale.models.flexivit import FlexiViTConfig
from polyscale.models.quadtree_vit import QuadtreeViTConfig, QuadtreeViTModel
from polyscale.models.s2_vision import (
    S2ImageProcessor,
    S2ImageProcessorPil,
    S2VisionBackbone,
    S2VisionConfig,
    S2VisionForImageClassification,
    S2VisionWrapper,
)


AutoConfig.register("quadtree_vit", QuadtreeViTConfig, exist_ok=True)
AutoModel.register(QuadtreeViTConfig, QuadtreeViTModel, exist_ok=True)
AutoConfig.register("s2_vision", S2VisionConfig, exist_ok=True)
AutoModel.register(S2VisionConfig, S2VisionWrapper, exist_ok=True)
AutoModelForImageClassification.register(S2VisionConfig, S2VisionForImageClassification, exist_ok=True)
AutoBackbone.register(S2VisionConfig, S2VisionBackbone, exist_ok=True)
AutoImageProcessor.register(
    S2VisionConfig,
    image_processor_classes={"torchvision": S2ImageProcessor, "pil": S2ImageProcessorPil},
    exist_ok=True,
)

ENCODER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
PLAIN = {**ENCODER, "patch_size": 8}
WIDE = {**PLAIN, "intermediate_size": 24}

BASES = {
    "clip": lambda: CLIPVisionConfig(**WIDE),
    "siglip": lambda: SiglipVisionConfig(**WIDE),
    "vit": lambda: ViTConfig(**WIDE),
    "deit": lambda: DeiTConfig(**WIDE),
    "dinov2": lambda: Dinov2Config(**PLAIN),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**PLAIN, num_register_tokens=2),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64),
    "flexivit": lambda: FlexiViTConfig(**ENCODER, base_patch_size=8),
}


def make_base(name: str) -> torch.nn.Module:
    """A tiny model to wrap, with random weights that are the same in every call."""
    torch.manual_seed(0)
    return AutoModel.from_config(BASES[name]()).eval()
