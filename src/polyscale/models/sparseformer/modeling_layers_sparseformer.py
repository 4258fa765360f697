"""The layers of a SparseFormer: early convolution, latent tokens, and the operations on them.

Papers and official code: see `modeling_sparseformer.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...layers.attention import attention_for, attention_name
from ...layers.encoder import DropPath
from .configuration_sparseformer import SparseFormerConfig
from .cpu_sparseformer import MAX_THIN_HEAD, ThinAttention, sample_features_on_cpu, uses_cpu_kernels
from .geometry_sparseformer import ClampGradient, adjust_rois, encode_rois, halves, place_points, sample_features


class SparseFormerUnitNorm(nn.LayerNorm):
    """A LayerNorm whose weights start at width ** -0.5: what it gives starts with a length of 1."""


class SparseFormerZeroLinear(nn.Linear):
    """A linear layer without bias whose weights start at zero."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class SparseFormerMatrixLinear(nn.Linear):
    """A linear layer that makes matrices; at first the same whatever its input, with xavier's distribution.

    Args:
        in_features: width of the input.
        shapes: of the matrices, flattened and concatenated in the output.
    """

    def __init__(self, in_features: int, *shapes: tuple[int, int]):
        super().__init__(in_features, sum(rows * columns for rows, columns in shapes))
        self.shapes = shapes


class SparseFormerFeatures(nn.Module):
    """Early convolution: the features that all samplings read, at a quarter of the image's height and width."""

    def __init__(self, config: SparseFormerConfig):
        super().__init__()
        self.convolution = nn.Conv2d(config.num_channels, config.feature_width, kernel_size=7, stride=2, padding=3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, rows, columns, feature_width), float32"""
        pixel_values = pixel_values.to(self.convolution.weight.dtype)
        if not torch.compiler.is_exporting():  # ExecuTorch knows channels first
            # Channels last all the way: the convolution, the pooling and the norm are each several times faster.
            pixel_values = pixel_values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        features = self.convolution(pixel_values)  # (batch, feature_width, height / 2, width / 2)
        # ReLU commutes with the maximum, and after it there is a quarter of the values.
        features = F.relu(F.max_pool2d(features, kernel_size=3, stride=2, padding=1), inplace=True)
        features = features.permute(0, 2, 3, 1).float()  # (batch, rows, columns, feature_width)
        return F.layer_norm(features, features.shape[-1:], eps=1e-5)


class SparseFormerEmbeddings(nn.Module):
    """The latent tokens that every image starts with, and their RoIs."""

    def __init__(self, config: SparseFormerConfig):
        super().__init__()
        num_vectors = 1 if config.shared_token_embedding else config.num_tokens
        self.num_tokens = config.num_tokens
        self.rois = nn.Parameter(torch.zeros(config.num_tokens, 2 * config.roi_dimensions))
        self.tokens = nn.Parameter(torch.zeros(num_vectors, config.widths[0]))
        has_cls = config.cls_token_layer is not None
        self.cls_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if has_cls else None

    def forward(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (batch, tokens, width) and RoIs (batch, tokens, 2 * dimensions), these in float32"""
        # Copies: a view of a parameter asks for a gradient even under `no_grad`, and these are outputs.
        tokens = self.tokens.expand(batch_size, self.num_tokens, -1).clone()
        return tokens, self.rois.float().expand(batch_size, -1, -1).clone()


class SparseFormerAttention(nn.Module):
    """Multi-head self-attention between the tokens."""

    def __init__(self, config: SparseFormerConfig, width: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads_for(width)
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, tokens: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, width) -> the same, or `num_queries` tokens only, the first; attention weights or None"""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # (batch, tokens, 3, heads, head_dim)
        if num_queries is None and self._is_thin(qkv):
            return self.o_proj(ThinAttention.apply(qkv, self.scaling).flatten(-2)), None
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, :num_queries]
        attention = attention_for(attention_name(self.config), query, key, needs_fused=False)
        output, weights = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights

    def _is_thin(self, qkv: torch.Tensor) -> bool:
        is_narrow = self.head_dim <= MAX_THIN_HEAD and attention_name(self.config) == "sdpa"
        return is_narrow and uses_cpu_kernels(self.config, qkv)


class SparseFormerMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: SparseFormerConfig, width: int, repeats: int):
        super().__init__()
        self.fc1 = nn.Linear(width, int(config.mlp_ratio * width))
        self.activation = ACT2FN[config.hidden_act if repeats == 1 else config.repeated_hidden_act]
        self.fc2 = nn.Linear(self.fc1.out_features, width)

    def forward(self, tokens: torch.Tensor, mean: bool = False) -> torch.Tensor:
        """(batch, tokens, width) -> the same shape; with `mean`, (batch, 1, width), the mean of its tokens"""
        hidden = self.activation(self.fc1(tokens))
        return self.fc2(hidden.mean(dim=1, keepdim=True) if mean else hidden)


class SparseFormerRoIAdjustment(nn.Module):
    """How a token wants to move its RoI. (batch, tokens, width) -> (batch, tokens, 2 * dimensions)"""

    def __init__(self, config: SparseFormerConfig, width: int):
        super().__init__()
        self.layernorm = SparseFormerUnitNorm(width, eps=config.layer_norm_eps)
        self.hidden = nn.Linear(width, width) if config.roi_adjustment == "mlp" else None
        self.activation = ACT2FN[config.repeated_hidden_act]
        self.deltas = SparseFormerZeroLinear(width, 2 * config.roi_dimensions)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.layernorm(tokens)
        if self.hidden is not None:
            tokens = self.activation(self.hidden(tokens))
        return self.deltas(tokens)


class SparseFormerPositionInjection(nn.Module):
    """Tells a token where its RoI is; in a video also when, from a start where time says nothing."""

    def __init__(self, config: SparseFormerConfig, width: int):
        super().__init__()
        self.num_frequencies = width // 4
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, width)
        is_video = config.roi_dimensions == 3
        self.time_projection = SparseFormerZeroLinear(2 * self.num_frequencies, width) if is_video else None

    def forward(self, rois: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, 2 * dimensions) -> (batch, tokens, width)"""
        dtype = self.layernorm.weight.dtype  # a quantizer may leave the projection without a weight
        if self.time_projection is None:
            return self.projection(self.layernorm(encode_rois(rois, self.num_frequencies).to(dtype)))
        low, high = halves(rois)
        space = encode_rois(torch.cat([low[..., :2], high[..., :2]], dim=-1), self.num_frequencies)
        time = encode_rois(torch.cat([low[..., 2:], high[..., 2:]], dim=-1), self.num_frequencies)
        return self.projection(self.layernorm(space.to(dtype))) + self.time_projection(time.to(dtype))


class SparseFormerSampling(nn.Module):
    """Reads the features at points that a token chooses in its RoI."""

    def __init__(self, config: SparseFormerConfig, width: int):
        super().__init__()
        self.config = config
        self.layernorm = SparseFormerUnitNorm(width, eps=config.layer_norm_eps)
        self.offsets = SparseFormerZeroLinear(width, config.num_sampling_points * config.roi_dimensions)
        self.offset_bias = nn.Parameter(torch.zeros(config.num_sampling_points * config.roi_dimensions))

    def forward(
        self,
        tokens: torch.Tensor,
        rois: torch.Tensor,
        features: torch.Tensor,
        loss_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (batch, tokens, points, feature_width), points (batch, tokens, points, dimensions), and `rois`"""
        offsets = self.offsets(self.layernorm(tokens)).float() + self.offset_bias.float()
        points = place_points(rois, offsets.unflatten(-1, (self.config.num_sampling_points, -1)))
        if loss_scale is not None:
            points = ClampGradient.apply(points, loss_scale / features.shape[-3])
        sample = sample_features_on_cpu if uses_cpu_kernels(self.config, features) else sample_features
        return sample(features, points, self.config.sampling_padding), points, rois


class SparseFormerMixing(nn.Module):
    """Adaptive mixing: a token makes the two matrices that mix its sampled features over channels and over points."""

    def __init__(self, config: SparseFormerConfig, width: int):
        super().__init__()
        channels, points, rows = config.feature_width, config.num_sampling_points, config.num_output_points
        inner = config.generator_width_for(width)
        self.channel_shape = (channels, channels)
        self.spatial_shape = (rows, points)
        self.layernorm = SparseFormerUnitNorm(width, eps=1e-5)
        self.generator_in = nn.Linear(width, inner)
        self.generator_out = SparseFormerMatrixLinear(inner, self.channel_shape, self.spatial_shape)
        self.channel_bias = nn.Parameter(torch.zeros(channels)) if config.mixing_bias else None
        self.spatial_bias = nn.Parameter(torch.zeros(rows)) if config.mixing_bias else None
        self.activation = ACT2FN[config.repeated_hidden_act]
        self.o_proj = nn.Linear(channels * rows, width)

    def make_matrices(self, generators: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, inner) -> (tokens, channels, channels) and (tokens, rows, points)"""
        matrices, size = self.generator_out(generators), math.prod(self.channel_shape)
        if torch.compiler.is_exporting():  # ExecuTorch's `split` fixes the size of the batch
            channel_mixing, spatial_mixing = matrices[:, :size], matrices[:, size:]
        else:  # the backward pass of a slice fills a tensor of the size of the whole with zeros
            channel_mixing, spatial_mixing = matrices.split([size, matrices.shape[1] - size], dim=1)
        return channel_mixing.unflatten(1, self.channel_shape), spatial_mixing.unflatten(1, self.spatial_shape)

    def mix(self, channel_mixing: torch.Tensor, spatial_mixing: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Matrices, and sampled (tokens, points, channels) -> (tokens, rows * channels)"""
        mixed = sampled.to(channel_mixing.dtype)
        if self.channel_bias is None:
            mixed = torch.bmm(spatial_mixing, torch.bmm(mixed, channel_mixing))
        else:
            mixed = self.activation(torch.baddbmm(self.channel_bias, mixed, channel_mixing))
            mixed = torch.baddbmm(self.spatial_bias[:, None], spatial_mixing, mixed)
        return self.activation(mixed).flatten(1)

    def forward(self, tokens: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Tokens (batch, tokens, width) and sampled (batch, tokens, points, channels) -> (batch, tokens, width)"""
        generators = self.generator_in(self.layernorm(tokens)).flatten(0, 1)
        mixed = self.mix(*self.make_matrices(generators), sampled.flatten(0, 1))
        return self.o_proj(mixed).unflatten(0, sampled.shape[:2])


class SparseFormerLayer(GradientCheckpointingLayer):
    """A list of operations, repeated. Tokens and RoIs -> tokens and RoIs, of the same shapes."""

    def __init__(self, config: SparseFormerConfig, index: int):
        super().__init__()
        self.config = config
        width, self.repeats, self.operations = config.widths[index], config.repeats[index], config.operations[index]
        self.roi_drop_path = config.roi_drop_path
        has_stage_embedding = config.stage_embedding and self.repeats > 1
        self.stage_embedding = nn.Parameter(torch.zeros(self.repeats, width)) if has_stage_embedding else None
        if "attn" in self.operations:
            self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.attention = SparseFormerAttention(config, width)
        if "mlp" in self.operations:
            self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp = SparseFormerMLP(config, width, self.repeats)
        if "roi_adj" in self.operations:
            self.roi_adjustment = SparseFormerRoIAdjustment(config, width)
        if "sampling_m" in self.operations:
            self.sampling = SparseFormerSampling(config, width)
            self.mixing = SparseFormerMixing(config, width)
        if "pe_inject" in self.operations:
            self.position_injection = SparseFormerPositionInjection(config, width)
        self.drop_paths = nn.ModuleList(DropPath(rate) for rate in config.drop_path_rates[index])

    @property
    def can_pool(self) -> bool:
        """Whether `forward` takes `pooling`."""
        return self.operations == ["attn", "mlp"] and self.repeats == 1

    def forward(
        self,
        tokens: torch.Tensor,
        rois: torch.Tensor,
        features: torch.Tensor,
        loss_scale: torch.Tensor | None = None,
        pooling: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, width)`).
            rois (`torch.Tensor` of shape `(batch, RoI tokens, 2 * dimensions)`).
            features (`torch.Tensor` of shape `(batch, rows, columns, feature_width)`): with frames after the batch in
                a video.
            loss_scale (`torch.Tensor`, *optional*): the factor on the loss, where gradients of points are clamped.
            pooling (`str`, *optional*): `"cls"` or `"mean"`, where `can_pool`: only what a head pools of the tokens is
                computed, and (batch, 1, width) comes back.

        Returns:
            Tokens and RoIs.
        """
        num_queries = 1 if pooling == "cls" else None
        for repeat, drop_path in enumerate(self.drop_paths):
            if self.stage_embedding is not None:
                tokens = tokens + self.stage_embedding[repeat]
            for operation in self.operations:
                if operation == "attn":
                    update, _ = self.attention(self.layernorm_before(tokens), num_queries=num_queries, **kwargs)
                    tokens = tokens[:, :num_queries] + drop_path(update)
                    del update  # the next operation takes its memory over
                elif operation == "mlp":
                    update = drop_path(self.mlp(self.layernorm_after(tokens), mean=pooling == "mean"))
                    tokens = (tokens.mean(dim=1, keepdim=True) if pooling == "mean" else tokens) + update
                    del update
                else:
                    tokens, rois = self._roi_operation(operation, tokens, rois, features, drop_path, loss_scale)
        return tokens, rois

    def _roi_operation(
        self,
        operation: str,
        tokens: torch.Tensor,
        rois: torch.Tensor,
        features: torch.Tensor,
        drop_path: DropPath,
        loss_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_prefix_tokens = tokens.shape[1] - rois.shape[1]  # CLS has no RoI
        located = tokens[:, num_prefix_tokens:] if num_prefix_tokens else tokens
        if operation == "roi_adj":
            deltas = self.roi_adjustment(located)
            return tokens, adjust_rois(rois, drop_path(deltas) if self.roi_drop_path else deltas)
        if operation == "sampling_m":
            sampled, _, _ = self.sampling(located, rois, features, loss_scale)
            located = located + drop_path(self.mixing(located, sampled))
        else:
            located = located + self.position_injection(rois)
        if num_prefix_tokens:
            located = torch.cat([tokens[:, :num_prefix_tokens], located], dim=1)
        return located, rois


__all__ = [
    "SparseFormerAttention",
    "SparseFormerEmbeddings",
    "SparseFormerFeatures",
    "SparseFormerLayer",
    "SparseFormerMLP",
    "SparseFormerMatrixLinear",
    "SparseFormerMixing",
    "SparseFormerPositionInjection",
    "SparseFormerRoIAdjustment",
    "SparseFormerSampling",
    "SparseFormerUnitNorm",
    "SparseFormerZeroLinear",
]
