"""Outputs of the official implementation on tiny models."""

import pytest
import torch
from sparseformer_reference import golden_model, load_golden

from polyscale.models.sparseformer import SparseFormerVideoConfig
from polyscale.models.sparseformer.convert_sparseformer import rename_official
from polyscale.models.sparseformer.convert_sparseformer_video import inflate_state_dict
from tests.golden import assert_golden, rounding_sensitivity


NAMES = ["v1", "btsp", "btsp_clip", "video"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_tokens_and_rois_are_the_official_ones(name):
    model, pixels, tensors = golden_model(name)

    def results(pixels):
        outputs = model(pixels)
        body = model.sparseformer(pixels, output_all_rois=True)
        assert torch.equal(body.rois, body.all_rois[-1])
        logits = outputs.image_embeds if name == "btsp_clip" else outputs.logits
        return [logits, body.last_hidden_state, *body.all_rois]

    expected = [tensors["logits"], tensors["last_tokens"]]
    expected += [tensors[key] for key in sorted(tensors) if key.startswith("rois.")]
    sensitivities = rounding_sensitivity(results, pixels)
    for actual, golden, sensitivity in zip(results(pixels), expected, sensitivities, strict=True):
        assert_golden(actual, golden, sensitivity)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name):
    model, pixels, _ = golden_model(name)
    outputs = model(pixels)
    (outputs.image_embeds if name == "btsp_clip" else outputs.logits).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_inflation_is_the_official_one():
    meta, tensors = load_golden("inflation")
    config = SparseFormerVideoConfig(
        feature_width=8,
        num_latent_tokens=meta["num_latent_tokens"],
        num_sampling_points=4,
        widths=meta["widths"],
        repeats=meta["repeats"],
        operations=[["attn", "roi_adj", "sampling_m", "mlp"]] * 2,
        replicates=meta["replicates"],
        num_labels=5,
    )
    image, video = (
        rename_official(
            {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(kind)}, config
        )
        for kind in ("image.", "video.")
    )
    inflated = inflate_state_dict(image, config)
    assert inflated.keys() == video.keys()
    for name, value in video.items():
        assert torch.equal(inflated[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "btsp"])
def test_compiled_gradients_are_the_eager_ones(name):
    model, pixels, _ = golden_model(name)
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(pixels).logits.square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-4, rtol=1e-3)
