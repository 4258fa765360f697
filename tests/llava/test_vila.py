"""VILA-1.5 and NVILA in their published layout, written tiny, converted, and computed by hand."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, interpolate, layer_norm
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import polyscale
from polyscale import loading
from polyscale.hub import save_with_code
from polyscale.llava import DownsampledTower, convert_vila, load_vila
from polyscale.llava.downsampled import space_to_depth
from polyscale.models.s2_vision import multiscale_forward
from polyscale.serving import check_servable
from polyscale_cli import app

from .llava_tiny import make_photographs, make_tokenizer
from .test_code import LOAD
from .vila_tiny import NVILA, S2, WORDS, shard, write_vila


TEXT = "USER: {} what is this ?"


def downsample(maps, factor, transposed):
    """(1, rows, columns, width) -> (1, tokens, factor ** 2 * width), step by step as the published code views it."""
    maps = torch.cat([maps, maps.new_zeros(1, -maps.shape[1] % factor, *maps.shape[2:])], dim=1)
    maps = torch.cat([maps, maps.new_zeros(1, maps.shape[1], -maps.shape[2] % factor, maps.shape[3])], dim=2)
    rows, columns, width = maps.shape[1:]
    maps = maps.reshape(1, rows, columns // factor, factor * width).permute(0, 2, 1, 3)
    maps = maps.reshape(1, columns // factor, rows // factor, factor**2 * width)
    if not transposed:
        maps = maps.permute(0, 2, 1, 3)
    return maps.flatten(1, 2)


def project(features, tensors, kind, transposed=False):
    """The projector of VILA on features (1, rows, columns, width)."""
    if kind == "mlp2x_gelu":
        hidden, places = features.flatten(1, 2), [0, 2]
    else:
        hidden = downsample(features, 3 if "3x3" in kind else 2, transposed)
        places = range(1, 1 + max(int(name.split(".")[1]) for name in tensors))
    for place in places:
        weight, bias = (tensors.get(f"layers.{place}.{name}") for name in ("weight", "bias"))
        if weight is None or place == 0:  # a GELU, or the first layer without one before it
            hidden = gelu(hidden) if weight is None else hidden @ weight.T + bias
        elif weight.ndim == 1:
            hidden = layer_norm(hidden, weight.shape, weight, bias)
        else:
            hidden = (gelu(hidden) if kind == "mlp2x_gelu" else hidden) @ weight.T + bias
    return hidden


def layer_of(tower, tiles, prefix=0):
    return tower(tiles, output_hidden_states=True).hidden_states[-2][:, prefix:]


def logits_by_hand(llm, image, before, after):
    """Logits at the places of `after`: text, the image's embeddings, text."""
    embed = llm.get_input_embeddings()
    embeddings = torch.cat([embed(before), image, embed(after)], dim=1)
    return llm(inputs_embeds=embeddings).logits[:, -after.shape[1] :]


@torch.no_grad()
def check_logits(model, processor, llm, image_by_hand, image=0):
    """Logits of the converted model equal those by hand; returns its inputs."""
    inputs = processor(images=make_photographs()[image], text=TEXT.format("<image>"), return_tensors="pt")
    before, after = (processor.tokenizer(part, return_tensors="pt")["input_ids"] for part in TEXT.split("{}"))
    expected = logits_by_hand(llm, image_by_hand(inputs["pixel_values"]), before, after)
    logits = model(**inputs).logits[:, -after.shape[1] :, : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    return inputs


PROJECTORS = [
    ("mlp_downsample", 4),
    ("mlp_downsample_2x2_fix", 4),
    ("mlp_downsample_3x3_fix", 1),
    ("mlp_downsample_3x3_s2", 1),
    ("mlp2x_gelu", 9),
]


@pytest.mark.parametrize(("kind", "count"), PROJECTORS)
def test_every_projector(kind, count, tmp_path):
    llm, siglip, tensors = write_vila(tmp_path / "vila", projector=kind)
    model, processor = load_vila(tmp_path / "vila")

    def by_hand(pixel_values):
        features = layer_of(siglip, pixel_values).unflatten(1, (3, 3))
        return project(features, tensors, kind, transposed=kind == "mlp_downsample")

    inputs = check_logits(model, processor, llm, by_hand)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count
    assert model.config.image_token_id == len(WORDS)
    assert model.config.text_config.vocab_size == 64


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_s2(vision, tmp_path):
    choice = {"mm_vision_select_feature": "patch" if vision == "clip" else "cls_patch"}
    llm, tower, tensors = write_vila(tmp_path / "vila", {**S2, **choice}, vision=vision)
    model, processor = load_vila(tmp_path / "vila")

    def by_hand(pixel_values):
        assert pixel_values.shape == (1, 3, 48, 48)
        features = multiscale_forward(
            lambda tiles: layer_of(tower, tiles, vision == "clip"), pixel_values, img_sizes=[24, 48], max_split_size=24
        )
        return project(features.unflatten(1, (3, 3)), tensors, "mlp_downsample", transposed=True)

    check_logits(model, processor, llm, by_hand)


def dynamic_by_hand(siglip, tensors, kind, tiles, rows, columns):
    """NVILA: one tile, then rows x columns tiles; all scales at the size of the last, projected tile by tile."""
    features = layer_of(siglip, tiles).transpose(1, 2).unflatten(2, (3, 3))  # (tiles, 16, 3, 3)
    last = features[1 : 1 + rows * columns].unflatten(0, (rows, columns))
    last = last.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]  # (1, 16, 3 rows, 3 columns)
    both = torch.cat([interpolate(features[:1], size=last.shape[-2:], mode="area"), last], dim=1)
    side = {"mlp_downsample": 2, "mlp_downsample_3x3_fix": 1}[kind]
    result = torch.zeros(1, side * rows, side * columns, 24)
    for row in range(rows):
        for column in range(columns):
            tile = both[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].permute(0, 2, 3, 1)
            projected = project(tile, tensors, kind).unflatten(1, (side, side))
            result[:, side * row : side * row + side, side * column : side * column + side] = projected
    return result.flatten(1, 2)


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_3x3_fix"])
@pytest.mark.parametrize(("image", "grid"), [(0, (2, 3)), (1, (4, 1))])
def test_dynamic_s2(kind, image, grid, tmp_path):
    llm, siglip, tensors = write_vila(tmp_path / "nvila", NVILA, projector=kind, text="qwen2")
    model, processor = load_vila(tmp_path / "nvila")
    rows, columns = grid
    assert processor.image_processor.tile_grid_for(make_photographs()[image].size[::-1]) == grid

    def by_hand(pixel_values):
        return dynamic_by_hand(siglip, tensors, kind, pixel_values[0, : 1 + rows * columns], rows, columns)

    check_logits(model, processor, llm, by_hand, image)


def test_images_of_different_shapes_in_one_batch(tmp_path):
    write_vila(tmp_path / "nvila", NVILA, text="qwen2")
    model, processor = load_vila(tmp_path / "nvila")
    texts = [TEXT.format("<image>")] * 2
    both = processor(images=make_photographs(), text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**both).logits[:, -1]
        for index, image in enumerate(make_photographs()):
            alone = processor(images=image, text=texts[0], return_tensors="pt")
            torch.testing.assert_close(logits[index], model(**alone).logits[0, -1], atol=1e-5, rtol=1e-4)


RELOAD = """
import sys
import torch
import polyscale
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, text = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(images=Image.open(folder + "/image.png"), text=text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
torch.save((logits, answer), folder + "/answer.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("record", "text"), [(S2, "llama"), (NVILA, "qwen2")])
def test_the_converted_folder_in_a_fresh_process(record, text, tmp_path):
    source, out = tmp_path / "vila", tmp_path / "out"
    write_vila(source, record, text=text)
    assert polyscale.convert_checkpoint(source, out) == out
    make_photographs()[0].save(out / "image.png")
    prompt = TEXT.format("<image>")
    subprocess.run([sys.executable, "-c", RELOAD, str(out), prompt], check=True, capture_output=True)
    logits, answer = torch.load(out / "answer.pt")
    model, processor = load_vila(source)
    inputs = processor(images=make_photographs()[0], text=prompt, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-6, rtol=1e-6)
    assert answer.tolist() == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    assert answer.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", [None, "safetensors", "bin"])
def test_shards_of_any_kind_are_the_same_model(kind, tmp_path):
    llm, _, _ = write_vila(tmp_path / "vila", shards=kind)
    model, _ = load_vila(tmp_path / "vila")
    own = model.model.language_model.state_dict()
    for name, value in llm.model.state_dict().items():
        assert torch.equal(own[name][: len(value)], value), name
    assert torch.equal(model.lm_head.weight[: len(WORDS)], llm.lm_head.weight)
    mean = llm.lm_head.weight.mean(dim=0).expand(64 - len(WORDS), -1)
    torch.testing.assert_close(model.lm_head.weight[len(WORDS) :], mean)  # never the most likely of all


def test_tied_embeddings_stay_tied(tmp_path):
    llm, siglip, tensors = write_vila(tmp_path / "nvila", NVILA, text="qwen2", tie_word_embeddings=True)
    model, processor = load_vila(tmp_path / "nvila")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    check_logits(
        model,
        processor,
        llm,
        lambda pixels: dynamic_by_hand(siglip, tensors, "mlp_downsample", pixels[0, :7], 2, 3),
    )
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_one_tensor_at_a_time_in_memory(dtype, tmp_path, monkeypatch):
    """Beside the model there is never more than one tensor that was read."""
    write_vila(tmp_path / "vila", S2)
    alive, most = weakref.WeakSet(), []
    original = convert_vila.iterate_tensors

    def watched(folder):
        for name, tensor in original(folder):
            alive.add(tensor)
            most.append(len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(convert_vila, "iterate_tensors", watched)
    model, _ = load_vila(tmp_path / "vila", dtype=dtype)
    assert len(most) == 6 + len(list(model.model.language_model.parameters())) + 1
    assert max(most) <= 2  # the one before is let go when the next comes
    assert model.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}


def test_a_siglip_without_its_head(tmp_path):
    llm, siglip, tensors = write_vila(tmp_path / "vila", S2)
    file = tmp_path / "vila" / "vision_tower" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "head." not in name}, file, {"format": "pt"})
    model, processor = load_vila(tmp_path / "vila")
    assert not [name for name, _ in model.named_parameters() if "vision_model.head" in name]
    features = multiscale_forward  # as in test_s2

    def by_hand(pixel_values):
        own = features(lambda tiles: layer_of(siglip, tiles), pixel_values, img_sizes=[24, 48], max_split_size=24)
        return project(own.unflatten(1, (3, 3)), tensors, "mlp_downsample", transposed=True)

    check_logits(model, processor, llm, by_hand)


@pytest.mark.parametrize(("record", "text"), [({}, "llama"), (S2, "llama"), (NVILA, "qwen2")])
def test_servers_can_ask_it(record, text, tmp_path):
    write_vila(tmp_path / "vila", record, text=text)
    report = check_servable(*load_vila(tmp_path / "vila"))
    assert report.passed, str(report)


def test_tile_budgets_of_s2(tmp_path):
    write_vila(tmp_path / "vila", S2)
    model, processor = load_vila(tmp_path / "vila")
    text = TEXT.format("<image>")
    one = processor(images=make_photographs()[0], text=text, return_tensors="pt", num_tiles=1)
    every = processor(images=make_photographs()[0], text=text, return_tensors="pt", num_tiles=4)
    plain = processor(images=make_photographs()[0], text=text, return_tensors="pt")
    with torch.no_grad():
        expected = model(**plain).logits
        torch.testing.assert_close(model(**every).logits, expected, atol=1e-5, rtol=1e-4)
        fewer = model(**one).logits
        assert not torch.allclose(fewer, expected, atol=1e-3)
        processor = polyscale.set_token_budget(model, processor, num_tiles=1)
        again = processor(images=make_photographs()[0], text=text, return_tensors="pt")
        torch.testing.assert_close(model(**again).logits, fewer, atol=1e-5, rtol=1e-4)


def test_the_tower_keeps_the_published_resize(tmp_path):
    write_vila(tmp_path / "vila", S2)
    model, _ = load_vila(tmp_path / "vila")
    tower = model.model.vision_tower.tower
    assert isinstance(tower, DownsampledTower)
    assert tower.config.vision_config.antialias is False
    assert tower.config.hidden_size == model.model.multi_modal_projector.linear_1.in_features == 128


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
    from PIL import Image

    choice = {"mm_vision_select_feature": "patch" if vision == "clip" else "cls_patch", "image_aspect_ratio": ratio}
    write_vila(tmp_path / "vila", {**scales, **choice}, vision=vision)
    _, processor = load_vila(tmp_path / "vila")
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))  # red, blue, red
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


def test_the_order_of_tokens_can_be_chosen(tmp_path):
    write_vila(tmp_path / "vila")
    pixels = torch.randn(1, 3, 24, 24)
    towers = [load_vila(tmp_path / "vila", token_order=order)[0].model.vision_tower for order in ("rows", "columns")]
    with torch.no_grad():
        rows, columns = (tower(pixels).last_hidden_state for tower in towers)
    torch.testing.assert_close(rows.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), columns)
    assert not torch.allclose(rows, columns)


def test_tiles_as_images_can_be_left_out(tmp_path):
    lite = {**NVILA, "dynamic_s2": False, "image_aspect_ratio": "dynamic", "mm_hidden_size": 16}
    llm, siglip, tensors = write_vila(tmp_path / "lite", lite, projector="mlp_downsample_3x3_fix", text="qwen2")
    model, processor = load_vila(tmp_path / "lite", image_aspect_ratio="resize")

    def by_hand(pixel_values):
        return project(layer_of(siglip, pixel_values).unflatten(1, (3, 3)), tensors, "mlp_downsample_3x3_fix")

    check_logits(model, processor, llm, by_hand)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_grids_that_do_not_divide(order):
    for rows, columns, factor in ((2, 4, 2), (3, 5, 2), (4, 7, 3), (5, 3, 3)):
        maps = torch.randn(1, rows, columns, 3)
        own = space_to_depth(maps.flatten(1, 2), (rows, columns), factor, order)
        assert torch.equal(own, downsample(maps, factor, transposed=order == "columns"))


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


@pytest.mark.slow
@pytest.mark.parametrize(("record", "words"), [({}, {}), (S2, {"num_tiles": 2})])
def test_it_loads_without_polyscale(record, words, tmp_path):
    write_vila(tmp_path / "vila", record)
    model, processor = load_vila(tmp_path / "vila")
    save_with_code(model, tmp_path / "model", processor)
    for index, image in enumerate(make_photographs()):
        image.save(tmp_path / f"{index}.png")
    prompts = [TEXT.format("<image>"), "a cat <image> ?"]
    code = f"PROMPTS, WORDS = {prompts!r}, {words!r}\n{LOAD}"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path), "model", "processor"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    inputs = processor(images=make_photographs(), text=prompts, padding=True, return_tensors="pt", **words)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-4)


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


def test_training_reaches_the_norm_in_the_tower(tmp_path):
    write_vila(tmp_path / "vila", S2)
    model, processor = load_vila(tmp_path / "vila")
    inputs = processor(images=make_photographs()[0], text=TEXT.format("<image>"), return_tensors="pt")
    model.train()
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= len(WORDS), -100)).loss.backward()
    tower = model.model.vision_tower.tower
    assert tower.norms[0].weight.grad.abs().sum() > 0
    assert tower.tower.vision_model.get_input_embeddings().weight.grad.abs().sum() > 0
