"""int8 weights by torchao, LoRA by peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from .families import each_family


def _rounded_to_int8(model: torch.nn.Module) -> torch.nn.Module:
    """The plain reference: each weight of a linear layer is one of 255 levels of its row."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight / step).round().nan_to_num() * step
    return model


@each_family("int8 weights (torchao)")
def test_int8_weights(family, tmp_path):
    """Through `from_pretrained`: quarter-size weights of the linear layers, logits near those in float32."""
    model, inputs = family.make_model(), family.make_inputs()
    model.save_pretrained(tmp_path / "float32")
    quantized = family.classifier.from_pretrained(
        tmp_path / "float32", quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    weights = {
        name: module.weight for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)
    }
    int8 = {name for name, weight in weights.items() if type(weight).__name__ == "Int8Tensor"}
    assert any("layers.1." in name for name in int8), {name: type(weight) for name, weight in weights.items()}
    with torch.no_grad():
        rounded = _rounded_to_int8(family.make_model())
        for budget in family.budgets:
            expected = model(inputs, **budget.knobs).logits
            actual = quantized(inputs, **budget.knobs).logits
            assert not torch.equal(actual, expected)
            error = (rounded(inputs, **budget.knobs).logits - expected).abs().max().item()
            assert_close(actual, expected, rtol=0, atol=2 * error)

        quantized.save_pretrained(tmp_path / "int8")
        reloaded = family.classifier.from_pretrained(tmp_path / "int8")
        assert_close(reloaded(inputs).logits, quantized(inputs).logits)


def _lora_config(family) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(family.lora_targets), modules_to_save=["head"])


@each_family("LoRA (peft), saved and reloaded")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_lora(family, checkpointing, tmp_path):
    """A few steps change the logits and nothing of the base; adapters alone bring them back, merged or not."""
    inputs, labels = family.make_inputs(batch_size=6), torch.tensor([0, 1, 2, 0, 1, 2])
    base = family.make_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, _lora_config(family)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        adapted = model(pixel_values=inputs).logits
        fresh = family.make_model()
        assert_close(fresh.state_dict(), before, rtol=0, atol=0)
        reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert_close(reloaded(pixel_values=inputs).logits, adapted)
        merged = reloaded.merge_and_unload()
        assert type(merged) is family.classifier
        for budget in family.budgets:
            expected = model(pixel_values=inputs, **budget.knobs).logits
            assert_close(merged(inputs, **budget.knobs).logits, expected, rtol=1e-4, atol=1e-4)
