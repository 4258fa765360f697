"""What SparseFormer computes differently on a CPU, for speed: attention of many thin heads, and sampling.

Values and gradients are those of the plain operations, rounding apart, gradients of gradients included. One switch
turns all of it off: the config's `cpu_kernels`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .configuration_sparseformer import SparseFormerConfig


# Heads up to this width: torch's fused attention takes two to three times as long for them.
MAX_THIN_HEAD = 31
# Attention weights at a time: a cache holds them.
_WEIGHTS = 2**20


def uses_cpu_kernels(config: SparseFormerConfig, tensor: torch.Tensor) -> bool:
    """Whether the operations of this file take the place of the plain ones: eagerly on a CPU.

    Compilers and the transforms of `torch.func` (`vmap`, `jvp`) see the plain operations, whose rules they know.
    """
    return (
        config.cpu_kernels
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        # Private, but what `torch.autograd.Function` itself asks; there is no public question.
        and not torch._C._are_functorch_transforms_active()
    )


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float
) -> Iterator[tuple[tuple[int, slice], torch.Tensor, torch.Tensor]]:
    """Goes through the images, and through parts of the heads where there are too many weights.

    Args:
        query, key: (batch, heads, head_dim, tokens).

    Yields:
        Which image and heads; their weights (heads, keys, queries); memory of the same shape, free to use. Both are
        overwritten in the next step: fresh memory takes longer to get than to compute into.
    """
    batch, num_heads, _, num_tokens = query.shape
    num_parts = -(-num_heads * num_tokens**2 // _WEIGHTS)
    part_size = -(-num_heads // num_parts)
    buffers = query.new_empty(2, part_size, num_tokens, num_tokens)
    for image in range(batch):
        for first in range(0, num_heads, part_size):
            part = image, slice(first, first + part_size)
            scores, weights = buffers[:, : num_heads - first]
            torch.bmm(key[part].transpose(1, 2) * scaling, query[part], out=scores)
            torch.softmax(scores, dim=1, out=weights)
            yield part, weights, scores


def _split(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(batch, tokens, 3, heads, head_dim) -> query, key and value, each (batch, heads, head_dim, tokens)"""
    return qkv.permute(2, 0, 3, 4, 1).unbind(0)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Products of few and short rows are many times slower in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class ThinAttention(torch.autograd.Function):
    """Attention: `apply(qkv, scaling)`, (batch, tokens, 3, heads, head_dim) -> (batch, tokens, heads, head_dim).

    A product is several times faster if the rows of its result are long: all results here are (..., head_dim,
    tokens). The backward pass computes the weights again instead of storing them. Half precision is computed in
    float32.
    """

    @staticmethod
    def forward(qkv: torch.Tensor, scaling: float) -> torch.Tensor:
        query, key, value = _split(_at_least_float32(qkv))
        batch, num_heads, head_dim, num_tokens = query.shape
        output = query.new_empty(batch, num_tokens, num_heads, head_dim)
        attended = output.permute(0, 2, 3, 1)
        for part, weights, _ in _attention_weights(query, key, scaling):
            attended[part] = torch.bmm(value[part], weights)
        return output.to(qkv.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        qkv, ctx.scaling = inputs
        ctx.save_for_backward(qkv, output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        qkv, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph`: operations that autograd can follow
            return _attention_gradient(qkv, gradient, ctx.scaling), None
        dtype = qkv.dtype
        qkv, output, gradient = (_at_least_float32(tensor) for tensor in (qkv, output, gradient))
        gradients = torch.empty_like(qkv)
        query, key, value = _split(qkv)
        to_query, to_key, to_value = _split(gradients)
        # Each weight's gradient less the mean, by the weights, of those of its query.
        mean = (output * gradient).sum(dim=-1).transpose(1, 2).unsqueeze(2)
        gradient = gradient.permute(0, 2, 3, 1)
        for part, weights, buffer in _attention_weights(query, key, ctx.scaling):
            to_value[part] = torch.bmm(gradient[part], weights.transpose(1, 2))
            scores = torch.bmm(value[part].transpose(1, 2), gradient[part], out=buffer)
            scores.sub_(mean[part]).mul_(weights).mul_(ctx.scaling)
            to_query[part] = torch.bmm(key[part], scores)
            to_key[part] = torch.bmm(query[part], scores.transpose(1, 2))
        return gradients.to(dtype), None


def _attention_gradient(qkv: torch.Tensor, gradient: torch.Tensor, scaling: float) -> torch.Tensor:
    """The gradient of `qkv` by operations that are differentiable themselves."""
    query, key, value = _split(_at_least_float32(qkv))
    gradient = _at_least_float32(gradient).permute(0, 2, 3, 1)
    weights = (key.transpose(2, 3) @ query * scaling).softmax(dim=2)  # (batch, heads, keys, queries)
    scores = value.transpose(2, 3) @ gradient
    scores = scaling * weights * (scores - (scores * weights).sum(dim=2, keepdim=True))
    parts = (key @ scores, query @ scores.transpose(2, 3), gradient @ weights.transpose(2, 3))
    return torch.stack(parts).permute(1, 4, 0, 2, 3).to(qkv.dtype)


def corner_cells(points: torch.Tensor, sizes: tuple[int, ...], padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The cells around each point, and their weights in a linear interpolation.

    Args:
        points: (batch, tokens, points, dimensions).
        sizes: of the grid of features: (height, width) or (frames, height, width).
        padding: "zeros" or "border".

    Returns:
        Numbers of cells, counted through the batch, int32, and weights, both (batch * tokens * points, corners): the
        corner of lower coordinates first, those along x next to each other.
    """
    # One row for each axis: operations run along rows.
    size = torch.tensor(sizes[::-1], device=points.device)[:, None]
    position = points.flatten(0, -2).t().contiguous() * size - 0.5
    if padding == "border":
        position = position.clamp(min=torch.zeros_like(position)).minimum(size - 1)
    low = position.floor()
    after = position - low
    cells = torch.stack([low, low + 1]).int()  # (2 sides, axes, points)
    # As integers, so that a point at infinity or NaN reads some cell of the grid too.
    inside = cells.clamp(min=0).minimum((size - 1).int())
    shares = torch.stack([1 - after, after]) * (cells == inside)
    images = torch.arange(points.shape[0], dtype=torch.int32, device=points.device)
    numbers = [images[:, None, None].expand(points.shape[:-1]).flatten()]
    weights = [torch.ones_like(after[0])]
    for axis in reversed(range(len(sizes))):
        numbers = [number * sizes[-1 - axis] + cell for number in numbers for cell in inside[:, axis]]
        weights = [weight * share for weight in weights for share in shares[:, axis]]
    return torch.stack(numbers, dim=1), torch.stack(weights, dim=1)


class TwiceDifferentiable(torch.autograd.Function):
    """`apply(sums, rows, numbers, weights)`: the identity on `sums`, what `embedding_bag` made of the others.

    Gradients go on to `embedding_bag`, fast but not differentiable itself. Where `create_graph` asks for gradients of
    gradients, they go to `rows` and `weights` instead, by operations that autograd can follow.
    """

    @staticmethod
    def forward(sums: torch.Tensor, rows: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return sums.view_as(sums)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return gradient, None, None, None
        rows, numbers, weights = ctx.saved_tensors
        gradient = gradient[:, None]  # (bags, 1, channels)
        shares = (weights[..., None] * gradient).flatten(0, 1)
        to_rows = torch.zeros_like(rows).index_add(0, numbers.flatten(), shares)
        return None, to_rows, None, (rows[numbers.long()] * gradient).sum(dim=-1)


def sample_features_on_cpu(features: torch.Tensor, points: torch.Tensor, padding: str) -> torch.Tensor:
    """`sample_features` by sums of weighted rows: about twice as fast on a CPU, four times for videos.

    Arguments and results: `geometry_sparseformer.sample_features`.
    """
    numbers, weights = corner_cells(points, features.shape[1:-1], padding)
    rows = features.flatten(0, -2)
    sums = F.embedding_bag(numbers, rows, per_sample_weights=weights, mode="sum")
    if sums.requires_grad:
        sums = TwiceDifferentiable.apply(sums, rows, numbers, weights)
    return sums.view(*points.shape[:3], -1)


__all__ = [
    "MAX_THIN_HEAD",
    "ThinAttention",
    "TwiceDifferentiable",
    "corner_cells",
    "sample_features_on_cpu",
    "uses_cpu_kernels",
]
