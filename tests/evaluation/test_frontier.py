import csv

import datasets
import numpy as np
import pytest
from PIL import Image

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
    assert list(table.columns[2].cells) == ["4", "8"]
    assert [column.header for column in table.columns][-2:] == ["ms, batch 1", "ms, batch 3"]
