"""SparseFormer models for videos.

SparseFormer: Sparse Visual Recognition via Limited Latent Tokens, arXiv 2304.03768. Faithful to the authors'
MediaSparseFormer (showlab/sparseformer), but for two faults of it: bootstrapped models keep their encoding of RoIs,
and the clamp of sampling gradients works.
"""

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...layers.call_checks import check_words, classification_loss
from ...layers.pooled_only import pooled_only_suffices
from ...utils.validation import check_video
from .configuration_sparseformer_video import SparseFormerVideoConfig
from .modeling_sparseformer import (
    SparseFormerClassifierOutput,
    SparseFormerEmbeddingOutput,
    SparseFormerModel,
    SparseFormerModelOutput,
    SparseFormerPreTrainedModel,
)


class SparseFormerVideoPreTrainedModel(SparseFormerPreTrainedModel):
    config: SparseFormerVideoConfig
    input_modalities = ("video",)


class SparseFormerVideoModel(SparseFormerVideoPreTrainedModel, SparseFormerModel):
    """SparseFormer on videos without a head: latent tokens of videos of any size and length."""

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) -> (batch, frames, rows, columns, feature_width); frame by frame"""
        check_video(pixel_values, self.config.num_channels)
        return self.features(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseFormerModelOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width), any number of frames, height and width.
            loss_scale, pooled_only, kwargs: as in `SparseFormerModel.forward`.

        Returns:
            `SparseFormerModelOutput`, RoIs and points with a time.

        Raises:
            ValueError: for a wrong shape of `pixel_values`.
        """
        return super().forward(pixel_values, loss_scale=loss_scale, pooled_only=pooled_only, **kwargs)


class SparseFormerForVideoClassification(SparseFormerVideoPreTrainedModel):
    """SparseFormer on videos with a linear classifier on the pooled tokens."""

    def __init__(self, config: SparseFormerVideoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.sparseformer = SparseFormerVideoModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseFormerClassifierOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width).
            labels: (batch,) class indices, or (batch, num_labels) for multi-label problems; gives `loss`.
            loss_scale, kwargs: as in `SparseFormerModel.forward`.

        Returns:
            `SparseFormerClassifierOutput`.
        """
        check_words(self, kwargs)
        pooled_only = pooled_only_suffices(self, kwargs)
        outputs = self.sparseformer(pixel_values, loss_scale=loss_scale, pooled_only=pooled_only, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = classification_loss(self, labels, logits, self.config, kwargs)
        return SparseFormerClassifierOutput.from_model(outputs, logits=logits, loss=loss)


class SparseFormerVideoModelWithProjection(SparseFormerVideoPreTrainedModel):
    """SparseFormer on videos with a linear projection of the pooled tokens into the space of a CLIP model."""

    def __init__(self, config: SparseFormerVideoConfig):
        super().__init__(config)
        self.sparseformer = SparseFormerVideoModel(config)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=config.projection_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseFormerEmbeddingOutput:
        """
        Args:
            pixel_values: (batch, frames, channels, height, width).
            loss_scale, kwargs: as in `SparseFormerModel.forward`.

        Returns:
            `SparseFormerEmbeddingOutput`, one embedding a video.
        """
        check_words(self, kwargs, self.sparseformer)
        outputs = self.sparseformer(pixel_values, loss_scale=loss_scale, **kwargs)
        return SparseFormerEmbeddingOutput(image_embeds=self.projection(outputs.pooler_output), **outputs)


__all__ = [
    "SparseFormerForVideoClassification",
    "SparseFormerVideoModel",
    "SparseFormerVideoModelWithProjection",
    "SparseFormerVideoPreTrainedModel",
]
