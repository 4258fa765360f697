"""What comes with a VILA: prompts, images, generation; and checkpoints that are refused."""

import json
import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import polyscale
from polyscale import loading
from polyscale.llava import load_vila
from polyscale_cli import app

from .llava_tiny import make_tokenizer
from .vila_tiny import NVILA, S2, WORDS, shard, write_vila


PLACES = [
    ("siglip", "resize", "all"),
    ("siglip", None, "all"),
    ("siglip", "pad", "padded"),
    ("clip", "resize", "all"),
    ("clip", None, "middle"),
    ("clip", "pad", "padded"),
]


@pytest.mark.parametrize("scales", [{}, S2])
@pytest.mark.parametrize(("vision", "ratio", "region"), PLACES)
def test_images_are_placed_as_in_the_checkpoint(scales, vision, ratio, region, tmp_path):
    choice = {"mm_vision_select_feature": "patch" if vision == "clip" else "cls_patch", "image_aspect_ratio": ratio}
    write_vila(tmp_path / "vila", {**scales, **choice}, vision=vision)
    _, processor = load_vila(tmp_path / "vila")
    image = Image.new("RGBA", (90, 30), (255, 0, 0, 255))
    image.paste((0, 0, 255, 255), (30, 0, 60, 30))  # red, blue, red
    side = 48 if scales else 24
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    red, blue = ((torch.tensor(colour) - mean) / std for colour in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]))
    assert pixels.shape == (3, side, side)
    left, middle, top = pixels[:, side // 2, 1], pixels[:, side // 2, side // 2], pixels[:, 1, side // 2]
    torch.testing.assert_close(middle, blue, atol=0.02, rtol=0)
    torch.testing.assert_close(left, blue if region == "middle" else red, atol=0.02, rtol=0)
    grey = (torch.floor(255 * mean) / 255 - mean) / std
    torch.testing.assert_close(top, grey if region == "padded" else blue, atol=0.02, rtol=0)


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "a ?"},
]
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
SYSTEM += "detailed, and polite answers to the user's questions. "
PROMPTS = {
    "vicuna_v1": SYSTEM + "USER: <image>\nwhat is this ? ASSISTANT: a cat</s>USER: a ? ASSISTANT:",
    "hermes-2": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nwhat is this ?"
    "<|im_end|><|im_start|>assistant\na cat<|im_end|><|im_start|>user\na ?<|im_end|><|im_start|>assistant\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n<image>\nwhat is this ?"
    "<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\na ?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize(
    ("words", "record", "name"),
    [
        ([], {}, "vicuna_v1"),
        (["<|im_start|>", "<|im_end|>"], {}, "hermes-2"),
        (["<|im_start|>", "<|im_end|>"], {**NVILA, "chat_template": "qwen2"}, "qwen2"),
    ],
)
def test_chat_templates(words, record, name, tmp_path):
    write_vila(tmp_path / "vila", record, words=[*WORDS, *words])
    model, processor = load_vila(tmp_path / "vila")
    processor.save_pretrained(tmp_path / "out")
    for one in (processor, AutoProcessor.from_pretrained(tmp_path / "out")):
        assert one.apply_chat_template(MESSAGES, add_generation_prompt=True) == PROMPTS[name]
        assert one.tokenizer.padding_side == "left"
    own = [{"role": "system", "content": "a cat ?"}, *MESSAGES[:1]]
    assert "a cat ?" in processor.apply_chat_template(own)
    assert "helpful" not in processor.apply_chat_template(own)
    ends = [2] if name == "vicuna_v1" else [2, len(WORDS) + 1]
    assert model.generation_config.eos_token_id == ends


def test_llama_3_and_the_template_of_the_tokenizer(tmp_path):
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    write_vila(tmp_path / "vila", words=[*WORDS, *words])
    _, processor = load_vila(tmp_path / "vila")
    text = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user = f"<|eot_id|>{header.format('user')}<image>\nwhat is this ?<|eot_id|>"
    assert text.endswith(user + header.format("assistant"))

    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        load_vila(tmp_path / "vila", conversation="tokenizer")
    with pytest.raises(ValueError, match="`conversation` must be one of 'vicuna_v1'"):
        load_vila(tmp_path / "vila", conversation="vicuna")
    tokenizer = make_tokenizer([*WORDS, *words])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}: {{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "vila" / "llm")
    _, processor = load_vila(tmp_path / "vila", conversation="tokenizer")
    assert processor.apply_chat_template(MESSAGES[:2]) == "[user: <image>\nwhat is this ?][assistant: a cat]"


def test_the_generation_config_can_be_used_and_saved(tmp_path):
    write_vila(tmp_path / "vila")
    model, _ = load_vila(tmp_path / "vila")
    assert model.generation_config.do_sample  # it comes with a temperature
    assert model.generation_config.temperature == 0.9
    assert model.generation_config.pad_token_id == 0
    model.save_pretrained(tmp_path / "out")


REFUSED = [
    ({"ps3": True}, {}, "`ps3` is true"),
    ({"mm_use_im_start_end": True}, {}, "mm_use_im_start_end"),
    ({"image_aspect_ratio": "dynamic"}, {}, "`image_aspect_ratio` is 'dynamic': tiles that become several images"),
    ({"mm_vision_select_feature": "patch"}, {}, "`mm_vision_select_feature` is 'patch' for a 'siglip_vision_model'"),
    ({"mm_hidden_size": 48}, {}, "`mm_hidden_size` in config.json is 48"),
    ({**S2, "s2_scales": "24;48"}, {}, "`s2_scales` in config.json"),
    ({**NVILA, "s2_resize_output_to_scale_idx": 0}, {}, "`s2_resize_output_to_scale_idx` is 0 with `dynamic_s2`"),
    ({**NVILA, "image_aspect_ratio": "resize"}, {}, "Dynamic-S2 needs 'dynamic_s2'"),
    ({**NVILA, "image_encoder": '{"_target_": "llava.x.TSPEncoder"}'}, {}, "`image_encoder` in config.json is"),
    ({**NVILA, "image_encoder": "{"}, {}, "`image_encoder` in config.json is"),
    ({**S2, "s2_scales": "24,,48"}, {}, "`s2_scales` in config.json"),
    (
        {"mm_vision_select_layer": -9},
        {},
        "`mm_vision_select_layer` in config.json is -9: the vision tower has 3 layers",
    ),
    ({**NVILA, "chat_template": "mistral"}, {}, "`conversation` must be one of .*'mistral'"),
    ({}, {"token_order": "diagonal"}, "`token_order` must be one of 'rows', 'columns'"),
    ({}, {"dtype": "int8"}, "`dtype` must be a floating-point type"),
]


@pytest.mark.parametrize(("record", "options", "message"), REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(record, options, message, tmp_path):
    write_vila(tmp_path / "vila", record)
    with pytest.raises(ValueError, match=message):
        load_vila(tmp_path / "vila", **options)


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_parts_of_other_kinds_are_refused_by_name(tmp_path):
    folder = tmp_path / "vila"
    write_vila(folder)
    for part, fields, message in (
        ("vision_tower", {"model_type": "intern_vit_6b"}, "The vision tower of .* is a 'intern_vit_6b'"),
        ("vision_tower", {"model_type": "radio"}, "is a 'radio': only siglip_vision_model and clip_vision_model"),
        ("llm", {"model_type": "mistral"}, "The language model of .* is a 'mistral': only llama and qwen2"),
        ("llm", {"quantization_config": {"quant_method": "awq"}}, "is quantized"),
        ("mm_projector", {"mm_projector_type": "linear"}, "`mm_projector_type` is 'linear'"),
        ("mm_projector", {"mm_projector_type": "identity"}, "`mm_projector_type` is 'identity'"),
    ):
        file = folder / part / "config.json"
        before = file.read_text()
        edit(file, **fields)
        with pytest.raises(ValueError, match=message):
            load_vila(folder)
        file.write_text(before)
    load_vila(folder)


def test_half_layouts_leave_nothing_behind(tmp_path):
    folder, out = tmp_path / "vila", tmp_path / "out"
    write_vila(folder)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            polyscale.convert_checkpoint(folder, out)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    for name, message in (
        ("vision_tower", "vision_tower/config.json, vision_tower/preprocessor_config.json is missing"),
        ("llm", "llm/config.json is missing"),
        ("mm_projector", "mm_projector/config.json is missing"),
    ):
        shutil.move(folder / name, tmp_path / "away")
        refused(f"no whole VILA checkpoint: {message}")
        shutil.move(tmp_path / "away", folder / name)

    lost = folder / "llm" / "model-00002-of-00003.safetensors"
    shutil.move(lost, tmp_path / "away")
    refused("is incomplete: model.safetensors.index.json names 3 files of weights, and 'model-00002-of-00003")
    lost.write_bytes(b"not a safetensors file")
    refused("is not a readable safetensors file")
    shutil.move(tmp_path / "away", lost)

    file = folder / "mm_projector" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "layers.9.weight": torch.zeros(2)}, file)
    refused("holds 'mm_projector/layers.9.weight', which this model does not have")
    save_file({name: value for name, value in tensors.items() if name != "layers.1.bias"}, file)
    refused("lacks 1 weights of the model, 'model.vision_tower.tower.norms.0.bias'")
    save_file({**tensors, "layers.2.weight": torch.zeros(24, 32)}, file)
    refused(r"'model.multi_modal_projector.linear_1.weight' has the shape \(24, 32\), the model wants \(24, 64\)")
    file.unlink()
    (file.parent / "pytorch_model.bin").write_bytes(pickle.dumps({"x": pytest.raises}))
    refused("more than tensors")


def test_a_language_model_that_lacks_a_tensor_is_refused(tmp_path):
    llm, _, _ = write_vila(tmp_path / "vila")
    weights = dict(llm.named_parameters())
    weights.pop("model.layers.1.mlp.up_proj.weight")
    shard(tmp_path / "vila" / "llm", weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model, 'model\.language_model\.layers\.1\.mlp"):
        load_vila(tmp_path / "vila")


def test_the_options_of_the_command(tmp_path):
    write_vila(tmp_path / "vila")
    with pytest.raises(ValueError, match=r"`base` is an option for a LLaVA with S2, and `source` .* is a VILA"):
        polyscale.convert_checkpoint(tmp_path / "vila", tmp_path / "out", base="vicuna")
    with pytest.raises(ValueError, match=r"has no option `conversatoin`\. Did you mean `conversation`"):
        polyscale.convert_checkpoint(tmp_path / "vila", tmp_path / "out", conversatoin="qwen2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither in the layout of VILA"):
        polyscale.convert_checkpoint(tmp_path / "empty", tmp_path / "out", to="llava")
    with pytest.raises(OSError, match="`source` 'nobody/nothing' cannot be loaded"):
        polyscale.convert_checkpoint("nobody/nothing", tmp_path / "out", to="llava")
    out = polyscale.convert_checkpoint(tmp_path / "vila", tmp_path / "out", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_name_on_the_hub_is_downloaded_without_code(tmp_path, monkeypatch):
    write_vila(tmp_path / "snapshot")
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(loading, "is_offline", lambda: False)
    monkeypatch.setattr(loading, "snapshot_download", download)
    out = polyscale.convert_checkpoint("somebody/vila-3b", tmp_path / "out", to="llava")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava"
    assert asked["name"] == "somebody/vila-3b"
    assert "*.py" not in asked["patterns"]


def test_the_command_knows_the_layout(tmp_path):
    write_vila(tmp_path / "vila", S2)
    arguments = ["convert", str(tmp_path / "vila"), str(tmp_path / "out"), "--set", "token_order=rows"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.model.vision_tower.tower.config.token_order == "rows"
    assert model.model.vision_tower.tower.config.vision_config.img_sizes == [24, 48]


def _cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


PROJECTOR, GENERATION = "mm_projector/config.json", "llm/generation_config.json"
DAMAGES = [
    (lambda vila: (vila / "llm/model-00002-of-00003.safetensors").unlink(), "/llm` is incomplete: .*model-00002"),
    (lambda vila: shutil.rmtree(vila / "llm"), "no whole VILA checkpoint: llm/config.json is missing"),
    (lambda vila: (vila / "llm/tokenizer.json").write_text("{"), "/llm`: its tokenizer cannot be used"),
    (lambda vila: _cut(vila / "llm/model-00002-of-00003.safetensors"), "/llm/model-00002.*` is not a readable"),
    (lambda vila: _cut(vila / "vision_tower/model.safetensors"), "/vision_tower/model.safetensors` is not a readable"),
    (
        lambda vila: (vila / "mm_projector/model.safetensors").write_bytes(b""),
        "/mm_projector/model.*` is not",
    ),
    (lambda vila: (vila / "mm_projector/model.safetensors").unlink(), "/mm_projector` has no weights"),
    (lambda vila: _edit(vila / PROJECTOR, mm_projector_type="foo"), "mm_projector_type` is 'foo'"),
    (lambda vila: _edit(vila / PROJECTOR, mm_projector_type=["a"]), "mm_projector_type` is "),
    (lambda vila: _edit(vila / PROJECTOR, mm_projector_type="mlp2x_gelu"), "holds 'mm_projector/layers.1.bias'"),
    (lambda vila: (vila / "config.json").write_text("{"), "/config.json` is missing or no readable JSON"),
    (lambda vila: (vila / "llm/config.json").write_text("[" * 100_000), "/llm/config.json` is missing or no readable"),
    (lambda vila: (vila / "vision_tower/preprocessor_config.json").write_text("[]"), "its image processor cannot be"),
    (lambda vila: _edit(vila / "vision_tower/preprocessor_config.json", image_std=[0, 0, 0]), "`image_std` must be"),
    (lambda vila: (vila / GENERATION).write_text("[]"), "/generation_config.json`: its settings cannot be used"),
    (lambda vila: _edit(vila / GENERATION, eos_token_id="x"), "`eos_token_id` must be an int or a list"),
    (lambda vila: _edit(vila / "llm/config.json", vocab_size="x"), "/llm/config.json`: its fields .*vocab_size"),
    (lambda vila: _edit(vila / "llm/config.json", num_hidden_layers=3), "lacks 9 weights of the model"),
    (lambda vila: _edit(vila / "vision_tower/config.json", num_hidden_layers=4), "/vision_tower` lacks 16 weights"),
    (lambda vila: _edit(vila / "config.json", s2_max_split_size="x"), "/config.json`: its fields .*max_split_size"),
    (lambda vila: _edit(vila / "config.json", image_aspect_ratio=["pad"]), "`image_aspect_ratio` must be text"),
]


@pytest.fixture(scope="module")
def whole_vila(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vila") / "whole"
    write_vila(folder, S2)
    return folder


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_part_is_named_and_nothing_is_written(whole_vila, damage, message, tmp_path):
    vila = tmp_path / "vila"
    shutil.copytree(whole_vila, vila)
    damage(vila)
    with pytest.raises(ValueError, match=message) as caught:
        load_vila(vila)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(app, ["convert", str(vila), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert str(vila) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]
