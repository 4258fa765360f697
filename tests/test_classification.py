import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from polyscale import (
    FlexiViTConfig,
    FlexiViTModel,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    S2VisionConfig,
)
from polyscale.assets import sample_photographs
from polyscale.checkpoints import available_checkpoints
from polyscale.classification import as_pipeline, classify_images, load_classifier
from polyscale.layers.token_budget import (
    choose_budgets,
    count_tokens,
    default_budgets_of,
    format_budget,
    parse_budget,
    token_budget,
    tokens_per_image,
)
from polyscale.loading import load_base_model, load_config
from polyscale.utils.images import open_image

from .tiny_checkpoints import (
    CIFAR10_LABELS,
    save_tiny_flexivit,
    save_tiny_quadtree_vit,
    save_tiny_s2,
    save_tiny_sparseformer,
)
from .utils.test_images import png_header


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_flexivit(tmp_path_factory.mktemp("flexivit"))


# the sample photographs


def test_sample_photographs_are_small_attributed_and_of_several_classes():
    photographs = sample_photographs()
    classes = {path.name.split("_")[0] for path in photographs}
    assert len(photographs) == 6
    assert len(classes) >= 3
    assert classes <= set(CIFAR10_LABELS)
    attribution = (photographs[0].parent.parent / "ATTRIBUTION.md").read_text()
    for path in photographs:
        assert path.stat().st_size < 100_000
        assert f"photographs/{path.name}" in attribution
        assert max(open_image(path).size) <= 480


# budgets


def test_default_budgets_are_the_trained_patch_sizes_or_the_own_one(checkpoint):
    config = load_classifier(checkpoint).model.config
    assert default_budgets_of(config) == [4, 8, 16]
    config.train_patch_sizes = None
    assert default_budgets_of(config) == [8]
    config.patch_size = (4, 8)
    assert default_budgets_of(config) == [[4, 8]]
    assert default_budgets_of(ViTConfig()) == [None]


def test_token_budget_is_put_back_even_after_an_error(checkpoint):
    model = load_classifier(checkpoint).model
    with token_budget(model.config, 4):
        assert model.base_model.config.patch_size == 4
    assert model.config.patch_size is None
    with pytest.raises(ValueError, match="must not be larger"), token_budget(model.config, 40):
        model(torch.zeros(1, 3, 32, 32))
    assert model.config.patch_size is None
    with pytest.raises(ValueError, match="no patch_size of 'flexivit'"), token_budget(model.config, "four"):
        pass


def test_budgets_are_typed_and_printed_alike():
    assert [format_budget(budget) for budget in (8, (4, 8), [4, 8], None)] == ["8", "4x8", "4x8", ""]
    flexivit, quadtree = FlexiViTConfig(), QuadtreeViTConfig()
    base = CLIPVisionConfig(image_size=16, patch_size=4)
    s2 = S2VisionConfig(vision_config=base, scales=[1, 2])
    sized = S2VisionConfig(vision_config=base, img_sizes=[16, 32])
    typed = [(flexivit, "16", 16), (flexivit, "8x16", (8, 16)), (quadtree, "64", 64), (s2, "1+2.5", [1, 2.5])]
    for config, text, budget in [*typed, (sized, "16+32x48", [16, [32, 48]])]:
        assert parse_budget(config, text) == budget
        assert format_budget(budget, config) == text
    for config, text in [(flexivit, "8x8x8"), (flexivit, "a"), (quadtree, "8x8"), (s2, "1+"), (sized, "1x2x3")]:
        with pytest.raises(ValueError, match=r"`budgets` of .* got "):
            parse_budget(config, text)


def test_words_of_other_budgets_are_refused():
    flexivit, quadtree = FlexiViTConfig(), QuadtreeViTConfig()
    assert choose_budgets(flexivit, {"budgets": None, "patch_sizes": ["8", "4x8"]}) == [8, (4, 8)]
    assert choose_budgets(quadtree, {"num_tokens": ["64"], "patch_sizes": None}) == [64]
    assert choose_budgets(quadtree, {"budgets": None}) is None
    with pytest.raises(ValueError, match=r"`num_tokens` does not fit a model of type 'flexivit'.*`patch_size`"):
        choose_budgets(flexivit, {"num_tokens": ["16"]})
    with pytest.raises(ValueError, match="`patch_sizes` does not fit a model of type 'quadtree_vit'"):
        choose_budgets(quadtree, {"patch_sizes": ["16"]})
    with pytest.raises(ValueError, match="Give one of `budgets`, `patch_sizes`, not all"):
        choose_budgets(flexivit, {"budgets": ["8"], "patch_sizes": ["8"]})
    with pytest.raises(ValueError, match="`budgets` must be None for a model of type 'vit'"):
        choose_budgets(ViTConfig(), {"budgets": ["8"]})


def test_real_tokens_are_counted_and_padding_is_not():
    torch.manual_seed(0)
    encoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = QuadtreeViTConfig(
        **encoder, image_size=64, min_patch_size=8, max_patch_size=32, split_threshold=0.05, num_tokens=None
    )
    model = QuadtreeViTForImageClassification(config).eval()
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, :, ::2] = 1  # busy everywhere: split to the end
    with torch.no_grad():
        outputs = model(images)
    assert count_tokens(outputs, config, (64, 64)) == [4, 64]
    assert tokens_per_image(model, {"pixel_values": images}, outputs) == [4, 64]


# classifying


def test_records_are_those_of_the_plain_pipeline_at_each_patch_size(checkpoint):
    files = sample_photographs()[:2]
    records, errors = classify_images(files, checkpoint, budgets=[4, (8, 16)])
    assert errors == []
    assert [record["budget"] for record in records] == [4, [8, 16], 4, [8, 16]]
    assert [record["tokens"] for record in records] == [64, 8, 64, 8]

    plain = pipeline("image-classification", model=str(checkpoint), device="cpu")
    for record in records:
        plain.model.config.patch_size = record["budget"]
        best = plain(record["file"])[0]
        assert record["label"] == best["label"]
        assert record["score"] == pytest.approx(best["score"], abs=1e-6)
        assert set(record) == {"file", "budget", "tokens", "label", "score", "milliseconds"}
    json.dumps(records)


def test_a_pipeline_can_be_given_and_is_left_as_it_was(checkpoint):
    loaded = load_classifier(checkpoint)
    before = loaded.model.config.to_dict()
    records, _ = classify_images(sample_photographs()[:1], as_pipeline(loaded))
    assert [record["budget"] for record in records] == [4, 8, 16]
    assert loaded.model.config.to_dict() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_batches_and_repeats_change_no_answer(checkpoint):
    one_by_one, _ = classify_images(sample_photographs(), checkpoint, [4, 16])
    done = []
    in_batches, _ = classify_images(
        sample_photographs(), checkpoint, [4, 16], batch_size=4, repeats=2, progress=lambda *args: done.append(args)
    )
    assert done == [(4, 6), (6, 6)]
    for left, right in zip(one_by_one, in_batches, strict=True):
        assert left.pop("milliseconds") is not right.pop("milliseconds")
        assert left.pop("score") == pytest.approx(right.pop("score"), abs=1e-6)
        assert left == right


@pytest.mark.parametrize(
    ("save", "budgets", "expected"),
    [
        (save_tiny_s2, None, [([1, 2], 16)]),
        (save_tiny_s2, [[1, 2], [2, 3]], [([1, 2], 16), ([2, 3], 64)]),
        (save_tiny_sparseformer, None, [(None, 9)]),
        (save_tiny_quadtree_vit, [4, 16], [(4, 4), (16, 16)]),
    ],
)
def test_every_family_classifies_at_its_budgets(save, budgets, expected, tmp_path):
    save(tmp_path)
    photograph = sample_photographs()[0]
    records, errors = classify_images([photograph], tmp_path, budgets)
    assert errors == []
    assert [(record["budget"], record["tokens"]) for record in records] == expected
    plain = pipeline("image-classification", model=str(tmp_path), device="cpu")
    for record in records:
        with token_budget(plain.model.config, record["budget"]):
            best = plain(str(photograph))[0]
        assert (record["label"], record["score"]) == (best["label"], pytest.approx(best["score"], abs=1e-6))


def test_dynamic_s2_counts_the_tokens_of_each_image(tmp_path):
    save_tiny_s2(tmp_path / "model", dynamic=True, max_tiles=6, resize_output_to_idx=-1)
    for name, size in (("square", (40, 40)), ("wide", (90, 30))):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    loaded = load_classifier(tmp_path / "model")
    records, errors = classify_images([tmp_path / "square.png", tmp_path / "wide.png"], loaded, batch_size=2)
    assert errors == []
    # 4 x 4 tokens for each tile of the last scale: 2 x 2 tiles, and 1 x 3, of which there must be 4 at least
    grids = [loaded.image_processor.tile_grid_for(size) for size in ((40, 40), (30, 90))]
    assert [record["tokens"] for record in records] == [16 * rows * columns for rows, columns in grids]


def test_images_of_several_sizes_are_classified_one_size_at_a_time(tmp_path):
    save_tiny_quadtree_vit(tmp_path)
    fields = {"size": {"height": 32, "width": 32}, "max_patch_size": 16, "fit": "aspect"}
    QuadtreeViTImageProcessor(**fields).save_pretrained(tmp_path)
    for name, size in (("a", (90, 30)), ("b", (30, 90)), ("c", (90, 30))):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    records, errors = classify_images([tmp_path], tmp_path, [6], batch_size=3)
    assert errors == []
    assert [record["file"][-5] for record in records] == ["a", "b", "c"]
    assert records[0]["score"] == pytest.approx(records[2]["score"], abs=1e-6)


def test_damaged_weights_are_refused(checkpoint, tmp_path):
    loaded = load_classifier(checkpoint)
    for weight in loaded.model.parameters():
        weight.data.fill_(float("nan"))
    records, errors = classify_images(sample_photographs()[:1], loaded, [8])
    assert records == []
    assert "scores that are not finite" in errors[0]["error"]


def test_unreadable_files_are_reported_and_the_others_go_on(checkpoint, tmp_path):
    good = sample_photographs()[0]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path / "empty").mkdir()
    records, errors = classify_images([tmp_path, tmp_path / "missing.jpg", tmp_path / "empty", good], checkpoint, [8])
    assert [record["file"] for record in records] == [str(good)]
    reasons = {error["file"].rpartition("/")[2]: error["error"] for error in errors}
    assert set(reasons) == {"bomb.png", "broken.png", "missing.jpg", "empty"}
    assert "decompression bomb" in reasons["bomb.png"]
    assert "not a readable image" in reasons["broken.png"]
    assert "without image files" in reasons["empty"]
    assert reasons["missing.jpg"] == "no such file"


@pytest.mark.parametrize("budgets", [[0], [-4], [33], [8, "x"], []])
def test_a_budget_that_is_not_allowed_is_refused(checkpoint, budgets):
    with pytest.raises(ValueError, match=r"patch_size|budgets"):
        classify_images(sample_photographs()[:1], checkpoint, budgets)


def test_repeats_below_one_are_refused(checkpoint):
    for name in ("repeats", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            classify_images(sample_photographs()[:1], checkpoint, **{name: 0})


def small_vit(config_class, **fields):
    return config_class(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        num_labels=3,
        **fields,
    )


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (lambda: ViTForImageClassification(small_vit(ViTConfig)), 16),
        (lambda: DeiTForImageClassification(small_vit(DeiTConfig)), 16),
        (
            lambda: ResNetForImageClassification(
                ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
            ),
            16,  # a map of 4 x 4
        ),
    ],
)
def test_other_models_run_once_and_their_tokens_are_counted(tmp_path, model, tokens):
    model = model()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    records, errors = classify_images(sample_photographs()[:1], tmp_path)
    assert errors == []
    assert [(record["budget"], record["tokens"]) for record in records] == [(None, tokens)]
    with pytest.raises(ValueError, match="has no budget to choose"):
        classify_images(sample_photographs()[:1], tmp_path, budgets=[4])


def test_a_checkpoint_without_a_classifier_is_refused(checkpoint, tmp_path):
    FlexiViTModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no trained image classifier: 2 tensors are missing"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("flexivit.layernorm.weight"),
            "1 tensors are missing .*'flexivit.layernorm.weight'",
        ),
        (lambda weights: weights.update(more=torch.zeros(1)), "has 1 tensors that its .* does not, such as 'more'"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused_by_every_tool(checkpoint, tmp_path, change, message):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_classifier(tmp_path)
    if "more" not in weights:
        with pytest.raises(ValueError, match=message.replace("flexivit.", "")):
            load_base_model(tmp_path)


def test_damaged_files_are_one_clear_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises((ValueError, OSError), match="cannot be loaded"):
        load_classifier(tmp_path)


def test_a_device_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"`device` must be one of cpu.*'gpu'"):
        load_classifier(checkpoint, "gpu")
    with pytest.raises(ValueError, match="`device` 'cuda:99' is not on this machine"):
        load_classifier(checkpoint, "cuda:99")


def test_code_of_a_checkpoint_never_runs_unasked(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_classifier, load_base_model, load_config):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere' cannot be loaded: it is neither a bundled checkpoint"):
        load_classifier(tmp_path / "nowhere")


def test_the_caller_s_gradient_mode_is_kept(checkpoint):
    classify_images(sample_photographs()[:1], checkpoint, [8])
    assert torch.is_grad_enabled()


@pytest.mark.skipif("flexivit-cifar10" not in available_checkpoints(), reason="the checkpoint is not installed")
def test_the_bundled_checkpoint_gets_the_sample_photographs_mostly_right():
    records, errors = classify_images(sample_photographs(), "flexivit-cifar10")
    assert errors == []
    finest = [record for record in records if record["budget"] == 4]
    right = [record["label"] in record["file"].rpartition("/")[2] for record in finest]
    assert sum(right) >= 4  # of six: the model is small, and two of the photographs are hard for it


@pytest.mark.skipif("quadtree-vit-cifar10" not in available_checkpoints(), reason="the checkpoint is not installed")
@pytest.mark.parametrize(("num_tokens", "same"), [(64, 6), (40, 5), (31, 4)])
def test_the_bundled_quadtree_answers_like_the_flexivit_that_it_was_made_of(num_tokens, same):
    source, _ = classify_images(sample_photographs(), "flexivit-cifar10", [4])
    records, _ = classify_images(sample_photographs(), "quadtree-vit-cifar10", [num_tokens])
    assert {record["tokens"] for record in records} == {num_tokens}
    assert sum(a["label"] == b["label"] for a, b in zip(records, source, strict=True)) >= same


def test_a_hub_that_cannot_be_reached_is_not_waited_for(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("polyscale.loading.is_offline", lambda: True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"'some/model' cannot be loaded: .* Offline: the hub cannot be reached"):
        load_classifier("some/model")


@pytest.mark.parametrize("files", ["x.png", ".", b"x", 5, None])
def test_one_path_is_no_list_of_files(checkpoint, files):
    with pytest.raises(ValueError, match="`files` must be a list of image files and folders, got"):
        classify_images(files, checkpoint, [8])
    with pytest.raises(ValueError, match="`files` must be a path or a name, got"):
        classify_images([files if isinstance(files, bytes | int | None) else ""], checkpoint, [8])


def test_an_image_size_of_a_loaded_model_is_refused_not_ignored():
    loaded = load_classifier("flexivit-cifar10", "cpu")
    with pytest.raises(ValueError, match="`image_size` is for a model that is not loaded yet"):
        classify_images(sample_photographs()[:1], loaded, image_size=64)
