"""What two CPU processes do together: data, fully sharded and tensor parallelism. `accelerate launch` starts it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers.distributed import DistributedConfig

from ..families import family_named
from ..running import answer_checks
from ..training import make_trainer


class Context:
    def __init__(self, family: str, folder: Path, arguments: dict[str, Any]):
        self.folder = folder
        self.family = family_named(family)
        self.arguments = arguments
        self.checkpoint = folder / "checkpoint"
        self.reference = self.family.make_model(**self.family.parallel_overrides)
        self.inputs = self.family.make_inputs(batch_size=4)
        self.labels = torch.tensor([0, 1, 2, 0])


def _sharded(model: torch.nn.Module) -> dict[str, DTensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel()
    }


def check_data_parallel_training(context: Context) -> None:
    """The Trainer in two processes does what one process does with the whole batch."""
    trainer, tokens = make_trainer(context.family, context.folder / "ddp", **context.arguments)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    everyone = [None, None]
    dist.all_gather_object(everyone, tokens.counts)
    assert everyone[0] == everyone[1], f"the processes worked on different token counts: {everyone}"
    expected_counts = json.loads((context.folder / "tokens.json").read_text())
    assert tokens.counts == expected_counts
    assert_close(trainer.model.state_dict(), load_file(context.folder / "trained.safetensors"), rtol=1e-4, atol=1e-5)


def check_fsdp2(context: Context) -> None:
    """Every process holds half of each layer and half of the batch; gradients are those of one process."""
    reference = context.reference
    reference(context.inputs, labels=context.labels).loss.backward()
    config = DistributedConfig(fsdp_size=2)
    model = context.family.classifier.from_pretrained(context.checkpoint, distributed_config=config)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model(context.inputs[mine], labels=context.labels[mine]).loss.backward()
    sharded = _sharded(model)
    assert any("layers.1." in name for name in sharded), sorted(sharded)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def check_tensor_parallel(context: Context) -> None:
    """Heads and MLP widths split over both processes; the same logits at every budget."""
    reference = context.reference
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = context.family.classifier.from_pretrained(context.checkpoint, distributed_config=config)
    sharded = _sharded(model)
    assert any("q_proj" in name or "fc1" in name for name in sharded), sorted(sharded)
    for budget in context.family.budgets:
        expected = reference(context.inputs, **budget.knobs).logits
        assert_close(model(context.inputs, **budget.knobs).logits, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    answer_checks(dict(globals()), _folder, Context)
    if dist.is_initialized():
        dist.destroy_process_group()
