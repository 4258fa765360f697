"""Which kernel computes attention on a CPU: torch's fused one, or the formula written out.

In float32 the fused kernel is the faster one. In bfloat16 it does not use the bfloat16 units of a processor with
AVX-512, and the formula, two batched products and a softmax, takes half of its time. A limit in tokens for each dtype
says up to which length the formula is taken; `measure_plain_attention_limit` finds it for the machine it runs on.

>>> from polyscale.layers.attention import measure_plain_attention_limit, set_plain_attention_limit
>>> set_plain_attention_limit(measure_plain_attention_limit(num_heads=12), torch.float32)
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
_LENGTHS = (4, 8, 16, 25, 36, 49, 64, 100, 144, 196, 256, 400, 576, 784, 1024)
# In bfloat16 the formula has some 30 us more to do than the fused kernel, whatever the shapes: not for few queries.
_FEWEST_QUERIES = {torch.bfloat16: 320}


def _default_limits() -> dict[torch.dtype, int]:
    """Processors with AMX are left to the fused kernel, which knows these units."""
    # torch tells what a processor has since 2.10
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    plain = capabilities.get("avx512_bf16", False) and not capabilities.get("amx_bf16", False)
    return {torch.bfloat16: 1024 if plain else 0}


# Training stores the formula's weights (batch, heads, tokens, tokens), and is no faster with it at 144 tokens.
_LONGEST_WITH_GRADIENT = 100
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_limits = _default_limits()


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
    batch_size, num_heads = query.shape[:2]
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    logits = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    output = logits.softmax(dim=-1) @ value
    return output.unflatten(0, (batch_size, num_heads)).transpose(1, 2), None


def attention_for(implementation: str, query: torch.Tensor, key: torch.Tensor, *, needs_fused: bool) -> Callable:
    """The attention function of a call.

    It is the configured one, except that "sdpa" on a CPU gives way to the formula where a sequence is no longer than
    the limit of its dtype, and than 100 tokens where a gradient will be asked for. Inside `torch.export` it is always
    the configured one: what is exported runs elsewhere.

    Args:
        implementation (`str`): see `attention_name`.
        query, key (`torch.Tensor`): (batch, heads, tokens, head width).
        needs_fused (`bool`): whether the formula cannot stand in: there is a mask or dropout.
    """
    limit = _limits.get(query.dtype, 0)
    if torch.is_grad_enabled() and query.requires_grad:
        limit = min(limit, _LONGEST_WITH_GRADIENT)
    if (
        implementation == "sdpa"
        and not needs_fused
        and query.device.type == "cpu"
        and not torch.compiler.is_exporting()
        and key.shape[2] <= limit
        and (torch.compiler.is_compiling() or query.shape[:3].numel() >= _FEWEST_QUERIES.get(query.dtype, 0))
    ):
        return plain_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def plain_attention_limit(dtype: torch.dtype = torch.float32) -> int:
    """The longest sequence, in tokens, for which the formula takes the place of torch's fused kernel on a CPU.

    At first it is 0, but 1024 for `torch.bfloat16` on a processor with AVX-512's bfloat16 units and without AMX.
    """
    return _limits.get(dtype, 0)


def set_plain_attention_limit(num_tokens: int, dtype: torch.dtype | None = None) -> None:
    """Sets `plain_attention_limit` for every model of this process.

    Args:
        num_tokens (`int`): 0 leaves every sequence to the fused kernel.
        dtype (`torch.dtype`, *optional*): of the models that it is for; float32, bfloat16 and float16 by default.

    Raises:
        ValueError: for a negative number, or a dtype that is not a floating-point one.
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(f"`num_tokens` must be an int of at least 0, got {num_tokens!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point torch.dtype or None, got {dtype!r}.")
    for each in _DTYPES if dtype is None else (dtype,):
        _limits[each] = num_tokens


@torch.inference_mode()
def measure_plain_attention_limit(
    num_heads: int = 12, head_dim: int = 64, batch_size: int = 1, dtype: torch.dtype = torch.float32, rounds: int = 30
) -> int:
    """Times both kernels on this machine at 4 to 1024 tokens, side by side, and stops where the formula loses.

    Args:
        num_heads (`int`, *optional*, defaults to 12): attention heads of the model.
        head_dim (`int`, *optional*, defaults to 64): width of a head.
        batch_size (`int`, *optional*, defaults to 1): images in a batch.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the model.
        rounds (`int`, *optional*, defaults to 30): timed calls of each kernel at each length.

    Returns:
        `int`: the longest of these lengths up to which the formula is faster by 3 % or more, 0 if at none. Lengths
            with so few queries that the formula is not taken do not count.
    """
    limit = 0
    for length in _LENGTHS:
        if batch_size * num_heads * length < _FEWEST_QUERIES.get(dtype, 0):
            continue
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
