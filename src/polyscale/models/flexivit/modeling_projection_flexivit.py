"""FlexiViT in the image-text space of a CLIP model: Learning Transferable Visual Models From Natural Language
Supervision (arXiv 2103.00020).

Faithful to transformers' `CLIPVisionModelWithProjection`, whose weights it takes over.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ...layers.call_checks import check_words
from .configuration_flexivit import FlexiViTConfig
from .embeddings_flexivit import PatchSize
from .modeling_flexivit import FlexiViTModel, FlexiViTPreTrainedModel


@dataclass
class FlexiViTEmbeddingOutput(ModelOutput):
    """`image_embeds` (batch, projection_dim), not normalised; the rest is that of `FlexiViTModel`."""

    image_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    token_mask: torch.BoolTensor | None = None


class FlexiViTModelWithProjection(FlexiViTPreTrainedModel):
    """FlexiViT with a linear projection of the pooled tokens into the image-text space of a CLIP model."""

    def __init__(self, config: FlexiViTConfig):
        super().__init__(config)
        self.flexivit = FlexiViTModel(config)
        self.projection = nn.Linear(config.pooled_size, config.projection_dim, bias=config.projection_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_size: PatchSize | None = None,
        pooled_only: bool = False,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiViTEmbeddingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images of any height and width.
            patch_size (`int`, `(height, width)` or a list of one for each image, *optional*): as in
                `FlexiViTModel.forward`.
            pooled_only (`bool`, *optional*, defaults to `False`): see there.
            merge_tokens_to (`int`, *optional*): see there.
            kwargs: outputs to record, as in `FlexiViTModel.forward`.

        Returns:
            `FlexiViTEmbeddingOutput`; `image_embeds` compare with text embeddings after both are divided by their
            norm.

        Raises:
            ValueError: as `FlexiViTModel.forward`.
        """
        check_words(self, kwargs)
        outputs = self.flexivit(
            pixel_values, patch_size=patch_size, pooled_only=pooled_only, merge_tokens_to=merge_tokens_to, **kwargs
        )
        return FlexiViTEmbeddingOutput(image_embeds=self.projection(outputs.pooler_output), **outputs)


__all__ = ["FlexiViTEmbeddingOutput", "FlexiViTModelWithProjection"]
