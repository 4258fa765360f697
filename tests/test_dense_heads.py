"""FlexiViT and Quadtree ViT as backbones of DPT, which reads `patch_size` and tokens in raster order."""

import pytest
import torch
from transformers import AutoBackbone, DPTConfig, DPTForDepthEstimation

from polyscale import FlexiViTConfig, QuadtreeViTConfig, SparseFormerConfig


SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32}
STAGES = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
NECK = {
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "reassemble_factors": [4, 2, 1, 0.5],
    "neck_ignore_stages": [],
}
BACKBONES = {
    "flexivit": lambda: FlexiViTConfig(**SHAPE, **STAGES, base_patch_size=8),
    "quadtree_vit": lambda: QuadtreeViTConfig(**SHAPE, **STAGES, min_patch_size=4, max_patch_size=16, num_tokens=31),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_a_dpt_reads_the_maps_of_its_backbone(name):
    torch.manual_seed(0)
    model = DPTForDepthEstimation(DPTConfig(backbone_config=BACKBONES[name](), **NECK)).eval()
    images = torch.randn(2, 3, 32, 48)
    patch_size = model.config.backbone_config.patch_size
    rows, columns = 32 // patch_size, 48 // patch_size
    if name == "quadtree_vit":
        model.backbone.config.num_tokens = 36
    seen = {}
    handle = model.neck.register_forward_pre_hook(lambda module, inputs: seen.update(states=inputs[0]))
    assert model(images).predicted_depth.isfinite().all()
    handle.remove()
    model.backbone.config.reshape_hidden_states = True
    maps = model.backbone(images).feature_maps
    for tokens, dense in zip(seen["states"], maps, strict=True):
        assert dense.shape == (2, 16, rows, columns)
        torch.testing.assert_close(tokens[:, 1:], dense.flatten(2).transpose(1, 2))


def test_a_sparseformer_has_no_backbone_and_says_so():
    with pytest.raises(ValueError, match="SparseFormerConfig"):
        AutoBackbone.from_config(SparseFormerConfig())
