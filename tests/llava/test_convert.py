"""LLaVA-1.5 with S2 in the layouts of the original code, written tiny, converted, and computed by hand."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from polyscale.models.s2_vision import S2VisionWrapper, multiscale_forward
from polyscale.models.s2_vision.convert_llava_s2_vision import load_llava_s2
from polyscale.models.s2_vision.convert_s2_vision import convert_s2_vision
from polyscale.models.s2_vision.projector_s2_vision import DownsampleProjector, space_to_depth

from .llava_tiny import CLIP, make_photographs, make_text_config, make_tokenizer


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "a", "cat", "?", "USER:", "ASSISTANT:"]
CONFIG = {
    "model_type": "llava",
    "s2": True,
    "s2_scales": "64,32,96",  # in any order
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 48,
    "image_aspect_ratio": "pad",
    "torch_dtype": "float32",
}
RANK, ALPHA = 2, 6
ADAPTED = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]


def random_like(shape, seed):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts(tmp_path):
    """Folders `base` (a Llama) and `clip`, and what goes into the projector."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(make_text_config(vocab_size=len(WORDS))).eval()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer(WORDS).save_pretrained(tmp_path / "base")
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    shapes = {"0.weight": (24, 48), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)}
    projector = {name: random_like(shape, index) for index, (name, shape) in enumerate(shapes.items())}
    return tmp_path, base, clip, projector


def write_config(folder, tmp_path, **fields):
    folder.mkdir(exist_ok=True)
    record = {**CONFIG, "mm_vision_tower": str(tmp_path / "clip"), **fields}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def write_lora(parts, safetensors=False, **fields):
    """As LLaVA's train.py saves a LoRA run; returns its folder and the base model with the updates merged."""
    tmp_path, base, _, projector = parts
    folder = write_config(tmp_path / "llava-lora", tmp_path, **fields)
    adapter = {}
    for index, name in enumerate(ADAPTED):
        weight = base.get_parameter(f"{name}.weight")
        factors = random_like((RANK, weight.shape[1]), 10 + index), random_like((weight.shape[0], RANK), 50 + index)
        for side, factor in zip("AB", factors, strict=True):
            adapter[f"base_model.model.{name}.lora_{side}.weight"] = factor
        with torch.no_grad():
            weight += ALPHA / RANK * (factors[1] @ factors[0])
    config = {"r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(tmp_path / "base"), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if safetensors:
        save_file(adapter, folder / "adapter_model.safetensors")
    else:
        torch.save(adapter, folder / "adapter_model.bin")
    trainables = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save(trainables, folder / "non_lora_trainables.bin")
    return folder, base


def write_full(parts, sharded=True):
    """As LLaVA saves a fully tuned model, its CLIP among the weights."""
    tmp_path, base, clip, projector = parts
    llama = {**base.config.to_dict(), "model_type": "llava_llama", "dtype": "float32"}
    folder = write_config(tmp_path / "llava-full", tmp_path, **llama)
    make_tokenizer(WORDS).save_pretrained(folder)
    with torch.no_grad():
        clip.encoder.layers[0].mlp.fc1.weight.mul_(1.5)  # tuned: other than what lies in the folder of the CLIP
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    weights.update({f"model.mm_projector.{name}": tensor for name, tensor in projector.items()})
    prefix = "model.vision_tower.vision_tower.vision_model."
    weights.update({prefix + name: tensor.clone() for name, tensor in clip.state_dict().items()})
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    names = sorted(weights)
    half = len(names) // 2 if sharded else len(names)
    for index, part in enumerate((names[:half], names[half:])):
        if part and sharded:
            torch.save({name: weights[name] for name in part}, folder / f"pytorch_model-0000{index + 1}-of-00002.bin")
        elif part:
            save_file({name: weights[name] for name in part}, folder / "model.safetensors")
    return folder, base


def by_hand(language_model, clip, projector, pixel_values, before, after):
    """Logits at the places of `after`: text, 16 image tokens, text."""

    def features(tiles):
        return clip(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]

    with torch.no_grad():
        image = multiscale_forward(features, pixel_values, img_sizes=[32, 64, 96], max_split_size=32)
        hidden = torch.nn.functional.gelu(image @ projector["0.weight"].T + projector["0.bias"])
        image = hidden @ projector["2.weight"].T + projector["2.bias"]
        embed = language_model.get_input_embeddings()
        embeddings = torch.cat([embed(before), image, embed(after)], dim=1)
        return language_model(inputs_embeds=embeddings).logits[:, -after.shape[1] :]


def check(out, parts, language_model, projector_dtype=torch.float32):
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    assert model.config.vision_config.model_type == "s2_vision"
    assert model.config.vision_config.img_sizes == [32, 64, 96]
    inputs = processor(images=make_photographs()[0], text="USER: <image> what is this ?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    ids = make_tokenizer(WORDS)("USER: what is this ?", return_tensors="pt")["input_ids"]
    expected = by_hand(language_model, parts[2], parts[3], inputs["pixel_values"], ids[:, :1], ids[:, 1:])
    with torch.no_grad():
        logits = model(**inputs).logits[:, -ids.shape[1] + 1 :, : len(WORDS)]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    return model, processor


@pytest.mark.parametrize("safetensors", [False, True])
def test_lora(parts, safetensors, tmp_path):
    folder, merged = write_lora(parts, safetensors)
    out = tmp_path / "out"
    out.mkdir()
    convert_s2_vision(folder, out)
    _, processor = check(out, parts, merged)
    assert processor.image_processor.fit == "pad"
    assert processor.patch_size == 24


@pytest.mark.parametrize("sharded", [True, False])
def test_everything_in_one(parts, sharded, tmp_path):
    folder, base = write_full(parts, sharded)
    out = tmp_path / "out"
    out.mkdir()
    convert_s2_vision(folder, out)
    check(out, parts, base)


def test_projector_alone(parts, tmp_path):
    folder = write_config(tmp_path / "llava-pretrain", tmp_path, image_aspect_ratio="resize")
    torch.save(
        {f"model.mm_projector.{name}": tensor for name, tensor in parts[3].items()}, folder / "mm_projector.bin"
    )
    out = tmp_path / "out"
    out.mkdir()
    convert_s2_vision(folder, out, base=tmp_path / "base")
    assert check(out, parts, parts[1])[1].image_processor.fit == "squash"


@pytest.mark.parametrize(("ratio", "fit"), [("pad", "pad"), ("resize", "squash"), ("square", "crop"), (None, "crop")])
def test_the_way_to_a_square_is_that_of_the_checkpoint(parts, ratio, fit):
    folder, _ = write_lora(parts, image_aspect_ratio=ratio)
    _, processor = load_llava_s2(folder)
    assert processor.image_processor.fit == fit


def test_chat_template_and_dtype(parts):
    folder, _ = write_lora(parts)
    model, processor = load_llava_s2(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}],
        add_generation_prompt=True,
    )
    assert text == "USER: <image>\nwhat is this ? ASSISTANT:"


BAD_FIELDS = [
    ({"s2": False}, "ordinary LLaVA"),
    ({"s2_scales": "336;672"}, "`s2_scales`"),
    ({"mm_projector_type": "linear"}, "'mlp2x_gelu' and no other"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"mm_hidden_size": 32}, "`mm_hidden_size` is 32"),
    ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_other_checkpoints_are_refused(parts, fields, message):
    folder, _ = write_lora(parts, **fields)
    with pytest.raises(ValueError, match=message):
        load_llava_s2(folder)


def test_broken_checkpoints_are_refused(parts, tmp_path):
    folder, _ = write_lora(parts)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_llava_s2(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere/vicuna"}))
    with pytest.raises(ValueError, match="holds no language model"):
        load_llava_s2(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))

    adapter = torch.load(folder / "adapter_model.bin", weights_only=True)
    name = next(iter(adapter))
    torch.save({**adapter, name.replace("layers.0", "layers.7"): adapter[name]}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"updates 'model\.layers\.7"):
        load_llava_s2(folder)
    torch.save(adapter, folder / "adapter_model.bin")

    torch.save(
        {"base_model.model.model.mm_projector.0.weight": torch.zeros(24, 16)}, folder / "non_lora_trainables.bin"
    )
    with pytest.raises(ValueError, match=r"has the shape \(24, 16\), the model wants \(24, 48\)"):
        load_llava_s2(folder)
    torch.save({}, folder / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"lacks 4 weights of the model, 'model\.multi_modal_projector"):
        load_llava_s2(folder)
    (folder / "non_lora_trainables.bin").write_bytes(pickle.dumps({"x": pytest.raises}))
    with pytest.raises(ValueError, match="more than tensors"):
        load_llava_s2(folder)


def test_plain_vision_model(parts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert_s2_vision(tmp_path / "clip", out, scales=[1, 2])
    model = AutoModel.from_pretrained(out).eval()
    pixel_values = AutoImageProcessor.from_pretrained(out)(make_photographs()[0], return_tensors="pt")["pixel_values"]
    expected = S2VisionWrapper.from_vision_model(parts[2], scales=[1, 2])(pixel_values)[0]
    torch.testing.assert_close(model(pixel_values)[0], expected, atol=1e-5, rtol=1e-4)


def test_space_to_depth():
    tokens = torch.arange(9.0).reshape(1, 9, 1)
    assert space_to_depth(tokens)[0].tolist() == [[0, 1, 3, 4], [2, 0, 5, 0], [6, 7, 0, 0], [8, 0, 0, 0]]
    with pytest.raises(ValueError, match="square grid"):
        space_to_depth(torch.zeros(1, 8, 2))


def test_vila(tmp_path):
    """The tower and projector of VILA-1.5 with S2: SigLIP at two scales, "mlp_downsample"."""
    torch.manual_seed(0)
    source, out = tmp_path / "vila", tmp_path / "out"
    (source / "mm_projector").mkdir(parents=True)
    out.mkdir()
    siglip = SiglipVisionModel(SiglipVisionConfig(**{**CLIP, "image_size": 24})).eval()
    siglip.save_pretrained(source / "vision_tower")
    SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(source / "vision_tower")
    record = {"s2": True, "s2_scales": "24,48", "s2_max_split_size": 24, "mm_vision_select_feature": "cls_patch"}
    (source / "config.json").write_text(json.dumps(record))
    (source / "mm_projector" / "config.json").write_text(json.dumps({"mm_projector_type": "mlp_downsample"}))
    shapes = {"layers.1": (128,), "layers.2": (24, 128), "layers.4": (24, 24)}
    tensors = {}
    for index, (name, shape) in enumerate(shapes.items()):
        tensors[f"{name}.weight"] = random_like(shape, index)
        tensors[f"{name}.bias"] = random_like(shape[:1], 9 + index)
    save_file(tensors, source / "mm_projector" / "model.safetensors")

    convert_s2_vision(source, out)
    model = AutoModel.from_pretrained(out).eval()
    pixel_values = AutoImageProcessor.from_pretrained(out)(make_photographs()[0], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 48, 48)
    features = model(pixel_values, output_hidden_states=-2).hidden_states[-2]
    expected = multiscale_forward(
        lambda x: siglip(x, output_hidden_states=True).hidden_states[-2],
        pixel_values,
        img_sizes=[24, 48],
        max_split_size=24,
    )
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    projected = DownsampleProjector.from_folder(out)(features)
    hidden = torch.nn.functional.layer_norm(
        space_to_depth(expected, order="columns"), (128,), tensors["layers.1.weight"], tensors["layers.1.bias"]
    )
    hidden = torch.nn.functional.gelu(hidden @ tensors["layers.2.weight"].T + tensors["layers.2.bias"])
    torch.testing.assert_close(
        projected, hidden @ tensors["layers.4.weight"].T + tensors["layers.4.bias"], atol=1e-5, rtol=1e-4
    )
