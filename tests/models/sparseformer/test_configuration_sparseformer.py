import pytest
import torch
from sparseformer_reference import tiny_config

from polyscale.models.sparseformer import (
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerModel,
    SparseFormerModelWithProjection,
    SparseFormerVideoConfig,
)


MILLIONS = {
    "sparseformer_v1_tiny": 31.5,
    "sparseformer_v1_small": 47.6,
    "sparseformer_v1_base": 81.1,
    "sparseformer_btsp_augreg_base": 64.2,
    "sparseformer_btsp_augreg_large": 212.4,
    "sparseformer_btsp_openai_clip_base": 63.8,
    "sparseformer_btsp_openai_clip_large": 212.2,
}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_presets_have_the_published_number_of_parameters(name, millions):
    config = SparseFormerConfig.preset(name)
    head = SparseFormerModelWithProjection if "clip" in name else SparseFormerForImageClassification
    with torch.device("meta"):
        model = head(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_presets_take_overrides_and_survive_json(tmp_path):
    config = SparseFormerConfig.preset("sparseformer_btsp_augreg_base", num_latent_tokens=15, num_labels=7)
    config.save_pretrained(tmp_path)
    again = SparseFormerConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.num_tokens, again.num_prefix_tokens, again.hidden_size, again.num_labels) == (15, 1, 768, 7)
    assert SparseFormerConfig().to_diff_dict() == SparseFormerConfig(**SparseFormerConfig().to_dict()).to_diff_dict()


def test_presets_are_not_shared_between_configs():
    first = SparseFormerConfig.preset("sparseformer_v1_tiny")
    first.widths[0] = first.operations[0][0] = None
    assert SparseFormerConfig.preset("sparseformer_v1_tiny").widths[0] == 256
    assert SparseFormerConfig.preset("sparseformer_v1_tiny").operations[0][0] == "attn"


def test_stochastic_depth_grows_with_every_repeat():
    config = tiny_config(drop_path_rate=0.3)
    assert config.drop_path_rates == [[0.0, pytest.approx(0.1)], [pytest.approx(0.2)], [pytest.approx(0.3)]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"operations": [["attn"], ["mlp"], ["mlp"]]}, "no 'sampling_m'"),
        ({"operations": [["sampling_m"], ["look"], ["mlp"]]}, r"`operations\[1\]` must be one of"),
        ({"operations": [["sampling_m"], [], ["mlp"]]}, "at least one operation"),
        ({"operations": [["sampling_m"], "mlp", ["mlp"]]}, "must be a list"),
        ({"operations": [["sampling_m", "mlp", "mlp"], ["mlp"], ["mlp"]]}, "names an operation twice"),
        ({"operations": [["sampling_m"]]}, "one entry for each layer each, got 3, 3 and 1"),
        ({"repeats": None}, "`repeats` has none"),
        ({"repeats": [2, 0, 1]}, "`repeats` must hold ints of at least 1"),
        ({"widths": [16, 32.0, 32]}, "`widths` must hold ints"),
        ({"num_latent_tokens": 0}, "`num_latent_tokens` must be at least 1, got 0"),
        ({"num_sampling_points": 1}, "`num_sampling_points` must be at least 2"),
        ({"num_attention_heads": 5}, "not a multiple of its 5 attention heads"),
        ({"pooling": "cls"}, "needs a CLS token"),
        ({"pooling": "max"}, "`pooling` must be one of"),
        ({"cls_token_layer": 3}, "index of a layer, 0 to 2, got 3"),
        ({"cls_token_layer": 0}, "the width of CLS"),
        ({"sampling_padding": "reflect"}, "`sampling_padding` must be one of"),
        ({"hidden_act": "wave"}, "`hidden_act` must be an activation"),
        ({"drop_path_rate": 1.0}, r"`drop_path_rate` must be in \[0, 1\)"),
        ({"feature_width": 0}, "`feature_width` must be at least 1"),
        ({"generator_width": 0}, "`generator_width` must be at least 1"),
        ({"image_size": 0}, "`image_size`"),
    ],
)
def test_what_cannot_run_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_position_injection_needs_a_width_of_four_quarters():
    operations = [["sampling_m", "pe_inject"], ["sampling_m"], ["mlp"]]
    with pytest.raises(ValueError, match=r"'pe_inject' in `operations\[0\]` needs a width"):
        tiny_config(operations=operations, widths=[18, 32, 32])


@pytest.mark.parametrize("name", ["replicates", "num_frames"])
def test_a_video_needs_replicates_and_frames(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        SparseFormerVideoConfig(**{name: 0})


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="sparseformer_v1_tiny"):
        SparseFormerConfig.preset("sparseformer_v2_tiny")


def test_the_readmes_own_operation_list_runs():
    """CLS joins before layer 2, and layer 3 samples: RoI operations leave CLS alone."""
    looking = ["sampling_m", "attn", "mlp", "roi_adj", "pe_inject"]
    config = tiny_config(
        "bootstrapped",
        widths=[32] * 6,
        repeats=[1] * 6,
        operations=[looking if index % 3 == 0 else ["attn", "mlp"] for index in range(6)],
    )
    outputs = SparseFormerModel(config).eval()(torch.randn(2, 3, 20, 24))
    assert outputs.last_hidden_state.shape == (2, 6, 32)
    assert outputs.rois.shape == (2, 5, 4)
