"""`output_hidden_states` of the towers around a tower: the index 0 is a layer, not False."""

import pytest
import torch

from polyscale import FlexiViTConfig, FlexiViTModel, S2VisionWrapper
from polyscale.llava import PackedTower
from polyscale.llava.downsampled import DownsampledTower, DownsampledTowerConfig


@pytest.fixture
def tower():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    return FlexiViTModel(FlexiViTConfig(**shape, base_patch_size=8)).eval()


@torch.no_grad()
def test_the_first_layer_of_a_packed_tower_can_be_asked_for(tower):
    images = torch.randn(2, 3, 32, 32)
    expected = tower(images, output_hidden_states=True).hidden_states[0][:, 1:]
    packed = PackedTower.around(tower)
    torch.testing.assert_close(packed(images, output_hidden_states=0).hidden_states[0], expected)
    scales = PackedTower.around(S2VisionWrapper.from_vision_model(tower, scales=[1, 2]))
    first, *others = scales(images, output_hidden_states=0).hidden_states
    torch.testing.assert_close(first[..., :16], expected)
    assert others == [None, None]
    assert packed(images).hidden_states is None
    assert packed(images, output_hidden_states=False).hidden_states is None
    with pytest.raises(ValueError, match="`output_hidden_states` must be an int, got 'last'"):
        packed(images, output_hidden_states="last")


@torch.no_grad()
def test_a_downsampled_tower_may_read_the_first_layer(tower):
    images = torch.randn(2, 3, 64, 64)
    inner = S2VisionWrapper.from_vision_model(tower, scales=[1, 2])
    model = DownsampledTower(DownsampledTowerConfig(vision_config=inner.config, downsample=2, vision_feature_layer=0))
    model.tower.load_state_dict(inner.state_dict())
    seen = []
    model.norms[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    assert model.eval()(images).hidden_states is None
    states = inner(images, output_hidden_states=True).hidden_states[0][:, 1:]
    maps = states.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(seen[0].sum(dim=-1), maps.unfold(2, 2, 2).unfold(3, 2, 2).sum(dim=(1, 4, 5)).flatten(1))
