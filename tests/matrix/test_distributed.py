"""Two CPU processes started by `accelerate launch`, and one model spread over memory and disk."""

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from safetensors.torch import save_file
from torch.testing import assert_close

from .families import FAMILIES, each_check, each_family
from .running import Report, ask_worker
from .training import make_trainer


# With `--cpu`, accelerate leaves it to an mpirun to start a second process; its launcher for several GPUs starts
# processes of any kind, and ACCELERATE_USE_CPU says which.
_LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
_OPTIONS = ("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--num_cpu_threads_per_process=1")
_CHECKS = {
    "data_parallel_training": "accelerate launch, two processes (DDP)",
    "fsdp2": "FSDP2, two processes",
    "tensor_parallel": "tensor parallel, two processes",
}


@pytest.fixture(scope="session")  # a parallel run goes back and forth between modules
def two_process_report(tmp_path_factory) -> Report:
    """The answers of two processes about all families, asked once."""
    root = tmp_path_factory.mktemp("two")
    # Not Adam: it would make rounding visible in gradients that are zero, such as those of the keys' biases.
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.01}
    for family in FAMILIES:
        folder = root / family.name
        family.make_model(**family.parallel_overrides).save_pretrained(folder / "checkpoint")
        trainer, tokens = make_trainer(family, folder / "one", per_device_train_batch_size=6, **arguments)
        trainer.train()
        state = {key: value.contiguous() for key, value in trainer.model.state_dict().items()}
        save_file(state, folder / "trained.safetensors")
        (folder / "tokens.json").write_text(json.dumps(tokens.counts))
    facts = {family.name: {**arguments, "per_device_train_batch_size": 3} for family in FAMILIES}
    return ask_worker("two_processes", root, facts, launcher=(*_LAUNCH, *_OPTIONS), ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@each_check(_CHECKS, "two")
def test_two_processes(family, check, two_process_report):
    two_process_report.require(family.name, check)


@each_family("device_map with offload to disk")
def test_offload_to_disk(family, tmp_path):
    """With too little memory the rest waits on disk; what must stay together, does."""
    model = family.make_model(**family.deeper_overrides)
    model.save_pretrained(tmp_path / "checkpoint")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    offloaded = family.classifier.from_pretrained(
        tmp_path / "checkpoint",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=tmp_path / "offload",
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}, offloaded.hf_device_map
    whole = set(offloaded._no_split_modules)
    for name, module in offloaded.named_modules():
        if type(module).__name__ in whole:
            inside = {key for key in offloaded.hf_device_map if key.startswith(f"{name}.")}
            assert not inside, f"{name} ({type(module).__name__}) was split: {sorted(inside)}"
    hooks = [getattr(module, "_hf_hook", None) for module in offloaded.modules()]
    assert any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)
    inputs = family.make_inputs()
    with torch.no_grad():
        for budget in family.budgets:
            assert_close(offloaded(inputs, **budget.knobs).logits, model(inputs, **budget.knobs).logits)
