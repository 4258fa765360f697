"""Several models on one data set: which of them, at which rows, drawn how."""

import csv
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from typer.testing import CliRunner

from polyscale import QuadtreeViTImageProcessor
from polyscale.cli import app
from polyscale.evaluation import run
from polyscale.evaluation.contestants import Contestant, control_budgets, fitting_checkpoints
from polyscale.evaluation.frontier import costs_table, frontier_records
from polyscale.evaluation.plotting import curves_of, draw_curves, plot_frontier
from polyscale.evaluation.speed import count_gflops
from polyscale.loading import load_classifier
from polyscale.utils.processors import output_size

from ..tiny_checkpoints import (
    CIFAR10_LABELS,
    save_tiny_flexivit,
    save_tiny_quadtree_vit,
    save_tiny_s2,
    save_tiny_sparseformer,
)


PETS = ("hamster", "parrot", "tortoise")


def make_split(names=CIFAR10_LABELS, count=8) -> Dataset:
    generator = np.random.default_rng(0)
    images = [PILImage.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": [i % len(names) for i in range(count)]}, features=features)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package with three checkpoints: two of CIFAR-10's classes and one of pets."""
    folder = tmp_path / "shipped"
    save_tiny_flexivit(folder / "b-cifar")
    save_tiny_quadtree_vit(folder / "a-cifar")
    save_tiny_flexivit(folder / "pets", id2label=dict(enumerate(PETS)), label2id={n: i for i, n in enumerate(PETS)})
    monkeypatch.setattr("polyscale.checkpoints._FOLDER", folder)
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (CIFAR10_LABELS, ["a-cifar", "b-cifar"]),
        (("Dog", "cat"), ["a-cifar", "b-cifar"]),
        (PETS[::-1], ["pets"]),
        (("0", "1", "2"), ["pets"]),
        (tuple(map(str, range(10))), ["a-cifar", "b-cifar"]),
    ],
)
def test_shipped_checkpoints_are_chosen_by_their_classes(shipped, names, expected):
    split = make_split(names)
    assert fitting_checkpoints(split) == expected
    if names[0].isdecimal():
        integers = make_split(names, count=len(names)).cast_column("label", Value("int64"))
        assert fitting_checkpoints(integers) == expected


def test_a_label_map_counts_and_where_no_checkpoint_fits_all_are_named(shipped):
    split = make_split(("parrot", "kitten"))
    assert fitting_checkpoints(split, {"kitten": "hamster"}) == ["pets"]
    with pytest.raises(ValueError, match="None of the checkpoints that ship has the data's 2 classes") as error:
        fitting_checkpoints(split)
    assert "a-cifar (10 classes, such as 'airplane'), b-cifar (10" in str(error.value)
    assert "pets (3 classes, such as 'hamster')" in str(error.value)
    missing = Dataset.from_dict({"image": list(split["image"]), "label": [-1] * 8}, features=split.features)
    with pytest.raises(ValueError, match="8 of the data's 8 labels are missing"):
        fitting_checkpoints(missing)
    with pytest.raises(ValueError, match="The data set is empty"):
        fitting_checkpoints(split.select([]))


def test_the_command_scores_the_checkpoints_of_these_classes(shipped, tmp_path):
    make_split().to_parquet(tmp_path / "test.parquet")
    arguments = ["evaluate", "--bundled", str(tmp_path / "test.parquet"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert list(dict.fromkeys(record["model"] for record in records)) == ["a-cifar", "b-cifar"]
    assert [record["tokens"] for record in records] == [4, 10, 19, 28, 37, 46, 55, 64, 4, 16, 64]
    done = CliRunner().invoke(app, [*arguments[:2], str(shipped / "b-cifar"), *arguments[2:]])
    records = json.loads(done.stdout)
    assert list(dict.fromkeys(record["model"] for record in records)) == [str(shipped / "b-cifar"), "a-cifar"]
    make_split(("spoon", "fork")).to_parquet(tmp_path / "test.parquet")
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout, len(done.stderr.strip().splitlines())) == (2, "", 1)
    assert "None of the checkpoints that ship has the data's 2 classes, such as 'spoon'" in done.stderr


def contestant(folder, **options) -> Contestant:
    loaded = load_classifier(folder, **options)
    return Contestant(loaded.model.config, output_size(loaded.image_processor))


def test_a_control_stands_at_the_budgets_of_models_of_its_kind(tmp_path):
    flexible = contestant(save_tiny_flexivit(tmp_path / "flexible", train_patch_sizes=[16, 4, [8, 4]]))
    quadtree = contestant(save_tiny_quadtree_vit(tmp_path / "quadtree"))
    control = contestant(save_tiny_flexivit(tmp_path / "control", train_patch_sizes=[8]))
    assert control_budgets(control, [quadtree, flexible]) == [16, 8, [8, 4], 4]
    assert control_budgets(control, [quadtree]) is None
    assert control_budgets(contestant(save_tiny_sparseformer(tmp_path / "sparse")), [flexible]) is None
    small = contestant(tmp_path / "control", image_size=12)
    assert control_budgets(small, [flexible]) == [8, [8, 4], 4]  # no patch of 16 pixels fits


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Evaluations of the four families and a control, with other ways; their records; the folders; what was loaded,
    and how many models of those loaded before were in memory then.
    """
    folder, loads, loaded_before = tmp_path_factory.mktemp("everything"), [], []
    models = {
        "flexivit": save_tiny_flexivit(folder / "flexivit", initializer_range=0.3),
        "quadtree": save_tiny_quadtree_vit(folder / "quadtree", initializer_range=0.3),
        "sparse": save_tiny_sparseformer(folder / "sparse"),
        "s2": save_tiny_s2(folder / "s2"),
        "plain": save_tiny_flexivit(folder / "plain", train_patch_sizes=[8], initializer_range=0.3),
    }
    make_split().to_parquet(folder / "test.parquet")

    def load(source, *args, **kwargs):
        loads.append((source, sum(model() is not None for model in loaded_before)))
        loaded = load_classifier(source, *args, **kwargs)
        loaded_before.append(weakref.ref(loaded.model))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_classifier", load)
        *others, plain = models.values()
        evaluations = run.evaluate_checkpoints(
            others, folder / "test.parquet", controls=[plain], device="cpu", merge_to=[10, 6], shrink_to=[48, 16]
        )
        records = frontier_records(evaluations, batch_sizes=(1, 2), rounds=1)
    return evaluations, records, models, loads


def test_one_model_at_a_time_is_in_memory(everything):
    *_, models, loads = everything
    # tried, scored and timed
    assert loads == 3 * [(str(folder), 0) for folder in models.values()]


def test_one_model_alone_is_loaded_once(tmp_path, monkeypatch):
    model, loads = save_tiny_flexivit(tmp_path / "model"), []
    make_split(count=2).to_parquet(tmp_path / "test.parquet")
    monkeypatch.setattr(run, "load_classifier", lambda *a, **k: loads.append(a) or load_classifier(*a, **k))
    evaluations = run.evaluate_checkpoints([model], tmp_path / "test.parquet", device="cpu", merge_to=[4])
    assert len(frontier_records(evaluations, batch_sizes=(1,), rounds=1)) == 4
    assert loads == [(str(model),)]


def test_rows_are_budgets_then_merging_then_smaller_images(everything):
    evaluations, records, models, _ = everything
    assert [evaluation.control for evaluation in evaluations] == [False, False, False, False, True]
    rows = [(record["way"], record["budget"], record["merge_to"], record["tokens"]) for record in records]
    merging, smaller = "token merging", "smaller images"
    own = [(merging, None, 10, 10), (merging, None, 6, 6), (smaller, None, None, 4)]
    flexible = [("budget", 16, None, 4), ("budget", 8, None, 16), ("budget", 4, None, 64)]
    quadtree = [("budget", count, None, count) for count in (4, 10, 19, 28, 37, 46, 55, 64)]
    assert rows == [
        *flexible,
        *own,
        *quadtree,
        *own[:2],
        ("budget", None, None, 9),
        ("budget", [1, 1], None, 16),
        ("budget", [1, 2], None, 16),
        *flexible,
        *own,
    ]
    assert [record["image_size"] for record in records if record["way"] == smaller] == [[16, 16], [16, 16]]
    by_hand = load_classifier(models["quadtree"])
    split = make_split()
    pixels = by_hand.image_processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    (merged,) = (r for r in records if r["model"] == str(models["quadtree"]) and r["merge_to"] == 6)
    with torch.no_grad():
        best = by_hand.model(pixels, num_tokens=16, merge_tokens_to=6).logits.argmax(-1)
    assert merged["top1"] == pytest.approx((best == torch.tensor(split["label"])).float().mean().item())
    operations = count_gflops(lambda: by_hand.model(pixels[:1], num_tokens=16, merge_tokens_to=6))
    assert merged["gflops"] == pytest.approx(operations, rel=1e-6)
    scales = [r["gflops"] for r in records if r["model"] == str(models["s2"])]
    assert scales[1] > 2 * scales[0]  # five tiles, not two


def test_curves_are_a_color_per_model_and_a_line_per_way(everything):
    evaluations, records, *_ = everything
    curves = curves_of(evaluations, records)
    assert [(curve.label, curve.line, curve.filled) for curve in curves] == [
        ("flexivit", "-", True),
        ("flexivit, tokens merged", ":", False),
        ("flexivit, smaller images", "-.", False),
        ("quadtree", "-", True),
        ("quadtree, tokens merged", ":", False),
        ("sparse", "-", True),
        ("s2", "-", True),
        ("plain (control)", "--", True),
        ("plain (control), tokens merged", ":", False),
        ("plain (control), smaller images", "-.", False),
    ]
    looks = [(curve.color, curve.marker) for curve in curves]
    assert looks[0] == looks[1] == looks[2] != looks[3] == looks[4]
    assert len(set(looks)) == 5
    assert [record for curve in curves for record in curve.records] == records
    assert curves[3].budgets == ["4", "10", "19", "28", "37", "46", "55", "64"]


def test_points_are_joined_from_few_tokens_to_many(everything):
    from matplotlib.figure import Figure

    evaluations, records, *_ = everything
    records = [{**record, "milliseconds_batch_1": 100 / (1 + place)} for place, record in enumerate(records)]
    curves = curves_of(evaluations, records)
    for field in ("tokens", "gflops", "milliseconds_batch_1"):
        axis = Figure().subplots()
        draw_curves(axis, curves, field)
        assert axis.get_xscale() == "log"
        for curve, container in zip(curves, axis.containers, strict=True):
            ordered = sorted(curve.records, key=lambda record: (record["tokens"], record["gflops"]))
            assert list(container.lines[0].get_xdata()) == [record[field] for record in ordered]
            assert list(container.lines[0].get_ydata()) == [100 * record["top1"] for record in ordered]


@pytest.mark.parametrize(
    ("field", "low", "high", "expected"),
    [
        ("tokens", 4, 256, ["4", "8", "16", "32", "64", "128", "256"]),
        ("tokens", 9, 9, ["9"]),
        ("gflops", 0.0026, 0.242, ["0.003", "0.01", "0.03", "0.1"]),
        ("milliseconds_batch_1", 0.9, 11.7, ["1", "2", "5", "10"]),
        ("milliseconds_batch_1", 2.2, 4.4, ["2.2", "4.4"]),
    ],
)
def test_ticks_are_few_and_round(everything, field, low, high, expected):
    from matplotlib.figure import Figure

    evaluations, records, *_ = everything
    curve = curves_of(evaluations, records)[0]
    axis = Figure().subplots()
    draw_curves(axis, [replace(curve, records=[{**curve.records[0], field: end} for end in (low, high)])], field)
    assert [label.get_text() for label in axis.get_xticklabels()] == expected


def test_smaller_image_sizes_are_dashed(tmp_path):
    models = [save_tiny_flexivit(tmp_path / "one"), save_tiny_sparseformer(tmp_path / "two")]
    make_split(count=3).to_parquet(tmp_path / "test.parquet")
    evaluations = run.evaluate_checkpoints(models, tmp_path / "test.parquet", device="cpu", image_sizes=[24, 32])
    curves = curves_of(evaluations, [{**record} for record in frontier_records(evaluations, rounds=1)])
    assert [(curve.label, curve.line, len(curve.records)) for curve in curves] == [
        ("one, 24x24 pixels", "--", 3),
        ("one, 32x32 pixels", "-", 3),
        ("two, 24x24 pixels", "--", 1),
        ("two, 32x32 pixels", "-", 1),
    ]


def test_the_plot_has_a_panel_per_cost_and_a_line_per_reference(everything, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    evaluations, records, *_ = everything
    figures, save = [], Figure.savefig

    def saved(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    plot_frontier(evaluations, records, tmp_path / "frontier.png", {"_teacher $5": 0.7})
    (figure,) = figures
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "tokens per image",
        "GFLOP per image",
        "milliseconds, batch of 1",
        "milliseconds, batch of 2",
    ]
    assert all([70.0, 70.0] in [list(line.get_ydata()) for line in axis.lines] for axis in figure.axes)
    assert figure.axes[0].texts[0].get_text() == r" _teacher \$5, 70.0 %"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == len(curves_of(evaluations, records))
    best = [max(r["top1"] for r in curve.records) for curve in curves_of(evaluations, records)]
    assert names[0] == curves_of(evaluations, records)[int(np.argmax(best))].label
    assert PILImage.open(tmp_path / "frontier.png").size[0] >= 1400
    table = costs_table(evaluations, records, {"teacher": 0.7})
    assert str(table.caption) == "For comparison, top-1 of teacher: 70.00"
    cells = [str(cell) for cell in table.columns[0].cells]
    assert cells[:7] == ["flexivit", "  16", "  8", "  4", "  merged to 10", "  merged to 6", "  its own at 16x16"]


@pytest.mark.parametrize("fit", ["squash", "aspect"])
def test_operations_are_those_of_the_data_where_tokens_depend_on_what_images_show(tmp_path, fit):
    model = save_tiny_quadtree_vit(tmp_path / "model", split_threshold=0.1, num_tokens=None)
    size = {"height": 32, "width": 32}
    QuadtreeViTImageProcessor(size=size, max_patch_size=16, fit=fit).save_pretrained(model)
    pixels = np.full((4, 32, 32, 3), 127, dtype=np.uint8)  # nothing to split: 4 tokens of the 64 that noise has
    features = Features({"image": Image(), "label": ClassLabel(names=list(CIFAR10_LABELS))})
    rows = {"image": [PILImage.fromarray(array) for array in pixels], "label": [0, 1, 2, 3]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    evaluations = run.evaluate_checkpoints([model], tmp_path / "test.parquet", device="cpu")
    (record,) = frontier_records(evaluations, batch_sizes=(1, 6), rounds=1)
    assert record["tokens"] == 4
    by_hand = load_classifier(model).model
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        expected = count_gflops(lambda: by_hand(images, num_tokens=4))
        most = count_gflops(lambda: by_hand(images, num_tokens=64))
    assert record["gflops"] == pytest.approx(expected, rel=0.05)
    assert record["gflops"] < most / 10
    title = str(costs_table(evaluations, [record]).title)
    assert title.endswith("operations and times on random images, those of the data where tokens differ")


def test_ways_that_no_model_can_go_are_refused(tmp_path):
    sparse = save_tiny_sparseformer(tmp_path / "sparse")
    make_split(count=2).to_parquet(tmp_path / "test.parquet")
    for option, message in (
        ("merge_to", "`merge_to` 16, 8: a model of type 'sparseformer' cannot merge tokens"),
        ("shrink_to", "`shrink_to` 16, 8: such images cost it 9 tokens, no fewer than its own: 9"),
    ):
        with pytest.raises(ValueError, match=message):
            run.evaluate_checkpoints([sparse], tmp_path / "test.parquet", device="cpu", **{option: [16, 8]})


def test_the_command_writes_all_columns(tmp_path):
    model, plain = save_tiny_flexivit(tmp_path / "model"), save_tiny_flexivit(tmp_path / "plain")
    make_split(count=2).to_parquet(tmp_path / "test.parquet")
    options = ["--merge-to", "8", "4", "--shrink-to", "24", "16", "--reference", "teacher=71.5", "--speed"]
    arguments = ["evaluate", model, "--control", plain, *options, "--output", tmp_path / "out", "--device", "cpu"]
    done = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "test.parquet")])
    assert done.exit_code == 0, done.output
    assert "teacher: 71.50" in done.stdout
    with (tmp_path / "out" / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = [(row["control"], row["way"], row["budget"], row["merge_to"], row["image_size"]) for row in rows]
    assert shown[:7] == [
        ("False", "budget", "16", "", "32x32"),
        ("False", "budget", "8", "", "32x32"),
        ("False", "budget", "4", "", "32x32"),
        ("False", "token merging", "", "8", "32x32"),
        ("False", "token merging", "", "4", "32x32"),
        ("False", "smaller images", "", "", "24x24"),
        ("False", "smaller images", "", "", "16x16"),
    ]
    assert [row[1:] for row in shown[7:]] == [row[1:] for row in shown[:7]]
    assert {row["control"] for row in rows[7:]} == {"True"}
    costs = ("tokens", "top1", "gflops", "milliseconds_batch_1", "milliseconds_batch_32")
    assert all(float(row[name]) >= 0 for row in rows for name in costs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "teacher=70"], "give --speed too"),
        (["--speed", "--reference", "teacher=0.7"], "expected NAME=PERCENT such as teacher=71.5"),
        (["--speed", "--reference", "70"], "expected NAME=PERCENT such as teacher=71.5"),
        (["--merge-to", "4x4"], "expected numbers of tokens such as 16"),
        (["--merge-to", "big"], "expected a number such as 16"),
        (["--merge-to", "64"], "`--merge-to` 64: it has no more than 16 tokens at its own budget"),
        (["--shrink-to", "40"], "`--shrink-to` 40: such images cost it 25 tokens, no fewer than its own: 16"),
        (["--control", "nowhere"], "`MODEL` 'nowhere' cannot be loaded"),
    ],
)
def test_a_bad_word_is_refused(tmp_path, arguments, message):
    model = save_tiny_flexivit(tmp_path / "model")
    make_split(count=2).to_parquet(tmp_path / "test.parquet")
    words = ["evaluate", str(model), str(tmp_path / "test.parquet"), "--device", "cpu", *arguments]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("\u2502", " ").split())
