"""Export through transformers' own exporters, with a batch of any size, at every token budget."""

import importlib.util

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch.export import Dim
from torch.testing import assert_close
from transformers.exporters import (
    DynamoConfig,
    DynamoExporter,
    ExecutorchConfig,
    ExecutorchExporter,
    OnnxConfig,
    OnnxExporter,
    OpenVINOConfig,
    OpenVINOExporter,
)

from .families import Budget, Family, each_family


_TORCH = DynamoExporter.min_versions["torch"]
# The exporters are newer than the versions of torch they were tried with, and some of what they call is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        Version(torch.__version__) < Version(_TORCH),
        reason=f"needs torch {_TORCH}, as transformers' exporters do",
    ),
]


_OPENVINO, _EXECUTORCH = "OpenVINO, any batch size", "ExecuTorch (XNNPACK), any batch size"


def _export(exporter, config_class, family: Family, budget: Budget):
    """(the exported model, the model): the budget stands in the config, because a graph has no keyword arguments."""
    model = family.make_model(**budget.knobs)
    shapes = {"pixel_values": {0: Dim("batch", min=1, max=64)}}
    inputs = {"pixel_values": family.make_inputs(batch_size=2)}
    return exporter().export(model, inputs, config_class(dynamic_shapes=shapes)), model


def _expect_gap(column: str, exporter, config_class, family: Family) -> None:
    """Where the family's row says that an exporter cannot do it: fails unless it still says so itself."""
    gap = family.gaps.get(column)
    if gap is not None:
        with pytest.raises(Exception, match=gap.error):
            _export(exporter, config_class, family, family.budgets[-1])
        pytest.xfail(gap.reason)


def _compare(run, model: torch.nn.Module, family: Family, tolerance: float = 1e-4) -> None:
    for batch_size in (2, 1, 5):
        inputs = family.make_inputs(batch_size, seed=batch_size)
        with torch.no_grad():
            expected = model(inputs).logits
        logits = torch.from_numpy(np.asarray(run(pixel_values=inputs)["logits"]))
        assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@each_family("torch.export, any batch size")
def test_torch_export(family):
    for budget in family.budgets:
        exported, model = _export(DynamoExporter, DynamoConfig, family, budget)
        _compare(exported, model, family, tolerance=1e-5)


@pytest.mark.slow
@each_family("ONNX, any batch size")
def test_onnx(family, tmp_path):
    for budget in family.budgets[:2]:
        exported, model = _export(OnnxExporter, OnnxConfig, family, budget)
        _compare(exported, model, family)
    exported.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.onnx"))


@pytest.mark.slow
@each_family(_OPENVINO)
def test_openvino(family):
    _expect_gap(_OPENVINO, OpenVINOExporter, OpenVINOConfig, family)
    exported, model = _export(OpenVINOExporter, OpenVINOConfig, family, family.budgets[-1])
    exported.to("cpu", config={"INFERENCE_PRECISION_HINT": "f32"})  # its own choice may be bfloat16
    _compare(exported, model, family)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs executorch")
@each_family(_EXECUTORCH)
def test_executorch(family):
    _expect_gap(_EXECUTORCH, ExecutorchExporter, ExecutorchConfig, family)
    exported, model = _export(ExecutorchExporter, ExecutorchConfig, family, family.budgets[-1])
    _compare(exported, model, family)
