"""torch.compile without graph breaks, torch.export and ONNX with a dynamic batch."""

import pytest
import torch
from s2_tiny import make_base
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

from polyscale.models.s2_vision import S2VisionForImageClassification


SETTINGS = {
    "even": {"scales": [1, 2]},
    "uneven": {"img_sizes": [32, 48]},
    "padded": {"img_sizes": [32, 48], "uneven": "pad"},
    "split": {"scales": [1, 2], "split_forward": True},
    "dynamic": {"scales": [1, 2], "dynamic": True, "max_tiles": 6, "resize_output_to_idx": -1},
}


def make_model(name):
    return S2VisionForImageClassification.from_vision_model(make_base("clip"), num_labels=3, **SETTINGS[name]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_compiles_without_graph_breaks(name, images):
    torch.compiler.reset()
    model = make_model(name)
    expected = model(images, output_hidden_states=-2)
    outputs = torch.compile(model, fullgraph=True, backend="eager")(images, output_hidden_states=-2)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.hidden_states[-2], expected.hidden_states[-2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("exporter", "config", "name"),
    [
        (DynamoExporter, DynamoConfig, "even"),
        (DynamoExporter, DynamoConfig, "split"),
        (OnnxExporter, OnnxConfig, "uneven"),
    ],
)
def test_exports_with_a_dynamic_batch(name, exporter, config, images):
    model = make_model(name)
    exported = exporter().export(model, {"pixel_values": images}, config(dynamic=True))
    more = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        logits = torch.as_tensor(exported(pixel_values=more)["logits"])
        torch.testing.assert_close(logits, model(more).logits, atol=1e-5, rtol=1e-4)
