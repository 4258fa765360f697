"""Every family trains at its defaults, from a checkpoint too, and its outputs say what happened."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTModel
from polyscale.models.auto import families
from polyscale.training import make_recipe, train
from polyscale.training.configs import label_fields, make_config
from polyscale.training.processing import default_image_size
from polyscale.training.starting_point import default_batch_size, starting_point

from .conftest import LABELS, make_picture


# A test elsewhere registers a family of its own.
FAMILIES = sorted(
    name
    for name, family in families().items()
    if family.classifier_class is not None and family.config_class.__module__.startswith("polyscale.")
)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = {"epochs": 1, "limit": 12, "batch_size": 6, "num_workers": 0}


def run(data, output, model_options=None, **choices):
    return train(data, output, make_recipe(None, model_options, **{**QUICK, **choices}), verbose=False)


def config_for(family, image_size, **options):
    recipe = make_recipe(None, family=family, image_size=image_size, num_channels=options.pop("num_channels", 3))
    return make_config(recipe, options)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_at_its_defaults(image_folder, tmp_path, family, capsys):
    recipe = make_recipe(None, family=family, **QUICK)
    metrics = train(image_folder, tmp_path / "model", recipe)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    assert set(model.config.id2label.values()) == set(LABELS)
    assert len(metrics["budgets"]) >= 1
    said = capsys.readouterr().out
    for words in (f"{family}, ", "16 x 16 pixels", "tokens)" if family != "sparseformer" else "tokens", "train: 12"):
        assert words in said
    assert "test: 6 images" in said
    assert "epoch 1/1  top-1" in said
    assert "total_flos" not in said
    classifier = pipeline("image-classification", model=str(tmp_path / "model"))
    assert classifier(make_picture(0, 0))[0]["label"] in LABELS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size", [16, 32, 96, 224])
def test_default_sizes_fit_the_images(family, image_size):
    config = config_for(family, (image_size, image_size))
    assert config.image_size == image_size
    assert 9 <= config.num_tokens_for(image_size) <= 256
    model = AutoModelForImageClassification.from_config(config)
    assert model.num_parameters() < 4e6 or image_size > 64


def test_a_flexivit_has_positions_and_a_default_from_the_sizes_trained():
    config = config_for("flexivit", (32, 32), train_patch_sizes=[16, 4, 8])
    assert (config.base_patch_size, config.patch_size, config.position_grid) == (8, 4, [8, 8])
    published = make_recipe(None, family="flexivit", preset="flexivit_base", image_size=32, num_channels=3)
    config = make_config(published, {"train_patch_sizes": [4, 8, 16]})
    assert (config.hidden_size, config.position_grid) == (768, [8, 8])
    model = AutoModelForImageClassification.from_config(config_for("flexivit", (32, 32))).eval()
    pixels = torch.randn(1, 3, 32, 32)
    shuffled = pixels.unflatten(3, (4, 8)).flip(3).flatten(3)
    assert not torch.allclose(model(pixels).logits, model(shuffled).logits, atol=1e-5)


def test_sizes_from_the_images():
    assert default_image_size([(32, 32, 3)] * 5) == (32, 32)
    assert default_image_size([(16, 20, 3)]) == (16, 16)
    assert default_image_size([(3000, 4000, 3), (480, 640, 3)]) == (224, 224)
    assert default_image_size([(100, 90, 3)]) == (64, 64)
    assert [default_batch_size(count) for count in (10, 200, 1024, 50_000)] == [8, 16, 128, 128]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier for the same classes in another order, of 24 px images normalised as CLIP's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = [LABELS[2], LABELS[0], LABELS[1]]
    torch.manual_seed(7)
    config = FlexiViTConfig(**SHAPE, image_size=24, base_patch_size=8, initializer_range=0.3, **label_fields(names))
    FlexiViTForImageClassification(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_keeps_its_classes_and_its_processing(checkpoint, image_folder, tmp_path):
    run(image_folder, tmp_path / "model", init_from=str(checkpoint), learning_rate=1e-12)
    before, after = (
        AutoModelForImageClassification.from_pretrained(path) for path in (checkpoint, tmp_path / "model")
    )
    assert after.config.id2label == before.config.id2label
    torch.testing.assert_close(after.head.classifier.weight, before.head.classifier.weight, rtol=0, atol=1e-6)
    old, new = (AutoImageProcessor.from_pretrained(path) for path in (checkpoint, tmp_path / "model"))
    image = make_picture(1, 7, 40)
    assert torch.equal(
        old(image, return_tensors="pt")["pixel_values"], new(image, return_tensors="pt")["pixel_values"]
    )
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["recipe"]["image_size"] == [24, 24]
    assert record["recipe"]["image_mean"] == pytest.approx(old.image_mean)
    right = [
        before(**old(make_picture(label, 1000 + index), return_tensors="pt")).logits.argmax().item()
        == before.config.label2id[LABELS[label]]
        for label in range(3)
        for index in range(2)
    ]
    assert record["metrics"]["eval_top1"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_other_classes_get_a_new_head_even_where_there_are_as_many(checkpoint, tmp_path, capsys):
    for label, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            make_picture(label, index).save(tmp_path / "data" / name / f"{index}.png")
    recipe = make_recipe(None, init_from=str(checkpoint), learning_rate=1e-12, **QUICK)
    train(tmp_path / "data", tmp_path / "model", recipe)
    assert "The head is new" in capsys.readouterr().out
    before, after = (
        AutoModelForImageClassification.from_pretrained(path) for path in (checkpoint, tmp_path / "model")
    )
    assert after.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert (after.head.classifier.weight - before.head.classifier.weight).abs().min() > 1e-4
    body = "flexivit.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(after.state_dict()[body], before.state_dict()[body], rtol=0, atol=1e-6)


def test_a_classifier_of_several_labels_becomes_one_of_one_label(checkpoint, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    for init_from in (str(tmp_path), None):
        point = starting_point(make_recipe(None, init_from=init_from), LABELS, [(16, 16, 3)], 12)
        assert point.model.config.problem_type is None


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
        ("deit", {**SHAPE, "intermediate_size": 32, "patch_size": 4}),
        ("swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}),
    ],
)
def test_families_of_transformers_see_images_of_the_size_asked_for(family, options):
    recipe = make_recipe(None, options, family=family, image_size=32)
    point = starting_point(recipe, LABELS, [(16, 16, 3)], 12)
    pixels = point.processor(make_picture(0, 0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert point.model(pixels).logits.shape == (1, len(LABELS))


@pytest.mark.parametrize(
    ("family", "image_size", "message"),
    [
        ("resnet", (16, 24), "`image_size` 16 x 24 is nothing that ConvNextImageProcessor.*Take a square"),
        ("clip", 32, "fresh model of the `family` 'clip' takes no images of 32 x 32 pixels and 3 channels"),
    ],
)
def test_families_of_transformers_that_cannot_be_trained_so(family, image_size, message):
    small = {"resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}}.get(family)
    with pytest.raises(ValueError, match=message):
        starting_point(make_recipe(None, small, family=family, image_size=image_size), LABELS, [(16, 16, 3)], 12)


def test_random_weights_are_refused(checkpoint, image_folder, tmp_path):
    broken = tmp_path / "broken"
    AutoModelForImageClassification.from_pretrained(checkpoint).save_pretrained(broken)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    del weights["flexivit.layers.0.mlp.fc1.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    headless = tmp_path / "headless"
    FlexiViTModel.from_pretrained(checkpoint).save_pretrained(headless)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(headless)
    corrupt = tmp_path / "corrupt"
    AutoModelForImageClassification.from_pretrained(checkpoint).save_pretrained(corrupt)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(corrupt)
    (corrupt / "model.safetensors").write_bytes((corrupt / "model.safetensors").read_bytes()[:-100])
    for choices, message in (
        ({"init_from": str(broken)}, "`init_from` .* lacks 1 tensors, such as 'flexivit.layers.0.mlp.fc1.weight'"),
        ({"teacher": str(broken)}, "`teacher` .* holds no trained image classifier: 1 tensors are missing"),
        ({"teacher": str(headless)}, "`teacher` .* holds no trained image classifier"),
        ({"init_from": str(corrupt)}, "`init_from` .* is damaged or of another kind"),
        ({"init_from": "/no/such/folder"}, "`init_from` '/no/such/folder' cannot be loaded"),
        ({"init_from": str(checkpoint), "family": "nonsense"}, "`family` must be a model type"),
        ({"teacher": "flexivit-cifar10"}, "does not know the classes of the data"),
    ):
        with pytest.raises(ValueError, match=message):
            run(image_folder, tmp_path / "out", {**SHAPE} if "teacher" in choices else None, **choices)
    assert not (tmp_path / "out.training").exists()


@pytest.mark.slow
def test_a_teacher_with_its_classes_in_another_order_is_followed(checkpoint, image_folder, tmp_path):
    from polyscale.training.data import load_image_dataset
    from polyscale.training.plans import make_plan, splits_for
    from polyscale.training.schedule import training_arguments

    recipe = make_recipe(None, SHAPE, teacher=str(checkpoint), image_size=24, **QUICK)
    splits, _ = splits_for(load_image_dataset(image_folder), recipe)
    trainer = make_plan(recipe, splits, lambda full: training_arguments(full, tmp_path, splits)).trainer
    pixels = torch.randn(2, 3, 24, 24)
    teacher = AutoModelForImageClassification.from_pretrained(checkpoint)
    logits = teacher(trainer.teacher_inputs(pixels)).logits
    order = [teacher.config.label2id[name] for name in splits["train"].features["label"].names]
    assert order != [0, 1, 2]
    torch.testing.assert_close(trainer.teacher_logits(pixels), logits[:, order])


@pytest.mark.slow
def test_the_outputs_of_a_run(image_folder, tmp_path):
    metrics = run(image_folder, tmp_path / "model", {**SHAPE, "train_patch_sizes": [4, 8]}, epochs=2, bf16=False)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        f"top-1 accuracy at patch_size {result['budget']} ({result['tokens']} tokens)": pytest.approx(result["top1"])
        for result in metrics["budgets"]
    }
    assert [result["tokens"] for result in metrics["budgets"]] == [16, 4]
    for words in ("## By budget", "| 4 | 16 |", "- command: `", "transformers ", "12 images"):
        assert words in card.text
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert [entry["epoch"] for entry in record["history"] if "budgets" in entry] == [1.0, 2.0]
    assert len([entry for entry in record["history"] if "loss" in entry]) == 4
    with Image.open(tmp_path / "model" / "curve.png") as curve:
        assert curve.size == (1200, 480)


@pytest.mark.slow
def test_grey_images_and_arrays_of_any_number_of_channels(image_folder, tmp_path):
    run(image_folder, tmp_path / "grey", SHAPE, num_channels=1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "grey")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "grey")
    inputs = processor(make_picture(0, 0).convert("L"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 16, 16)
    assert model(**inputs).logits.shape == (1, 3)

    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in range(2):
            folder = tmp_path / "arrays" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                np.save(folder / f"{index}.npy", generator.integers(0, 30000 * (1 + label), (16, 16, 5), np.uint16))
    run(tmp_path / "arrays", tmp_path / "five", SHAPE)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "five")
    assert model.config.num_channels == 5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_of_the_trainer_see_logits_alone(family, tmp_path):
    recipe = make_recipe(None, family=family, image_size=16, num_channels=3)
    model = AutoModelForImageClassification.from_config(make_config(recipe, label_fields(LABELS)))
    pixels = torch.randn(4, 3, 16, 16)
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels)]
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2)
    metrics = Trainer(model=model, args=args, eval_dataset=rows, compute_metrics=compute_metrics).evaluate()
    expected = model.eval()(pixels).logits.detach().numpy()
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((expected.argmax(1) == np.arange(4) % 3).mean())


def test_what_cannot_be_trained_is_refused_before_anything_is_written(image_folder, tmp_path):
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    make_picture(0, 0).save(one / "cat" / "1.png")
    for data, options, choices, message in (
        (image_folder, {"train_patch_sizes": [4, 8], "train_patch_size_probs": [1, 1]}, {}, "sum to 1"),
        (image_folder, {"pach_size": 8}, {}, "`pach_size` is no field .* did you mean `patch_size`"),
        (image_folder, {"drop_path_rate": 1.0}, {}, "drop_path_rate"),
        (image_folder, {"hidden_size": 65}, {}, "multiple of `num_attention_heads`"),
        (image_folder, {}, {"family": "sparseformer_video"}, "`family` must be a model type with an image classifier"),
        (image_folder, {}, {"image_mean": (0.5,)}, "`image_mean` must hold 3 numbers"),
        (image_folder, {}, {"family": "quadtree_vit", "image_size": 37}, "take a multiple of 16"),
        (image_folder, {}, {"family": "s2_vision", "image_size": 31}, "a multiple of 2"),
        (image_folder, {}, {"num_channels": 2}, "1 channel .grey. or 3"),
        (one, {}, {}, "has one class in training, 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data, tmp_path / "out", options, **choices)
    with pytest.raises(ValueError, match="lies inside the data"):
        run(image_folder, image_folder / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    assert not (image_folder / "out.training").exists()


def test_a_teacher_s_processing_is_its_own(checkpoint, image_folder, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    AutoModelForImageClassification.from_pretrained(checkpoint).save_pretrained(teacher)
    settings = AutoImageProcessor.from_pretrained(checkpoint).to_dict()
    size = {"height": 24, "width": 24}
    processor = type(AutoImageProcessor.from_pretrained(checkpoint)).from_dict(
        {**settings, "size": size, "crop_size": size, "do_normalize": False}
    )
    processor.save_pretrained(teacher)

    class Stop(Exception):
        pass

    def stop(*args, **options):
        raise Stop(options["teacher_size"], options["image_stats"])

    monkeypatch.setattr("polyscale.training.plans.ImageClassificationTrainer", stop)
    with pytest.raises(Stop) as caught:
        run(image_folder, tmp_path / "out", SHAPE, teacher=str(teacher))
    size, (own, theirs) = caught.value.args
    assert size == (24, 24)
    assert own == ([0.5] * 3, [0.5] * 3)
    assert theirs == ([0.0] * 3, [1.0] * 3)  # values of files


def test_fields_that_say_another_size_than_the_recipe_are_refused(image_folder, tmp_path):
    with pytest.raises(ValueError, match=r"`image_size` is \(16, 16\), and \(32, 32\) in `model_options`"):
        run(image_folder, tmp_path / "out", {**SHAPE, "image_size": 32}, image_size=16)
    with pytest.raises(ValueError, match="`num_channels` is 3, and 1 in `model_options`"):
        run(image_folder, tmp_path / "out", {**SHAPE, "num_channels": 1}, num_channels=3)


def test_tensors_of_a_checkpoint_that_have_no_place_are_said(checkpoint, image_folder, tmp_path, capsys):
    source = tmp_path / "source"
    AutoModelForImageClassification.from_pretrained(checkpoint).save_pretrained(source)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "flexivit.foo": torch.ones(2)}, source / "model.safetensors", metadata={"format": "pt"})
    train(image_folder, tmp_path / "out", make_recipe(None, init_from=str(source), **QUICK))
    assert "1 tensors of" in capsys.readouterr().out
