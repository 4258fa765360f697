"""The SparseFormer that a training starts with."""

from typing import Any

from ...layers.token_budget import plain_size
from .configuration_sparseformer import SparseFormerConfig, v1_operations


_SMALL_IMAGE = 160  # shorter side in pixels up to which the published sizes are out of proportion


def _small(num_latent_tokens: int, width: int, num_layers: int) -> dict[str, Any]:
    return {
        "num_latent_tokens": num_latent_tokens,
        "widths": [width // 2] + [width] * (num_layers - 1),
        "repeats": [4] + [1] * (num_layers - 1),
        "operations": v1_operations(num_layers),
        "num_attention_heads": None,
        "attention_head_width": 32,
        "feature_width": 64,
        "num_sampling_points": 16,
    }


def training_config(
    image_size: tuple[int, int],
    num_channels: int = 3,
    preset: str | None = None,
    base: SparseFormerConfig | None = None,
    **options: Any,
) -> SparseFormerConfig:
    """A config to train with: a small one for small images, else SparseFormer v1 tiny.

    Args:
        image_size: (height, width) in pixels.
        num_channels: channels of an image.
        preset: a published variant; one that fits the images when None.
        base: the config of a checkpoint, which only `options` change.
        options: fields of the config, which go before all others.
    """
    if base is not None:
        return SparseFormerConfig.from_dict({**base.to_dict(), **options})
    fields: dict[str, Any] = {
        "image_size": plain_size(image_size),
        "num_channels": num_channels,
        "restrict_grad_norm": True,
    }
    if preset is not None:
        return SparseFormerConfig.preset(preset, **{**fields, **options})
    if min(image_size) <= _SMALL_IMAGE:
        fields |= _small(16, 192, 6) if min(image_size) <= 64 else _small(36, 256, 8)
    return SparseFormerConfig(**{**fields, **options})


__all__ = ["training_config"]
