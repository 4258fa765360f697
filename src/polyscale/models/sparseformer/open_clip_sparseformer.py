"""SparseFormer as the image side of a model of open_clip."""

import torch
from torch import nn

from .modeling_sparseformer import SparseFormerModelWithProjection


class SparseFormerOpenCLIPVisual(nn.Module):
    """A `SparseFormerModelWithProjection` as the `visual` of an open_clip model: pixels in, bare image embeddings out.

    Example:

    ```python
    >>> clip.visual = SparseFormerOpenCLIPVisual(model)  # clip: open_clip.create_model("ViT-B-16", ...)
    >>> clip.encode_image(pixel_values, normalize=True)
    ```
    """

    def __init__(self, model: SparseFormerModelWithProjection):
        super().__init__()
        self.model = model
        self.image_size = model.config.image_size
        self.output_dim = model.config.projection_dim

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """What open_clip calls; recomputes layers in the backward pass instead of storing them."""
        (self.model.activation_checkpointing_enable if enable else self.model.activation_checkpointing_disable)()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, projection_dim)"""
        return self.model(pixel_values, pooled_only=True).image_embeds


__all__ = ["SparseFormerOpenCLIPVisual"]
