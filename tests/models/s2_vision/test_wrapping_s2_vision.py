"""What S2 does around models of all kinds: flags, refusals, drawn budgets, attentions, antialias, names of weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from s2_tiny import ENCODER, make_base
from safetensors.torch import load_file
from transformers import AutoModel

from polyscale.checkpoints import bundled_checkpoint
from polyscale.models.flexivit import FlexiViTConfig
from polyscale.models.s2_vision import S2VisionConfig, S2VisionForImageClassification, S2VisionWrapper
from polyscale.models.s2_vision.multiscale_s2_vision import multiscale_forward
from polyscale.token_merging import apply_token_merging, remove_token_merging


def images(batch=2, size=96, seed=5):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_sparseformer_has_no_places():
    from polyscale.models.sparseformer import SparseFormerConfig

    with pytest.raises(ValueError, match="no fixed place"):
        S2VisionWrapper.from_vision_model(AutoModel.from_config(SparseFormerConfig()), scales=[1, 2])


def test_the_function_refuses_models_whose_tokens_make_no_map():
    from polyscale.models.sparseformer import SparseFormerConfig

    with pytest.raises(ValueError, match="`model` of type 'sparseformer' does not work at several scales"):
        multiscale_forward(AutoModel.from_config(SparseFormerConfig()), images(size=224), scales=[1])
    flexivit = make_base("flexivit")
    flexivit.config.merge_tokens_to = 4  # a square number
    with pytest.raises(ValueError, match="`merge_tokens_to` must be None in `multiscale_forward`, got 4"):
        multiscale_forward(flexivit, images(size=64), scales=[1], num_prefix_token=1)
    vit = make_base("vit")
    apply_token_merging(vit, num_tokens=4)
    with pytest.raises(ValueError, match="`remove_token_merging` makes it the plain model again"):
        multiscale_forward(vit, images(size=64), scales=[1], num_prefix_token=1)


@torch.no_grad()
def test_the_function_and_the_wrapper_agree_about_models_that_know_where_their_tokens_are():
    quadtree = make_base("quadtree_vit").eval()
    quadtree.config.num_tokens = 10  # where 64 would be all of the smallest patches: mixed sizes
    tile = quadtree.config.image_size
    wrapper = S2VisionWrapper.from_vision_model(quadtree, scales=[1, 2]).eval()
    pixels = images(size=tile)
    expected = wrapper(pixels).last_hidden_state
    for split_forward in (False, True):
        features = multiscale_forward(quadtree, pixels, scales=[1, 2], num_prefix_token=1, split_forward=split_forward)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_the_function_draws_one_size_for_all_tiles():
    flexivit = make_base("flexivit").train()
    flexivit.config.train_patch_sizes = [4, 8, 16]
    torch.manual_seed(0)
    drawn = {
        multiscale_forward(
            flexivit, images(size=64), [1, 2], max_split_size=64, num_prefix_token=1, split_forward=True
        ).shape[1]
        for _ in range(8)
    }
    assert drawn == {1 + 16, 1 + 64, 1 + 256}


def test_flags_are_those_of_the_model_inside():
    for name in ("clip", "convnext"):
        base = make_base(name)
        model = S2VisionWrapper.from_vision_model(base, scales=[1, 2])
        for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
            assert getattr(model, flag) == getattr(base, flag), (name, flag)


def test_a_model_that_draws_sizes_draws_once_a_call():
    base = make_base("flexivit")
    base.config.train_patch_sizes = [4, 8, 16]
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2], split_forward=True).train()
    torch.manual_seed(0)
    for _ in range(8):
        drawn = model(images(size=64))[0]
        assert drawn.shape[1] in (1 + 4, 1 + 16, 1 + 64)


def test_dynamic_keeps_attentions():
    model = S2VisionWrapper.from_vision_model(
        make_base("clip"), scales=[1, 2], dynamic=True, max_tiles=6, resize_output_to_idx=-1
    )
    model.set_attn_implementation("eager")
    tiles = torch.rand(2, 7, 3, 32, 32)
    outputs = model(tiles, image_sizes=torch.tensor([[64, 96], [64, 64]]), output_attentions=True)
    own = model.vision_model(tiles[1, :5], output_attentions=True).attentions
    assert outputs.attentions[0].shape[:2] == (2, 7)
    torch.testing.assert_close(outputs.attentions[1][1, :5], own[1], atol=1e-5, rtol=1e-4)


def test_antialias_is_an_option():
    base = make_base("clip")
    batch = images(size=64)
    with torch.no_grad():
        for antialias in (None, True):
            model = S2VisionWrapper.from_vision_model(base, scales=[1, 2], antialias=antialias).eval()
            small = F.interpolate(batch, size=32, mode="bicubic", antialias=bool(antialias))
            first = base(small).last_hidden_state
            torch.testing.assert_close(model(batch)[0][:, 1:, :16], first[:, 1:], atol=1e-5, rtol=1e-4)
    published = multiscale_forward(base, batch, scales=[0.5, 1], max_split_size=32, num_prefix_token=1)
    plain = S2VisionWrapper.from_vision_model(base, scales=[1, 2]).eval()
    torch.testing.assert_close(plain(batch)[0], published, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "flexivit"])
def test_a_checkpoint_has_the_names_of_the_model(name, tmp_path):
    """A resumed `Trainer` loads it by `load_state_dict`, which knows no older names."""
    model = S2VisionWrapper.from_vision_model(make_base(name), scales=[1, 2])
    model.save_pretrained(tmp_path)
    assert not any(model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False))
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_class_names_are_stored_once(tmp_path):
    names = {"id2label": {0: "owl", 1: "cat", 2: "dog"}, "label2id": {"owl": 0, "cat": 1, "dog": 2}}
    torch.manual_seed(0)
    base = AutoModel.from_config(FlexiViTConfig(**ENCODER, base_patch_size=8, **names)).eval()
    model = S2VisionForImageClassification.from_vision_model(base, scales=[1, 2], **names)
    model.save_pretrained(tmp_path / "new")
    assert base.config.id2label == names["id2label"]  # only the file goes without
    stored = json.loads((tmp_path / "new/config.json").read_text())
    assert (stored["id2label"], stored["label2id"]) == ({"0": "owl", "1": "cat", "2": "dog"}, names["label2id"])
    assert not {"id2label", "label2id"} & set(stored["vision_config"])

    # as older versions wrote it
    model.save_pretrained(tmp_path / "old")
    stored["vision_config"] |= {"id2label": stored["id2label"], "label2id": stored["label2id"]}
    (tmp_path / "old/config.json").write_text(json.dumps(stored))
    pixels = images(size=64)
    for folder in ("new", "old"):
        again = S2VisionForImageClassification.from_pretrained(tmp_path / folder).eval()
        assert (again.config.id2label, again.config.label2id) == (names["id2label"], names["label2id"])
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=0, atol=0)
        again.save_pretrained(tmp_path / "again")
        written = json.loads((tmp_path / "again/config.json").read_text())
        assert written["id2label"] == {"0": "owl", "1": "cat", "2": "dog"}
        assert not {"id2label", "label2id"} & set(written["vision_config"])


def test_class_names_that_only_the_wrapped_config_has_stay():
    inner = FlexiViTConfig(**ENCODER, base_patch_size=8, id2label={0: "owl", 1: "cat", 2: "dog"})
    for names in ({}, {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}):
        config = S2VisionConfig(vision_config=inner, scales=[1, 2], **names)
        again = S2VisionConfig.from_dict(config.to_dict())
        assert again.vision_config.id2label == inner.id2label
        assert again.id2label == config.id2label


def test_the_checkpoint_that_ships_has_the_class_names_of_its_flexivit():
    folder = bundled_checkpoint("s2-flexivit-tiny200")
    expected = FlexiViTConfig.from_pretrained(bundled_checkpoint("flexivit-tiny200"))
    config = S2VisionConfig.from_pretrained(folder)
    assert (config.num_labels, config.id2label, config.label2id) == (200, expected.id2label, expected.label2id)
    assert "id2label" not in json.loads((folder / "config.json").read_text())["vision_config"]


@pytest.mark.parametrize("name", ["flexivit", "quadtree_vit", "vit"])
@torch.no_grad()
def test_merged_tokens_are_not_laid_out_as_maps(name):
    base = make_base(name)
    model = S2VisionWrapper.from_vision_model(base, scales=[1, 2]).eval()
    expected = model(images()).last_hidden_state
    if name == "vit":
        with pytest.raises(ValueError, match="`merge_tokens_to` is no argument of S2VisionWrapper: it merges no tok"):
            model(images(), merge_tokens_to=4)
        apply_token_merging(base, num_tokens=4)  # a square number
        with pytest.raises(ValueError, match="`remove_token_merging` makes it the plain model again"):
            model(images())
        remove_token_merging(base)
    else:
        refused = "`merge_tokens_to` must be None in a model at several scales, got 4"
        with pytest.raises(ValueError, match=refused):
            model(images(), merge_tokens_to=4)
        base.config.merge_tokens_to = 4
        with pytest.raises(ValueError, match=refused):
            model(images())
        with pytest.raises(ValueError, match=refused):
            S2VisionWrapper.from_vision_model(base, scales=[1, 2])
        base.config.merge_tokens_to = None
    torch.testing.assert_close(model(images()).last_hidden_state, expected)
