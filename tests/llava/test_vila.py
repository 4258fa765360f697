"""VILA-1.5 and NVILA in their published layout, written tiny, converted, and computed by hand."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, interpolate, layer_norm
from transformers import AutoModelForImageTextToText

import polyscale
from polyscale.hub import save_with_code
from polyscale.llava import DownsampledTower, convert_vila, load_vila
from polyscale.models.s2_vision import multiscale_forward
from polyscale.models.s2_vision.projector_s2_vision import space_to_depth
from polyscale.serving import check_servable

from .llava_tiny import make_photographs
from .test_code import LOAD
from .vila_tiny import NVILA, S2, WORDS, write_vila


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


@pytest.mark.slow
@pytest.mark.parametrize(("record", "words"), [({}, {}), (S2, {"num_tiles": 2})])
def test_it_loads_without_polyscale(record, words, tmp_path):
    write_vila(tmp_path / "vila", record)
    model, processor = load_vila(tmp_path / "vila")
    save_with_code(model, tmp_path / "model", processor)
    for index, image in enumerate(make_photographs()):
        image.save(tmp_path / f"{index}.png")
    prompts = [TEXT.format("<image>"), "a cat <image> ?"]
    cases = {"model": (words, ("model", "processor"))}
    done = subprocess.run(
        [sys.executable, "-c", f"PROMPTS, CASES = {prompts!r}, {cases!r}\n{LOAD}"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "model.pt").is_file(), done.stderr[-6000:]
    inputs = processor(images=make_photographs(), text=prompts, padding=True, return_tensors="pt", **words)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "model.pt"), expected, atol=1e-5, rtol=1e-4)


def test_training_reaches_the_norm_in_the_tower(tmp_path):
    write_vila(tmp_path / "vila", S2)
    model, processor = load_vila(tmp_path / "vila")
    inputs = processor(images=make_photographs()[0], text=TEXT.format("<image>"), return_tensors="pt")
    model.train()
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= len(WORDS), -100)).loss.backward()
    tower = model.model.vision_tower.tower
    assert tower.norms[0].weight.grad.abs().sum() > 0
    assert tower.tower.vision_model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("record", [{}, S2])
def test_the_tower_is_one_graph(record, tmp_path):
    write_vila(tmp_path / "vila", record)
    tower = load_vila(tmp_path / "vila")[0].model.vision_tower.tower
    pixels = torch.randn(2, 3, *[48 if record else 24] * 2)
    torch.compiler.reset()
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state  # the first call for hidden states installs transformers' recorders
        compiled = torch.compile(tower, backend="eager", fullgraph=True)(pixels).last_hidden_state
        torch.testing.assert_close(compiled, expected)


def test_half_precision_and_other_scales(tmp_path):
    write_vila(tmp_path / "vila", S2)
    model, processor = load_vila(tmp_path / "vila", dtype="bfloat16")
    processor = polyscale.set_token_budget(model, processor, img_sizes=[24, 72])
    inputs = processor(images=make_photographs()[0], text=TEXT.format("<image>"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 72, 72)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] == 11
    model.float()
    other = processor(
        images=make_photographs()[0], text=TEXT.format("<image>"), return_tensors="pt", img_sizes=[24, 48]
    )
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-3)


def test_another_tower_gets_another_projector(tmp_path):
    """Four scales are as wide as four tokens brought together, and are something else."""
    write_vila(tmp_path / "vila")
    model, processor = load_vila(tmp_path / "vila")
    siglip = model.model.vision_tower.tower.tower
    tower = polyscale.S2VisionWrapper.from_vision_model(siglip, scales=[1, 2, 3, 4])
    assert tower.config.hidden_size == model.model.multi_modal_projector.linear_1.in_features
    with pytest.warns(UserWarning, match="it is replaced by a new one"):
        processor = polyscale.swap_vision_tower(model, tower, processor)
    inputs = processor(images=make_photographs()[0], text=TEXT.format("<image>"), return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
