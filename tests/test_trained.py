"""What the trained checkpoints know, where random weights tell nothing: photographs, int8, export, bfloat16."""

import pytest
import torch
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageClassification, TorchAoConfig

from polyscale.assets import photograph_class, sample_photographs
from polyscale.checkpoints import available_checkpoints
from polyscale.classification import classify_images
from polyscale.loading import load_classifier

from .tiny_checkpoints import TINY_IMAGENET_LABELS


PHOTOGRAPHS = sample_photographs(TINY_IMAGENET_LABELS)
# Right answers of the twelve photographs, by budget; one less is allowed for the rounding of another build.
RIGHT = {
    ("flexivit-tiny200", 8): 10,
    ("flexivit-tiny200", 16): 10,
    ("flexivit-tiny200", 32): 7,
    ("quadtree-vit-tiny200", 64): 10,
    ("quadtree-vit-tiny200", 34): 10,
    ("quadtree-vit-tiny200", 16): 9,
    ("s2-flexivit-tiny200", (1, 2)): 8,
    ("sparseformer-tiny200", None): 11,
}
TINY200 = sorted({name for name, _ in RIGHT})


@pytest.fixture(scope="module", params=TINY200)
def classifier(request):
    return load_classifier(request.param, "cpu")


def answers(classifier, model=None, dtype=torch.float32) -> torch.Tensor:
    """The class of each photograph at the checkpoint's own budget."""
    images = [Image.open(file).convert("RGB") for file in PHOTOGRAPHS]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"].to(dtype)
    with torch.no_grad():
        return (model or classifier.model)(pixel_values).logits.argmax(-1)


def test_every_checkpoint_of_these_classes_is_asked():
    assert [name for name in available_checkpoints() if name.endswith("tiny200")] == TINY200


@pytest.mark.parametrize(("name", "budget"), RIGHT)
def test_a_checkpoint_knows_the_photographs(name, budget):
    records, errors = classify_images(PHOTOGRAPHS, name, None if budget is None else [budget])
    right = sum(record["label"] == photograph_class(record["file"]) for record in records)
    assert errors == []
    assert RIGHT[name, budget] - 1 <= right <= RIGHT[name, budget] + 1


def test_int8_weights_keep_the_answers(classifier):
    before = answers(classifier)
    quantized = AutoModelForImageClassification.from_pretrained(
        classifier.model.name_or_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    assert (answers(classifier, quantized) == before).sum() >= 11


def test_bfloat16_keeps_the_answers(classifier):
    half = load_classifier(classifier.model.name_or_path, "cpu").model.bfloat16()
    assert (answers(classifier, half, torch.bfloat16) == answers(classifier)).sum() >= 11


def test_an_exported_program_gives_the_same_answers(classifier):
    images = [Image.open(file).convert("RGB") for file in PHOTOGRAPHS]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    program = torch.export.export(classifier.model, (pixel_values,)).module()
    torch.testing.assert_close(
        program(pixel_values).logits, classifier.model(pixel_values).logits, rtol=1e-4, atol=1e-4
    )
