"""Converted checkpoints and wrapped models, asked what each family's default configuration is asked elsewhere."""

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.export import Dim
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from polyscale.training.trainer import WholeWeightsTrainer

from .families import each_family
from .pictures import CropDataset
from .test_compile import CountingBackend
from .variants import each_variant


_COLUMN = "converted and wrapped: reload, hidden states, compile"
_RESUMED = "converted and wrapped: resumed training equals unbroken"
_ONNX = "torch.onnx.export(dynamo=True), any batch size"


def _result(outputs) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@each_variant(_COLUMN)
@torch.no_grad()
def test_reload(variant, tmp_path):
    model, inputs = variant.make_model(), variant.make_inputs()
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(_result(reloaded(inputs)), _result(model(inputs)), rtol=0, atol=0)


@each_variant(_COLUMN)
@torch.no_grad()
def test_a_call_after_hidden_states_gives_the_same(variant):
    """transformers leaves its recorders behind: they must change neither the result nor what is computed."""
    model, inputs = variant.make_model(), variant.make_inputs()
    expected = model(inputs)
    recorded = model(inputs, output_hidden_states=True)
    assert len(recorded.hidden_states) > 1
    assert_close(_result(recorded), _result(expected), rtol=1e-5, atol=1e-5)
    again = model(inputs)
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_close(again[name], value, rtol=0, atol=0)


@each_variant(_COLUMN)
def test_training_step_in_one_graph(variant):
    torch.compiler.reset()
    model, inputs = variant.make_model().train(), variant.make_inputs()
    backend = CountingBackend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        _result(call(inputs)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert backend.graphs == 1
    torch.compiler.reset()


def _trainer(variant, folder, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=1,
        seed=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        adam_epsilon=1e-3,
    )
    return WholeWeightsTrainer(
        model=variant.make_model(), args=arguments, train_dataset=CropDataset(variant.family.input_shape)
    )


@each_variant(_RESUMED, needs_classes=True)
def test_resumed_training(variant, tmp_path):
    """Two steps at once, and one step, then another from its checkpoint in a new Trainer."""
    unbroken = _trainer(variant, tmp_path / "unbroken", steps=2)
    unbroken.train()
    _trainer(variant, tmp_path / "run", steps=1).train()
    resumed = _trainer(variant, tmp_path / "run", steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=1e-5, atol=1e-6)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="needs torch 2.11: the exporter of torch 2.8 fails with the onnx_ir that is installed with it today",
)
@pytest.mark.filterwarnings("ignore")  # of the exporter's own code
@each_family(_ONNX)
def test_onnx_dynamo(family, tmp_path):
    """PyTorch's own exporter, run by ONNX Runtime; a flat image has equal scores everywhere."""
    import onnxruntime

    model = family.make_model(**family.budgets[-1].knobs)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.onnx.export(
        _Logits(model), (family.make_inputs(2),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (value.name for value in session.get_inputs())
    for inputs in (family.make_inputs(2), family.make_inputs(5, seed=5), torch.ones(1, *family.input_shape)):
        with torch.no_grad():
            expected = model(inputs).logits
        (logits,) = session.run(None, {name: inputs.numpy()})
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
