"""Vision models that let their user choose, at run time, how many visual tokens to spend on a picture.

Importing polyscale registers every family with the Auto classes of transformers:

    >>> import polyscale
    >>> from transformers import AutoModelForImageClassification, pipeline
    >>> model = AutoModelForImageClassification.from_pretrained(polyscale.bundled_checkpoint("flexivit-cifar10"))
"""

from importlib import import_module

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from .layers.resizing import interpolate_resize_patch_embed, pi_resize_patch_embed, resize_abs_pos_embed
from .models.flexivit import (
    FlexiViTBackbone,
    FlexiViTConfig,
    FlexiViTForImageClassification,
    FlexiViTImageProcessor,
    FlexiViTImageProcessorPil,
    FlexiViTModel,
)


__version__ = "0.1.0"

# Imported at first use: what they need is not needed by a model.
_LAZY = {
    "PatchSizeCallback": ".training.callbacks",
    "bundled_checkpoint": ".checkpoints",
    "convert_checkpoint": ".conversion",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def _register(config, model, classifier, backbone, image_processor, image_processor_pil) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageClassification.register(config, classifier, exist_ok=True)
    AutoBackbone.register(config, backbone, exist_ok=True)
    AutoImageProcessor.register(
        config,
        image_processor_classes={"torchvision": image_processor, "pil": image_processor_pil},
        exist_ok=True,
    )


_register(
    FlexiViTConfig,
    FlexiViTModel,
    FlexiViTForImageClassification,
    FlexiViTBackbone,
    FlexiViTImageProcessor,
    FlexiViTImageProcessorPil,
)

__all__ = [
    "FlexiViTBackbone",
    "FlexiViTConfig",
    "FlexiViTForImageClassification",
    "FlexiViTImageProcessor",
    "FlexiViTImageProcessorPil",
    "FlexiViTModel",
    "bundled_checkpoint",
    "convert_checkpoint",
    "interpolate_resize_patch_embed",
    "pi_resize_patch_embed",
    "resize_abs_pos_embed",
]
