"""The patch embedding is a module like any other: LoRA, offload and hooks work on it, at every patch size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
)
from polyscale.layers.patch_projection import PatchProjection
from polyscale.layers.resizing import KernelResize, resize_patches


SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 5}
BUDGETS = {"flexivit": [{"patch_size": size} for size in (8, 5, (12, 16))], "quadtree_vit": [{"num_tokens": 21}]}


def make_classifier(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "flexivit":
        config = FlexiViTConfig(**SHAPE, image_size=48, base_patch_size=8, initializer_range=0.2)
        return FlexiViTForImageClassification(config).eval()
    sizes = {"image_size": 48, "min_patch_size": 4, "max_patch_size": 16}
    config = QuadtreeViTConfig(**SHAPE, **sizes, initializer_range=0.2)
    return QuadtreeViTForImageClassification(config).eval()


@pytest.mark.parametrize("kernel_size", [(8, 8), (6, 10)])
@pytest.mark.parametrize("patch_size", [(8, 8), (5, 7), (16, 12)])
@pytest.mark.parametrize(
    "resize", [KernelResize(), KernelResize("pi", "bicubic", True), KernelResize("interpolate", "bicubic", False)]
)
def test_resized_patches_under_the_kernel_are_patches_under_the_resized_kernel(kernel_size, patch_size, resize):
    torch.manual_seed(0)
    projection, images = (
        PatchProjection(3, 16, kernel_size, stride=kernel_size),
        torch.randn(2, 3, 50, 37),
    )
    expected = F.conv2d(images, resize(projection.weight, patch_size), projection.bias, stride=patch_size)
    torch.testing.assert_close(projection(images, patch_size, resize), expected)
    patches = resize_patches(images, patch_size, kernel_size, resize)
    torch.testing.assert_close(projection(patches), expected, rtol=1e-4, atol=1e-5)


def test_an_image_of_one_patch_is_projected_too():
    torch.manual_seed(0)
    projection, patches = PatchProjection(3, 16, 8, stride=8), torch.randn(5, 3, 8, 8)
    expected = F.conv2d(patches, projection.weight, projection.bias, stride=8)
    torch.testing.assert_close(projection(patches), expected)


@pytest.mark.parametrize("family", list(BUDGETS))
def test_the_input_embeddings_are_the_projection(family):
    model = make_classifier(family)
    assert isinstance(model.get_input_embeddings(), PatchProjection)
    assert model.get_input_embeddings() is model.base_model.get_input_embeddings()
    other = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(other)
    assert model.base_model.embeddings.patch_embeddings.projection is other


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", list(BUDGETS))
def test_lora_on_the_patch_embedding_works_before_and_after_merging(family):
    """An adapter is a change of the kernel: with it, and merged, logits are those of the changed kernel."""
    base, images = make_classifier(family), torch.randn(2, 3, 48, 48)
    before = [base(images, **budget).logits for budget in BUDGETS[family]]
    changed = copy.deepcopy(base)
    config = LoraConfig(r=4, target_modules=["projection"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    layer = model.get_submodule(f"base_model.model.{base.base_model_prefix}.embeddings.patch_embeddings.projection")
    changed.get_input_embeddings().weight.data += layer.get_delta_weight("default")
    with torch.no_grad():
        expected = [changed(images, **budget).logits for budget in BUDGETS[family]]
        adapted = [model(pixel_values=images, **budget).logits for budget in BUDGETS[family]]
    loss = model(pixel_values=images, labels=torch.tensor([0, 1]), **BUDGETS[family][-1]).loss
    loss.backward()
    assert all(weight.grad.abs().max() > 0 for name, weight in model.named_parameters() if "lora" in name)
    merged = model.merge_and_unload()
    assert isinstance(merged.get_input_embeddings(), PatchProjection)
    with torch.no_grad():
        deployed = [merged(images, **budget).logits for budget in BUDGETS[family]]
    for plain, want, with_adapter, without in zip(before, expected, adapted, deployed, strict=True):
        assert (plain - want).abs().max() > 0.01
        torch.testing.assert_close(with_adapter, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(without, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(BUDGETS))
def test_hooks_of_the_projection_fire_also_when_it_is_offloaded(family):
    model, images = make_classifier(family), torch.randn(2, 3, 48, 48)
    budget = BUDGETS[family][-1]
    expected = model(images, **budget).logits
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    cpu_offload(model)
    assert model.get_input_embeddings().weight.is_meta
    torch.testing.assert_close(model(images, **budget).logits, expected)
    assert calls == [32]


def test_a_model_on_the_meta_device_resizes():
    model = make_classifier("flexivit").to("meta")
    images = torch.empty(2, 3, 48, 48, device="meta")
    assert model(images, patch_size=5).logits.shape == (2, 5)
