"""Models of transformers as FlexiViT: equal outputs at their own size and at others."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from polyscale import FlexiViTForImageClassification, FlexiViTModel, FlexiViTModelWithProjection
from polyscale.conversion import convert_checkpoint
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source


SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MLP = {**SHAPE, "intermediate_size": 24}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 60000,
}


def clip_config(**fields):
    return transformers.CLIPConfig(vision_config=MLP, text_config=TEXT, projection_dim=8, **fields)


# name -> (class, config); those named "classifier" give logits
SOURCES = {
    "vit": ("ViTModel", lambda: transformers.ViTConfig(**MLP, pooler_output_size=10, pooler_act="gelu")),
    "vit classifier": ("ViTForImageClassification", lambda: transformers.ViTConfig(**MLP, num_labels=5)),
    "vit without qkv bias": ("ViTModel", lambda: transformers.ViTConfig(**MLP, qkv_bias=False, hidden_act="relu")),
    "deit": ("DeiTModel", lambda: transformers.DeiTConfig(**MLP)),
    "deit classifier": ("DeiTForImageClassification", lambda: transformers.DeiTConfig(**MLP, num_labels=5)),
    "deit distilled classifier": (
        "DeiTForImageClassificationWithTeacher",
        lambda: transformers.DeiTConfig(**MLP, num_labels=5),
    ),
    "dinov2": ("Dinov2Model", lambda: transformers.Dinov2Config(**SHAPE, mlp_ratio=2)),
    "dinov2 classifier": ("Dinov2ForImageClassification", lambda: transformers.Dinov2Config(**SHAPE, num_labels=5)),
    "dinov2 giant": ("Dinov2Model", lambda: transformers.Dinov2Config(**SHAPE, use_swiglu_ffn=True)),
    "dinov2 registers": (
        "Dinov2WithRegistersModel",
        lambda: transformers.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3),
    ),
    "dinov2 registers classifier": (
        "Dinov2WithRegistersForImageClassification",
        lambda: transformers.Dinov2WithRegistersConfig(**SHAPE, num_labels=5),
    ),
    "clip": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**MLP)),
    "clip with projection": ("CLIPVisionModelWithProjection", lambda: transformers.CLIPVisionConfig(**MLP)),
    "clip with text": ("CLIPModel", clip_config),
    "clip classifier": ("CLIPForImageClassification", lambda: clip_config(num_labels=5)),
}


@pytest.fixture
def make_source(randomise):
    def make(name):
        class_name, config = SOURCES[name]
        torch.manual_seed(0)
        return randomise(getattr(transformers, class_name)(config()))

    return make


def run_source(model, images, **kwargs):
    is_whole_clip = type(model).__name__ in ("CLIPModel", "CLIPVisionModelWithProjection")
    with torch.no_grad():
        if not is_whole_clip:
            return model(images, **kwargs)
        outputs = model.vision_model(images, **kwargs)
        return {**outputs, "image_embeds": model.visual_projection(outputs.pooler_output)}


def assert_same_outputs(expected, actual, atol=1e-5):
    compared = 0
    for name in ("logits", "last_hidden_state", "pooler_output", "image_embeds"):
        if expected.get(name) is not None:
            torch.testing.assert_close(actual[name], expected[name], atol=atol, rtol=1e-4)
            compared += 1
    assert compared


@pytest.mark.parametrize("name", SOURCES)
def test_outputs_equal_the_source(make_source, images, name):
    source = make_source(name)
    model = flexivit_from_source(load_flexivit_source(source))
    kinds = {"classifier": FlexiViTForImageClassification, "with": FlexiViTModelWithProjection}
    expected = next((kind for word, kind in kinds.items() if word in name.split()[1:]), FlexiViTModel)
    assert type(model) is (FlexiViTModel if "bias" in name else expected)
    with torch.no_grad():
        actual = model(images)
    assert_same_outputs(run_source(source, images), actual)
    assert (model.config.kernel_interpolation, model.config.kernel_antialias) == ("bicubic", True)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2 registers", "clip"])
@pytest.mark.parametrize("size", [(48, 32), (16, 24), (56, 72)])
def test_positions_are_resized_as_the_source_does(make_source, name, size):
    source = make_source(name)
    model = flexivit_from_source(load_flexivit_source(source))
    images = torch.randn(1, 3, *size)
    kwargs = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        actual = model(images)
    assert_same_outputs(run_source(source, images, **kwargs), actual, atol=1e-4)


@torch.no_grad()
def test_clips_projection_is_saved_and_has_a_budget(make_source, tmp_path, images):
    source = make_source("clip with projection")
    expected = source(images)
    convert_checkpoint(source, tmp_path / "out")
    model = FlexiViTModelWithProjection.from_pretrained(tmp_path / "out").eval()
    outputs = model(images)
    torch.testing.assert_close(outputs.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0], outputs.image_embeds, atol=0, rtol=0)
    tower = AutoModel.from_pretrained(tmp_path / "out").eval()  # reads what is inside
    assert type(tower) is FlexiViTModel
    coarse = model(images, patch_size=16, pooled_only=True)
    expected = model.projection(tower(images, patch_size=16).pooler_output)
    torch.testing.assert_close(coarse.image_embeds, expected, atol=1e-5, rtol=1e-5)
    assert coarse.last_hidden_state.shape[1] == 1
    convert_checkpoint(tmp_path / "out", tmp_path / "again")
    again = FlexiViTModelWithProjection.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(images).image_embeds, outputs.image_embeds, atol=0, rtol=0)
    with pytest.raises(ValueError, match="projection_dim"):
        convert_checkpoint(tmp_path / "out", tmp_path / "vit", to="vit")


def test_every_other_patch_size_runs_on_the_converted_model(make_source, images):
    model = flexivit_from_source(load_flexivit_source(make_source("vit classifier")))
    with torch.no_grad():
        outputs = [model(images, patch_size=patch_size).logits for patch_size in (4, 8, 16, (8, 16))]
    assert all(torch.isfinite(output).all() for output in outputs)
    assert not torch.allclose(outputs[0], outputs[1])


def test_the_converted_weights_are_copies(make_source):
    source = make_source("vit classifier")
    model = flexivit_from_source(load_flexivit_source(source))
    before = model.head.classifier.weight.clone()
    with torch.no_grad():
        source.classifier.weight.add_(1)
    assert torch.equal(model.head.classifier.weight, before)


def test_config_fields_can_be_set_otherwise(make_source):
    config = load_flexivit_source(
        make_source("vit"), patch_size=4, remainder="pad", kernel_interpolation="bilinear"
    ).config
    assert (config.patch_size, config.remainder, config.kernel_interpolation) == (4, "pad", "bilinear")
    with pytest.raises(ValueError, match="patchsize"):
        load_flexivit_source(make_source("vit"), patchsize=4)
    with pytest.raises(ValueError, match="do not fit"):
        load_flexivit_source(make_source("vit"), hidden_size=32)


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 36}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 34}, "crop_size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_folder_converts_with_labels_and_image_processor(make_source, tmp_path, processor, images):
    source = make_source("dinov2 classifier" if processor == "BitImageProcessor" else "vit classifier")
    source.config.id2label = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
    source.config.label2id = {label: index for index, label in source.config.id2label.items()}
    source.save_pretrained(tmp_path / "source")
    theirs = getattr(transformers, processor)(**PROCESSORS[processor])
    theirs.save_pretrained(tmp_path / "source")

    converted = load_flexivit_source(tmp_path / "source")
    model = flexivit_from_source(converted)
    model.save_pretrained(tmp_path / "out")
    converted.image_processor.save_pretrained(tmp_path / "out")

    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert isinstance(loaded, FlexiViTForImageClassification)
    assert [loaded.config.id2label[index] for index in range(5)] == ["ant", "bee", "cat", "dog", "eel"]
    assert loaded.config.label2id["eel"] == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, source(images).logits)
    ours = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.effect_noise((60, 50), 80).convert("RGB")
    expected = theirs(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(picture, return_tensors="pt").pixel_values, expected, atol=1e-5, rtol=1e-5)


def test_a_folder_of_clip_gives_its_vision_part(make_source, tmp_path, images):
    source = make_source("clip with text")
    source.save_pretrained(tmp_path)
    converted = load_flexivit_source(tmp_path)
    assert converted.image_processor is None  # the folder says nothing about pictures
    with torch.no_grad():
        actual = flexivit_from_source(converted)(images)
    assert_same_outputs(run_source(source, images), actual)


def test_a_folder_of_our_own_converts_to_itself(make_source, tmp_path, images):
    model = flexivit_from_source(load_flexivit_source(make_source("vit classifier"), patch_size=4))
    model.save_pretrained(tmp_path)
    again = flexivit_from_source(load_flexivit_source(tmp_path))
    assert again.config.patch_size == 4
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_a_pooler_that_the_checkpoint_lacks_is_left_out(make_source, tmp_path, images):
    source = make_source("vit classifier")
    source.config.architectures = ["ViTModel"]
    source.vit.save_pretrained(tmp_path)  # a classifier's body has no pooler
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    model = flexivit_from_source(load_flexivit_source(tmp_path))
    assert model.config.pooling == "cls"
    with torch.no_grad():
        expected = source.vit(images).last_hidden_state
        torch.testing.assert_close(model(images).pooler_output, expected[:, 0])


OLD_NAMES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    "vit.layers.": "vit.encoder.layer.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


@pytest.mark.parametrize("name", ["vit classifier", "clip with text"])
def test_checkpoints_of_older_versions_convert(make_source, tmp_path, images, name):
    """Published weights have names that transformers translates, and left-overs that it ignores."""
    source = make_source(name)

    def alter(tensors):
        for key in list(tensors):
            old = key
            if name == "vit classifier":
                for ours, theirs in OLD_NAMES.items():
                    old = old.replace(ours, theirs)
            tensors[old] = tensors.pop(key)
        if name == "vit classifier":
            tensors["vit.pooler.dense.bias"] = torch.zeros(16)
        else:
            tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    save_altered(source, tmp_path, alter)
    with torch.no_grad():
        actual = flexivit_from_source(load_flexivit_source(tmp_path))(images)
    assert_same_outputs(run_source(source, images), actual)


def save_altered(source, folder, alter):
    source.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda tensors: tensors.pop("classifier.bias"), r"missing.*classifier\.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "unexpected.*extra"),
        (lambda tensors: tensors.update({"classifier.bias": torch.zeros(7)}), "classifier.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(make_source, tmp_path, alter, message):
    save_altered(make_source("vit classifier"), tmp_path, alter)
    with pytest.raises(ValueError, match=message):
        load_flexivit_source(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("BertModel", lambda: transformers.BertConfig(**TEXT)),
        ("ViTForMaskedImageModeling", lambda: transformers.ViTConfig(**MLP, encoder_stride=8)),
        ("ViTMAEModel", lambda: transformers.ViTMAEConfig(**MLP)),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, class_name, config):
    model = getattr(transformers, class_name)(config())
    with pytest.raises(ValueError, match=class_name):
        load_flexivit_source(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot become a FlexiViT"):
        load_flexivit_source(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "config", "missing"),
    [
        ("DINOv3ViTModel", lambda: transformers.DINOv3ViTConfig(**MLP), "rotary positions"),
        (
            "BeitModel",
            lambda: transformers.BeitConfig(**MLP, use_shared_relative_position_bias=True),
            "a relative position bias",
        ),
    ],
)
def test_positions_that_a_flexivit_lacks_are_named(tmp_path, class_name, config, missing):
    model = getattr(transformers, class_name)(config())
    with pytest.raises(ValueError, match=f"{class_name} cannot become a FlexiViT. FlexiViT does not have: {missing}"):
        load_flexivit_source(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot become a FlexiViT. FlexiViT does not have: {missing}"):
        load_flexivit_source(tmp_path)


def test_modules_of_no_library_are_refused():
    with pytest.raises(ValueError, match="Linear"):
        load_flexivit_source(torch.nn.Linear(2, 2))
