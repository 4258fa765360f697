import pytest
import torch
import torch.nn.functional as F
from polyscale.models.sparseformer.attention_sparseformer import ThinAttention

from polyscale.models.sparseformer import attention_sparseformer


def attend_plainly(qkv: torch.Tensor, scaling: float) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return ((query @ key.transpose(2, 3) * scaling).softmax(dim=-1) @ value).transpose(1, 2)


def random_qkv(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# A head at a time, three of five, all five of a picture.
@pytest.mark.parametrize("num_weights", [1, 3 * 7**2, 2**20])
def test_values_and_gradients_equal_the_formula(monkeypatch, num_weights):
    monkeypatch.setattr(attention_sparseformer, "_WEIGHTS", num_weights)
    qkv = random_qkv(2, 7, 3, 5, 4).requires_grad_()
    weights = random_qkv(2, 5, 7, 4).transpose(1, 2)
    results = []
    for attend in (ThinAttention.apply, attend_plainly):
        output = attend(qkv, 0.7)
        results.append((output, *torch.autograd.grad((output * weights).sum(), qkv)))
    torch.testing.assert_close(*results)
    assert results[0][0].shape == (2, 7, 5, 4)


# In bfloat16 the weights are rounded before the values are weighed, as in eager attention.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_torch_in_each_precision(dtype, tolerance):
    qkv = random_qkv(3, 9, 3, 4, 6, dtype=dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.4).transpose(1, 2)
    output = ThinAttention.apply(qkv, 0.4)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_large_scores_do_not_overflow():
    qkv = random_qkv(1, 5, 3, 2, 4, dtype=torch.float32) * 1e3
    torch.testing.assert_close(ThinAttention.apply(qkv, 1.0), attend_plainly(qkv, 1.0))


def test_gradients_of_frozen_inputs_are_not_asked_for():
    assert not ThinAttention.apply(random_qkv(1, 3, 3, 2, 4), 1.0).requires_grad


def test_refuses_to_be_differentiated_twice():
    qkv = random_qkv(1, 3, 3, 2, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(ThinAttention.apply(qkv, 1.0).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
