"""The figures of `polyscale evaluate` and `polyscale train`, computed once more without any of their code.

Pillow reads the images, NumPy normalises them, and torch and transformers run the model.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

import polyscale
from polyscale.cli import app


BUDGETS = (2, 4, 8)
MODEL_NAMES = ["cat", "dog", "ant", "bee"]  # in another order than that of the sorted folders
Z = 1.959963984540054  # of the normal distribution: 95 % lie within


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def save_model(folder, names, seed=0):
    torch.manual_seed(seed)
    config = polyscale.FlexiViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        base_patch_size=4,
        initializer_range=0.3,
        train_patch_sizes=list(BUDGETS),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    polyscale.FlexiViTForImageClassification(config).save_pretrained(folder)
    polyscale.FlexiViTImageProcessor(
        size={"height": 16, "width": 16}, do_center_crop=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    ).save_pretrained(folder)
    return folder


def draw(folder, names, counts, seed=1):
    """Images of 16 px, so that nothing is resized; returns (file, folder's name) of each."""
    generator, rows = np.random.default_rng(seed), []
    for name, count in zip(names, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (16, 16, 3)) * generator.random(3)
            file = folder / name / f"{index}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
            rows.append((file, name))
    return rows


@torch.no_grad()
def predictions(folder, files) -> dict[int, np.ndarray]:
    """For each budget the classes from the best to the worst: (images, classes)."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with (folder / "preprocessor_config.json").open() as file:
        processing = json.load(file)
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 255 for file in files])
    pixels = (pixels - processing["image_mean"]) / processing["image_std"]
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    found = {}
    for budget in BUDGETS:
        scores = torch.cat([model(pixels[i : i + 1], patch_size=budget).logits for i in range(len(pixels))])
        found[budget] = scores.argsort(dim=1, descending=True).numpy()
    return found


def wilson_by_roots(right: int, count: int) -> tuple[float, float]:
    """Where (share - p)^2 = z^2 p (1 - p) / n: Wilson's interval as it is defined."""
    share, part = right / count, Z * Z / count
    low, high = sorted(np.roots([1 + part, -(2 * share + part), share * share]).real)
    return low, high


def check(records, ranked, labels, names):
    """Records of the command against ranked classes and the true ones, given as the model's indices."""
    labels = np.asarray(labels)
    assert [record["budget"] for record in records] == sorted(BUDGETS, reverse=True)  # from few tokens to many
    for record in records:
        right = ranked[record["budget"]][:, 0] == labels
        assert record["top1"] == pytest.approx(right.sum() / len(labels), abs=1e-12)
        assert record["tokens"] == math.ceil(16 / record["budget"]) ** 2
        assert record["images"] == len(labels)
        low, high = wilson_by_roots(int(right.sum()), len(labels))
        assert (record["top1_low"], record["top1_high"]) == pytest.approx((low, high), abs=1e-9)
        among_five = (ranked[record["budget"]][:, :5] == labels[:, None]).any(axis=1)
        assert record["top5"] == pytest.approx(among_five.mean(), abs=1e-12)
        by_hand = {
            name: {"images": names.count(name), "top1": float(right[np.array(names) == name].mean())}
            for name in set(names)
        }
        assert record["per_class"].keys() == by_hand.keys()
        for name, expected in by_hand.items():
            assert record["per_class"][name] == pytest.approx(expected)


def test_folders_in_another_order_than_the_model_s_classes(tmp_path):
    model = save_model(tmp_path / "model", MODEL_NAMES)
    rows = draw(tmp_path / "data" / "test", ["dog", "Bee", "cat", "ant"], [9, 4, 12, 6])
    names = [name for _, name in rows]
    ranked = predictions(model, [file for file, _ in rows])
    labels = [MODEL_NAMES.index(name.lower()) for name in names]
    by_place = [sorted(set(names)).index(name) for name in names]
    shares = [(ranked[budget][:, 0] == np.array(labels)).mean() for budget in BUDGETS]
    assert shares != [(ranked[budget][:, 0] == np.array(by_place)).mean() for budget in BUDGETS]
    assert len(set(shares)) > 1  # or a mistaken budget would not show
    records = json.loads(run("evaluate", model, tmp_path / "data", "--per-class", "--json").stdout)
    check(records, ranked, labels, names)
    assert {(record["split"], record["classes"]) for record in records} == {("test", 4)}


def test_a_label_map_goes_before_the_names(tmp_path):
    model = save_model(tmp_path / "model", MODEL_NAMES)
    rows = draw(tmp_path / "data" / "test", ["kitten", "dog", "cat"], [7, 8, 5])  # two are one class of the model
    names = [name for _, name in rows]
    mapped = {"kitten": "cat", "dog": "bee", "cat": "cat"}
    ranked = predictions(model, [file for file, _ in rows])
    arguments = ["--label-map", "kitten=cat", "--label-map", "dog=3", "--per-class", "--json"]
    records = json.loads(run("evaluate", model, tmp_path / "data", *arguments).stdout)
    check(records, ranked, [MODEL_NAMES.index(mapped[name]) for name in names], names)


@pytest.mark.parametrize("names", [MODEL_NAMES, [f"LABEL_{index}" for index in range(12)]])
def test_integers_stand_for_themselves(names, tmp_path):
    model = save_model(tmp_path / "model", names)
    rows = draw(tmp_path / "images", [str(index) for index in range(len(names))], [3] * len(names))
    order = np.random.default_rng(3).permutation(len(rows))
    files, labels = [rows[index][0] for index in order], [int(rows[index][1]) for index in order]
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    data = Dataset.from_dict({"image": [str(file) for file in files], "label": labels}, features=features)
    data.to_parquet(tmp_path / "test.parquet")
    records = json.loads(run("evaluate", model, tmp_path / "test.parquet", "--per-class", "--json").stdout)
    check(records, predictions(model, files), labels, [str(label) for label in labels])
    # folders whose names are the integers, which sort as "0", "1", "10", ...
    records = json.loads(run("evaluate", model, tmp_path / "images", "--per-class", "--json").stdout)
    by_file = [label for _, label in rows]
    check(records, predictions(model, [file for file, _ in rows]), [int(label) for label in by_file], by_file)


def test_a_training_writes_what_its_checkpoint_reaches(tmp_path):
    names = ["plum", "fig", "kiwi"]
    draw(tmp_path / "data" / "train", names, [6, 6, 6])
    rows = draw(tmp_path / "data" / "test", names[::-1], [5, 9, 7], seed=2)
    start, out = save_model(tmp_path / "start", names), tmp_path / "out"
    arguments = ["--init-from", start, "--epochs", 1, "--batch-size", 6, "--num-workers", 0]
    run("train", tmp_path / "data", out, *arguments)
    config = json.loads((out / "config.json").read_text())
    classes = [config["id2label"][str(index)] for index in range(3)]
    assert sorted(classes) == sorted(names)
    ranked = predictions(out, [file for file, _ in rows])
    labels = np.array([classes.index(name) for _, name in rows])
    right = {budget: int((ranked[budget][:, 0] == labels).sum()) for budget in BUDGETS}
    results = json.loads((out / "training.json").read_text())["results"]
    assert [result["budget"] for result in results] == list(BUDGETS)
    for result in results:
        assert result["top1"] == pytest.approx(right[result["budget"]] / 21, abs=1e-6)
        assert result["images"] == 21
    card = (out / "README.md").read_text()
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == pytest.approx([right[size] / 21 for size in BUDGETS], abs=1e-6)
    table = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) % \(([\d.]+) to ([\d.]+)\)", card, flags=re.MULTILINE)
    assert [(int(budget), int(tokens)) for budget, tokens, *_ in table] == [(2, 64), (4, 16), (8, 4)]
    for budget, _, top1, low, high in table:
        interval = wilson_by_roots(right[int(budget)], 21)
        expected = [100 * value for value in (right[int(budget)] / 21, *interval)]
        assert [float(top1), float(low), float(high)] == pytest.approx(expected, abs=0.051)
    evaluated = json.loads(run("evaluate", out, tmp_path / "data", "--per-class", "--json").stdout)
    check(evaluated, ranked, labels, [name for _, name in rows])
