"""The one-sort selection against a heap that splits one patch at a time; the reverse against cell-by-cell copies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadtree_reference import cell_by_cell_reverse, heap_quadtree

from polyscale import quadtree_tokens, reverse_quadtree
from polyscale.models.quadtree_vit import selection_quadtree_vit
from polyscale.models.quadtree_vit.scoring_quadtree_vit import PixelBlurPatchScorer


def make_scores(kind, levels, rows, columns, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(batch, rows << s, columns << s, generator=generator) for s in range(levels)]
    if kind == "tied":
        return [(score * 3).floor() for score in scores]
    if kind == "constant":
        return [torch.zeros_like(score) for score in scores]
    if kind == "infinite":
        return [torch.where(score > 0.8, torch.inf, torch.where(score < 0.2, -torch.inf, score)) for score in scores]
    return scores


def as_lists(tokens):
    fields = [field.tolist() for field in tokens[:3]]
    rows = [list(zip(*picture, strict=True)) for picture in zip(*fields, strict=True)]
    if len(tokens) == 3:
        return rows
    return [
        [t for t, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, tokens.mask.tolist(), strict=True)
    ]


cases = {
    "kind": st.sampled_from(["random", "tied", "constant", "infinite"]),
    "levels": st.integers(1, 4),
    "rows": st.integers(1, 4),
    "columns": st.integers(1, 3),
    "batch": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
    "share": st.floats(0, 1),
}


@settings(max_examples=250, deadline=None)
@given(**cases, key_bits=st.sampled_from([62, 20, 8]))
def test_budget_equals_heap(kind, levels, rows, columns, batch, seed, share, key_bits):
    scores = make_scores(kind, levels, rows, columns, batch, seed)
    coarsest = rows * columns
    num_tokens = coarsest + 3 * round(share * coarsest * (4**levels - 1) / 3)
    before = selection_quadtree_vit.KEY_BITS
    selection_quadtree_vit.KEY_BITS = key_bits  # fewer bits: keys are sorted in several passes
    try:
        tokens = quadtree_tokens(scores, num_tokens)
    finally:
        selection_quadtree_vit.KEY_BITS = before
    assert tokens.level.shape == (batch, num_tokens)
    assert as_lists(tokens) == [
        heap_quadtree([score[b].numpy() for score in scores], num_tokens) for b in range(batch)
    ]


@settings(max_examples=150, deadline=None)
@given(**cases, threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.7, 1.0, 2.0]), capped=st.booleans())
def test_threshold_equals_heap(kind, levels, rows, columns, batch, seed, share, threshold, capped):
    scores = make_scores(kind, levels, rows, columns, batch, seed)
    coarsest = rows * columns
    cap = coarsest + 3 * round(share * coarsest * (4**levels - 1) / 3) if capped else None
    tokens = quadtree_tokens(scores, cap, threshold)
    expected = [heap_quadtree([score[b].numpy() for score in scores], cap, threshold) for b in range(batch)]
    assert as_lists(tokens) == expected
    assert tokens.mask.shape[1] == (cap if capped else max(map(len, expected)))
    assert all(field[~tokens.mask].eq(0).all() for field in tokens[:3])


def test_photographs_equal_heap(golden_pixels):
    scores = PixelBlurPatchScorer(8, 128)(golden_pixels)
    for num_tokens in (4, 100, 400, 1024):
        expected = [heap_quadtree([score[b].numpy() for score in scores], num_tokens) for b in range(2)]
        assert as_lists(quadtree_tokens(scores, num_tokens)) == expected


def test_order_is_coarse_to_fine_then_raster_and_ties_go_to_the_coarser_level():
    scores = [torch.ones(1, 1, 2), torch.ones(1, 2, 4)]
    level, row, column = quadtree_tokens(scores, 8)
    assert level.tolist() == [[1] * 8]
    assert row.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert column.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_compiles_without_graph_breaks():
    scores = make_scores("random", 3, 2, 3, 2, 0)
    compiled = torch.compile(quadtree_tokens, fullgraph=True, backend="aot_eager")
    for knobs in ({"num_tokens": 60}, {"num_tokens": 60, "split_threshold": 0.6}):
        for ours, expected in zip(compiled(scores, **knobs), quadtree_tokens(scores, **knobs), strict=True):
            assert torch.equal(ours, expected)


def test_constants_of_few_sizes_are_kept_and_serve_every_mode(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(selection_quadtree_vit, "_trees", {})
    monkeypatch.setattr(selection_quadtree_vit, "MAX_TREES", 3)
    with FakeTensorMode():
        quadtree_tokens([torch.rand(1, 2, 2)], 7)
    assert not selection_quadtree_vit._trees
    for columns in range(1, 9):
        with torch.inference_mode():
            quadtree_tokens(make_scores("random", 2, 2, columns, 1, 0), 2 * columns + 3)
        assert 0 < len(selection_quadtree_vit._trees) <= 3
    assert not any(table.is_inference() for tree in selection_quadtree_vit._trees.values() for table in tree)
    with FakeTensorMode():
        assert quadtree_tokens([torch.rand(1, 2, 8), torch.rand(1, 4, 16)], 19).level.shape == (1, 19)


@pytest.mark.parametrize(
    ("scores", "knobs", "message"),
    [
        ([torch.zeros(1, 2, 2)], {"num_tokens": 5}, "4 and 7"),
        ([torch.zeros(1, 2, 2)], {"num_tokens": 3}, "4 and 7"),
        ([torch.zeros(1, 2, 2)], {"num_tokens": 19}, "13 and 16"),
        ([torch.zeros(1, 2, 2)], {"num_tokens": 4.0}, "int"),
        ([torch.zeros(1, 2, 2)], {}, "split_threshold"),
        ([torch.zeros(1, 2, 2)], {"split_threshold": float("nan")}, "NaN"),
        ([torch.zeros(1, 2, 2)], {"split_threshold": 10**400}, "`split_threshold` must be at most"),
        ([torch.zeros(1, 2, 2), torch.zeros(1, 4, 5)], {"num_tokens": 4}, r"scores\[1\].*\(1, 4, 4\)"),
        ([torch.zeros(1, 2, 2), torch.zeros(2, 4, 4)], {"num_tokens": 4}, r"scores\[1\]"),
        ([torch.zeros(2, 2)], {"num_tokens": 4}, r"\(batch, rows, columns\)"),
        ([torch.zeros(1, 2, 2, dtype=torch.complex64)], {"num_tokens": 4}, r"got \(1, 2, 2\) of torch\.complex64"),
        ([torch.full((1, 2, 2), float("nan"))], {"num_tokens": 4}, "NaN"),
        ([], {"num_tokens": 4}, "empty"),
        (torch.zeros(1, 2, 2), {"num_tokens": 4}, "list"),
    ],
)
def test_bad_input(scores, knobs, message):
    with pytest.raises(ValueError, match=message):
        quadtree_tokens(scores, **knobs)


def reverse_inputs(num_tokens=31, rows=2, columns=3, cell=4, seed=0):
    scores = make_scores("random", 2, rows, columns, 2, seed)
    level, row, column = quadtree_tokens(scores, num_tokens)
    sizes = cell * 4 >> level
    centers = (torch.stack([column, row], dim=-1) + 0.5) * sizes[..., None]
    tokens = torch.randn(2, num_tokens, 5, generator=torch.Generator().manual_seed(seed))
    return tokens, centers, sizes, (rows * cell * 4, columns * cell * 4), cell


@pytest.mark.parametrize("num_tokens", [6, 9, 30, 96])
def test_reverse_equals_copies(num_tokens):
    tokens, centers, sizes, image_size, cell = reverse_inputs(num_tokens)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(1))
    dense = reverse_quadtree(tokens[:, order], centers[:, order], sizes[:, order], image_size, cell)
    for b in range(2):
        expected = cell_by_cell_reverse(tokens[b].numpy(), centers[b].tolist(), sizes[b].tolist(), *image_size, cell)
        np.testing.assert_array_equal(dense[b].numpy(), expected)


def test_reverse_ignores_masked_tokens_and_has_gradients():
    tokens, centers, sizes, image_size, cell = reverse_inputs(30)
    tokens = tokens.double().requires_grad_()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5] = False
    dense = reverse_quadtree(tokens, centers, sizes, image_size, cell, mask)
    dense.sum().backward()
    area = ((sizes // cell) ** 2 * mask).double()
    torch.testing.assert_close(tokens.grad, area[..., None].expand_as(tokens))


def test_reverse_bad_input():
    tokens, centers, sizes, image_size, cell = reverse_inputs(30)
    with pytest.raises(ValueError, match="patch_centers"):
        reverse_quadtree(tokens, centers[:, 1:], sizes, image_size, cell)
    with pytest.raises(ValueError, match="patch_sizes"):
        reverse_quadtree(tokens, centers, sizes[:, 1:], image_size, cell)
    with pytest.raises(ValueError, match="image_size"):
        reverse_quadtree(tokens, centers, sizes, (30, 48), cell)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda centers, sizes: (centers + 1000, sizes), "`patch_centers` in the middle of such.*token 0 of image 0"),
        (lambda centers, sizes: (centers - 1000, sizes), "got the size 16 at"),
        (lambda centers, sizes: (centers + 2, sizes), "in the middle of such patches"),
        (lambda centers, sizes: (centers * float("nan"), sizes), r"at \[nan, nan\] for token 0 of image 0"),
        (lambda centers, sizes: (centers, sizes - 3), r"must be 4 \(`min_patch_size`\) times a power of two.*size 13"),
        (lambda centers, sizes: (centers, sizes // 8), "times a power of two.*got the size 2 at"),
        (lambda centers, sizes: (centers[:, [0, 0]], sizes[:, [0, 0]]), "patches lie over one another in image 0"),
    ],
)
def test_patches_of_no_quadtree_are_not_laid_out(change, message):
    tokens, centers, sizes, image_size, cell = reverse_inputs(9)
    centers, sizes = change(centers, sizes)
    with pytest.raises(ValueError, match=message):
        reverse_quadtree(tokens[:, : sizes.shape[1]], centers, sizes, image_size, cell)


def test_patches_of_other_sizes_that_lie_over_one_another_are_refused():
    tokens, sizes = torch.ones(1, 2, 1), torch.tensor([[16, 4]])
    centers = torch.tensor([[[8.0, 8.0], [6.0, 6.0]]])
    with pytest.raises(ValueError, match="lie over one another in image 0"):
        reverse_quadtree(tokens, centers, sizes, 16, 4)
    mask = torch.tensor([[True, False]])
    assert torch.equal(reverse_quadtree(tokens, centers, sizes, 16, 4, mask), torch.ones(1, 1, 4, 4))
    moved = centers + torch.tensor([[[0.0, 0.0], [12.0, 0.0]]])
    dense = reverse_quadtree(tokens, moved, sizes, (16, 20), 4)  # the rest of the second column is empty
    assert dense.sum() == 17


@pytest.mark.parametrize("kind", [np.float32, np.float64, int, np.int64])
def test_a_threshold_may_be_any_number(kind):
    scores = [torch.tensor([[[0.5, 1.5], [1.0, -2.0]]])]
    expected = quadtree_tokens(scores, split_threshold=1.0)
    for found, wanted in zip(quadtree_tokens(scores, split_threshold=kind(1)), expected, strict=True):
        assert torch.equal(found, wanted)
    assert expected.mask.sum() == 7  # one patch is split
    if kind is int:  # of Python, without bounds
        assert quadtree_tokens(scores, split_threshold=10**30).mask.sum() == 4
        assert quadtree_tokens(scores, split_threshold=-(10**30)).mask.sum() == 16
