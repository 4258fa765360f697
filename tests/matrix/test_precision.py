"""Half precision, attention implementations, hidden states and attentions."""

import pytest
import torch
from torch.testing import assert_close

from .families import each_family


_HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
# The error of one rounding is a draw: so many times that of the reference may another be.
_FACTOR = 4


@torch.no_grad()
def _rounding_error(family, dtype: torch.dtype, budget) -> float:
    """The largest error of a plain reference: the model in float32, its weights, inputs and the output of every
    innermost module rounded to `dtype`.
    """
    model, inputs = family.make_model(), family.make_inputs()
    expected = model(inputs, **budget.knobs).logits
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))

    def rounded(module, args, output):
        return output.to(dtype).float() if isinstance(output, torch.Tensor) else output

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(rounded)
    return (model(inputs.to(dtype).float(), **budget.knobs).logits - expected).abs().max().item()


@_HALF
@each_family("float16 and bfloat16, also under autocast")
def test_half_precision(family, dtype):
    """Weights in half precision: finite, and as near to float32 as the format allows."""
    model, inputs = family.make_model(), family.make_inputs()
    for budget in family.budgets:
        with torch.no_grad():
            expected = model(inputs, **budget.knobs).logits
        half = family.make_model().to(dtype)
        loss = half(inputs.to(dtype), labels=torch.tensor([0, 1]), **budget.knobs)
        assert loss.logits.dtype == dtype
        assert_close(loss.logits.float(), expected, rtol=0, atol=_FACTOR * _rounding_error(family, dtype, budget))
        loss.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in half.parameters() if parameter.grad is not None)


@_HALF
@each_family("float16 and bfloat16, also under autocast")
def test_autocast(family, dtype):
    model, inputs = family.make_model().train(), family.make_inputs()
    for budget in family.budgets:
        model.zero_grad()
        with torch.no_grad():
            expected = model.eval()(inputs, **budget.knobs).logits
        with torch.autocast("cpu", dtype=dtype):
            outputs = model.train()(inputs, labels=torch.tensor([0, 1]), **budget.knobs)
        assert_close(outputs.logits.float(), expected, rtol=0, atol=_FACTOR * _rounding_error(family, dtype, budget))
        outputs.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name


@_HALF
@each_family("float16 and bfloat16, also under autocast")
def test_half_precision_from_disk(family, dtype, tmp_path):
    """`dtype=` of `from_pretrained` makes the same model as `.to(dtype)`, and is kept in the checkpoint."""
    model = family.make_model()
    model.save_pretrained(tmp_path)
    loaded = family.classifier.from_pretrained(tmp_path, dtype=dtype)
    inputs = family.make_inputs().to(dtype)
    with torch.no_grad():
        assert_close(loaded(inputs).logits, model.to(dtype)(inputs).logits, rtol=0, atol=0)


def _outputs_and_gradients(family, implementation: str, budget):
    model = family.make_model()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    outputs = model(family.make_inputs(), labels=torch.tensor([0, 1]), **budget.knobs)
    outputs.loss.backward()
    return outputs.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_family("sdpa equals eager")
def test_sdpa_equals_eager(family):
    assert family.classifier._supports_sdpa
    for budget in family.budgets:
        eager, eager_gradients = _outputs_and_gradients(family, "eager", budget)
        sdpa, sdpa_gradients = _outputs_and_gradients(family, "sdpa", budget)
        assert_close(sdpa, eager, rtol=1e-4, atol=1e-5)
        assert_close(sdpa_gradients, eager_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@each_family("flex attention, where the class says so")
def test_flex_attention_flag_is_true(family):
    """A flag is set only where it holds; flash attention needs a GPU and is not run here."""
    model, inputs = family.make_model().requires_grad_(False), family.make_inputs()
    if not family.classifier._supports_flex_attn:
        with pytest.raises(ValueError, match="flex"):
            model.set_attn_implementation("flex_attention")
        return
    eager = model(inputs).logits
    model.set_attn_implementation("flex_attention")
    assert_close(model(inputs).logits, eager, rtol=1e-4, atol=1e-5)


@each_family("hidden states (True, int, list) and attentions")
def test_hidden_states(family):
    model, inputs = family.make_model(family.model), family.make_inputs()
    for budget in family.budgets:
        with torch.no_grad():
            outputs = model(inputs, output_hidden_states=True, **budget.knobs)
            states = outputs.hidden_states
            assert len(states) > 1
            for index, wanted in ((1, 1), (-1, -1), (0, [0]), (1, [1]), (-1, [-1])):  # transformers reads 0 as False
                some = model(inputs, output_hidden_states=wanted, **budget.knobs).hidden_states
                assert_close(some[index], states[index], rtol=0, atol=0)
            both = model(inputs, output_hidden_states=[0, -1], **budget.knobs).hidden_states
            assert_close((both[0], both[-1]), (states[0], states[-1]), rtol=0, atol=0)
            assert model(inputs, **budget.knobs).hidden_states is None


@each_family("hidden states (True, int, list) and attentions")
def test_outputs_as_a_tuple(family):
    for model_class in (family.model, family.classifier):
        model, inputs = family.make_model(model_class), family.make_inputs()
        for options in ({}, {"output_hidden_states": True}):
            with torch.no_grad():
                outputs = model(inputs, **options)
                assert_close(model(inputs, return_dict=False, **options), outputs.to_tuple(), rtol=0, atol=0)


@each_family("hidden states (True, int, list) and attentions")
def test_attentions_are_probabilities(family):
    model, inputs = family.make_model(family.model), family.make_inputs()
    model.set_attn_implementation("eager")
    for budget in family.budgets:
        with torch.no_grad():
            outputs = model(inputs, output_attentions=True, **budget.knobs)
        assert len(outputs.attentions) > 0
        for attention in outputs.attentions:
            # (batch, heads, tokens, tokens), or (batch, tiles, heads, tokens, tokens)
            assert attention.shape[0] == 2
            assert attention.shape[-1] == attention.shape[-2]
            assert attention.ndim == 5 or attention.shape[-1] == outputs.last_hidden_state.shape[1]
            assert (attention >= 0).all()
            assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
