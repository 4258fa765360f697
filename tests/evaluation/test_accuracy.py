import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTImageProcessor
from polyscale.cli import app
from polyscale.evaluation import evaluate_budgets, load_classifier, plot_results
from polyscale.layers.token_budget import budget_argument_of, count_tokens


NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def split() -> Dataset:
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (20, 28, 3)).astype(np.uint8)) for _ in range(11)]
    labels = [int(label) for label in rng.integers(0, 3, 11)]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = FlexiViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, base_patch_size=4, num_labels=3
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    FlexiViTForImageClassification(config).save_pretrained(folder)
    FlexiViTImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def accuracy_by_hand(model, pixel_values, labels, **budget) -> float:
    with torch.no_grad():
        return (model(pixel_values, **budget).logits.argmax(-1) == torch.tensor(labels)).float().mean().item()


def test_each_budget_has_the_accuracy_of_a_plain_loop(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    results = evaluate_budgets(
        model, processor, split, budgets=[2, 4, (8, 4)], image_sizes=[16, (16, 24)], batch_size=4
    )
    assert [(result.image_size, result.budget) for result in results] == [
        (size, budget) for size in ((16, 16), (16, 24)) for budget in (2, 4, (8, 4))
    ]
    for result in results:
        pixel_values = processor(
            list(split["image"]),
            size={"shortest_edge": int(max(result.image_size) / 0.8)},
            crop_size=dict(zip(("height", "width"), result.image_size, strict=True)),
            return_tensors="pt",
        )["pixel_values"]
        assert result.top1 == pytest.approx(
            accuracy_by_hand(model, pixel_values, split["label"], patch_size=result.budget)
        )
        assert result.tokens == model.num_tokens_for(result.image_size, result.budget)
        assert result.top5 == 1.0
        assert result.images_per_second > 0


def test_defaults_are_the_checkpoints_own(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    (result,) = evaluate_budgets(model, processor, split)
    pixel_values = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    assert (result.image_size, result.budget, result.tokens) == ((16, 16), None, 16)
    assert result.top1 == pytest.approx(accuracy_by_hand(model, pixel_values, split["label"]))


def test_statistics_and_interpolation_reach_the_processor(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    seen = {}

    def recording(images, **options):
        seen.update(options)
        return processor(images, **options)

    recording.do_center_crop, recording.size, recording.crop_size = True, processor.size, processor.crop_size
    evaluate_budgets(
        model, recording, split, crop_pct=0.5, mean="imagenet", std=[0.1, 0.2, 0.3], interpolation="nearest"
    )
    assert seen["size"] == {"shortest_edge": 32}
    assert seen["image_mean"] == [0.485, 0.456, 0.406]
    assert seen["image_std"] == [0.1, 0.2, 0.3]
    assert seen["resample"] == 0


def test_an_ordinary_vit_is_converted_on_the_fly(split, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    vit = ViTForImageClassification(config).eval()
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, processor = load_classifier(tmp_path, resize_method="interpolate")
    assert model.config.resize_method == "interpolate"
    pixel_values = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, rtol=0, atol=1e-4)
    results = evaluate_budgets(model, processor, split, budgets=[2, 4])
    assert [result.tokens for result in results] == [64, 16]
    assert results[1].top1 == pytest.approx(accuracy_by_hand(vit, pixel_values, split["label"]))


def test_bad_input(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    with pytest.raises(ValueError, match="`patch_size` must not be larger"):
        evaluate_budgets(model, processor, split, budgets=[17])
    with pytest.raises(ValueError, match="`interpolation` must be one of"):
        evaluate_budgets(model, processor, split, interpolation="magic")
    with pytest.raises(ValueError, match="`mean` must be one of"):
        evaluate_budgets(model, processor, split, mean="mars")
    with pytest.raises(ValueError, match="is empty"):
        evaluate_budgets(model, processor, split.select([]))
    other = split.cast_column("label", ClassLabel(names=[*NAMES, "d"]))
    with pytest.raises(ValueError, match="4 classes and the model 3"):
        evaluate_budgets(model, processor, other)


def test_count_tokens_and_budget_argument_of(checkpoint):
    model, _ = load_classifier(checkpoint)
    assert budget_argument_of(model.config) == "patch_size"
    assert budget_argument_of(ViTConfig()) is None
    assert count_tokens(None, model.config, (16, 16), patch_size=8) == [4]


def test_the_command_prints_and_writes(split, checkpoint, tmp_path):
    split.to_parquet(tmp_path / "test.parquet")
    arguments = ["evaluate", str(checkpoint), str(tmp_path / "test.parquet"), "--patch-sizes", "4", "8x4"]
    result = CliRunner().invoke(app, [*arguments, "--limit", "5", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(record["budget"], record["tokens"]) for record in records] == [(4, 16), ([8, 4], 8)]
    with PILImage.open(tmp_path / "out" / "accuracy.png") as picture:
        assert picture.size == (1050, 675)
    assert "8x4" in result.output

    failed = CliRunner().invoke(app, [*arguments, "--mean", "mars"])
    assert failed.exit_code == 2
    assert "`mean` must be one of" in failed.output


def test_plots_of_several_models(split, checkpoint, tmp_path):
    model, processor = load_classifier(checkpoint)
    results = evaluate_budgets(model, processor, split, budgets=[4, 8])
    plot_results({"one": results, "two": results}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
