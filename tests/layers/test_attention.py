"""Which attention kernel runs on a CPU."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polyscale import FlexiViTConfig, FlexiViTForImageClassification
from polyscale.layers import attention


@pytest.fixture(autouse=True)
def limit():
    """Every test starts and ends with the limit of a new process."""
    yield attention.set_plain_attention_limit(0)
    attention.set_plain_attention_limit(0)


def make_heads(tokens: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, tokens, 24).to(dtype).unflatten(-1, (3, 8)).transpose(1, 2) for _ in range(3)]


def chosen(tokens: int, implementation: str = "sdpa", **options):
    query, key, _ = make_heads(tokens)
    return attention.attention_for(implementation, query, key, **{"needs_fused": False, **options})


def test_short_sequences_take_the_formula_where_the_limit_says_so():
    fused, plain = ALL_ATTENTION_FUNCTIONS["sdpa"], attention.plain_attention_forward
    assert chosen(4) is fused
    attention.set_plain_attention_limit(16)
    assert attention.plain_attention_limit() == 16
    assert [chosen(tokens) for tokens in (4, 16, 17)] == [plain, plain, fused]
    assert chosen(4, needs_fused=True) is fused
    assert chosen(4, "eager") is attention.eager_attention_forward
    for value in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_tokens"):
            attention.set_plain_attention_limit(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_equals_the_fused_kernel(dtype):
    module = nn.Identity().eval()
    module.is_causal = False
    outputs = [
        kernel(module, *make_heads(16, dtype), None, scaling=0.3)[0]
        for kernel in (attention.plain_attention_forward, ALL_ATTENTION_FUNCTIONS["sdpa"])
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_a_model_gives_the_same_whatever_the_limit():
    torch.manual_seed(0)
    config = FlexiViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, num_labels=5)
    model, images = FlexiViTForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(images, patch_size=8).logits
        attention.set_plain_attention_limit(64)
        plain = model(images, patch_size=8).logits
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images, patch_size=8).logits, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), 0), ((2.0, 1.0), 64)])
def test_the_measured_limit_follows_the_faster_kernel(monkeypatch, seconds, expected):
    ticks = [tick for duration in seconds for tick in (0.0, duration)]
    clock = iter(ticks * 1000)
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    assert attention.measure_plain_attention_limit(num_heads=2, head_dim=4, rounds=3) == expected
