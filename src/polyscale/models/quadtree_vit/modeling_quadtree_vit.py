"""Vision Transformers with Mixed-Resolution Tokenization (arXiv 2304.00287).

Faithful to TomerRonen34/mixed-resolution-vit, which published the tokenizers; the ViT behind them is the shared
encoder.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.backbone import feature_maps_of
from ...layers.call_checks import check_words, classification_loss
from ...layers.encoder import EncoderClassificationHead, EncoderPreTrainedModel, TokenPooler, make_encoder_layers
from ...layers.encoding import run_layers, run_merging_layers
from ...layers.packing import Padding
from ...layers.pooled_only import pooled_only_suffices
from ...layers.token_merging import check_nothing_merges
from ...utils.transformers_internals import capture_outputs, filter_output_hidden_states, merge_with_config_defaults
from .configuration_quadtree_vit import QuadtreeViTConfig
from .patch_scorers_quadtree_vit import check_scorer, scorer_fields
from .pyramid_quadtree_vit import ZeroLinear, dense_map
from .scoring_quadtree_vit import PatchScorer
from .tokenizing_quadtree_vit import PatchTokenizer, QuadtreeTokenizer, TokenizerOutput, VanillaTokenizer


PatchScores = Sequence[torch.Tensor] | torch.Tensor


@dataclass
class QuadtreeViTModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: (batch, num_prefix_tokens + num_tokens, hidden); tokens from coarse to fine, in raster order
            within a size.
        pooler_output: (batch, pooled).
        patch_centers: (batch, num_tokens, 2), (x, y) in pixels; 0 for padding.
        patch_sizes: (batch, num_tokens) in pixels; 0 for padding.
        token_mask: (batch, num_tokens), True for a real token.
        split_scores: with `output_split_scores=True`, one (batch, rows, columns) tensor for each size of patch that
            can be split.
    """

    patch_centers: torch.FloatTensor | None = None
    patch_sizes: torch.LongTensor | None = None
    token_mask: torch.BoolTensor | None = None
    split_scores: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class QuadtreeViTClassifierOutput(ImageClassifierOutput):
    """`logits` (batch, num_labels), `loss`, and the patches: fields as in `QuadtreeViTModelOutput`."""

    patch_centers: torch.FloatTensor | None = None
    patch_sizes: torch.LongTensor | None = None
    token_mask: torch.BoolTensor | None = None
    split_scores: tuple[torch.FloatTensor, ...] | None = None


class QuadtreeViTPreTrainedModel(EncoderPreTrainedModel):
    config: QuadtreeViTConfig
    base_model_prefix = "quadtree_vit"
    _no_split_modules = ["QuadtreeTokenizer", "VanillaTokenizer", "EncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, PatchTokenizer) and module.position_embeddings is not None:
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)

    def num_tokens_for(
        self, image_size: int | Sequence[int] | None = None, num_tokens: int | None = None
    ) -> int | None:
        """How many tokens an image costs: see `QuadtreeViTConfig.num_tokens_for`."""
        return self.config.num_tokens_for(image_size, num_tokens)

    def set_patch_scorer(self, scorer: PatchScorer) -> None:
        """Puts a scorer with its weights into the model and its config, so that both are saved.

        Raises:
            ValueError: if its patch sizes or its `reduction` are not the model's, there is nothing to score, or a
                checkpoint could not rebuild it.
        """
        config, tokenizer = self.config, self.base_model.embeddings
        check_scorer(scorer, config)
        if not isinstance(tokenizer, QuadtreeTokenizer):
            raise ValueError("All patches of this model have one size, so there is nothing to score.")
        for changed in (copy.copy(config), config):  # nothing changes where a field is refused
            for name, value in scorer.config_fields().items():
                setattr(changed, name, value)
        tokenizer.patch_scorer = scorer.to(tokenizer.patch_embeddings.projection.weight.device)
        tokenizer.scorer_fields = scorer_fields(config)


class QuadtreeViTModel(QuadtreeViTPreTrainedModel):
    """Quadtree ViT without a head: tokens of images whose height and width are multiples of the largest patch."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.embeddings = VanillaTokenizer(config) if config.num_levels == 1 else QuadtreeTokenizer(config)
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        )
        self.layers = make_encoder_layers(config)
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        )
        self.pooler = TokenPooler(config)
        self.post_init()

    def tokens_to_grid(
        self,
        tokens: torch.Tensor,
        outputs: QuadtreeViTModelOutput,
        image_size: tuple[int, int],
        layer: int | None = None,
    ) -> torch.Tensor:
        """Tokens of patches of several sizes as one token for each smallest patch, in raster order.

        Args:
            tokens (`torch.Tensor`): (batch, num_prefix_tokens + num_tokens, hidden).
            outputs (`QuadtreeViTModelOutput`): what the model said about the patches.
            image_size (`(height, width)`): of the images, in pixels.
            layer (`int`, *optional*): whose tokens these are, as counted in `hidden_states`; those of the last when
                `None`.

        Returns:
            `torch.Tensor`: (batch, num_prefix_tokens + smallest patches, hidden).
        """
        is_merged = self.config.merge_layer > 0 and self.config.num_levels > 1
        if is_merged and layer is not None and layer <= self.config.merge_layer:
            return tokens  # all smallest patches
        prefix, patches = tokens[:, : self.config.num_prefix_tokens], tokens[:, self.config.num_prefix_tokens :]
        maps = dense_map(
            patches,
            outputs["patch_centers"],
            outputs["patch_sizes"],
            image_size,
            self.config.min_patch_size,
            outputs.get("token_mask"),
        )
        return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: PatchScores | None = None,
        output_split_scores: bool = False,
        pooled_only: bool = False,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuadtreeViTModelOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised; height and width multiples of
                `config.max_patch_size`.
            num_tokens: tokens of every image, prefix tokens not counted: (height / max) (width / max) + 3 k; or a
                list, of one number for each image, padded to the longest.
            split_threshold: splits patches whose score is higher, so that each image has its own number of tokens,
                padded to the longest; with `num_tokens` too, that is the maximum, and all are padded to it. When
                neither is given, both are as the config says.
            patch_scores: scores to use instead of the scorer's: one (batch, rows, columns) tensor for each size of
                patch that can be split, largest first; or one map (batch, height, width), averaged to each grid.
            output_split_scores: whether the output holds the scores.
            pooled_only: leaves out of the last layer the tokens that neither pooling nor head reads; those that
                are read, the first ones, are `last_hidden_state`. Without effect where the pooling reads all tokens.
            merge_tokens_to: tokens that are left after the last layer, similar ones merged on the way;
                `config.merge_tokens_to` when None. Not for images with token counts of their own.

        Images with token counts of their own run as `config.pack_tokens` says.

        Raises:
            ValueError: for a wrong shape of `pixel_values`, an image size or a budget that no quadtree has (it names
                the nearest legal ones), scores of a wrong shape, or a number of merged tokens that the layers cannot
                reach.
        """
        check_words(self, kwargs)
        budget = {"num_tokens": num_tokens, "split_threshold": split_threshold, "patch_scores": patch_scores}
        tokens = self.embeddings(pixel_values, **budget)
        hidden_states = self.pre_layernorm(tokens.embeddings)
        first = 0
        if self.config.merge_layer and self.config.num_levels > 1:
            first = min(self.config.merge_layer, len(self.layers))
            for layer in self.layers[:first]:
                hidden_states = layer(hidden_states, **kwargs)
            tokens = self.embeddings.merge(hidden_states, tuple(pixel_values.shape[-2:]), **budget)
            hidden_states = tokens.embeddings
        if merge_tokens_to is None:
            merge_tokens_to = self.config.merge_tokens_to
        if merge_tokens_to is not None:
            return self._merged(tokens, hidden_states, first, merge_tokens_to, **kwargs)
        hidden_states = run_layers(
            self.layers[first:],
            hidden_states,
            self.config,
            padding=self.padding_of(tokens),
            num_queries=self.config.num_pooled_tokens if pooled_only else None,
            key_bias=self.key_bias_for(tokens),
            **kwargs,
        )
        hidden_states = self.layernorm(hidden_states)
        return QuadtreeViTModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states, self.token_weights_for(tokens)),
            patch_centers=tokens.patch_centers,
            patch_sizes=tokens.patch_sizes,
            token_mask=tokens.token_mask,
            split_scores=tokens.split_scores if output_split_scores else None,
        )

    def padding_of(self, tokens: TokenizerOutput) -> Padding | None:
        """Which tokens are real, prefix tokens included; None where all are."""
        if not tokens.is_padded:
            return None
        return Padding.behind_prefix(tokens.token_mask, self.config.num_prefix_tokens, tokens.counts)

    def areas_of(self, tokens: TokenizerOutput) -> torch.Tensor:
        """(batch, num_tokens) in smallest patches; 0 for padding."""
        return (tokens.patch_sizes // self.config.min_patch_size).square()

    def key_bias_for(self, tokens: TokenizerOutput) -> torch.Tensor | None:
        """What attention adds to the logits of each token, (batch, num_prefix_tokens + num_tokens): `area_attention`
        times the logarithm of its area. None where that is 0.
        """
        if not self.config.area_attention:
            return None
        bias = self.config.area_attention * self.areas_of(tokens).clamp(min=1).float().log()
        return F.pad(bias, (self.config.num_prefix_tokens, 0))

    def token_weights_for(self, tokens: TokenizerOutput) -> torch.Tensor | None:
        """Weights of the tokens in a mean, (batch, num_tokens); None where all are the same."""
        if self.config.area_pooling:
            return self.areas_of(tokens)
        return tokens.token_mask if tokens.is_padded else None

    def _merged(
        self, tokens: TokenizerOutput, hidden_states: torch.Tensor, first: int, merge_tokens_to: int, **kwargs
    ) -> QuadtreeViTModelOutput:
        """The layers from `first` on, merging tokens; the result has no patches, merged tokens have no place."""
        if tokens.is_padded:
            raise ValueError(
                "`merge_tokens_to` cannot be used with `split_threshold` or a list of `num_tokens`: images with token "
                "counts of their own are padded, and padding would be merged. Give one `num_tokens` alone."
            )
        num_prefix = self.config.num_prefix_tokens
        bias = self.key_bias_for(tokens)
        merging = self.config.merge_layers and self.config.merge_layers - first
        weights = self.token_weights_for(tokens)
        if weights is None and bias is not None:
            weights = torch.ones_like(tokens.patch_sizes)
        if weights is not None:
            weights = F.pad(weights, (num_prefix, 0), value=1)
        hidden_states, weights = run_merging_layers(
            self.layers[first:], hidden_states, merge_tokens_to, num_prefix, bias, merging, weights, **kwargs
        )
        hidden_states = self.layernorm(hidden_states)
        return QuadtreeViTModelOutput(
            last_hidden_state=hidden_states, pooler_output=self.pooler(hidden_states, weights[:, num_prefix:])
        )


class QuadtreeViTForImageClassification(QuadtreeViTPreTrainedModel):
    """Quadtree ViT with a linear classifier on the pooled tokens."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.quadtree_vit = QuadtreeViTModel(config)
        self.head = EncoderClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: PatchScores | None = None,
        output_split_scores: bool = False,
        merge_tokens_to: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuadtreeViTClassifierOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch, num_labels) for multi-label problems; gives `loss`.
            num_tokens: as in `QuadtreeViTModel.forward`, like the other arguments.
            split_threshold: see there.
            patch_scores: see there.
            output_split_scores: see there.
            merge_tokens_to: see there.
        """
        check_words(self, kwargs)
        outputs = self.quadtree_vit(
            pixel_values,
            num_tokens=num_tokens,
            split_threshold=split_threshold,
            patch_scores=patch_scores,
            output_split_scores=output_split_scores,
            merge_tokens_to=merge_tokens_to,
            pooled_only=pooled_only_suffices(self, kwargs),
            **kwargs,
        )
        logits = self.head(outputs.pooler_output, outputs.last_hidden_state)
        loss = classification_loss(self, labels, logits, self.config, kwargs)
        return QuadtreeViTClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_centers=outputs.patch_centers,
            patch_sizes=outputs.patch_sizes,
            token_mask=outputs.token_mask,
            split_scores=outputs.split_scores,
        )


class QuadtreeViTBackbone(BackboneMixin, QuadtreeViTPreTrainedModel):
    """Quadtree ViT as a backbone: dense feature maps, in which each token covers the area of its patch."""

    def __init__(self, config: QuadtreeViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        self.quadtree_vit = QuadtreeViTModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | Sequence[int] | None = None,
        split_threshold: float | None = None,
        patch_scores: PatchScores | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            num_tokens: as in `QuadtreeViTModel.forward`, like the other arguments.
            split_threshold: see there.
            patch_scores: see there.

        Returns:
            `feature_maps`: one (batch, hidden, height / min_patch_size, width / min_patch_size) per stage; with
            `config.reshape_hidden_states=False` one token for each of these places in raster order, behind the prefix
            tokens: (batch, num_prefix_tokens + places, hidden).
        """
        check_words(self, kwargs)
        check_nothing_merges(self.config, "a backbone")
        outputs = self.quadtree_vit(
            pixel_values, num_tokens=num_tokens, split_threshold=split_threshold, patch_scores=patch_scores, **kwargs
        )

        image_size = tuple(pixel_values.shape[-2:])

        dense = tuple(
            self.quadtree_vit.tokens_to_grid(states, outputs, image_size, layer)
            if stage in self.out_features
            else states
            for layer, (stage, states) in enumerate(zip(self.stage_names, outputs.hidden_states, strict=True))
        )

        def to_map(hidden_states: torch.Tensor) -> torch.Tensor:
            patches = hidden_states[:, self.config.num_prefix_tokens :]
            return patches.transpose(1, 2).unflatten(2, self.config.feature_grid_for(image_size))

        feature_maps = feature_maps_of(self, dense, to_map, self.quadtree_vit.layernorm)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "QuadtreeViTBackbone",
    "QuadtreeViTClassifierOutput",
    "QuadtreeViTForImageClassification",
    "QuadtreeViTModel",
    "QuadtreeViTModelOutput",
    "QuadtreeViTPreTrainedModel",
]
