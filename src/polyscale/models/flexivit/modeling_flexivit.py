"""FlexiViT: One Model for All Patch Sizes (arXiv 2212.08013).

Faithful to google-research/big_vision, `models/proj/flexi/vit.py` (JAX), and to timm's `flexivit_*`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.backbone import feature_maps_of
from ...layers.call_checks import check_words, classification_loss
from ...layers.encoder import (
    EncoderAttention,
    EncoderClassificationHead,
    EncoderPreTrainedModel,
    TokenPooler,
    make_encoder_layers,
)
from ...layers.encoding import run_layers, run_merging_layers
from ...layers.freezing import check_no_adapters, is_plain, thaw
from ...layers.packing import Padding
from ...layers.pooled_only import pooled_only_suffices
from ...layers.token_merging import check_nothing_merges
from ...utils.transformers_internals import capture_outputs, filter_output_hidden_states, merge_with_config_defaults
from ...utils.validation import check_pixel_values
from .configuration_flexivit import FlexiViTConfig
from .embeddings_flexivit import FlexiViTEmbeddings, PatchSize


@dataclass
class FlexiViTModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: (batch, num_prefix_tokens + num_tokens, hidden).
        pooler_output: (batch, pooled).
        token_mask: (batch, num_tokens), True for a real token; only where images have patch sizes of their own.
    """

    token_mask: torch.BoolTensor | None = None


class FlexiViTPreTrainedModel(EncoderPreTrainedModel):
    config: FlexiViTConfig
    base_model_prefix = "flexivit"
    _no_split_modules = ["FlexiViTEmbeddings", "EncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)

    def freeze_budget(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Makes the kernel and the positions of one budget once, and the three projections of each attention one
        product, for serving at that budget.

        They are kept until `unfreeze_budget()`, `train()`, loading a state dict, or another `freeze_budget`; they
        follow `.to()`, and are in no checkpoint. Calls at another image or patch size compute theirs as ever, and so
        does a call whose weights take gradients. Weights that are changed in place by other means are not seen.

        Args:
            image_size (`int` or `(height, width)`, *optional*): in pixels; `config.image_size` when `None`.
            patch_size (`int` or `(height, width)`, *optional*): in pixels; that of a call that names none when
                `None`. A call that names none keeps the config's.

        Raises:
            ValueError: for a patch that does not fit the image, a model in training mode, with adapters, or with
                weights that are quantised, offloaded or split over processes.
        """
        if self.training:
            raise ValueError("`freeze_budget` is for inference, and the model is in training mode: `model.eval()`.")
        check_no_adapters(self)
        patch_size = self.config.resolve_patch_size(patch_size)
        patch_grid = self.config.patch_grid_for(image_size, patch_size)
        embeddings = self.base_model.embeddings
        if not is_plain(embeddings.position_embeddings, embeddings.patch_embeddings.projection.weight):
            raise ValueError(
                "`freeze_budget` needs ordinary tensors as weights of the embeddings, and they are quantised, "
                "offloaded or split over processes."
            )
        with torch.inference_mode(False):  # what is kept may later take part in a backward pass
            embeddings.freeze(patch_size, patch_grid)
            for module in self.modules():
                if isinstance(module, EncoderAttention):
                    module.freeze()

    def unfreeze_budget(self) -> None:
        """Ends `freeze_budget`; without effect where nothing is frozen."""
        thaw(self)

    def draw_budget(self) -> dict[str, int | Sequence[int]]:
        """The budget of one training step for callers that need several forwards of the same one; none elsewhere."""
        embeddings = self.base_model.embeddings
        if not self.training or self.config.train_patch_sizes is None:
            return {}
        return {"patch_size": embeddings.resolve_patch_size(None)}

    def num_tokens_for(
        self, image_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> int:
        """How many tokens an image costs: see `FlexiViTConfig.num_tokens_for`."""
        return self.config.num_tokens_for(image_size, patch_size)

    def patch_size_for(self, image_size: int | Sequence[int] | None, num_tokens: int) -> int:
        """The patch size nearest to a token budget: see `FlexiViTConfig.patch_size_for`."""
        return self.config.patch_size_for(image_size, num_tokens)


class FlexiViTModel(FlexiViTPreTrainedModel):
    """FlexiViT without a head: tokens of images of any size, at any patch size."""

    def __init__(self, config: FlexiViTConfig):
        super().__init__(config)
        self.embeddings = FlexiViTEmbeddings(config)
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        )
        self.layers = make_encoder_layers(config)
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        )
        self.pooler = TokenPooler(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_size: PatchSize | None = None,
        pooled_only: bool = False,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiViTModelOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), any height and width.
            patch_size: int or (height, width) in pixels; or a list of one (height, width) for each image, whose tokens
                are padded to the longest and run as `config.pack_tokens` says. When None: in training drawn from
                `config.train_patch_sizes`, if there are any; otherwise `config.patch_size`, or
                `config.base_patch_size`.
            pooled_only: leaves out of the last layer the tokens that neither pooling nor head reads; those that
                are read, the first ones, are `last_hidden_state`. Without effect where the pooling reads all tokens.
            merge_tokens_to: patch tokens that are left after the last layer, similar ones merged on the way;
                `config.merge_tokens_to` when None.

        Returns:
            `last_hidden_state` (batch, num_prefix_tokens + num_tokens, hidden) and `pooler_output` (batch, pooled).

        Raises:
            ValueError: for a wrong shape of `pixel_values`, a patch size below 1 or larger than the image, or a number
                of merged tokens that the layers cannot reach.
        """
        check_words(self, kwargs)
        hidden_states, patch_grid = self.embeddings(pixel_values, patch_size)
        token_mask = padding = None
        if isinstance(patch_grid, list):
            counts = [rows * columns for rows, columns in patch_grid]
            device = hidden_states.device
            token_mask = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
            padding = Padding.behind_prefix(token_mask, self.config.num_prefix_tokens, counts)
        hidden_states = self.pre_layernorm(hidden_states)
        if merge_tokens_to is None:
            merge_tokens_to = self.config.merge_tokens_to
        if merge_tokens_to is not None:
            if padding is not None:
                raise ValueError("`merge_tokens_to` needs one `patch_size` for all images: padding would be merged.")
            num_prefix = self.config.num_prefix_tokens
            hidden_states, weights = run_merging_layers(
                self.layers,
                hidden_states,
                merge_tokens_to,
                num_prefix,
                num_merging=self.config.merge_layers,
                **kwargs,
            )
            hidden_states = self.layernorm(hidden_states)
            pooled = self.pooler(hidden_states, weights[:, num_prefix:])
            return FlexiViTModelOutput(last_hidden_state=hidden_states, pooler_output=pooled)
        num_queries = self.config.num_pooled_tokens if pooled_only else None
        hidden_states = run_layers(self.layers, hidden_states, self.config, padding, num_queries, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = self.pooler(hidden_states, token_mask)
        return FlexiViTModelOutput(last_hidden_state=hidden_states, pooler_output=pooled, token_mask=token_mask)


class FlexiViTForImageClassification(FlexiViTPreTrainedModel):
    """FlexiViT with a linear classifier on the pooled tokens."""

    def __init__(self, config: FlexiViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.flexivit = FlexiViTModel(config)
        self.head = EncoderClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patch_size: PatchSize | None = None,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch, num_labels) for multi-label problems; gives `loss`.
            patch_size: as in `FlexiViTModel.forward`.
            merge_tokens_to: see there.

        Returns:
            `logits` (batch, num_labels), and `loss` when `labels` are given.
        """
        check_words(self, kwargs)
        pooled_only = pooled_only_suffices(self, kwargs)
        outputs = self.flexivit(
            pixel_values,
            patch_size=patch_size,
            pooled_only=pooled_only,
            merge_tokens_to=merge_tokens_to,
            **kwargs,
        )
        logits = self.head(outputs.pooler_output, outputs.last_hidden_state)
        loss = classification_loss(self, labels, logits, self.config, kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class FlexiViTBackbone(BackboneMixin, FlexiViTPreTrainedModel):
    """FlexiViT as a backbone: feature maps (batch, hidden, rows, columns) of the layers in `config.out_features`."""

    def __init__(self, config: FlexiViTConfig):
        if config.patch_size is None:  # heads such as DPT ask for it
            config.patch_size = config.base_patch_size
        super().__init__(config)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        self.flexivit = FlexiViTModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_size: int | Sequence[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            patch_size: as in `FlexiViTModel.forward`.

        Returns:
            `feature_maps`: one (batch, hidden, rows, columns) per stage; with `config.reshape_hidden_states=False`
            (batch, tokens, hidden), prefix tokens included.
        """
        check_words(self, kwargs)
        check_pixel_values(pixel_values, self.config.num_channels)
        check_nothing_merges(self.config, "a backbone")
        patch_size = self.flexivit.embeddings.resolve_patch_size(patch_size)
        outputs = self.flexivit(pixel_values, patch_size=patch_size, **kwargs)
        patch_grid = self.config.patch_grid_for(pixel_values.shape[-2:], patch_size)

        def to_map(hidden_states: torch.Tensor) -> torch.Tensor:
            patches = hidden_states[:, self.config.num_prefix_tokens :]
            return patches.transpose(1, 2).unflatten(2, patch_grid)

        feature_maps = feature_maps_of(self, outputs.hidden_states, to_map, self.flexivit.layernorm)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "FlexiViTBackbone",
    "FlexiViTForImageClassification",
    "FlexiViTModel",
    "FlexiViTModelOutput",
    "FlexiViTPreTrainedModel",
]
