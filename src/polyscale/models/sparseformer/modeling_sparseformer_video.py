"""SparseFormer models for videos.

SparseFormer: Sparse Visual Recognition via Limited Latent Tokens, arXiv 2304.03768. Faithful to the authors'
MediaSparseFormer (showlab/sparseformer), but for two faults of it: bootstrapped models keep their encoding of RoIs,
and the clamp of sampling gradients works.
"""

import torch

from ...utils.validation import check_video
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .modeling_sparseformer import (
    SparseFormerClassifierMixin,
    SparseFormerModel,
    SparseFormerPreTrainedModel,
    SparseFormerProjectionMixin,
)


class SparseFormerVideoPreTrainedModel(SparseFormerPreTrainedModel):
    """Flags of SparseFormers for videos."""

    config: SparseFormerVideoConfig
    input_modalities = ("video",)


class SparseFormerVideoModel(SparseFormerVideoPreTrainedModel, SparseFormerModel):
    """SparseFormer on videos without a head: latent tokens of videos of any size and length.

    `pixel_values` are (batch, frames, channels, height, width); RoIs and points have a time.
    """

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, frames, rows, columns, feature_width); frame by frame"""
        check_video(pixel_values, self.config.num_channels)
        return self.features(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])


class SparseFormerForVideoClassification(SparseFormerClassifierMixin, SparseFormerVideoPreTrainedModel):
    """SparseFormer on videos with a linear classifier on the pooled tokens."""

    model_class = SparseFormerVideoModel


class SparseFormerVideoModelWithProjection(SparseFormerProjectionMixin, SparseFormerVideoPreTrainedModel):
    """SparseFormer on videos with a linear projection of the pooled tokens into the space of a CLIP model."""

    model_class = SparseFormerVideoModel


__all__ = [
    "SparseFormerForVideoClassification",
    "SparseFormerVideoModel",
    "SparseFormerVideoModelWithProjection",
    "SparseFormerVideoPreTrainedModel",
]
