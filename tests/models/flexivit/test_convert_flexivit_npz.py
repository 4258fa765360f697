"""big_vision's `.npz` files as FlexiViT, in both layouts, against plain formulas and timm's own reader."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.vit_sources import npz_vit


WIDTH, HEADS, DEPTH, MLP, PATCH, GRID, LABELS = 24, 3, 2, 40, 16, 5, 6
ATTENTION = "MultiHeadDotProductAttention_0"


def layer_arrays(random, leading=()):
    """One layer of flax, by its names; with `leading`, all layers in one array each."""

    def array(*shape):
        return random.normal(size=(*leading, *shape)).astype(np.float32) / 4

    arrays = {}
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        arrays |= {f"{norm}/scale": 1 + array(WIDTH), f"{norm}/bias": array(WIDTH)}
    head_width = WIDTH // HEADS
    for projection in ("query", "key", "value"):
        arrays[f"{ATTENTION}/{projection}/kernel"] = array(WIDTH, HEADS, head_width)
        arrays[f"{ATTENTION}/{projection}/bias"] = array(HEADS, head_width)
    arrays |= {f"{ATTENTION}/out/kernel": array(HEADS, head_width, WIDTH), f"{ATTENTION}/out/bias": array(WIDTH)}
    arrays |= {"MlpBlock_0/Dense_0/kernel": array(WIDTH, MLP), "MlpBlock_0/Dense_0/bias": array(MLP)}
    arrays |= {"MlpBlock_0/Dense_1/kernel": array(MLP, WIDTH), "MlpBlock_0/Dense_1/bias": array(WIDTH)}
    return arrays


@pytest.fixture
def arrays():
    """A model of big_vision by its names, layers separate."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.normal(size=shape).astype(np.float32) / 4

    model = {
        "embedding/kernel": array(PATCH, PATCH, 3, WIDTH) / 4,
        "embedding/bias": array(WIDTH),
        "cls": array(1, 1, WIDTH),
        "pos_embedding": array(1, GRID * GRID, WIDTH),
        "Transformer/encoder_norm/scale": 1 + array(WIDTH),
        "Transformer/encoder_norm/bias": array(WIDTH),
        "head/kernel": array(WIDTH, LABELS),
        "head/bias": array(LABELS),
    }
    for index in range(DEPTH):
        model |= {f"Transformer/encoderblock_{index}/{k}": v for k, v in layer_arrays(random).items()}
    return model


def stacked(arrays):
    """The other layout: one array for all layers, the layer its first axis."""
    first = "Transformer/encoderblock_0/"
    others = {name: array for name, array in arrays.items() if "/encoderblock_" not in name}
    names = [name.removeprefix(first) for name in arrays if name.startswith(first)]
    return others | {
        f"Transformer/encoderblock/{name}": np.stack(
            [arrays[f"Transformer/encoderblock_{index}/{name}"] for index in range(DEPTH)]
        )
        for name in names
    }


def under_params(arrays):
    """As a training run saves it, with the optimiser's arrays beside it."""
    moments = {f"opt/0/mu/{name}": array for name, array in arrays.items()}
    return {f"params/{name}": array for name, array in arrays.items()} | moments | {"extra/step": np.array(7)}


def save(tmp_path, arrays, name="model.npz"):
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


def plain_logits(arrays, images):
    """big_vision's forward at the stored patch size and grid, written out on its own arrays (flax axes)."""
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def norm(tokens, name):
        scale, bias = weights[f"{name}/scale"], weights[f"{name}/bias"]
        mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
        return (tokens - mean) / (var + 1e-6).sqrt() * scale + bias

    def dense(tokens, name):
        return tokens @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    patches = images.permute(0, 2, 3, 1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # n, rows, columns, c, h, w
    tokens = torch.einsum("nrschw,hwcd->nrsd", patches, weights["embedding/kernel"]) + weights["embedding/bias"]
    tokens = tokens.flatten(1, 2) + weights["pos_embedding"]
    tokens = torch.cat([weights["cls"].expand(len(images), -1, -1), tokens], dim=1)
    for index in range(DEPTH):
        layer = f"Transformer/encoderblock_{index}"
        normed = norm(tokens, f"{layer}/LayerNorm_0")
        query, key, value = (
            torch.einsum("nld,dhe->nhle", normed, weights[f"{layer}/{ATTENTION}/{name}/kernel"])
            + weights[f"{layer}/{ATTENTION}/{name}/bias"][None, :, None]
            for name in ("query", "key", "value")
        )
        mixed = (query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ value
        out = torch.einsum("nhle,hed->nld", mixed, weights[f"{layer}/{ATTENTION}/out/kernel"])
        tokens = tokens + out + weights[f"{layer}/{ATTENTION}/out/bias"]
        inner = F.gelu(dense(norm(tokens, f"{layer}/LayerNorm_1"), f"{layer}/MlpBlock_0/Dense_0"), approximate="tanh")
        tokens = tokens + dense(inner, f"{layer}/MlpBlock_0/Dense_1")
    return dense(norm(tokens, "Transformer/encoder_norm")[:, 0], "head")


@pytest.mark.parametrize("layout", [lambda arrays: arrays, stacked, under_params, lambda a: under_params(stacked(a))])
def test_logits_equal_plain_formulas_in_every_layout(tmp_path, arrays, layout):
    converted = load_flexivit_source(save(tmp_path, layout(arrays)))
    model, images = flexivit_from_source(converted), torch.randn(2, 3, PATCH * GRID, PATCH * GRID)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, plain_logits(arrays, images), atol=1e-5, rtol=1e-4)
    config = converted.config
    assert (config.hidden_act, config.kernel_interpolation, config.kernel_antialias) == (
        "gelu_pytorch_tanh",
        "bilinear",
        False,
    )
    assert (config.position_interpolation, config.position_antialias, config.image_size) == ("bilinear", True, 240)
    assert converted.image_processor.size["shortest_edge"] == 252


def to_npz(model):
    """A transcription back to big_vision's names, for the round trip."""
    arrays = {}
    heads = model.config.num_attention_heads
    for name, tensor in model.state_dict().items():
        name, array = name.removeprefix("flexivit."), tensor.numpy()
        is_weight = name.endswith("weight")
        leaf = ("scale" if "norm" in name else "kernel") if is_weight else "bias"
        if "patch_embeddings" in name:
            arrays[f"embedding/{leaf}"] = array.transpose(2, 3, 1, 0) if is_weight else array
        elif "cls_token" in name:
            arrays["cls"] = array
        elif "position_embeddings" in name:
            arrays["pos_embedding"] = array
        elif name.startswith("layernorm"):
            arrays[f"Transformer/encoder_norm/{leaf}"] = array
        elif name.startswith("head"):
            arrays[f"head/{leaf}"] = array.T
        else:
            _, index, module = name.split(".", 2)
            flax = {
                "layernorm_before": "LayerNorm_0",
                "layernorm_after": "LayerNorm_1",
                "mlp.fc1": "MlpBlock_0/Dense_0",
                "mlp.fc2": "MlpBlock_0/Dense_1",
                "attention.q_proj": f"{ATTENTION}/query",
                "attention.k_proj": f"{ATTENTION}/key",
                "attention.v_proj": f"{ATTENTION}/value",
                "attention.o_proj": f"{ATTENTION}/out",
            }[module.rpartition(".")[0]]
            if "o_proj" in module:
                array = array.T.reshape(heads, -1, array.shape[0]) if is_weight else array
            elif "attention" in module:
                array = array.T.reshape(array.shape[1], heads, -1) if is_weight else array.reshape(heads, -1)
            elif "mlp" in module:
                array = array.T
            arrays[f"Transformer/encoderblock_{index}/{flax}/{leaf}"] = array
    return arrays


@pytest.mark.parametrize("layout", [lambda arrays: arrays, stacked])
def test_round_trip(tmp_path, make_model, layout):
    model = make_model(num_labels=4, hidden_act="gelu_pytorch_tanh")
    converted = load_flexivit_source(save(tmp_path, layout(to_npz(model))), image_size=32)
    assert converted.state_dict.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict[name], tensor)
    images = torch.randn(2, 3, 32, 32)
    again = flexivit_from_source(converted)
    with torch.no_grad():
        for patch_size in (8, 4, 16):
            assert torch.equal(
                again(images, patch_size=patch_size).logits, model(images, patch_size=patch_size).logits
            )


@pytest.mark.parametrize("patch_size", [8, 16, 30])
def test_logits_equal_timms_reading_of_the_same_file(tmp_path, arrays, patch_size):
    timm = pytest.importorskip("timm")
    path = save(tmp_path, arrays)
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": MLP / WIDTH, "num_classes": LABELS}
    theirs = timm.create_model("flexivit_small", img_size=240, patch_size=patch_size, **shape).eval()
    theirs.load_pretrained(str(path))
    # timm keeps the erf form of GELU and never antialiases positions
    ours = flexivit_from_source(load_flexivit_source(path, hidden_act="gelu", position_antialias=False))
    images = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        torch.testing.assert_close(ours(images, patch_size=patch_size).logits, theirs(images), atol=1e-4, rtol=1e-4)


def test_mean_pooling_without_cls_and_without_head(tmp_path, arrays):
    for name in ("cls", "head/kernel", "head/bias"):
        del arrays[name]
    converted = load_flexivit_source(save(tmp_path, arrays))
    assert (converted.config.pooling, converted.config.use_cls_token) == ("mean", False)
    output = flexivit_from_source(converted)(torch.randn(1, 3, 80, 80))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda a: a.pop("embedding/kernel"), r"unknown layout.*embedding/kernel"),
        (lambda a: a.pop("pos_embedding"), r"unknown layout.*pos_embedding"),
        (lambda a: a.pop("head/kernel"), r"missing: head\.classifier\.weight"),
        (
            lambda a: a.pop("Transformer/encoderblock_1/LayerNorm_0/bias"),
            r"missing: .*layers\.1\.layernorm_before\.bias",
        ),
        (lambda a: a.update({"MAPHead_0/probe": np.zeros((1, 1, WIDTH))}), "MAPHead_0/probe"),
        (lambda a: a.update({"pre_logits/kernel": np.zeros((WIDTH, WIDTH))}), "pre_logits"),
        (lambda a: a.update({"head/bias": np.zeros(LABELS + 1)}), "other shapes"),
        (lambda a: a.update({"pos_embedding": np.zeros((1, 26, WIDTH))}), "position_grid"),
        (lambda a: a.update({"embedding/kernel": np.zeros((768, WIDTH))}), "unknown layout"),
    ],
)
def test_unknown_layouts_are_refused(tmp_path, arrays, alter, message):
    alter(arrays)
    with pytest.raises(ValueError, match=message):
        load_flexivit_source(save(tmp_path, arrays))


def test_released_names_are_downloaded_once(tmp_path, arrays, monkeypatch):
    asked = []

    def download(url, path):
        asked.append(url)
        np.savez(path, **arrays)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in ("flexivit_s_i1k", "flexivit_s_i1k.npz"):
        assert load_flexivit_source(name).config.hidden_size == WIDTH
    assert asked == ["https://storage.googleapis.com/big_vision/flexivit/flexivit_s_i1k.npz"]


def test_released_names_without_a_network_say_so(tmp_path, monkeypatch):
    def download(url, path):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ConnectionError, match=r"flexivit_b_i21k_300ep.*cannot be downloaded"):
        load_flexivit_source("flexivit_b_i21k_300ep")
    assert len(npz_vit.RELEASED_NAMES) == 17
