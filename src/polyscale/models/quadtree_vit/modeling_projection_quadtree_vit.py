"""Quadtree ViT in the image-text space of a CLIP model: Learning Transferable Visual Models From Natural Language
Supervision (arXiv 2103.00020).

Faithful to transformers' `CLIPVisionModelWithProjection`, whose weights it takes over.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ...layers.call_checks import check_words
from .configuration_quadtree_vit import QuadtreeViTConfig
from .modeling_quadtree_vit import PatchScores, QuadtreeViTModel, QuadtreeViTPreTrainedModel


@dataclass
class QuadtreeViTEmbeddingOutput(ModelOutput):
    """`image_embeds` (batch, projection_dim), not normalised; the rest is that of `QuadtreeViTModelOutput`."""

    image_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_centers: torch.FloatTensor | None = None
    patch_sizes: torch.LongTensor | None = None
    token_mask: torch.BoolTensor | None = None
    split_scores: tuple[torch.FloatTensor, ...] | None = None


class QuadtreeViTModelWithProjection(QuadtreeViTPreTrainedModel):
    """Quadtree ViT with a linear projection of the pooled tokens into the image-text space of a CLIP model."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.quadtree_vit = QuadtreeViTModel(config)
        self.projection = nn.Linear(config.pooled_size, config.projection_dim, bias=config.projection_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        num_tokens: int | None = None,
        split_threshold: float | None = None,
        patch_scores: PatchScores | None = None,
        output_split_scores: bool = False,
        pooled_only: bool = False,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuadtreeViTEmbeddingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): normalised; height and width
                multiples of `config.max_patch_size`.
            num_tokens (`int`, *optional*): as in `QuadtreeViTModel.forward`, like the other arguments.
            split_threshold (`float`, *optional*): see there.
            patch_scores (*optional*): see there.
            output_split_scores (`bool`, *optional*, defaults to `False`): see there.
            pooled_only (`bool`, *optional*, defaults to `False`): see there.
            merge_tokens_to (`int`, *optional*): see there.
            kwargs: outputs to record, as in `QuadtreeViTModel.forward`.

        Returns:
            `QuadtreeViTEmbeddingOutput`; `image_embeds` compare with text embeddings after both are divided by their
            norm.

        Raises:
            ValueError: as `QuadtreeViTModel.forward`.
        """
        check_words(self, kwargs)
        outputs = self.quadtree_vit(
            pixel_values,
            num_tokens=num_tokens,
            split_threshold=split_threshold,
            patch_scores=patch_scores,
            output_split_scores=output_split_scores,
            pooled_only=pooled_only,
            merge_tokens_to=merge_tokens_to,
            **kwargs,
        )
        return QuadtreeViTEmbeddingOutput(image_embeds=self.projection(outputs.pooler_output), **outputs)


__all__ = ["QuadtreeViTEmbeddingOutput", "QuadtreeViTModelWithProjection"]
