import csv

import datasets
import numpy as np
import pytest
from PIL import Image

from polyscale.checkpoints import bundled_checkpoint
from polyscale.evaluation.frontier import costs_table, frontier_records, write_frontier
from polyscale.evaluation.run import evaluate_checkpoints
from polyscale.evaluation.speed import count_gflops
from polyscale.loading import load_classifier


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("data")
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = {"image": [Image.fromarray(array) for array in pixels], "label": [0, 1] * 6}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "test.parquet"))
    return evaluate_checkpoints(["flexivit-cifar10"], folder, budget_words={"budgets": ["4", "8"]}, device="cpu")


def test_costs_stand_beside_accuracy(evaluations, tmp_path):
    steps = []
    records = frontier_records(
        evaluations, batch_sizes=(1, 3), rounds=1, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 2), (2, 2)]
    assert [(record["budget"], record["tokens"]) for record in records] == [(4, 64), (8, 16)]
    assert [record["top1"] for record in records] == [result.top1 for result in evaluations[0].results]
    assert all(record["milliseconds_batch_1"] > 0 and record["milliseconds_batch_3"] > 0 for record in records)

    model, processor = load_classifier("flexivit-cifar10", "cpu")
    pixels = processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    for record in records:
        expected = count_gflops(lambda size=record["budget"]: model(pixels, patch_size=size))
        # what resizes the kernel is shared by the images of a batch
        assert record["gflops"] == pytest.approx(expected, rel=0.05)

    written = write_frontier(evaluations, records, tmp_path)
    assert [path.name for path in written] == ["frontier.csv", "frontier.png"]
    rows = list(csv.DictReader(written[0].open()))
    assert [float(row["gflops"]) for row in rows] == [record["gflops"] for record in records]
    assert Image.open(written[1]).size[0] > Image.open(written[1]).size[1]
    table = costs_table(evaluations, records)
    assert [str(cell) for cell in table.columns[0].cells] == ["flexivit-cifar10", "  4", "  8"]
    assert list(table.columns[1].cells) == ["", "64", "16"]
    assert [column.header for column in table.columns][-2:] == ["ms, batch 1", "ms, batch 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "`batch_sizes` is empty"),
        ({"batch_sizes": 1}, "`batch_sizes` must be a list"),
        ({"batch_sizes": (0,)}, "`batch_sizes` must be at least 1"),
        ({"batch_sizes": (1, 1)}, "`batch_sizes` holds 1 twice"),
        ({"rounds": True}, "`rounds` must be an int"),
        ({"evaluations": []}, "`evaluations` is empty"),
        ({"evaluations": [5]}, "`evaluations` must be a list of evaluations, got 5"),
    ],
)
def test_arguments_that_are_none(evaluations, options, message):
    with pytest.raises(ValueError, match=message):
        frontier_records(**{"evaluations": evaluations, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "flexivit-cifar10"}, "`models` must be a list of checkpoints, got 'flexivit-cifar10'"),
        ({"models": []}, "`models` is empty"),
        ({"models": ["flexivit-cifar10"] * 2}, "`models` holds 'flexivit-cifar10' twice"),
        ({"controls": ["flexivit-cifar10"]}, "`models` holds 'flexivit-cifar10' twice"),
        ({"models": [bundled_checkpoint("flexivit-cifar10"), "flexivit-cifar10"]}, "`models` holds .* twice"),
        ({"controls": "vit"}, "`controls` must be a list of checkpoints, got 'vit'"),
        ({"models": [], "bundled": 1}, "`bundled` must be True or False"),
        ({"models": 5, "bundled": True}, "`models` must be a list of checkpoints"),
        ({"data": 5}, "`dataset` must be a path or a name, got 5"),
        ({"split": 5}, r"`split` must be one of \['test'\], got 5"),
        ({"limit": True}, "`limit` must be an int"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"limit": 1, "seed": -1}, "`seed` must be at least 0"),
        ({"budget_words": {"budgets": "16"}}, r"`budget_words\['budgets'\]` must be a list of texts"),
        ({"budget_words": ["16"]}, "`budget_words` must be a dict"),
        ({"image_sizes": [32, (32, 32)]}, r"`image_sizes` holds \(32, 32\) twice"),
        ({"per_class": "yes"}, "`per_class` must be True or False"),
        ({"crop_pct": True}, "`crop_pct` must be a number"),
        ({"std": [0.5]}, "`std` must hold 3 numbers, one for each channel"),
    ],
)
def test_arguments_of_an_evaluation(evaluations, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoints(
            **{"models": ["flexivit-cifar10"], "data": evaluations[0].data, "device": "cpu", **options}
        )
