"""Which kernel computes attention on a CPU: torch's fused one, or the formula written out for short sequences.

The fused kernel is the faster one on most processors at every length. Where it is not, a limit in tokens says up to
which length the formula is taken; `measure_plain_attention_limit` finds it for the machine it runs on.

>>> from polyscale.layers.attention import measure_plain_attention_limit, set_plain_attention_limit
>>> set_plain_attention_limit(measure_plain_attention_limit(num_heads=12))
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


# The formula has to be this much faster before it is taken: differences below are noise.
_MARGIN = 1.03
_LENGTHS = (4, 8, 16, 25, 36, 49, 64)
_limit = 0


def attention_name(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that a model with this config calls: "sdpa", "eager", ..."""
    return config._attn_implementation


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Sets `attention_name` of a config, and of the configs inside it. Of a model, `model.set_attn_implementation`."""
    config._attn_implementation = name


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; query, key, value are (batch, heads, tokens, head width)."""
    weights = query @ key.transpose(2, 3) * scaling  # (batch, heads, tokens, tokens)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def plain_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """`eager_attention_forward` without mask and dropout, with as few copies as can be."""
    weights = ((query * scaling) @ key.transpose(2, 3)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


def attention_for(implementation: str, query: torch.Tensor, key: torch.Tensor, *, needs_fused: bool) -> Callable:
    """The attention function of a call.

    It is the configured one, except that "sdpa" on a CPU gives way to the formula where a sequence is no longer than
    the limit. Inside `torch.compile` and `torch.export` it is always the configured one.

    Args:
        implementation (`str`): see `attention_name`.
        query, key (`torch.Tensor`): (batch, heads, tokens, head width).
        needs_fused (`bool`): whether the formula cannot stand in: there is a mask, dropout or a gradient.
    """
    if (
        not torch.compiler.is_compiling()
        and implementation == "sdpa"
        and not needs_fused
        and key.shape[2] <= _limit
        and query.device.type == "cpu"
    ):
        return plain_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def plain_attention_limit() -> int:
    """The longest sequence, in tokens, for which the formula takes the place of torch's fused kernel on a CPU."""
    return _limit


def set_plain_attention_limit(num_tokens: int) -> None:
    """Sets `plain_attention_limit` for every model of this process.

    Args:
        num_tokens (`int`): 0, the value at first, leaves every sequence to the fused kernel.

    Raises:
        ValueError: for a negative number.
    """
    global _limit
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(f"`num_tokens` must be an int of at least 0, got {num_tokens!r}.")
    _limit = num_tokens


@torch.inference_mode()
def measure_plain_attention_limit(
    num_heads: int = 12, head_dim: int = 64, batch_size: int = 1, dtype: torch.dtype = torch.float32, rounds: int = 30
) -> int:
    """Times both kernels on this machine at 4 to 64 tokens, side by side.

    Args:
        num_heads (`int`, *optional*, defaults to 12): attention heads of the model.
        head_dim (`int`, *optional*, defaults to 64): width of a head.
        batch_size (`int`, *optional*, defaults to 1): images in a batch.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the model.
        rounds (`int`, *optional*, defaults to 30): timed calls of each kernel at each length.

    Returns:
        `int`: the longest of these lengths up to which the formula is faster by 3 % or more, 0 if at none.
    """
    limit = 0
    for length in _LENGTHS:
        query, key, value = (
            torch.randn(batch_size, length, num_heads * head_dim)
            .to(dtype)
            .unflatten(-1, (num_heads, head_dim))
            .transpose(1, 2)
            for _ in range(3)
        )
        kernels = (ALL_ATTENTION_FUNCTIONS["sdpa"], plain_attention_forward)
        module = nn.Identity().eval()
        module.is_causal = False
        ratios = []
        for _ in range(rounds):
            seconds = []
            for kernel in kernels:
                start = time.perf_counter()
                kernel(module, query, key, value, None, scaling=head_dim**-0.5)[0].flatten(2)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        if median(ratios) < _MARGIN:
            break
        limit = length
    return limit


__all__ = [
    "attention_for",
    "attention_name",
    "eager_attention_forward",
    "measure_plain_attention_limit",
    "plain_attention_limit",
    "set_attention_name",
    "set_plain_attention_limit",
]
