"""Sizes, budgets and bad values of FlexiViTConfig."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyscale import FlexiViTConfig, FlexiViTForImageClassification


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("flexivit_small", 22_061_416), ("flexivit_base", 86_589_160), ("flexivit_large", 304_355_304)],
)
def test_presets_have_the_published_parameter_counts(name, parameters):
    config = FlexiViTConfig.preset(name, base_patch_size=16, num_labels=1000)  # as resampled in timm
    with torch.device("meta"):
        model = FlexiViTForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "shape"), [("flexivit_tiny", (192, 12, 3)), ("flexivit_huge", (1280, 32, 16))])
def test_other_presets(name, shape):
    config = FlexiViTConfig.preset(name, patch_size=30)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == shape
    assert config.patch_size == 30
    assert config.position_grid == [7, 7]


def test_patch_size_falls_back_to_the_config_then_to_the_kernel():
    assert FlexiViTConfig().resolve_patch_size() == (32, 32)
    assert FlexiViTConfig(patch_size=16).resolve_patch_size() == (16, 16)
    assert FlexiViTConfig(patch_size=16).resolve_patch_size((10, 15)) == (10, 15)


@pytest.mark.parametrize(
    ("remainder", "image_size", "patch_size", "tokens"),
    [
        ("crop", 240, 16, 225),
        ("crop", 240, 48, 25),
        ("crop", 224, 20, 121),
        ("crop", (224, 320), (16, 32), 140),
        ("crop", None, None, 49),
        ("pad", 224, 20, 144),
        ("pad", (224, 230), 20, 144),
        ("error", 240, 20, 144),
    ],
)
def test_num_tokens_for(remainder, image_size, patch_size, tokens):
    assert FlexiViTConfig(remainder=remainder).num_tokens_for(image_size, patch_size) == tokens


def test_uneven_error_names_the_sizes():
    with pytest.raises(ValueError, match=r"\(20, 20\) does not divide.*\(224, 224\)"):
        FlexiViTConfig(remainder="error").num_tokens_for(224, 20)


@given(
    height=st.integers(8, 60),
    width=st.integers(8, 60),
    remainder=st.sampled_from(["crop", "pad"]),
    share=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_patch_size_for_is_the_nearest_there_is(height, width, remainder, share):
    config = FlexiViTConfig(remainder=remainder)
    budget = 1 + round(share * (height * width - 1))
    chosen = config.patch_size_for((height, width), budget)
    divide = math.floor if remainder == "crop" else math.ceil
    costs = {p: divide(height / p) * divide(width / p) for p in range(1, min(height, width) + 1)}
    assert config.num_tokens_for((height, width), chosen) == costs[chosen]
    assert abs(costs[chosen] - budget) == min(abs(cost - budget) for cost in costs.values())


def test_patch_size_for_published_sizes():
    config = FlexiViTConfig()
    sizes = [8, 10, 12, 15, 16, 20, 24, 30, 40, 48]
    assert [config.patch_size_for(240, (240 // size) ** 2) for size in sizes] == sizes
    assert FlexiViTConfig(remainder="error").patch_size_for(224, 100) == 28  # 64 tokens; 16 has 196


@pytest.mark.parametrize("num_tokens", [0, -1, 240 * 240 + 1])
def test_budgets_out_of_range_are_refused(num_tokens):
    with pytest.raises(ValueError, match=r"num_tokens.*between 1 and 57600"):
        FlexiViTConfig().patch_size_for(240, num_tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_patch_size": 0}, "base_patch_size"),
        ({"base_patch_size": 300}, "base_patch_size"),
        ({"patch_size": -4}, "patch_size"),
        ({"patch_size": [16, 0]}, "patch_size"),
        ({"image_size": [240, 240, 3]}, "image_size"),
        ({"position_grid": 0}, "position_grid"),
        ({"resize_method": "nearest"}, "resize_method"),
        ({"kernel_interpolation": "area"}, "kernel_interpolation"),
        ({"position_interpolation": "area"}, "position_interpolation"),
        ({"prefix_positions": "some"}, "prefix_positions"),
        ({"remainder": "stretch"}, "remainder"),
        ({"uneven": "stretch"}, "uneven"),
        ({"train_patch_sizes": []}, "train_patch_sizes"),
        ({"train_patch_sizes": [8, 0]}, "train_patch_sizes"),
        ({"train_patch_size_probs": [1.0]}, "train_patch_size_probs"),
        ({"train_patch_sizes": [8, 16], "train_patch_size_probs": [1.0]}, "train_patch_size_probs"),
        ({"train_patch_sizes": [8, 16], "train_patch_size_probs": [0.5, 0.6]}, "train_patch_size_probs"),
        ({"train_patch_sizes": [8, 16], "train_patch_size_probs": [1.5, -0.5]}, "train_patch_size_probs"),
    ],
)
def test_bad_values_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        FlexiViTConfig(**fields)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="flexivit_tiny"):
        FlexiViTConfig.preset("flexivit_giant")


def test_config_survives_saving(tmp_path):
    config = FlexiViTConfig(patch_size=(10, 15), train_patch_sizes=[8, (10, 15)], train_patch_size_probs=[0.25, 0.75])
    config.save_pretrained(tmp_path)
    loaded = FlexiViTConfig.from_pretrained(tmp_path)
    assert loaded.resolve_patch_size() == (10, 15)
    assert [tuple(size) if isinstance(size, list) else size for size in loaded.train_patch_sizes] == [8, (10, 15)]
    assert loaded.train_patch_size_probs == [0.25, 0.75]


def test_each_budget_is_listed_once():
    config = FlexiViTConfig(image_size=32, base_patch_size=8, train_patch_sizes=[16, 8, [8, 8], [8, 4], 16])
    assert config.default_budgets() == [[8, 4], 8, 16]


@pytest.mark.parametrize("size", [[8], [8, 4, 4], (8, 4, 4), [[8]], "8", 8.0, True, []])
def test_a_patch_size_that_is_none(size):
    config = FlexiViTConfig(image_size=32, base_patch_size=8)
    with pytest.raises(ValueError, match=r"`patch_size` must be an int or a pair \(height, width\) of ints, got"):
        config.num_tokens_for(32, patch_size=size)
    with pytest.raises(ValueError, match="`patch_size` must be an int or a pair"):
        FlexiViTConfig(patch_size=size)
    with torch.device("meta"):
        model = FlexiViTForImageClassification(FlexiViTConfig(image_size=32, base_patch_size=8, num_hidden_layers=0))
    for batch in (1, 2):
        with pytest.raises(ValueError, match=r"`patch_size` must be an int(,| or a pair) "):
            model(torch.zeros(batch, 3, 32, 32, device="meta"), patch_size=size)
