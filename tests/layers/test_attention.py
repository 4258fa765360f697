"""Which attention kernel runs on a CPU."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polyscale import FlexiViTConfig, FlexiViTForImageClassification
from polyscale.layers import attention


FUSED = ALL_ATTENTION_FUNCTIONS["sdpa"]
PLAIN = attention.plain_attention_forward


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    """Every test starts without limits, whatever the processor is, and leaves those of the process as they were."""
    monkeypatch.setattr(attention, "_limits", {})


def make_heads(tokens: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, tokens, 24).to(dtype).unflatten(-1, (3, 8)).transpose(1, 2) for _ in range(3)]


def chosen(tokens: int, implementation: str = "sdpa", dtype=torch.float32, requires_grad=False, **options):
    query, key, _ = (head.requires_grad_(requires_grad) for head in make_heads(tokens, dtype))
    return attention.attention_for(implementation, query, key, **{"needs_fused": False, **options})


def test_short_sequences_take_the_formula_where_the_limit_says_so():
    assert chosen(4) is FUSED
    attention.set_plain_attention_limit(16)
    assert attention.plain_attention_limit() == attention.plain_attention_limit(torch.float16) == 16
    assert [chosen(tokens) for tokens in (4, 16, 17)] == [PLAIN, PLAIN, FUSED]
    assert chosen(4, needs_fused=True) is FUSED
    assert chosen(4, "eager") is attention.eager_attention_forward
    for value in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_tokens"):
            attention.set_plain_attention_limit(value)
    for dtype in ("float32", torch.int8):
        with pytest.raises(ValueError, match="dtype"):
            attention.set_plain_attention_limit(4, dtype)


def test_each_dtype_has_a_limit_and_bfloat16_needs_enough_queries():
    attention.set_plain_attention_limit(100, torch.bfloat16)
    assert attention.plain_attention_limit() == 0
    assert chosen(100) is FUSED
    # 2 images x 3 heads x tokens: 320 queries are 54 tokens
    sizes = (53, 54, 100, 101)
    assert [chosen(size, dtype=torch.bfloat16) for size in sizes] == [FUSED, PLAIN, PLAIN, FUSED]


def test_with_a_gradient_the_formula_is_for_short_sequences_only():
    attention.set_plain_attention_limit(1024)
    assert [chosen(size, requires_grad=True) for size in (100, 101)] == [PLAIN, FUSED]
    attention.set_plain_attention_limit(60)
    assert [chosen(size, requires_grad=True) for size in (60, 61)] == [PLAIN, FUSED]
    attention.set_plain_attention_limit(1024)
    with torch.no_grad():
        assert chosen(101, requires_grad=True) is PLAIN


def test_gradients_of_the_formula_equal_those_of_the_fused_kernel():
    model, images = make_model().train(), torch.randn(2, 3, 32, 32)
    gradients = []
    for limit in (0, 64):
        attention.set_plain_attention_limit(limit)
        model.zero_grad()
        model(images, patch_size=8, labels=torch.tensor([1, 3])).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert any("q_proj" in name for name in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_formula_gives_gradients_for_each_sample():
    model, images, labels = make_model(), torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    attention.set_plain_attention_limit(64)
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        output = torch.func.functional_call(model, parameters, (image[None],), {"patch_size": 8})
        return nn.functional.cross_entropy(output.logits, label[None])

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for row in range(2):
        single = torch.func.grad(loss)(parameters, images[row], labels[row])
        torch.testing.assert_close({name: grad[row] for name, grad in by_sample.items()}, single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "expected"), [((), 0), (("avx512_bf16",), 1024), (("avx512_bf16", "amx_bf16"), 0), (None, 0)]
)
def test_the_first_limit_of_bfloat16_follows_the_processor(monkeypatch, units, expected):
    if units is None:  # torch below 2.10
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True), raising=False)
    assert attention._default_limits() == {torch.bfloat16: expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_equals_the_fused_kernel(dtype):
    module = nn.Identity().eval()
    module.is_causal = False
    outputs = [kernel(module, *make_heads(16, dtype), None, scaling=0.3)[0] for kernel in (PLAIN, FUSED)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def make_model() -> FlexiViTForImageClassification:
    torch.manual_seed(0)
    config = FlexiViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, num_labels=5)
    return FlexiViTForImageClassification(config).eval()


def test_a_model_gives_the_same_whatever_the_limit():
    model, images = make_model(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(images, patch_size=8).logits
        attention.set_plain_attention_limit(64)
        plain = model(images, patch_size=8).logits
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images, patch_size=8).logits, fused, rtol=1e-5, atol=1e-5)


def test_what_is_exported_keeps_the_configured_kernel():
    attention.set_plain_attention_limit(64)
    program = torch.export.export(make_model(), (torch.randn(2, 3, 32, 32),), strict=False)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in called
    assert "aten.softmax.int" not in called


def test_in_bfloat16_the_formula_is_as_near_to_float32_as_the_fused_kernel_up_to_one_rounding_of_the_logits():
    heads = [head.double() for head in make_heads(64, torch.bfloat16)]
    module = nn.Identity().eval()
    module.is_causal = False
    exact = FUSED(module, *heads, None, scaling=0.35)[0]
    values = [head.to(torch.bfloat16) for head in heads]
    plain, fused = (kernel(module, *values, None, scaling=0.35)[0].double() for kernel in (PLAIN, FUSED))
    assert (fused - exact).norm() / exact.norm() < 0.005
    assert (plain - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), 0), ((2.0, 1.0), 1024)])
def test_the_measured_limit_follows_the_faster_kernel(monkeypatch, seconds, expected):
    ticks = [tick for duration in seconds for tick in (0.0, duration)]
    clock = iter(ticks * 1000)
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    assert attention.measure_plain_attention_limit(num_heads=2, head_dim=4, rounds=3) == expected
