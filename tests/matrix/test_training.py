"""`Trainer`: it learns, saves memory without changing gradients, and a killed run goes on as if nothing happened."""

import signal

import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

from .families import each_family
from .running import run_forked
from .training import make_trainer
from .workers.killed_training import train_until_killed


@pytest.mark.slow
@each_family("Trainer: the loss falls on photographs")
def test_loss_falls(family, tmp_path):
    trainer, tokens = make_trainer(family, tmp_path, max_steps=30, per_device_train_batch_size=12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    if family.training_overrides:
        assert len(set(tokens.counts)) > 1


def _gradients(model, family, budget):
    model.zero_grad()
    torch.manual_seed(3)  # dropout and stochastic depth draw the same in both runs
    model(family.make_inputs(), labels=torch.tensor([0, 1]), **budget.knobs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@each_family("gradient checkpointing, equal gradients")
def test_gradient_checkpointing(family):
    model = family.make_model(**family.dropout_overrides).train()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers
    calls = []
    inner = next(module for module in layers[0].modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    for budget in family.budgets:
        expected = _gradients(model, family, budget)
        plain_calls = len(calls)
        model.activation_checkpointing_enable()
        gradients = _gradients(model, family, budget)
        model.activation_checkpointing_disable()
        assert len(calls) == 3 * plain_calls  # forward, then forward and again in backward
        assert_close(gradients, expected, rtol=1e-5, atol=1e-7)
        calls.clear()


@pytest.mark.slow
@each_family("Trainer: a killed run, resumed, equals an unbroken one")
def test_resume_after_sigkill(family, tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    arguments["adam_epsilon"] = 1e-3  # else Adam makes rounding visible where gradients are zero, as in keys' biases
    unbroken, tokens = make_trainer(family, tmp_path / "unbroken", **arguments)
    unbroken.train()

    assert run_forked(train_until_killed, family.name, tmp_path / "run", arguments) == -signal.SIGKILL
    last = get_last_checkpoint(tmp_path / "run")
    assert last.endswith("checkpoint-3")
    resumed, resumed_tokens = make_trainer(family, tmp_path / "run", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert resumed_tokens.counts == tokens.counts[len(tokens.counts) // 2 :]
    assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=1e-5, atol=1e-6)
