"""Token merging against the paper's algorithm written out token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyscale.layers.token_merging import merge_schedule, merge_tokens, size_bias


def merge_one_by_one(hidden, metric, num_merged, sizes, num_prefix_tokens):
    """One image: hidden (tokens, width), metric (tokens, any), sizes (tokens,)."""
    if num_merged == 0:
        return hidden, sizes
    patches = list(range(num_prefix_tokens, len(hidden)))
    first, second = patches[::2], patches[1::2]
    metric = [row / row.norm() for row in metric]
    best = {one: max(second, key=lambda other, one=one: float(metric[one] @ metric[other])) for one in first}
    ranked = sorted(first, key=lambda one: -float(metric[one] @ metric[best[one]]))
    gone = ranked[:num_merged]
    tokens = [(hidden[index], sizes[index]) for index in range(num_prefix_tokens)]
    tokens += [(hidden[one], sizes[one]) for one in first if one not in gone]
    for other in second:
        members = [other, *(one for one in gone if best[one] == other)]
        size = sum(sizes[member] for member in members)
        tokens.append((sum(hidden[member] * sizes[member] for member in members) / size, size))
    return torch.stack([token for token, _ in tokens]), torch.stack([size for _, size in tokens])


@settings(max_examples=40, deadline=None)
@given(
    patches=st.integers(2, 12),
    prefix=st.integers(0, 2),
    share=st.floats(0, 1),
    sized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_merging_is_the_paper_s_pair_by_pair(patches, prefix, share, sized, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, prefix + patches, 5, generator=generator)
    metric = torch.randn(2, prefix + patches, 3, generator=generator)
    sizes = torch.randint(1, 9, (2, prefix + patches), generator=generator).float() if sized else None
    num_merged = round(share * (patches // 2))
    merged, new_sizes = merge_tokens(hidden, metric, num_merged, sizes, prefix)
    assert merged.shape[1] == prefix + patches - num_merged
    known = torch.ones(2, prefix + patches) if sizes is None else sizes
    for image in range(2):
        expected, expected_sizes = merge_one_by_one(hidden[image], metric[image], num_merged, known[image], prefix)
        torch.testing.assert_close(merged[image], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(new_sizes[image], expected_sizes)
    torch.testing.assert_close(new_sizes.sum(dim=1), known.sum(dim=1))


def test_gradients_are_the_reference_s():
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    metric = torch.randn(1, 9, 3)
    weights = torch.randn(6, 4, dtype=torch.float64)
    merged, _ = merge_tokens(hidden, metric, 3, None, 1)
    (actual,) = torch.autograd.grad((merged[0] * weights).sum(), hidden)
    reference, _ = merge_one_by_one(hidden[0], metric[0], 3, torch.ones(9, dtype=torch.float64), 1)
    (expected,) = torch.autograd.grad((reference * weights).sum(), hidden)
    torch.testing.assert_close(actual, expected)


def test_what_is_summed_with_the_sizes_is_summed_over_the_members():
    torch.manual_seed(0)
    hidden, metric = torch.randn(2, 9, 4), torch.randn(2, 9, 3)
    sizes, weights = torch.rand(2, 9) + 1, torch.rand(2, 9)
    both = merge_tokens(hidden, metric, 3, torch.stack([sizes, weights], dim=-1), 1)
    alone = merge_tokens(hidden, metric, 3, sizes, 1)
    torch.testing.assert_close(both.hidden_states, alone.hidden_states)
    torch.testing.assert_close(both.sizes[..., 0], alone.sizes)
    members = merge_tokens(torch.eye(9).expand(2, 9, 9), metric, 3, None, 1)  # which tokens each stands for
    expected = ((members.hidden_states > 0).float() @ weights[..., None])[..., 0]
    torch.testing.assert_close(both.sizes[..., 1], expected)


def test_sums_in_half_precision_stay_finite():
    torch.manual_seed(0)
    hidden, metric = torch.full((1, 8, 4), 3000.0, dtype=torch.float16), torch.randn(1, 8, 3)
    merged, sizes = merge_tokens(hidden, metric, 4, torch.full((1, 8), 16.0))
    assert merged.dtype == torch.float16
    assert float(sizes.sum()) == 128
    torch.testing.assert_close(merged, hidden[:, :4])


def test_the_mean_of_all_patches_weighted_by_size_stays():
    torch.manual_seed(0)
    hidden, metric, sizes = torch.randn(3, 16, 8), torch.randn(3, 16, 4), None
    before = hidden.mean(dim=1)
    for _ in range(3):
        hidden, sizes = merge_tokens(hidden, metric[:, : hidden.shape[1]], 4, sizes)
    after = (hidden * sizes[..., None]).sum(dim=1) / sizes.sum(dim=1, keepdim=True)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)


def test_a_token_of_size_two_counts_as_two_equal_tokens():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 5, 8)
    doubled_key, doubled_value = (torch.cat([part, part[:, :, -1:]], dim=2) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, doubled_key, doubled_value)
    bias = size_bias(torch.tensor([[1.0, 1, 1, 1, 2]]), torch.float32)
    actual = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("num_tokens", "target", "layers", "expected"),
    [
        (64, 64, 3, [0, 0, 0]),
        (64, 100, 3, [0, 0, 0]),
        (64, 52, 3, [4, 4, 4]),
        (64, 50, 3, [5, 5, 4]),
        (64, 16, 2, [32, 16]),
        (16, 2, 4, [4, 4, 4, 2]),
        (9, 1, 4, [3, 3, 1, 1]),
    ],
)
def test_the_schedule_is_even_and_exact(num_tokens, target, layers, expected):
    assert merge_schedule(num_tokens, target, layers) == expected


@given(num_tokens=st.integers(1, 300), layers=st.integers(1, 13), share=st.floats(0, 1))
def test_every_reachable_budget_is_met_exactly(num_tokens, layers, share):
    smallest = num_tokens
    for _ in range(layers):
        smallest -= smallest // 2
    target = smallest + round(share * (num_tokens - smallest))
    left = num_tokens
    for merged in merge_schedule(num_tokens, target, layers):
        assert 0 <= merged <= left // 2
        left -= merged
    assert left == target


def test_what_no_schedule_reaches_is_named():
    with pytest.raises(ValueError, match=r"at least 16 for 64 tokens and 2 layers.*got 15"):
        merge_schedule(64, 15, 2)
    with pytest.raises(ValueError, match="`merge_tokens_to` must be at least 1, got 0"):
        merge_schedule(64, 0, 2)
    for wrong in (True, 8.0, "8", None):
        with pytest.raises(ValueError, match="`merge_tokens_to` must be an int, got"):
            merge_schedule(64, wrong, 2)
    assert merge_schedule(64, np.int64(20), 2) == merge_schedule(64, 20, 2)
