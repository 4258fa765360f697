"""The CPU kernels against the plain operations: values, gradients, gradients of gradients, per-sample gradients."""

import pytest
import torch
import torch.nn.functional as F
from sparseformer_reference import make_classifier, values_and_gradients
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyscale.models.sparseformer import cpu_sparseformer, modeling_layers_sparseformer
from polyscale.models.sparseformer.cpu_sparseformer import ThinAttention, sample_features_on_cpu
from polyscale.models.sparseformer.geometry_sparseformer import sample_features


KINDS = ["v1", "bootstrapped", "video"]


def attend_plainly(qkv: torch.Tensor, scaling: float) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return ((query @ key.transpose(2, 3) * scaling).softmax(dim=-1) @ value).transpose(1, 2)


def random_qkv(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# A head at a time, three of five, all five of an image.
@pytest.mark.parametrize("num_weights", [1, 3 * 7**2, 2**20])
def test_values_and_gradients_equal_the_formula(monkeypatch, num_weights):
    monkeypatch.setattr(cpu_sparseformer, "_WEIGHTS", num_weights)
    qkv = random_qkv(2, 7, 3, 5, 4).requires_grad_()
    weights = random_qkv(2, 5, 7, 4).transpose(1, 2)
    results = []
    for attend in (ThinAttention.apply, attend_plainly):
        output = attend(qkv, 0.7)
        results.append((output, *torch.autograd.grad((output * weights).sum(), qkv)))
    torch.testing.assert_close(*results)
    assert results[0][0].shape == (2, 7, 5, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_equals_torch_in_each_precision(dtype, tolerance):
    qkv = random_qkv(3, 9, 3, 4, 6, dtype=dtype).requires_grad_()
    weights = random_qkv(3, 9, 4, 6, dtype=dtype)
    query, key, value = qkv.float().permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.4).transpose(1, 2).to(dtype)
    output = ThinAttention.apply(qkv, 0.4)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad((result * weights).sum(), qkv)[0] for result in (output, expected)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients, atol=4 * tolerance, rtol=4 * tolerance)


def test_large_scores_do_not_overflow():
    qkv = random_qkv(1, 5, 3, 2, 4, dtype=torch.float32) * 1e3
    torch.testing.assert_close(ThinAttention.apply(qkv, 1.0), attend_plainly(qkv, 1.0))


def test_gradients_of_frozen_inputs_are_not_asked_for():
    assert not ThinAttention.apply(random_qkv(1, 3, 3, 2, 4), 1.0).requires_grad


def test_attention_is_differentiable_twice():
    qkv = random_qkv(2, 4, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda qkv: ThinAttention.apply(qkv, 0.7), qkv)
    (gradient,) = torch.autograd.grad(ThinAttention.apply(qkv, 0.7).square().sum(), qkv)
    (with_graph,) = torch.autograd.grad(ThinAttention.apply(qkv, 0.7).square().sum(), qkv, create_graph=True)
    torch.testing.assert_close(with_graph, gradient)


def _grid_sample_is_differentiable_twice() -> bool:
    features, grid = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    sampled = torch.nn.functional.grid_sample(features, grid, align_corners=False)
    (gradient,) = torch.autograd.grad(sampled.square().sum(), grid, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), features, allow_unused=True)
    except RuntimeError:
        return False
    return True


_twice = pytest.mark.skipif(
    not _grid_sample_is_differentiable_twice(), reason="needs a torch that differentiates grid_sample twice"
)


@_twice
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("sizes", [(4, 5), (2, 3, 4)])
def test_sampling_is_differentiable_twice(sizes, padding):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *sizes, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 2, 2, len(sizes), generator=generator, dtype=torch.float64) * 1.4 - 0.2
    points.requires_grad_()
    results = []
    for sample in (sample_features_on_cpu, sample_features):
        output = sample(features, points, padding)
        first = torch.autograd.grad(output.pow(3).sum(), (features, points), create_graph=True)
        plain = torch.autograd.grad(output.pow(3).sum(), (features, points), retain_graph=True)
        torch.testing.assert_close(first, plain)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (features, points))
        results.append((output, *first, *second))
    torch.testing.assert_close(*results)


def count_kernels(monkeypatch) -> list[str]:
    """The kernels that run from now on."""
    calls = []
    thin, sample = ThinAttention.apply, sample_features_on_cpu
    monkeypatch.setattr(ThinAttention, "apply", lambda *inputs: calls.append("attention") or thin(*inputs))
    monkeypatch.setattr(
        modeling_layers_sparseformer,
        "sample_features_on_cpu",
        lambda *inputs: calls.append("sampling") or sample(*inputs),
    )
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_one_switch_turns_the_kernels_off(monkeypatch, kind):
    model, pixels = make_classifier(kind, restrict_grad_norm=True)
    calls = count_kernels(monkeypatch)
    fast = values_and_gradients(model, pixels)
    assert {"attention", "sampling"} == set(calls)
    calls.clear()
    model.config.cpu_kernels = False
    plain = values_and_gradients(model, pixels)
    assert not calls
    # Encodings of RoIs, of frequencies up to 128 * pi, multiply differences in rounding.
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-3)


def test_heads_that_are_not_thin_and_other_attention_take_the_plain_way(monkeypatch):
    model, pixels = make_classifier("v1", num_attention_heads=1)
    calls = count_kernels(monkeypatch)
    model(pixels)
    attentions = len(calls) - calls.count("sampling")
    model.set_attn_implementation("eager")
    model(pixels)
    assert (attentions, calls.count("attention")) == (2, 2)  # two of width 16, then of 32


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_whole_batch(kind):
    model, pixels = make_classifier(kind, keep_all_tokens=True)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, outputs, name=name: seen.setdefault(name, []).append(
                len(outputs[0] if type(outputs) is tuple else outputs)
            )
        )
    with torch.no_grad():
        model.sparseformer(pixels)
    flat = 2 * model.config.num_tokens  # what mixing works on
    frames = 2 * pixels.shape[1] if kind == "video" else 2
    for name, lengths in seen.items():
        if name == "sparseformer":
            continue
        is_flat = name.endswith(("generator_out", "mixing.activation", "mixing.o_proj"))
        expected = flat if is_flat else frames if "features" in name else 2
        assert set(lengths) == {expected}, name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind):
    model, pixels = make_classifier(kind, restrict_grad_norm=True)
    parameters = dict(model.named_parameters())
    labels = torch.tensor([0, 2])

    def loss(parameters, image, label):
        return functional_call(model, parameters, (image[None],), {"labels": label[None]}).loss

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, pixels, labels)
    for index in range(2):
        model.zero_grad()
        model(pixels[index : index + 1], labels=labels[index : index + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


@_twice
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalties(kind):
    model, pixels = make_classifier(kind)
    results = []
    for cpu_kernels in (True, False):
        model.config.cpu_kernels = cpu_kernels
        model.zero_grad()
        images = pixels.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention is not differentiable twice
            (gradient,) = torch.autograd.grad(model(images).logits.square().sum(), images, create_graph=True)
            gradient.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({name: value for name, value in gradients.items() if value is not None})
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(results[0][name], value, atol=1e-3 * scale + 1e-6, rtol=1e-2, msg=name)
