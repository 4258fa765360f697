"""The Grad-CAM oracle against Grad-CAM written out, and the drawing of a quadtree."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from polyscale import QuadtreeViTForImageClassification, gradcam_oracle, quadtree_tokens
from polyscale.models.quadtree_vit.plot_quadtree_vit import draw_quadtree


LABELS = torch.tensor([0, 2, 1])


def averaged(heat):
    """A (batch, rows, columns) heat map -> scaled to 1, at 8 x 8 cells, averaged over 2 x 2 and 4 x 4 patches."""
    heat = heat / heat.flatten(1).amax(dim=1).clamp(min=1e-30)[:, None, None]
    heat = F.interpolate(heat[:, None], size=(8, 8), mode="bilinear")
    return [F.avg_pool2d(heat, 4)[:, 0], F.avg_pool2d(heat, 2)[:, 0]]


def test_convolutional_network(images):
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.ReLU())
    model = torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3))
    scores = gradcam_oracle(model, images, LABELS, target_layer=body, min_patch_size=4, max_patch_size=16)
    # The gradient of a mean is the classifier's weight over the number of places.
    weights = model[3].weight[LABELS] / 16
    heat = torch.einsum("bc,bchw->bhw", weights, body(images)).relu()
    for ours, expected in zip(scores, averaged(heat), strict=True):
        torch.testing.assert_close(ours, expected.detach())
    assert model[3].weight.grad is None
    assert scores[0].shape == (3, 2, 2)


def test_quadtree_model_and_its_own_precomputed_scores(make_config, images):
    torch.manual_seed(0)
    model = QuadtreeViTForImageClassification(make_config()).eval().requires_grad_(False)
    scores = gradcam_oracle(model, images, LABELS)
    states = model(images.requires_grad_(), num_tokens=64, output_hidden_states=True)
    features = states.hidden_states[-2]
    (gradients,) = torch.autograd.grad(states.logits.gather(1, LABELS[:, None]).sum(), features)
    heat = (features[:, 1:] * gradients[:, 1:].mean(dim=1, keepdim=True)).sum(dim=2).relu().view(3, 8, 8)
    for ours, expected in zip(scores, averaged(heat.detach()), strict=True):
        torch.testing.assert_close(ours, expected)
    outputs = model(images, num_tokens=31, patch_scores=scores)
    level, _, _ = quadtree_tokens(scores, 31)
    assert torch.equal(outputs.patch_sizes, 16 >> level)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_models_of_transformers(images, kind):
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config)
    scores = gradcam_oracle(model.eval(), images, LABELS, min_patch_size=4, max_patch_size=16)
    assert [tuple(score.shape) for score in scores] == [(3, 2, 2), (3, 4, 4)]
    assert all(score.min() >= 0 and score.max() <= 1 for score in scores)


def test_errors(images):
    with pytest.raises(ValueError, match="labels"):
        gradcam_oracle(torch.nn.Identity(), images, LABELS[:2], min_patch_size=4, max_patch_size=16)
    with pytest.raises(ValueError, match="192 and 256"):
        gradcam_oracle(torch.nn.Identity(), torch.zeros(3, 3, 224, 256), LABELS)


def test_drawing_shows_each_patch_at_its_resolution():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    centers = torch.tensor([[4.0, 4], [12, 4], [4, 12], [10, 10], [14, 10], [10, 14], [14, 14], [0, 0]])
    sizes = torch.tensor([8, 8, 8, 4, 4, 4, 4, 0])
    drawn = draw_quadtree(image, centers, sizes, scale=3)
    assert drawn.size == (48, 48)
    assert drawn.getpixel((0, 0)) == drawn.getpixel((23, 5)) == (255, 255, 255)
    # A patch of 8 shows 4 x 4 blocks of 2 pixels; one of 4 shows its own pixels.
    assert drawn.getpixel((7, 7)) == drawn.getpixel((10, 10))
    expected = tuple(image[:, 9, 9].mul(255).round().int().tolist())
    assert drawn.getpixel((28, 28)) == expected
    with pytest.raises(ValueError, match="patch_sizes"):
        draw_quadtree(image, centers, sizes[:3])
