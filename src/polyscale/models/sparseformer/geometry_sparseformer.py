"""RoIs and sampling of SparseFormer, as pure functions for images (2 dimensions) and videos (3).

A RoI is (left, top, right, bottom), or (left, top, start, right, bottom, end), in [0, 1] of the image; points are
(x, y) or (x, y, time) in the same unit. All of it is float32 whatever the dtype of the tokens: bfloat16 cannot tell
neighbouring pixels apart.
"""

import math

import torch
import torch.nn.functional as F

from .cpu_sparseformer import corner_cells


MAX_FREQUENCY = 128.0


def halves(sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last half of the last dimension. As `chunk`, for which ExecuTorch fixes the batch size."""
    return sides.unflatten(-1, (2, -1)).unbind(-2)


def initial_rois(num_latent_tokens: int, replicates: int | None = None) -> torch.Tensor:
    """The largest square grid of boxes half as wide as the image; what does not fit in it sees the whole image.

    With `replicates` (videos), that many copies, each over its own part of the time. (replicates * num_latent_tokens,
    4 or 6)
    """
    side = math.isqrt(num_latent_tokens)
    steps = torch.arange(side, dtype=torch.float32) / (side - 1) if side > 1 else torch.tensor([0.5])
    top, left = torch.meshgrid(steps * 0.5, steps * 0.5, indexing="ij")
    corner = torch.stack([left, top], dim=-1).flatten(0, 1)  # (side * side, 2), row by row
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(num_latent_tokens - side * side, -1)
    rois = torch.cat([torch.cat([corner, corner + 0.5], dim=-1), whole])
    return rois if replicates is None else inflate_rois(rois, replicates)


def inflate_rois(rois: torch.Tensor, replicates: int) -> torch.Tensor:
    """RoIs of an image (tokens, 4) -> of a video (replicates * tokens, 6), each copy over 1 / replicates of it."""
    num_tokens = rois.shape[0]
    centers = torch.linspace(0.5 / replicates, 1 - 0.5 / replicates, replicates).to(rois)
    centers = centers.repeat_interleave(num_tokens)[:, None]
    low, high = halves(rois.repeat(replicates, 1))
    return torch.cat([low, centers - 0.5 / replicates, high, centers + 0.5 / replicates], dim=-1)


def initial_offsets(num_points: int, dimensions: int) -> torch.Tensor:
    """Offsets of the sampling points in [-0.5, 0.5], (num_points * dimensions,): a regular grid where the points form
    a square, else (and along time) random.
    """
    offsets = torch.rand(num_points, dimensions) - 0.5
    side = math.isqrt(num_points)
    if side * side == num_points:
        steps = (torch.arange(side) + 0.5) / side - 0.5
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        offsets[:, :2] = torch.stack([x, y], dim=-1).flatten(0, 1)
    return offsets.flatten()


def adjust_rois(rois: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """Moves RoIs by `deltas` (shift in sizes, logarithm of scale), both (batch, tokens, 2 * dimensions)."""
    low, high = halves(rois)
    shift, log_scale = halves(deltas.float())
    size = (high - low).abs()
    center = (low + high) / 2 + shift * size
    half = size * log_scale.exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def place_points(rois: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sampling points in RoIs.

    Args:
        rois: (batch, tokens, 2 * dimensions).
        offsets: (batch, tokens, points, dimensions); standardised over the points here: three deviations are one size.

    Returns:
        (batch, tokens, points, dimensions)
    """
    offsets = offsets.float()
    deviation = offsets.std(dim=-2, keepdim=True)
    offsets = (offsets - offsets.mean(dim=-2, keepdim=True)) / (3 * (deviation + 1e-5))
    low, high = halves(rois.unsqueeze(-2))  # (batch, tokens, 1, dimensions)
    return (low + high) / 2 + offsets * (high - low)


class ClampGradient(torch.autograd.Function):
    """The identity; in the backward pass, clamps each entry of the gradient to +-`bound`, a 0-dim tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(points: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        return points.view_as(points)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (bound,) = ctx.saved_tensors
        return gradient.clamp(min=-bound, max=bound), None


def sample_features(features: torch.Tensor, points: torch.Tensor, padding: str) -> torch.Tensor:
    """Linear interpolation of features at points. On a CPU `cpu_sparseformer.sample_features_on_cpu` takes its place:
    another interpolation goes into both.

    Args:
        features: (batch, height, width, channels) or (batch, frames, height, width, channels), float32. Channels last:
            all the channels of a cell are then read at once.
        points: (batch, tokens, points, 2 or 3).
        padding: "zeros" or "border": what lies outside.

    Returns:
        (batch, tokens, points, channels)
    """
    is_video = points.shape[-1] == 3
    if is_video and torch.compiler.is_exporting():  # not every runtime has `grid_sample` for videos
        numbers, weights = corner_cells(points, features.shape[1:-1], padding)
        sampled = (features.flatten(0, -2)[numbers.long()] * weights[..., None]).sum(dim=1)
        return sampled.unflatten(0, points.shape[:3])
    grid = points * 2 - 1
    grid = grid[:, None] if is_video else grid
    sampled = F.grid_sample(features.movedim(-1, 1), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return sampled.flatten(2).transpose(1, 2).unflatten(1, points.shape[1:3])


@torch.no_grad()
def encode_rois(rois: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """Sines and cosines of RoI sides: (batch, tokens, sides) -> (batch, tokens, sides * num_frequencies). No gradient
    passes.

    For each side, the sines of the frequencies of even index, then the cosines of those of odd index.
    """
    frequencies = torch.linspace(0, math.log(MAX_FREQUENCY), num_frequencies, device=rois.device).exp()
    angles = rois.float()[..., None] * math.pi * frequencies
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


__all__ = [
    "ClampGradient",
    "adjust_rois",
    "encode_rois",
    "halves",
    "inflate_rois",
    "initial_offsets",
    "initial_rois",
    "place_points",
    "sample_features",
]
