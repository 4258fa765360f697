"""The parts of a SparseFormer: early convolution, latent tokens, and the layers of operations on them.

Papers and official code: see `modeling_sparseformer.py`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...layers.attention import eager_attention_forward
from ...layers.encoder import DropPath
from .attention_sparseformer import ThinAttention
from .configuration_sparseformer import SparseFormerConfig
from .geometry_sparseformer import (
    ClampGradient,
    adjust_rois,
    encode_rois,
    halves,
    is_eager_cpu,
    place_points,
    sample_features,
)


# Convolved values, or mixing parameters, made at a time on a CPU without gradients: larger blocks of memory go back to
# the operating system after each use, and the next use pays for their pages again.
_VALUES = 2**22


def _can_split(tensor: torch.Tensor) -> bool:
    """Whether to work through a batch in parts: on a CPU, without gradients."""
    return is_eager_cpu(tensor) and not torch.is_grad_enabled()


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
    """Early convolution: the features that all samplings read, at a quarter of the picture's height and width."""

    def __init__(self, config: SparseFormerConfig):
        super().__init__()
        self.convolution = nn.Conv2d(config.num_channels, config.feature_width, kernel_size=7, stride=2, padding=3)
        self.is_encoded = any("pe_inject" in operations for operations in config.operations)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, rows, columns, feature_width), float32"""
        if not _can_split(pixel_values):
            return self.encode(pixel_values)
        values = self.convolution.out_channels * math.prod(pixel_values.shape[2:])  # of four pictures
        parts = pixel_values.split(max(1, 4 * _VALUES // values))
        return torch.cat([self.encode(part) for part in parts])

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`forward` of a part of the batch."""
        kernel = self.convolution.weight
        if not torch.compiler.is_exporting():  # ExecuTorch knows channels first
            # Channels last all the way: the convolution, the pooling and the norm are each several times faster.
            kernel = kernel.to(memory_format=torch.channels_last)
        features = F.conv2d(pixel_values.to(kernel.dtype), kernel, self.convolution.bias, stride=2, padding=3)
        # ReLU commutes with the maximum, and after it there is a quarter of the values.
        features = F.relu(F.max_pool2d(features, kernel_size=3, stride=2, padding=1), inplace=True)
        features = features.permute(0, 2, 3, 1).float()  # (batch, rows, columns, feature_width)
        if not self.is_encoded or torch.compiler.is_exporting():  # ExecuTorch has no `var_mean`
            return F.layer_norm(features, features.shape[-1:], eps=1e-5)
        # Encodings of RoIs multiply a rounding of the last bit by hundreds: the same operations as the official code.
        variance, mean = torch.var_mean(features, dim=-1, correction=0, keepdim=True)
        return (features - mean) / (variance + 1e-5).sqrt()


class SparseFormerEmbeddings(nn.Module):
    """The latent tokens that every picture starts with, and their RoIs."""

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
        tokens = self.tokens.expand(batch_size, self.num_tokens, -1)
        return tokens, self.rois.float().expand(batch_size, -1, -1)


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
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights

    def _is_thin(self, qkv: torch.Tensor) -> bool:
        """Whether torch's fused kernel takes two to three times as long."""
        return self.config._attn_implementation == "sdpa" and self.head_dim < 32 and is_eager_cpu(qkv)


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
        dtype = self.projection.weight.dtype
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
        points, rois = points.expand(features.shape[0], -1, -1, -1), rois.expand(features.shape[0], -1, -1)
        if loss_scale is not None:
            points = ClampGradient.apply(points, loss_scale / features.shape[-3])
        return sample_features(features, points, self.config.sampling_padding), points, rois


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
        """
        Args:
            tokens: (batch, tokens, width), or (1, tokens, width) for all pictures.
            sampled: (batch, tokens, points, channels).

        Returns:
            (batch, tokens, width)
        """
        generators = self.generator_in(self.layernorm(tokens)).flatten(0, 1)
        if tokens.shape[0] < sampled.shape[0]:
            matrices = self.make_matrices(generators)
            mixed = torch.cat([self.mix(*matrices, picture) for picture in sampled])
        elif _can_split(tokens):
            num_parts = math.ceil(len(generators) * self.generator_out.out_features / _VALUES)
            parts = zip(generators.chunk(num_parts), sampled.flatten(0, 1).chunk(num_parts), strict=True)
            mixed = torch.cat([self.mix(*self.make_matrices(part), picture) for part, picture in parts])
        else:
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

    def forward(
        self,
        tokens: torch.Tensor,
        rois: torch.Tensor,
        features: torch.Tensor,
        loss_scale: torch.Tensor | None = None,
        pooling: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if pooling is not None:
            return self.pool(tokens, pooling, **kwargs), rois
        if self._is_shared(tokens, rois):
            tokens, rois = tokens[:1], rois[:1]
        for repeat, drop_path in enumerate(self.drop_paths):
            if self.stage_embedding is not None:
                tokens = tokens + self.stage_embedding[repeat]
            for operation in self.operations:
                if operation == "attn":
                    update, _ = self.attention(self.layernorm_before(tokens), **kwargs)
                    tokens = tokens + drop_path(update)
                elif operation == "mlp":
                    tokens = tokens + drop_path(self.mlp(self.layernorm_after(tokens)))
                else:
                    tokens, rois = self._roi_operation(operation, tokens, rois, features, drop_path, loss_scale)
        return tokens.expand(features.shape[0], -1, -1), rois.expand(features.shape[0], -1, -1)

    def _is_shared(self, tokens: torch.Tensor, rois: torch.Tensor) -> bool:
        """Whether all pictures have the same tokens and RoIs still, so that what comes before the first look at the
        features needs to be computed for one of them only.
        """
        return (
            is_eager_cpu(tokens)
            and tokens.shape[0] > 1
            and tokens.stride(0) == rois.stride(0) == 0
            and self.config._attn_implementation == "sdpa"  # others give the attention of each picture
            and not (self.training and self.drop_paths[0].rate)
        )

    @property
    def can_pool(self) -> bool:
        """Whether `forward` takes `pooling`."""
        return self.operations == ["attn", "mlp"] and self.repeats == 1

    def pool(self, tokens: torch.Tensor, pooling: str, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """What a head pools of the tokens that this layer makes, and none of the rest.

        Args:
            tokens: (batch, tokens, width).
            pooling: "cls", the first token, or "mean".

        Returns:
            (batch, 1, width)
        """
        (drop_path,) = self.drop_paths
        is_cls = pooling == "cls"
        update, _ = self.attention(self.layernorm_before(tokens), num_queries=1 if is_cls else None, **kwargs)
        tokens = (tokens[:, :1] if is_cls else tokens) + drop_path(update)
        update = self.mlp(self.layernorm_after(tokens), mean=not is_cls)
        return tokens.mean(dim=1, keepdim=True) + drop_path(update)

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
