"""RoIs and sampling of SparseFormer, as pure functions for pictures (2 dimensions) and videos (3).

A RoI is (left, top, right, bottom), or (left, top, start, right, bottom, end), in [0, 1] of the picture; points are
(x, y) or (x, y, time) in the same unit. All of it is float32 whatever the dtype of the tokens: bfloat16 cannot tell
neighbouring pixels apart.
"""

import math

import torch
import torch.nn.functional as F


MAX_FREQUENCY = 128.0


def is_eager_cpu(tensor: torch.Tensor) -> bool:
    """Whether operations on a tensor run at once and on a CPU: what is faster there need not suit compilers."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def halves(sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last half of the last dimension. As `chunk`, for which ExecuTorch fixes the batch size."""
    return sides.unflatten(-1, (2, -1)).unbind(-2)


def initial_rois(num_latent_tokens: int, replicates: int | None = None) -> torch.Tensor:
    """The largest square grid of boxes half as wide as the picture; what does not fit in it sees the whole picture.

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
    """RoIs of a picture (tokens, 4) -> of a video (replicates * tokens, 6), each copy over 1 / replicates of it."""
    num_tokens = rois.shape[0]
    centers = torch.linspace(0.5 / replicates, 1 - 0.5 / replicates, replicates).to(rois)
    centers = centers.repeat_interleave(num_tokens)[:, None]
    low, high = halves(rois.repeat(replicates, 1))
    return torch.cat([low, centers - 0.5 / replicates, high, centers + 0.5 / replicates], dim=-1)


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
        offsets: (batch, tokens, points, dimensions); standardised over the points here, to three deviations a size.

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

    @staticmethod
    def forward(ctx, points: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(bound)
        return points.view_as(points)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (bound,) = ctx.saved_tensors
        return gradient.clamp(min=-bound, max=bound), None


def corner_cells(points: torch.Tensor, sizes: tuple[int, ...], padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The cells around each point, and their weights in a linear interpolation, rounded as `grid_sample` does.

    Args:
        points: (batch, tokens, points, dimensions).
        sizes: of the grid of features: (height, width) or (frames, height, width).
        padding: "zeros" or "border".

    Returns:
        Numbers of cells, counted through the batch, int32, and weights, both (batch * tokens * points, corners): the
        corner of lower coordinates first, those along x next to each other.
    """
    # Points in rows, axes and sides in front of them: operations run along rows.
    size = torch.tensor(sizes[::-1], device=points.device)[:, None]
    axes = points.flatten(0, -2).t().contiguous()
    grid = axes * 2 - 1
    if len(sizes) == 2:
        # `grid_sample` multiplies and subtracts with one rounding; so does float64, rounded to float32 in the end.
        position = ((grid + 1).double() * (size / 2) - 0.5).to(points.dtype)
    else:
        position = ((grid + 1) * size - 1) / 2
    if padding == "border":
        position = position.clamp(min=torch.zeros_like(position)).minimum(size - 1)
    low = position.floor()
    after = position - low
    cells = torch.stack([low, low + 1]).int()  # (2 sides, axes, points)
    # As integers, so that a point at infinity or NaN reads some cell of the grid too.
    inside = cells.clamp(min=0).minimum((size - 1).int())
    shares = torch.stack([1 - after, after]) * (cells == inside)
    pictures = torch.arange(points.shape[0], dtype=torch.int32, device=points.device)
    numbers = [pictures[:, None, None].expand(points.shape[:-1]).flatten()]
    weights = [torch.ones_like(after[0])]
    for axis in reversed(range(len(sizes))):
        numbers = [number * sizes[-1 - axis] + cell for number in numbers for cell in inside[:, axis]]
        weights = [weight * share for weight in weights for share in shares[:, axis]]
    return torch.stack(numbers, dim=1), torch.stack(weights, dim=1)


def sample_features(features: torch.Tensor, points: torch.Tensor, padding: str) -> torch.Tensor:
    """Linear interpolation of features at points.

    Args:
        features: (batch, height, width, channels) or (batch, frames, height, width, channels), float32. Channels last:
            all the channels of a cell are then read at once.
        points: (batch, tokens, points, 2 or 3).
        padding: "zeros" or "border": what lies outside.

    Returns:
        (batch, tokens, points, channels)
    """
    is_video = points.shape[-1] == 3
    if is_eager_cpu(features):
        # The same numbers as below, about twice as fast on a CPU, for videos four times (benchmarks/sparseformer.py).
        numbers, weights = corner_cells(points, features.shape[1:-1], padding)
        sampled = F.embedding_bag(numbers, features.flatten(0, -2), per_sample_weights=weights, mode="sum")
        return sampled.view(*points.shape[:3], -1)
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
    "corner_cells",
    "encode_rois",
    "halves",
    "inflate_rois",
    "initial_rois",
    "is_eager_cpu",
    "place_points",
    "sample_features",
]
