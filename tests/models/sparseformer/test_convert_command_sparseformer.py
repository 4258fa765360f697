import torch
from sparseformer_reference import tiny_config
from transformers import AutoModelForVideoClassification, AutoVideoProcessor
from typer.testing import CliRunner

from polyscale import SparseFormerForImageClassification, SparseFormerImageProcessor
from polyscale.cli import app


def test_the_command_inflates_an_image_checkpoint(tmp_path):
    torch.manual_seed(0)
    image_model = SparseFormerForImageClassification(tiny_config()).eval()
    image_model.save_pretrained(tmp_path / "image")
    SparseFormerImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "image")
    arguments = ["convert", str(tmp_path / "image"), str(tmp_path / "video"), "--to", "sparseformer_video"]
    result = CliRunner().invoke(app, [*arguments, "--replicates", "1"])
    assert result.exit_code == 0, result.output

    video_model = AutoModelForVideoClassification.from_pretrained(tmp_path / "video").eval()
    assert tuple(AutoVideoProcessor.from_pretrained(tmp_path / "video").image_mean) == (0.1, 0.2, 0.3)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            video_model(pixel_values[:, None]).logits, image_model(pixel_values).logits, rtol=1e-4, atol=1e-4
        )
