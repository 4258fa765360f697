import pytest
import torch
from sparseformer_reference import make_model, tiny_config

from polyscale.models.sparseformer import (
    SparseFormerForVideoClassification,
    SparseFormerVideoModel,
    SparseFormerVideoModelWithProjection,
)


def video(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_outputs_have_a_time():
    model = make_model(SparseFormerVideoModel, tiny_config("video"))
    with torch.no_grad():
        outputs = model(video(2, 3, 3, 20, 24), output_sampling_points=True, output_all_rois=True)
    assert outputs.last_hidden_state.shape == (2, 10, 32)  # 2 replicates of 5
    assert outputs.rois.shape == (2, 10, 6)
    assert outputs.sampling_points[0].shape == (2, 10, 4, 3)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_any_number_of_frames(frames):
    model = make_model(SparseFormerForVideoClassification, tiny_config("video"))
    with torch.no_grad():
        assert torch.isfinite(model(video(1, frames, 3, 16, 20)).logits).all()


def test_the_order_of_frames_matters():
    model = make_model(SparseFormerForVideoClassification, tiny_config("video"))
    clip = video(1, 4, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(model(clip).logits, model(clip.flip(1)).logits, atol=1e-3)


def test_the_clamp_works_in_three_dimensions():
    config = tiny_config("video")
    free = make_model(SparseFormerForVideoClassification, config)
    clamped = SparseFormerForVideoClassification(tiny_config("video", restrict_grad_norm=True)).eval()
    clamped.load_state_dict(free.state_dict())
    gradients = []
    for model in (free, clamped):
        (model(video(2, 3, 3, 32, 32) * 4).logits.square().sum() * 16).backward()
        gradients.append(model.sparseformer.layers[0].sampling.offset_bias.grad)
    assert not torch.allclose(*gradients)


def test_time_is_encoded_apart_and_starts_at_nothing():
    model = SparseFormerVideoModel(
        tiny_config(
            "video",
            operations=[["sampling_m", "pe_inject", "attn", "roi_adj"], ["sampling_m", "pe_inject"], ["attn", "mlp"]],
        )
    )
    injection = model.layers[0].position_injection
    assert not injection.time_projection.weight.any()
    rois = torch.rand(1, 3, 6)
    shifted = rois + torch.tensor([0, 0, 0.3, 0, 0, 0.3])
    torch.testing.assert_close(injection(rois), injection(shifted))
    torch.nn.init.normal_(injection.time_projection.weight)
    assert not torch.allclose(injection(rois), injection(shifted))


def test_projection():
    model = make_model(SparseFormerVideoModelWithProjection, tiny_config("video"))
    assert model(video(2, 2, 3, 16, 16)).image_embeds.shape == (2, 12)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), "must have the shape"),
        ((2, 0, 3, 16, 16), "zero frames"),
        ((0, 2, 3, 16, 16), "empty batch"),
        ((2, 3, 4, 16, 16), "must have 3 channels"),
    ],
)
def test_wrong_videos_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        SparseFormerVideoModel(tiny_config("video"))(torch.zeros(shape))
