"""The shared encoder's parts against plain formulas."""

import pytest
import torch

from polyscale.layers.encoder import DropPath, EncoderClassificationHead, EncoderLayer, PrefixTokens, TokenPooler
from polyscale.layers.encoder_config import EncoderConfig


def make_config(**fields):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = EncoderConfig(**{**shape, **fields})
    config._attn_implementation = "eager"
    return config


def plain_attention(attention, tokens):
    batch, length, width = tokens.shape
    heads = attention.config.num_attention_heads

    def split(projection):
        return projection(tokens).reshape(batch, length, heads, width // heads)

    query, key, value = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / (width // heads) ** 0.5
    mixed = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(dim=-1), value)
    return attention.o_proj(mixed.reshape(batch, length, width))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mlp_type", ["mlp", "swiglu"])
def test_layer_equals_plain_formula_with_gradients(implementation, mlp_type):
    torch.manual_seed(0)
    config = make_config(mlp_type=mlp_type, layer_scale_init_value=0.3)
    config._attn_implementation = implementation
    layer = EncoderLayer(config).eval()
    ours = torch.randn(2, 5, 8, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()

    normed = layer.layernorm_before(plain)
    middle = plain + 0.3 * plain_attention(layer.attention, normed)
    normed = layer.layernorm_after(middle)
    if mlp_type == "swiglu":
        gate = layer.mlp.gate_proj(normed)
        update = layer.mlp.down_proj(gate * gate.sigmoid() * layer.mlp.up_proj(normed))
    else:
        inner = layer.mlp.fc1(normed)
        update = layer.mlp.fc2(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    expected = middle + 0.3 * update

    actual = layer(ours)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=1e-4)


def test_drop_path_keeps_the_expectation_and_drops_whole_samples():
    torch.manual_seed(0)
    drop_path = DropPath(0.25)
    dropped = drop_path(torch.ones(4000, 2, 3))
    values = dropped.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    torch.testing.assert_close(values[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(dropped.mean().item() - 1) < 0.05
    assert torch.equal(drop_path.eval()(dropped), dropped)


def test_prefix_tokens_stand_in_order():
    tokens = PrefixTokens(make_config(use_distillation_token=True, num_register_tokens=2))
    with torch.no_grad():
        tokens.cls_token.fill_(1)
        tokens.distillation_token.fill_(2)
        tokens.register_tokens.fill_(3)
    assert tokens(5)[4, :, 0].tolist() == [1, 2, 3, 3]
    assert PrefixTokens(make_config(use_cls_token=False, pooling="mean"))(5) is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "pooler"])
@pytest.mark.parametrize("fc_norm", [False, True])
def test_poolings_equal_plain_formulas(pooling, fc_norm):
    torch.manual_seed(0)
    config = make_config(pooling=pooling, fc_norm=fc_norm, num_register_tokens=2, pooler_output_size=5)
    pooler, tokens = TokenPooler(config), torch.randn(3, 1 + 2 + 6, 8)
    cls, mean = tokens[:, 0], tokens[:, 3:].sum(1) / 6
    expected = {
        "cls": cls,
        "mean": mean,
        "cls_mean": torch.cat([cls, mean], dim=1),
        "pooler": torch.tanh(pooler.dense(cls)) if pooling == "pooler" else None,
    }[pooling]
    if fc_norm:
        deviation = (expected.var(dim=-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        expected = (expected - expected.mean(dim=-1, keepdim=True)) / deviation
    assert config.pooled_size == expected.shape[-1]
    torch.testing.assert_close(pooler(tokens), expected, atol=1e-5, rtol=1e-5)


def test_masked_mean_leaves_padding_out():
    pooler, tokens = TokenPooler(make_config(pooling="mean", use_cls_token=False)), torch.randn(2, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = torch.stack([tokens[0].mean(0), tokens[1, :4].mean(0)])
    torch.testing.assert_close(pooler(tokens, mask), expected)


def test_distilled_head_averages_both_classifiers():
    head = EncoderClassificationHead(
        make_config(use_distillation_token=True, use_distillation_head=True, num_labels=4)
    )
    tokens = torch.randn(2, 7, 8)
    expected = 0.5 * head.classifier(tokens[:, 0]) + 0.5 * head.distillation_classifier(tokens[:, 1])
    torch.testing.assert_close(head(tokens[:, 0], tokens), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 9}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"mlp_type": "glu"}, "mlp_type"),
        ({"pooling": "max"}, "pooling"),
        ({"hidden_act": "gelou"}, "hidden_act"),
        ({"use_cls_token": False}, "pooling"),
        ({"use_cls_token": False, "pooling": "mean", "use_distillation_token": True}, "use_distillation_token"),
        ({"use_distillation_head": True}, "use_distillation_head"),
    ],
)
def test_configs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_pooling_follows_the_config_where_no_weights_depend_on_it():
    tokens = torch.randn(2, 5, 8)
    pooler = TokenPooler(make_config(pooling="mean"))
    pooler.config.pooling = "cls"
    torch.testing.assert_close(pooler(tokens), tokens[:, 0])
    pooler.config.pooling = "mean"
    torch.testing.assert_close(pooler(tokens), tokens[:, 1:].mean(dim=1))
    for other in ("cls_mean", "pooler", "attention"):
        pooler.config.pooling = other
        with pytest.raises(ValueError, match=f"`config.pooling` was 'mean' .* cannot pool by {other!r}"):
            pooler(tokens)
    without_cls = TokenPooler(make_config(pooling="mean", use_cls_token=False))
    without_cls.config.pooling = "cls"
    with pytest.raises(ValueError, match="cannot pool by 'cls'"):
        without_cls(tokens)


def test_a_weighted_mean_in_half_precision_is_finite():
    pooler = TokenPooler(make_config(pooling="mean", use_cls_token=False))
    tokens = torch.full((1, 64, 8), 100.0, dtype=torch.float16)
    pooled = pooler(tokens, torch.full((1, 64), 16))  # areas; the sum is 102,400
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled, tokens[:, 0])
