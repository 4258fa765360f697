import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from polyscale import FlexiViTImageProcessor, QuadtreeViTImageProcessor
from polyscale.evaluation import evaluate_budgets, load_classifier, wilson_interval
from polyscale.layers.token_budget import budget_kwargs, budget_ladder_of
from polyscale.training.data import sample_rows

from ..tiny_checkpoints import save_tiny_quadtree_vit, save_tiny_s2, save_tiny_sparseformer
from .tiny_data import NAMES, make_split, save_checkpoint


def accuracy_by_hand(model, pixel_values, labels, **budget) -> float:
    with torch.no_grad():
        return (model(pixel_values, **budget).logits.argmax(-1) == torch.tensor(labels)).float().mean().item()


def test_each_budget_has_the_accuracy_of_a_plain_loop(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    done = []
    results = evaluate_budgets(
        model,
        processor,
        split,
        budgets=[2, 4, (8, 4)],
        image_sizes=[16, (16, 24)],
        batch_size=4,
        progress=lambda *args: done.append(args),
    )
    assert done == [(4, 22), (8, 22), (11, 22), (15, 22), (19, 22), (22, 22)]
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
        expected = accuracy_by_hand(model, pixel_values, split["label"], patch_size=result.budget)
        assert result.top1 == pytest.approx(expected)
        assert result.tokens == model.config.num_tokens_for(result.image_size, patch_size=result.budget)
        assert result.top5 == 1.0
        assert result.images == 11
        assert result.top1_interval == wilson_interval(result.top1, 11)


def test_the_interval_is_that_of_wilson():
    # the examples of Newcombe (1998), table I: 81 of 263, and 0 of 20
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29)[1] == 1


def test_all_default_budgets_are_run(split, checkpoint, tmp_path):
    model, processor = load_classifier(checkpoint)
    (result,) = evaluate_budgets(model, processor, split)
    pixel_values = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    assert (result.image_size, result.budget, result.tokens) == ((16, 16), 4, 16)
    assert result.top1 == pytest.approx(accuracy_by_hand(model, pixel_values, split["label"]))
    loaded = load_classifier(save_checkpoint(tmp_path, train_patch_sizes=[8, 4, 2]))
    assert [result.budget for result in evaluate_budgets(*loaded, split)] == [8, 4, 2]


def test_merged_tokens_and_smaller_images_are_rows_at_the_own_budget(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    steps = []
    results = evaluate_budgets(
        model,
        processor,
        split,
        [8, 2],
        merge_to=[16, 12, 5],  # of 16 tokens
        shrink_to=[12, 16, (8, 16), 20],  # 16 and 20 cost no less
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(11, 33), (22, 33), (33, 33)]
    found = [(r.way, r.image_size, r.budget, r.merge_to, r.tokens) for r in results]
    assert found == [
        ("budget", (16, 16), 8, None, 4),
        ("budget", (16, 16), 2, None, 64),
        ("token merging", (16, 16), None, 12, 12),
        ("token merging", (16, 16), None, 5, 5),
        ("smaller images", (12, 12), None, None, 9),
        ("smaller images", (8, 16), None, None, 8),
    ]
    for result in results:
        height, width = result.image_size
        pixel_values = processor(
            list(split["image"]),
            size={"shortest_edge": int(max(height, width) / 0.8)},
            crop_size={"height": height, "width": width},
            return_tensors="pt",
        )["pixel_values"]
        call = {"patch_size": result.budget or 4, "merge_tokens_to": result.merge_to}
        assert result.top1 == pytest.approx(accuracy_by_hand(model, pixel_values, split["label"], **call))


def test_statistics_and_interpolation_reach_the_processor(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    changes = {"crop_pct": 0.5, "mean": "imagenet", "std": [0.1, 0.2, 0.3], "interpolation": "nearest"}
    (result,) = evaluate_budgets(model, processor, split, [4], **changes)
    by_hand = FlexiViTImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.1, 0.2, 0.3],
        resample=0,
    )
    pixel_values = by_hand(list(split["image"]), return_tensors="pt")["pixel_values"]
    assert result.top1 == pytest.approx(accuracy_by_hand(model, pixel_values, split["label"], patch_size=4))
    with torch.no_grad():
        logits = model(pixel_values, patch_size=4).logits
    own = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    assert not torch.allclose(logits, model(own, patch_size=4).logits, atol=1e-2)


def test_classes_are_matched_by_name(checkpoint):
    model, processor = load_classifier(checkpoint)
    split = make_split()
    expected = [result.top1 for result in evaluate_budgets(model, processor, split, [2, 4])]
    order = ["c", "A", "b"]
    renamed = [order.index(NAMES[label].upper() if NAMES[label] == "a" else NAMES[label]) for label in split["label"]]
    features = Features({"image": Image(), "label": ClassLabel(names=order)})
    turned = Dataset.from_dict({"image": list(split["image"]), "label": renamed}, features=features)
    assert [result.top1 for result in evaluate_budgets(model, processor, turned, [2, 4])] == expected
    integers = split.cast_column("label", Value("int64"))
    assert [result.top1 for result in evaluate_budgets(model, processor, integers, [2, 4])] == expected
    pets = split.cast_column("label", ClassLabel(names=["cat", "dog", "owl"]))
    with pytest.raises(ValueError, match=r"'cat', 'dog', 'owl'\. Of the model: 'a', 'b', 'c'"):
        evaluate_budgets(model, processor, pets)
    mapped = evaluate_budgets(model, processor, pets, [2, 4], label_map={"cat": "a", "dog": "b", "owl": "c"})
    assert [result.top1 for result in mapped] == expected


def test_a_part_of_the_classes_and_their_accuracies(checkpoint):
    model, processor = load_classifier(checkpoint)
    split = make_split(["c", "a"])
    (result,) = evaluate_budgets(model, processor, split, [4], per_class=True)
    pixel_values = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        best = model(pixel_values).logits.argmax(-1).tolist()
    right = [guess == [2, 0][label] for guess, label in zip(best, split["label"], strict=True)]
    assert result.top1 == pytest.approx(np.mean(right))
    for label, name in enumerate(["c", "a"]):
        of_class = [hit for hit, other in zip(right, split["label"], strict=True) if other == label]
        assert result.per_class[name] == {"images": len(of_class), "top1": pytest.approx(np.mean(of_class))}


def test_labels_that_are_missing_are_no_class(split, checkpoint):
    rows = {"image": list(split["image"]), "label": [-1] * len(split)}
    unknown = Dataset.from_dict(rows, features=split.features)
    with pytest.raises(ValueError, match="11 of the data's 11 labels are missing or -1"):
        evaluate_budgets(*load_classifier(checkpoint), unknown)


def test_odd_images_have_the_pixels_of_the_image_processor(checkpoint, tmp_path):
    model, processor = load_classifier(checkpoint)
    deep = PILImage.fromarray((np.random.default_rng(1).random((20, 28)) * 65535).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    PILImage.fromarray(np.ones((20, 28), dtype=np.float32)).save(tmp_path / "float.tif")
    split = make_split(count=1, images=[str(tmp_path / "deep.png")])
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    evaluate_budgets(model, processor, split, [4])
    torch.testing.assert_close(
        seen[0], processor(PILImage.open(tmp_path / "deep.png"), return_tensors="pt")["pixel_values"], rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"float\.tif: pixels are 32-bit floats"):
        evaluate_budgets(model, processor, make_split(count=1, images=[str(tmp_path / "float.tif")]))


@pytest.mark.parametrize("save", [save_tiny_s2, save_tiny_sparseformer, save_tiny_quadtree_vit])
def test_image_sizes_take_effect_in_every_family(save, tmp_path):
    save(tmp_path)
    model, processor = load_classifier(tmp_path)
    split = make_split([model.config.id2label[index] for index in range(3)])
    results = evaluate_budgets(model, processor, split, image_sizes=[32, 64])
    expected = [(size, budget) for size in ((32, 32), (64, 64)) for budget in budget_ladder_of(model.config, size)]
    assert [(result.image_size, result.budget) for result in results] == expected
    assert len(expected) == {save_tiny_s2: 4, save_tiny_sparseformer: 2, save_tiny_quadtree_vit: 16}[save]
    for result in results:
        size = {"height": result.image_size[0], "width": result.image_size[1]}
        if save is save_tiny_sparseformer:
            sizes = {"size": {"shortest_edge": int(36 / 32 * size["height"])}, "crop_size": size}
        else:
            sizes = {"size": size, "crop_size": size}
        pixel_values = processor(list(split["image"]), return_tensors="pt", **sizes)["pixel_values"]
        call = budget_kwargs(model.config, result.budget)
        assert result.top1 == pytest.approx(accuracy_by_hand(model, pixel_values, split["label"], **call))


def test_a_size_without_effect_is_refused_and_varying_sizes_are_scored(tmp_path):
    save_tiny_quadtree_vit(tmp_path, split_threshold=0.1, num_tokens=None)
    model, _ = load_classifier(tmp_path)
    processor = QuadtreeViTImageProcessor(size={"height": 32, "width": 32}, max_patch_size=16, fit="aspect")
    images = [PILImage.linear_gradient("L").resize(size) for size in ((90, 30), (40, 40), (30, 90))]
    images += [PILImage.new("L", (40, 40))]
    split = make_split([model.config.id2label[0]], count=4, images=images)
    (result,) = evaluate_budgets(model, processor, split)
    counts = []
    for image in images:
        with torch.no_grad():
            outputs = model(processor(image, return_tensors="pt")["pixel_values"])
        counts.append(int((outputs.patch_sizes > 0).sum()))
    assert counts[3] == 4  # nothing to split, and no padding counted
    assert (result.image_size, result.tokens) == (None, pytest.approx(np.mean(counts), abs=0.051))
    with pytest.raises(ValueError, match="`fit='aspect'`"):
        evaluate_budgets(model, processor, split, image_sizes=[64])


def test_a_limit_is_a_sample_over_all_classes():
    labels = [0] * 50 + [1] * 50
    rows = Dataset.from_dict({"label": labels})
    sample = sample_rows(rows, 20)
    assert 5 <= sum(sample["label"]) <= 15
    assert sample["label"] == sample_rows(rows, 20)["label"]
    assert len(sample_rows(rows, 1000)) == len(sample_rows(rows, None)) == 100


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
    model, processor = load_classifier(tmp_path, convert=True, resize_method="interpolate")
    assert model.config.resize_method == "interpolate"
    pixel_values = processor(list(split["image"]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, rtol=0, atol=1e-4)
    results = evaluate_budgets(model, processor, split, budgets=[2, 4])
    assert [result.tokens for result in results] == [64, 16]
    assert results[1].top1 == pytest.approx(accuracy_by_hand(vit, pixel_values, split["label"]))


def test_a_budget_of_one_image_size_alone_is_scored_there(split, checkpoint):
    results = evaluate_budgets(*load_classifier(checkpoint), split, [12, 4], image_sizes=[8, 16])
    found = [(result.image_size, result.budget, result.tokens) for result in results]
    assert found == [((8, 8), 4, 4), ((16, 16), 12, 1), ((16, 16), 4, 16)]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_tokens_of_a_network_whose_images_differ_in_size_are_counted_for_each(split, batch_size):
    names = dict(enumerate(NAMES))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names)
    processor = ViTImageProcessor(size={"shortest_edge": 32})
    images = [PILImage.new("RGB", size, "red") for size in ((32, 32), (64, 32), (32, 96), (64, 32), (32, 32))]
    # the last layer has a token for 8 x 8 pixels
    (result,) = evaluate_budgets(
        ResNetForImageClassification(config).eval(),
        processor,
        make_split(count=5, images=images),
        batch_size=batch_size,
    )
    assert (result.image_size, result.tokens) == (None, (16 + 32 + 48 + 32 + 16) / 5)


def test_bad_input(split, checkpoint):
    model, processor = load_classifier(checkpoint)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    for arguments, message in (
        ({"budgets": [17]}, "`patch_size` must not be larger"),
        ({"budgets": []}, "`budgets` is empty"),
        ({"image_sizes": []}, "`image_sizes` is empty"),
        ({"image_sizes": [0]}, "`image_sizes` must be at least 1"),
        ({"interpolation": "magic"}, "`interpolation` must be one of"),
        ({"mean": "mars"}, "`mean` must be one of"),
        ({"std": [0.0, 1, 1]}, "`std` must be finite and above 0"),
        ({"mean": [float("nan")] * 3}, "`mean` must be finite"),
        ({"crop_pct": 0}, "`crop_pct` must be above 0"),
        ({"merge_to": []}, "`merge_to` is empty"),
        ({"merge_to": [8, 8]}, "`merge_to` holds 8 twice"),
        ({"merge_to": [0]}, "`merge_to` must be at least 1"),
        ({"merge_to": [3]}, "`merge_to` 3: `merge_tokens_to` must be at least 4 for 16 tokens and 2 layers"),
        ({"merge_to": [8, 3]}, "`merge_to` 3: `merge_tokens_to` must be at least 4 for 16 tokens and 2 layers"),
        ({"budgets": [4, 17]}, "`budgets` 17: `patch_size` must not be larger"),
        ({"image_sizes": [16, 3], "budgets": [4]}, "`image_sizes` 3: `patch_size` must not be larger"),
        ({"shrink_to": [8, 2]}, "`shrink_to` 2: `patch_size` must not be larger"),
        ({"shrink_to": [8, (8, 8)]}, r"`shrink_to` holds \(8, 8\) twice"),
        ({"shrink_to": 8}, "`shrink_to` must be a list"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ):
        seen.clear()
        with pytest.raises(ValueError, match=message):
            evaluate_budgets(model, processor, split, **arguments)
        assert set(seen) <= {1}  # nothing was scored before
    with pytest.raises(ValueError, match="is empty"):
        evaluate_budgets(model, processor, split.select([]))


def test_results_need_no_cache_of_another_library(split, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "file" / "cache")
    model, processor = load_classifier(checkpoint)
    (result,) = evaluate_budgets(model, processor, split, [8])
    assert result.images == len(split)
