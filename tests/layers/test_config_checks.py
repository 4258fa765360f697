"""Names and values of configs are checked when a config is made, changed, saved and used."""

import copy
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

import polyscale
from polyscale.layers.config_checks import ConfigError

from ..tiny_models import FAMILIES, tiny_config, tiny_fields


def test_the_error_is_a_value_error_and_what_transformers_raises():
    error = ConfigError("why")
    assert isinstance(error, ValueError)
    assert isinstance(error, StrictDataclassFieldValidationError)
    assert isinstance(error, StrictDataclassClassValidationError)
    assert str(error) == "why"
    assert str(pickle.loads(pickle.dumps(error))) == "why"


NAMES = [
    ("flexivit", "pach_size", "patch_size"),
    ("flexivit", "hidden_sizes", "hidden_size"),
    ("quadtree_vit", "splitThreshold", "split_threshold"),
    ("sparseformer", "num_latent_token", "num_latent_tokens"),
    ("sparseformer_video", "replicate", "replicates"),
    ("s2_vision", "scale", "scales"),
]


@pytest.mark.parametrize(("family", "name", "nearest"), NAMES)
def test_a_misspelt_field_is_refused_and_the_nearest_named(family, name, nearest):
    config_class, fields = tiny_fields(family)
    with pytest.raises(ValueError, match=rf"no field `{name}`. Did you mean `{nearest}`\?"):
        config_class(**fields, **{name: 4})
    with pytest.raises(ValueError, match=rf"Did you mean `{nearest}`\?"):
        setattr(tiny_config(family), name, 4)
    with pytest.raises(ValueError, match=rf"Did you mean `{nearest}`\?"):
        AutoConfig.for_model(family, **fields, **{name: 4})
    with pytest.raises(ValueError, match=rf"Did you mean `{nearest}`\?"):
        config_class.from_dict(fields, **{name: 4})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_field_is_refused_and_the_fields_listed(family):
    config_class, fields = tiny_fields(family)
    with pytest.raises(ValueError, match=r"no field `banana`. Its fields: .*initializer_range"):
        config_class(**fields, banana=1)
    config = tiny_config(family)
    with pytest.raises(ValueError, match="no field `banana`"):
        config.banana = 1
    config.use_cache = False  # what trainers and hosts set on any config
    config._private = 1
    config.tie_word_embeddings = False


@pytest.mark.parametrize("family", FAMILIES)
def test_names_out_of_a_file_are_kept_and_near_misses_warned_of(family, tmp_path, monkeypatch):
    config = tiny_config(family)
    record = {**config.to_dict(), "my_note": "x", "initialiser_range": 3}
    warnings = []
    monkeypatch.setattr(logging.get_logger("polyscale.layers.config_checks"), "warning", warnings.append)
    (tmp_path / "config.json").write_text(json.dumps(record))
    for load, source in (
        (type(config).from_dict, record),
        (lambda fields: type(config)(**fields), record),
        (type(config).from_pretrained, tmp_path),
        (AutoConfig.from_pretrained, tmp_path),
    ):
        loaded = load(source)
        assert (loaded.my_note, loaded.initialiser_range) == ("x", 3)
        assert any("`initialiser_range`" in text and "`initializer_range`" in text for text in warnings)
        assert not any("my_note" in text for text in warnings)
        warnings.clear()
        assert type(config)(**loaded.to_dict()).to_dict() == loaded.to_dict()
        loaded.my_note = "y"
        loaded.save_pretrained(tmp_path / "saved")
        assert type(config).from_pretrained(tmp_path / "saved").my_note == "y"
        warnings.clear()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [object(), {"a": torch.zeros(2)}, [b"x"], {"a": [float("nan")]}, {(1, 2): 3}])
def test_a_name_out_of_a_file_cannot_hold_what_no_file_can(family, value):
    with pytest.raises(ValueError, match="`my_note` must be a plain value, which JSON can hold"):
        type(tiny_config(family)).from_dict({**tiny_config(family).to_dict(), "my_note": value})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_of_the_first_argument_is_no_field(family):
    config_class, fields = tiny_fields(family)
    with pytest.raises(ValueError, match="no field `self`"):
        config_class(**fields, self=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_made_again_from_its_dict(family):
    config = tiny_config(family)
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


NAN, INFINITY = float("nan"), float("inf")
VALUES = [
    ("flexivit", "pooling", "banana", "one of 'cls', 'mean'"),
    ("flexivit", "remainder", "stretch", "one of 'crop', 'pad', 'error'"),
    ("flexivit", "patch_size", -1, "at least 1 pixel"),
    ("flexivit", "patch_size", True, "int or a pair"),
    ("flexivit", "patch_size", "8", "int or a pair"),
    ("flexivit", "image_size", [32, 0], "at least 1 pixel"),
    ("flexivit", "hidden_size", 16.0, "an int"),
    ("flexivit", "num_channels", True, "an int"),
    ("flexivit", "use_cls_token", 1, "True or False"),
    ("flexivit", "drop_path_rate", 1.0, r"in \[0, 1\)"),
    ("flexivit", "drop_path_rate", NAN, r"in \[0, 1\)"),
    ("flexivit", "layer_norm_eps", NAN, "above 0"),
    ("flexivit", "layer_norm_eps", 0, "above 0"),
    ("flexivit", "initializer_range", INFINITY, "finite"),
    ("flexivit", "layer_scale_init_value", NAN, "finite"),
    ("flexivit", "hidden_act", "rectifier", "activation that transformers knows"),
    ("flexivit", "train_patch_sizes", 8, "a list or None"),
    ("flexivit", "train_patch_size_probs", [NAN, 1], "finite"),
    ("flexivit", "num_labels", -1, "at least 0"),
    ("flexivit", "dtype", "float31", "torch.dtype"),
    ("flexivit", "id2label", {"first": "cat"}, "class indices"),
    ("quadtree_vit", "num_tokens", 0, "at least 1"),
    ("quadtree_vit", "patch_scorer", "sharpest", "one of 'pixel_blur'"),
    ("quadtree_vit", "split_threshold", NAN, "finite"),
    ("sparseformer", "sampling_padding", "reflect", "one of 'zeros', 'border'"),
    ("sparseformer", "num_sampling_points", 1, "at least 2"),
    ("sparseformer", "mlp_ratio", 0, "above 0"),
    ("sparseformer_video", "replicates", 0, "at least 1"),
    ("s2_vision", "uneven", "crop", "one of 'resize', 'pad'"),
    ("s2_vision", "max_tiles", 0, "at least 1"),
    ("s2_vision", "scales", [1, NAN], "finite"),
]


@pytest.mark.parametrize(("family", "name", "value", "expected"), VALUES)
def test_an_illegal_value_is_refused_when_made_and_when_assigned(family, name, value, expected):
    config_class, fields = tiny_fields(family)
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{expected}"):
        config_class(**{**fields, name: value})
    config = tiny_config(family)
    before = config.to_dict()
    with pytest.raises(StrictDataclassError, match=rf"`{name}` must be .*{expected}"):
        setattr(config, name, value)
    assert config.to_dict() == before


def test_what_follows_from_other_fields_cannot_be_set():
    with pytest.raises(ValueError, match=r"`num_tokens` of SparseFormerConfig follows .*one latent token each"):
        polyscale.SparseFormerConfig(num_tokens=9)
    with pytest.raises(ValueError, match="`hidden_size` of S2VisionConfig follows"):
        tiny_config("s2_vision").hidden_size = 3


def test_two_fields_may_be_changed_one_after_the_other_and_are_checked_together(tmp_path):
    config = tiny_config("flexivit")
    config.hidden_size = 24
    config.num_attention_heads = 3
    assert AutoModel.from_config(config).embeddings.position_embeddings.shape == (1, 16, 24)
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="`hidden_size` must be a multiple of `num_attention_heads`, got 24 and 5"):
        AutoModel.from_config(config)
    with pytest.raises(ValueError, match="must be a multiple"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a multiple"):
        type(config).from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("old", "new", "value", "other"),
    [("uneven", "remainder", "pad", "error"), ("pooled_norm", "fc_norm", True, False)],
)
def test_renamed_fields_load_by_their_old_names(old, new, value, other, tmp_path):
    record = tiny_config("flexivit").to_dict()
    assert old not in record
    del record[new]
    (tmp_path / "config.json").write_text(json.dumps({**record, old: value}))
    for config in (AutoConfig.from_pretrained(tmp_path), tiny_config("flexivit", **{old: value})):
        assert getattr(config, new) == getattr(config, old) == value
        setattr(config, old, other)
        assert getattr(config, new) == other
        assert old not in config.to_dict()
        with pytest.raises(ValueError, match=f"`{new}` must be"):
            setattr(config, old, "banana")
