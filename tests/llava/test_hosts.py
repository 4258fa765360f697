"""Each kind of LLaVA model with each tower that it can have."""

import warnings

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from polyscale import apply_token_merging
from polyscale.llava import PackedTower, set_token_budget, swap_vision_tower
from polyscale.models.flexivit import FlexiViTConfig, FlexiViTModel
from polyscale.models.quadtree_vit import QuadtreeViTConfig, QuadtreeViTModel
from polyscale.models.s2_vision import S2VisionWrapper

from .llava_tiny import CLIP, ENCODER, HOSTS, PROMPTS, make_llava, make_photographs, make_tower, swapped


def encode(processor, **options):
    return processor(images=make_photographs(), text=PROMPTS, padding=True, return_tensors="pt", **options)


GRIDS = ("s2", "flexivit", "flexivit_no_cls", "flexivit_registers")
PAIRS = [(host, name) for host in ("llava_next", "llava_onevision") for name in GRIDS]
PAIRS += [("vipllava", name) for name in (*GRIDS, "quadtree", "quadtree_merging", "sparseformer", "sparseformer_cls")]


@pytest.mark.parametrize(("host", "name"), PAIRS)
def test_forward_save_reload_generate(host, name, tmp_path):
    model, processor = swapped(name, host)
    inputs = encode(processor)
    outputs = model(**inputs, labels=inputs["input_ids"])
    assert torch.isfinite(outputs.loss)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    torch.testing.assert_close(reloaded(**encode(again)).logits, outputs.logits, atol=1e-5, rtol=1e-4)
    ids = reloaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("host", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("name", ["quadtree", "flexivit_merging", "sparseformer", "s2_dynamic", "quadtree_threshold"])
def test_hosts_with_a_grid_refuse_tokens_that_are_none(host, name):
    with pytest.raises(ValueError, match="cannot be in a LLaVA-"):
        swapped(name, host)


@pytest.mark.parametrize("name", ["s2_dynamic", "quadtree_threshold"])
def test_vipllava_refuses_tokens_that_vary(name):
    with pytest.raises(ValueError, match="cannot be in a VipLLaVA model"):
        swapped(name, "vipllava")


def test_vipllava_reads_the_tokens_of_its_tower():
    """It drops the first token whatever it is: the tower has one to drop."""
    model, processor = swapped("flexivit_no_cls", "vipllava")
    inputs = encode(processor)
    tower = model.model.vision_tower
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        states = tower.tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(torch.cat([states[-2], states[-1]], dim=-1))
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(("layer", "merging"), [(-2, 2), (1, 1), ([-2, -1], 2), (-1, 3)])
def test_all_tokens_are_merged_in_the_layers_that_a_host_reads(layer, merging):
    host = "llava" if isinstance(layer, int) else "vipllava"
    model, processor = HOSTS[host]()
    tower = FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=32, base_patch_size=8, merge_tokens_to=10)).eval()
    plain = FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=32, base_patch_size=8)).eval()
    plain.load_state_dict(tower.state_dict())
    with pytest.warns(UserWarning, match="projector"):
        processor = swap_vision_tower(model, tower, processor, vision_feature_layer=layer, keep_projector=False)
    assert tower.config.merge_layers == merging
    inputs = encode(processor)
    assert (inputs["input_ids"] == 4).sum(dim=1).tolist() == [10, 10]
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs["pixel_values"], **{"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        ).pooler_output
        plain.config.merge_tokens_to, plain.config.merge_layers = 10, merging
        states = plain(inputs["pixel_values"], output_hidden_states=True).hidden_states
        read = torch.cat([states[index] for index in layer], -1) if isinstance(layer, list) else states[layer]
        assert states[merging].shape[1] == 1 + 10
        expected = model.model.multi_modal_projector(read[:, 1:])
    features = torch.stack(list(features)) if isinstance(features, list | tuple) else features
    torch.testing.assert_close(features, expected)


def test_the_input_of_the_first_layer_has_no_merged_tokens():
    model, processor = HOSTS["llava"]()
    tower = FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=32, base_patch_size=8, merge_tokens_to=10))
    with pytest.raises(ValueError, match="`vision_feature_layer` 0 reads what goes into the first layer"):
        swap_vision_tower(model, tower, processor, vision_feature_layer=0)
    assert tower.config.merge_layers is None


def test_merging_that_its_host_could_not_count_is_refused():
    model, processor = HOSTS["llava"]()
    before = model.model.vision_tower
    plain = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    apply_token_merging(plain, num_tokens=6)
    around = S2VisionWrapper.from_vision_model(CLIPVisionModel(CLIPVisionConfig(**CLIP)), scales=[1, 2])
    apply_token_merging(around.vision_model, num_tokens=6)
    few = FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=32, base_patch_size=8, merge_tokens_to=3))
    padded = QuadtreeViTModel(
        QuadtreeViTConfig(**ENCODER, image_size=64, max_patch_size=32, split_threshold=1.0, merge_tokens_to=10)
    )
    for tower, message in (
        (plain, "`tower` merges tokens .* which its config does not say"),
        (around, "The model in a model at several scales merges tokens"),
        (few, "`merge_tokens_to` must be at least 4 for 16 tokens and 2 layers"),
        (padded, "`split_threshold` with `merge_tokens_to=10` cannot be used in a host model"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_vision_tower(model, tower, processor)
        assert model.model.vision_tower is before


@pytest.mark.parametrize("host", ["llava", "llava_next", "llava_onevision"])
def test_plain_towers_with_a_cls_token(host):
    model, processor = HOSTS[host]()
    fields = {**CLIP, "hidden_size": 20, "image_size": 48}
    with pytest.warns(UserWarning, match="reads 16 channels and the new tower gives 20"):
        processor = swap_vision_tower(model, CLIPVisionModel(CLIPVisionConfig(**fields)), processor)
    model.generate(**encode(processor), max_new_tokens=1)
    several = processor(images=make_photographs(), text="<image> <image> this", return_tensors="pt")
    model.generate(**several, max_new_tokens=1)


@pytest.mark.parametrize("host", ["llava_next", "llava_onevision"])
def test_pinpoints_follow_the_budget(host):
    model, processor = swapped("s2", host)
    assert model.config.image_grid_pinpoints == [[64, 128], [128, 64], [128, 128]]
    set_token_budget(model, processor, scales=[1, 3])
    expected = [[96, 192], [192, 96], [192, 192]]
    assert model.config.image_grid_pinpoints == expected
    assert [list(point) for point in processor.image_processor.image_grid_pinpoints] == expected
    inputs = encode(processor)
    assert inputs["pixel_values"].shape[-1] == 96
    model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("host", ["llava_next", "llava_onevision", "vipllava"])
def test_hosts_without_a_carrier_refuse_budgets_of_a_call_and_say_why(host):
    model, processor = swapped("flexivit", host)
    with pytest.raises(ValueError, match=r"`num_tokens` cannot be given to a call.*set_token_budget"):
        encode(processor, num_tokens=9)
    with pytest.raises(ValueError, match=r"`nim_tokens` is no argument.*Did you mean `num_tokens`"):
        encode(processor, nim_tokens=9)
    set_token_budget(model, processor, num_tokens=9)
    assert torch.isfinite(model(**encode(processor)).logits).all()


def test_other_models_are_refused_with_a_list():
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration, LlavaNextFor.*VipLlava.*got CLIP"):
        swap_vision_tower(CLIPVisionModel(CLIPVisionConfig(**CLIP)), make_tower("flexivit", None))


@pytest.mark.parametrize("host", ["llava", "llava_next", "llava_onevision", "vipllava"])
def test_a_failing_swap_changes_nothing(host):
    model, processor = HOSTS[host]()
    tower = make_tower("flexivit", model)
    tower.config.train_patch_sizes = [8, 12]
    before = model.config.to_dict(), tower.config.to_dict(), model.model.vision_tower
    projector, attention = model.model.multi_modal_projector, tower.config._attn_implementation
    for options, message in (
        ({"vision_feature_layer": 9}, "`vision_feature_layer` 9"),
        ({"fit": "banana"}, "`fit` must be None"),
        ({"keep_projector": True, "vision_feature_layer": [0, 1, 2]}, "`keep_projector=True` is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_vision_tower(model, tower, processor, **options)
        assert model.config.to_dict() == before[0]
        assert tower.config.to_dict() == before[1]
        assert tower.config._attn_implementation == attention
        assert model.model.vision_tower is before[2]
        assert model.model.multi_modal_projector is projector
    model(**encode(processor))


def test_drawn_patch_sizes_stop_in_a_copy_of_the_config():
    model, processor = make_llava()
    tower = make_tower("flexivit", model)
    config = tower.config
    config.train_patch_sizes, config.patch_size = [8, 12, 16], None
    with pytest.warns(UserWarning, match=r"no longer draws its patch size in training.*\[8, 12, 16\].*`patch_size` 8"):
        processor = swap_vision_tower(model, tower, processor, keep_projector=True)
    assert config.train_patch_sizes == [8, 12, 16]
    inputs = encode(processor)
    model.train()
    counts = {model.model.vision_tower(inputs["pixel_values"]).last_hidden_state.shape[1] for _ in range(5)}
    assert counts == {36}


def test_a_drawing_flexivit_inside_s2_stops_too():
    model, processor = make_llava()
    base = FlexiViTModel(FlexiViTConfig(**ENCODER, image_size=32, base_patch_size=8, train_patch_sizes=[8, 16]))
    with pytest.warns(UserWarning, match="no longer draws"):
        processor = swap_vision_tower(model, S2VisionWrapper.from_vision_model(base, scales=[1, 2]), processor)
    model.train()
    for _ in range(4):
        assert torch.isfinite(model(**encode(processor)).logits).all()


def test_a_projector_is_kept_for_a_tower_made_of_the_old_one():
    """A conversion holds the weights of the old tower under other names."""
    model, processor = make_llava()
    before = model.model.multi_modal_projector.linear_1.weight
    same = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    same.load_state_dict(model.model.vision_tower.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_vision_tower(model, same, processor)
    assert model.model.multi_modal_projector.linear_1.weight is before
    with pytest.warns(UserWarning, match="trained with another tower"):
        swap_vision_tower(model, CLIPVisionModel(CLIPVisionConfig(**CLIP)), processor)
    other = S2VisionWrapper.from_vision_model(CLIPVisionModel(CLIPVisionConfig(**CLIP)), scales=[1, 2])
    with pytest.raises(ValueError, match="reads 16 channels and the new tower gives 64"):
        swap_vision_tower(model, other, processor, keep_projector=True, vision_feature_layer=[0, 1])


def test_real_images_are_shrunk_as_the_old_image_processor_shrinks_them():
    """S2 around the model's own tower sees at the first scale almost what the tower saw before."""
    model, processor = make_llava()
    old = processor.image_processor(make_photographs(), return_tensors="pt")["pixel_values"]
    tower = S2VisionWrapper.from_vision_model(model.model.vision_tower, scales=[1, 2, 3])
    assert tower.config.antialias is None
    new = swap_vision_tower(model, tower, processor)
    assert model.config.vision_config.vision_config.antialias
    large = new.image_processor(make_photographs(), return_tensors="pt")["pixel_values"]
    shrunk = {
        antialias: torch.nn.functional.interpolate(large, size=32, mode="bicubic", antialias=antialias)
        for antialias in (True, False)
    }
    error = {antialias: (image - old).abs().mean() for antialias, image in shrunk.items()}
    assert error[True] < 0.8 * error[False]
    with torch.no_grad():
        first = model.model.vision_tower.tower(large).last_hidden_state[:, 1:, :16]
        expected = model.model.vision_tower.tower.vision_model(shrunk[True]).last_hidden_state[:, 1:]
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)


def test_another_swap_takes_the_packed_tower_away():
    model, processor = swapped("flexivit")
    assert type(model.model.vision_tower) is PackedTower
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    processor = swap_vision_tower(model, clip, processor, keep_projector=True)
    assert model.model.vision_tower is clip
    assert "image_sizes" not in encode(processor)
    assert torch.isfinite(model(**encode(processor)).logits).all()
