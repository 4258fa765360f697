"""SparseFormer models.

SparseFormer: Sparse Visual Recognition via Limited Latent Tokens, arXiv 2304.03768, and Bootstrapping SparseFormers
from Vision Foundation Models, arXiv 2312.01987. Faithful to the authors' `sparseformer` library (showlab/sparseformer,
v1 and bootstrapped).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from ...layers.call_checks import CheckedModelMixin, check_words, classification_loss
from ...layers.pooled_only import pooled_only_suffices
from ...utils.transformers_internals import OutputRecorder, capture_outputs, merge_with_config_defaults
from ...utils.validation import check_pixel_values
from .configuration_sparseformer import SparseFormerConfig
from .geometry_sparseformer import initial_offsets, initial_rois
from .modeling_layers_sparseformer import (
    SparseFormerAttention,
    SparseFormerEmbeddings,
    SparseFormerFeatures,
    SparseFormerLayer,
    SparseFormerMatrixLinear,
    SparseFormerMixing,
    SparseFormerSampling,
    SparseFormerUnitNorm,
    SparseFormerZeroLinear,
)


logger = logging.get_logger(__name__)

_ROI_TABLE, _TOKEN_TABLE = "embeddings.rois", "embeddings.tokens"


@dataclass
class SparseFormerModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, tokens, hidden)`): after the final LayerNorm; CLS, if any,
            first. `None` with `pooled_only`.
        pooler_output (`torch.Tensor` of shape `(batch, hidden)`): what a head reads.
        hidden_states (`tuple`, on `output_hidden_states`): tokens in front of the first layer and after each layer.
        attentions (`tuple`, on `output_attentions`): (batch, heads, tokens, tokens) of each attention, repeats one by
            one.
        rois (`torch.Tensor` of shape `(batch, RoI tokens, 4)`): (left, top, right, bottom) in [0, 1], beyond it what
            lies outside of the image; of videos (..., 6), (left, top, start, right, bottom, end).
        all_rois (`tuple`, on `output_all_rois`): `rois` after each layer.
        sampling_points (`tuple`, on `output_sampling_points`): (batch, RoI tokens, points, 2 or 3), (x, y) or
            (x, y, time) in [0, 1], of each sampling, repeats one by one.
        sampling_rois (`tuple`, on `output_sampling_rois`): the RoIs that these points lie in.
    """

    rois: torch.Tensor | None = None
    all_rois: tuple[torch.Tensor, ...] | None = None
    sampling_points: tuple[torch.Tensor, ...] | None = None
    sampling_rois: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseFormerEmbeddingOutput(ModelOutput):
    """`image_embeds` (batch, projection_dim), not normalised; the rest is that of `SparseFormerModelOutput`."""

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    rois: torch.Tensor | None = None
    all_rois: tuple[torch.Tensor, ...] | None = None
    sampling_points: tuple[torch.Tensor, ...] | None = None
    sampling_rois: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseFormerClassifierOutput(ImageClassifierOutput):
    """`loss`, `logits` (batch, num_labels); `rois` and the fields after it are those of `SparseFormerModelOutput`."""

    rois: torch.Tensor | None = None
    all_rois: tuple[torch.Tensor, ...] | None = None
    sampling_points: tuple[torch.Tensor, ...] | None = None
    sampling_rois: tuple[torch.Tensor, ...] | None = None


class SparseFormerPreTrainedModel(CheckedModelMixin, PreTrainedModel):
    """Flags, weight initialisation and loading of SparseFormers."""

    config: SparseFormerConfig
    base_model_prefix = "sparseformer"
    old_names: ClassVar = {r"^classifier\.": "head."}
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseFormerEmbeddings", "SparseFormerFeatures", "SparseFormerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(SparseFormerLayer, index=0),
        "attentions": OutputRecorder(SparseFormerAttention, index=1),
        "all_rois": OutputRecorder(SparseFormerLayer, index=1),
        "sampling_points": OutputRecorder(SparseFormerSampling, index=1),
        "sampling_rois": OutputRecorder(SparseFormerSampling, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SparseFormerZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, SparseFormerMatrixLinear):
            init.zeros_(module.weight)
            matrices = [nn.init.xavier_uniform_(torch.empty(shape)).flatten() for shape in module.shapes]
            init.copy_(module.bias, torch.cat(matrices))
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            is_unit = isinstance(module, SparseFormerUnitNorm)
            init.constant_(module.weight, module.normalized_shape[0] ** -0.5 if is_unit else 1.0)
            init.zeros_(module.bias)
        elif isinstance(module, SparseFormerEmbeddings):
            replicates = self.config.replicates if self.config.roi_dimensions == 3 else None
            init.copy_(module.rois, initial_rois(self.config.num_latent_tokens, replicates))
            init.trunc_normal_(module.tokens, std=1.0)
            if module.cls_token is not None:
                init.normal_(module.cls_token)
        elif isinstance(module, SparseFormerLayer) and module.stage_embedding is not None:
            init.normal_(module.stage_embedding)
        elif isinstance(module, SparseFormerSampling):
            num_points, dimensions = self.config.num_sampling_points, self.config.roi_dimensions
            init.copy_(module.offset_bias, initial_offsets(num_points, dimensions))
        elif isinstance(module, SparseFormerMixing) and module.channel_bias is not None:
            init.zeros_(module.channel_bias)
            init.zeros_(module.spatial_bias)
        elif isinstance(module, SparseFormerModel) and module.loss_scale is not None:
            init.ones_(module.loss_scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers; besides, `num_latent_tokens` may differ from the checkpoint's if its tokens share an
        embedding. The RoIs then start anew, as in training (a warning says so).

        Raises:
            ValueError: for another `num_latent_tokens` where each token has its own embedding.
        """
        wanted = kwargs.get("num_latent_tokens", getattr(config, "num_latent_tokens", None))
        if wanted is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        mismatched = sorted(info["mismatched_keys"])
        stored = next((shape[0] for name, shape, _ in mismatched if name.endswith(_ROI_TABLE)), None)
        if stored is not None and any(name.endswith(_TOKEN_TABLE) for name, *_ in mismatched):
            raise ValueError(
                f"`num_latent_tokens` = {wanted} does not fit the checkpoint, whose {stored} tokens have an embedding "
                "each. Only checkpoints with `shared_token_embedding` can change it."
            )
        others = [entry for entry in mismatched if not entry[0].endswith(_ROI_TABLE)]
        if others and not may_mismatch:
            raise ValueError(f"The checkpoint does not fit the model: {', '.join(map(str, others))}.")
        if stored is not None:
            logger.warning(
                f"`num_latent_tokens` is {wanted}, and the checkpoint has {stored} tokens: their RoIs start anew, "
                "from a grid. Fine-tune the model, or expect a lower accuracy."
            )
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        """The early convolution: its output is the first that depends on weights."""
        return self.base_model.features.convolution

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.features.convolution = value

    def set_loss_scale(self, loss_scale: float) -> None:
        """Tells the clamp of sampling gradients the factor on the loss, a `GradScaler`'s, before each forward."""
        for module in self.modules():
            if isinstance(module, SparseFormerModel) and module.loss_scale is not None:
                module.loss_scale.fill_(loss_scale)


class SparseFormerModel(SparseFormerPreTrainedModel):
    """SparseFormer without a head: latent tokens of images of any size."""

    def __init__(self, config: SparseFormerConfig):
        super().__init__(config)
        self.features = SparseFormerFeatures(config)
        self.embeddings = SparseFormerEmbeddings(config)
        self.transitions = nn.ModuleDict()
        for index, (before, after) in enumerate(zip(config.widths, config.widths[1:], strict=False), start=1):
            if before != after:
                norm = [nn.LayerNorm(after, eps=config.layer_norm_eps)] if config.transition_norm else []
                self.transitions[str(index)] = nn.Sequential(nn.Linear(before, after), *norm)
        self.layers = nn.ModuleList(SparseFormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # A tensor, so that a compiled model reads its present value.
        loss_scale = torch.ones(()) if config.restrict_grad_norm else None
        self.register_buffer("loss_scale", loss_scale, persistent=False)
        self.post_init()

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the tokens sample: (batch, channels, height, width) -> (batch, rows, columns, feature_width)"""
        check_pixel_values(pixel_values, self.config.num_channels)
        return self.features(pixel_values)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseFormerModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images of any height and width;
                to a model for videos `(batch, frames, channels, height, width)`, of any number of frames.
            loss_scale (`torch.Tensor`, *optional*): 0-dim, the factor on the loss (of a `GradScaler`). Read only where
                `config.restrict_grad_norm`; when `None`, the value of `set_loss_scale`, which is 1 at first.
            pooled_only (`bool`, *optional*, defaults to `False`): leaves out of the last layer what `pooler_output`
                does not need; `last_hidden_state` is then `None`.
            kwargs: `output_hidden_states`, `output_attentions`, `output_all_rois`, `output_sampling_points`,
                `output_sampling_rois`.

        Returns:
            `SparseFormerModelOutput`.

        Raises:
            ValueError: for a wrong shape of `pixel_values`, or a word that is no argument.
        """
        check_words(self, kwargs)
        if self.config.pooling == "cls" and self.embeddings.cls_token is None:
            raise ValueError("`config.pooling='cls'` needs a CLS token, which this model has not: use 'mean'.")
        features = self.encode(pixel_values)
        tokens, rois = self.embeddings(features.shape[0])
        if not self.config.restrict_grad_norm:
            loss_scale = None
        elif loss_scale is None:
            loss_scale = self.loss_scale
        for index, layer in enumerate(self.layers):
            if str(index) in self.transitions:
                tokens = self.transitions[str(index)](tokens)
            if index == self.config.cls_token_layer:
                cls_token = self.embeddings.cls_token.expand(tokens.shape[0], 1, -1)
                tokens = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)
            is_last = index == len(self.layers) - 1
            pooling = self.config.pooling if pooled_only and is_last and layer.can_pool else None
            tokens, rois = layer(tokens, rois, features, loss_scale, pooling=pooling, **kwargs)
        # The head's LayerNorm follows the pooling; for a CLS token the order makes no difference.
        pooled = self.layernorm(tokens.mean(dim=1) if self.config.pooling == "mean" else tokens[:, 0])
        states = None if pooled_only else self.layernorm(tokens)
        return SparseFormerModelOutput(last_hidden_state=states, pooler_output=pooled, rois=rois)


class SparseFormerClassifierMixin:
    """A linear classifier on the pooled tokens of a `model_class`. Goes before `SparseFormerPreTrainedModel`."""

    model_class: type[SparseFormerModel]

    def __init__(self, config: SparseFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.sparseformer = self.model_class(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
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
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images of any height and width;
                to a model for videos `(batch, frames, channels, height, width)`, of any number of frames.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): class indices, or of shape `(batch, num_labels)`
                for multi-label problems; gives `loss`.
            loss_scale (`torch.Tensor`, *optional*): as in `SparseFormerModel.forward`.
            kwargs: outputs to record, as in `SparseFormerModel.forward`. Without any of them (and without
                `config.keep_all_tokens`) the last layer computes only what the head reads.

        Returns:
            `SparseFormerClassifierOutput`.

        Raises:
            ValueError: for a wrong shape of `pixel_values` or `labels`, or a word that is no argument.
        """
        check_words(self, kwargs)
        outputs = self.sparseformer(
            pixel_values, loss_scale=loss_scale, pooled_only=pooled_only_suffices(self, kwargs), **kwargs
        )
        logits = self.head(outputs.pooler_output)
        loss = classification_loss(self, labels, logits, self.config, kwargs)
        others = {name: value for name, value in outputs.items() if name not in ("last_hidden_state", "pooler_output")}
        return SparseFormerClassifierOutput(loss=loss, logits=logits, **others)


class SparseFormerProjectionMixin:
    """A linear projection of the pooled tokens of a `model_class` into the image-text space of a CLIP model. Goes
    before `SparseFormerPreTrainedModel`.
    """

    model_class: type[SparseFormerModel]

    def __init__(self, config: SparseFormerConfig):
        super().__init__(config)
        self.sparseformer = self.model_class(config)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=config.projection_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseFormerEmbeddingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images of any height and width;
                to a model for videos `(batch, frames, channels, height, width)`, of any number of frames.
            loss_scale (`torch.Tensor`, *optional*): as in `SparseFormerModel.forward`.
            pooled_only (`bool`, *optional*, defaults to `False`): as in `SparseFormerModel.forward`.
            kwargs: outputs to record, as in `SparseFormerModel.forward`.

        Returns:
            `SparseFormerEmbeddingOutput`; `image_embeds` compare with text embeddings after both are divided by their
            norm.

        Raises:
            ValueError: for a wrong shape of `pixel_values`, or a word that is no argument.
        """
        check_words(self, kwargs)
        outputs = self.sparseformer(pixel_values, loss_scale=loss_scale, pooled_only=pooled_only, **kwargs)
        return SparseFormerEmbeddingOutput(image_embeds=self.projection(outputs.pooler_output), **outputs)


class SparseFormerForImageClassification(SparseFormerClassifierMixin, SparseFormerPreTrainedModel):
    """SparseFormer with a linear classifier on the pooled tokens."""

    model_class = SparseFormerModel


class SparseFormerModelWithProjection(SparseFormerProjectionMixin, SparseFormerPreTrainedModel):
    """SparseFormer with a linear projection of the pooled tokens into the image-text space of a CLIP model."""

    model_class = SparseFormerModel


__all__ = [
    "SparseFormerClassifierMixin",
    "SparseFormerForImageClassification",
    "SparseFormerModel",
    "SparseFormerModelWithProjection",
    "SparseFormerPreTrainedModel",
    "SparseFormerProjectionMixin",
]
