import pytest
import torch
from sparseformer_reference import encode_plainly, sample_plainly

from polyscale.models.sparseformer.cpu_sparseformer import sample_features_on_cpu
from polyscale.models.sparseformer.geometry_sparseformer import (
    ClampGradient,
    adjust_rois,
    encode_rois,
    inflate_rois,
    initial_rois,
    place_points,
    sample_features,
)


def test_initial_rois_are_a_grid_of_half_wide_boxes_and_whole_images():
    rois = initial_rois(11)
    assert rois.shape == (11, 4)
    torch.testing.assert_close(rois[0], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    torch.testing.assert_close(rois[1], torch.tensor([0.25, 0.0, 0.75, 0.5]))  # row by row
    torch.testing.assert_close(rois[3], torch.tensor([0.0, 0.25, 0.5, 0.75]))
    torch.testing.assert_close(rois[8], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(rois[9:], torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))


@pytest.mark.parametrize(("num_tokens", "whole"), [(48, 12), (49, 0), (63, 14), (64, 0), (81, 0)])
def test_the_grid_is_the_largest_square_that_fits(num_tokens, whole):
    rois = initial_rois(num_tokens)
    assert (rois == torch.tensor([0.0, 0.0, 1.0, 1.0])).all(dim=-1).sum() == whole


def test_few_tokens_have_finite_rois():
    torch.testing.assert_close(initial_rois(1), torch.tensor([[0.25, 0.25, 0.75, 0.75]]))
    assert torch.isfinite(initial_rois(3)).all()


def test_video_rois_share_the_time_between_replicates():
    rois = initial_rois(4, replicates=2)
    assert torch.equal(rois, inflate_rois(initial_rois(4), 2))
    torch.testing.assert_close(rois[0], torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5]))
    torch.testing.assert_close(rois[7], torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 1.0]))


def test_adjusting_moves_by_sizes_and_scales_by_exponentials():
    rois = torch.tensor([[[0.2, 0.4, 0.6, 0.5]]])
    deltas = torch.tensor([[[0.5, -1.0, 0.0, 2.0]]])
    center, half = torch.tensor([0.4 + 0.2, 0.45 - 0.1]), torch.tensor([0.2, 0.05 * torch.e**2])
    expected = torch.cat([center - half, center + half])[None, None]
    torch.testing.assert_close(adjust_rois(rois, deltas), expected)
    flipped = adjust_rois(torch.tensor([[[0.6, 0.5, 0.2, 0.4]]]), deltas)  # a size below 0 counts without its sign
    torch.testing.assert_close(flipped, expected)


def test_points_are_standardised_offsets_in_the_roi():
    rois = torch.tensor([[[0.0, 0.5, 0.5, 1.0]]])
    offsets = torch.tensor([[[[1.0, 5.0], [3.0, 5.0], [5.0, 8.0]]]])
    points = place_points(rois, offsets)
    torch.testing.assert_close(
        points[0, 0, :, 0], torch.tensor([0.25 - 0.5 / 3, 0.25, 0.25 + 0.5 / 3]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(points.mean(dim=2)[0, 0], torch.tensor([0.25, 0.75]))
    constant = place_points(rois, torch.ones(1, 1, 3, 2))  # no spread: all in the centre, not NaN
    torch.testing.assert_close(constant, torch.tensor([0.25, 0.75]).expand(1, 1, 3, 2))


@pytest.mark.parametrize("sample", [sample_features, sample_features_on_cpu])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("sizes", [(3, 5), (2, 3, 4), (1, 3, 4)])
def test_sampling_equals_plain_interpolation(sizes, padding, sample):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *sizes, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 4, 5, len(sizes), generator=generator, dtype=torch.float64) * 1.6 - 0.3
    actual = sample(features, points, padding)
    expected = torch.stack(
        [
            sample_plainly(features[index], points[index].flatten(0, 1), padding).unflatten(0, (4, 5))
            for index in (0, 1)
        ]
    )
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((value * weights).sum(), features)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("sizes", [(7, 56), (3, 7, 56)])
def test_sampling_on_a_cpu_equals_grid_sample(sizes, padding):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *sizes, 24, generator=generator, requires_grad=True)
    points = (torch.rand(2, 9, 16, len(sizes), generator=generator) * 1.6 - 0.3).requires_grad_()
    values = [sample(features, points, padding) for sample in (sample_features_on_cpu, sample_features)]
    torch.testing.assert_close(*values, rtol=0, atol=2e-5)
    weights = torch.randn(values[0].shape, generator=generator)
    of_features, of_points = zip(
        *(torch.autograd.grad((value * weights).sum(), (features, points)) for value in values), strict=True
    )
    torch.testing.assert_close(*of_features, rtol=0, atol=2e-5)
    torch.testing.assert_close(*of_points, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_points_that_are_no_places_do_no_harm(value, padding):
    features = torch.randn(1, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    points = torch.full((1, 2, 3, 2), 0.4)
    expected = sample_features_on_cpu(features, points, padding)
    points[0, 0, 0] = value
    sampled = sample_features_on_cpu(features, points, padding)
    assert torch.equal(sampled[0, 1], expected[0, 1])
    assert torch.equal(sampled[0, 0, 1:], expected[0, 0, 1:])
    if abs(value) == 1e30:
        corner = features[0, -1, -1] if padding == "border" else torch.zeros(3)
        torch.testing.assert_close(sampled[0, 0, 0], corner)


@pytest.mark.parametrize("num_frequencies", [1, 4, 7])
def test_encoding_of_rois(num_frequencies):
    rois = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))
    actual = encode_rois(rois, num_frequencies)
    assert actual.shape == (2, 3, 4 * num_frequencies)
    torch.testing.assert_close(actual, encode_plainly(rois, num_frequencies), rtol=0, atol=1e-4)


def test_encoding_passes_no_gradient():
    assert not encode_rois(torch.rand(1, 2, 4, requires_grad=True), 4).requires_grad


def test_clamp_is_element_wise_and_follows_the_loss_scale():
    points = torch.zeros(2, 3, requires_grad=True)
    gradient = torch.tensor([[0.1, -0.5, 2.0], [0.0, 0.3, -0.2]])
    for scale in (1.0, 4.0):
        points.grad = None
        (ClampGradient.apply(points, torch.tensor(0.25)) * gradient).sum().backward()
        torch.testing.assert_close(points.grad, gradient.clamp(-0.25, 0.25))
        points.grad = None
        (ClampGradient.apply(points, torch.tensor(0.25 * scale)) * gradient * scale).sum().backward()
        torch.testing.assert_close(points.grad / scale, gradient.clamp(-0.25, 0.25))
