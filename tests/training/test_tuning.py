"""Budget tuning: the model at drawn budgets comes nearer to itself at the full budget, without labels."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForImageClassification, TrainingArguments, ViTConfig, ViTModel

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    FlexiViTImageProcessor,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    QuadtreeViTModel,
    QuadtreeViTModelWithProjection,
)
from polyscale.training import make_recipe, train
from polyscale.training.tuning import BudgetTuningTrainer, features_of, has_classes

from .conftest import make_picture


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "image_size": 16,
}
SIZE = {"height": 16, "width": 16}


def quadtree(seed=0, cls=QuadtreeViTForImageClassification, **options):
    torch.manual_seed(seed)
    return cls(QuadtreeViTConfig(**SHAPE, min_patch_size=2, max_patch_size=8, num_labels=4, **options))


@pytest.mark.parametrize(("share", "expected"), [(1.0, 64), (0.3, 19), (0.01, 4), (0.5, 31)])
def test_shares_of_a_quadtree_are_legal_budgets(share, expected):
    config = QuadtreeViTConfig(**SHAPE, min_patch_size=2, max_patch_size=8)
    assert config.budget_for_share((16, 16), share) == expected
    assert config.num_tokens_for((16, 16), expected) == expected


@pytest.mark.parametrize(("share", "expected"), [(1.0, 2), (0.25, 4), (0.3, 4), (0.05, 8)])
def test_shares_of_a_flexivit_are_patch_sizes(share, expected):
    config = FlexiViTConfig(**SHAPE, base_patch_size=4, train_patch_sizes=[2, 4, 8])
    assert config.budget_for_share(None, share) == expected


def make_trainer(folder, model, **options):
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, seed=3)
    return BudgetTuningTrainer(model=model, args=args, image_size=(16, 16), **{"shares": (0.3, 1.0), **options})


def test_the_loss_is_divergence_and_distance_from_the_full_budget(tmp_path):
    model = quadtree()
    trainer = make_trainer(tmp_path, model, temperature=2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pixels = torch.randn(3, 3, 16, 16)
    budget = trainer.budget_at(0)
    full = trainer.teacher(pixels, num_tokens=64, output_hidden_states=True)
    part = model(pixels, num_tokens=budget, output_hidden_states=True)
    target, student = (full.logits / 2).softmax(-1), (part.logits / 2).softmax(-1)
    divergence = 4 * (target * (target.log() - student.log())).sum(-1)
    features = [outputs.hidden_states[-1][:, 0] for outputs in (full, part)]
    expected = (divergence + 1 - F.cosine_similarity(*features, dim=-1)).mean()
    loss = trainer.compute_loss(model, {"pixel_values": pixels})
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


def test_the_full_budget_has_no_loss_and_draws_follow_seed_and_step(tmp_path):
    trainer = make_trainer(tmp_path, quadtree().eval(), shares=(1.0, 1.0))
    assert trainer.compute_loss(trainer.model, {"pixel_values": torch.randn(2, 3, 16, 16)}).item() < 1e-5
    trainer = make_trainer(tmp_path, quadtree())
    drawn = [trainer.budget_at(step) for step in range(200)]
    assert drawn == [trainer.budget_at(step) for step in range(200)]
    assert (min(drawn), max(drawn)) == (19, 64)
    assert trainer.budgets() == [19, 34, 49, 64]


def test_features_are_what_a_head_reads():
    model = quadtree(cls=QuadtreeViTModel).eval()
    outputs = model(torch.randn(2, 3, 16, 16))
    assert torch.equal(features_of(outputs, model.config), outputs.pooler_output)
    pooled = quadtree(use_cls_token=False, pooling="mean").eval()
    outputs = pooled(torch.randn(2, 3, 16, 16), output_hidden_states=True)
    torch.testing.assert_close(features_of(outputs, pooled.config), outputs.hidden_states[-1].mean(dim=1))


def test_merging_is_tuned_at_the_full_budget_of_the_family(tmp_path):
    trainer = make_trainer(tmp_path, quadtree(), merging=True, shares=(0.5, 1.0))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert trainer.budget_argument == "merge_tokens_to"
    assert trainer.budgets() == [32, 43, 53, 64]
    assert [trainer.tokens_of((16, 16), budget) for budget in (32, 64)] == [32, 64]
    assert trainer.call_of(40) == {"num_tokens": 64, "merge_tokens_to": 40}
    drawn = {trainer.budget_at(step) for step in range(300)}
    assert drawn == set(range(32, 65))

    pixels = torch.randn(2, 3, 16, 16)
    budget = trainer.budget_at(0)
    full = trainer.teacher(pixels, num_tokens=64, output_hidden_states=True)
    part = trainer.model(pixels, num_tokens=64, merge_tokens_to=budget, output_hidden_states=True)
    target, student = full.logits.softmax(-1), part.logits.softmax(-1)
    divergence = (target * (target.log() - student.log())).sum(-1)
    features = [outputs.hidden_states[-1][:, 0] for outputs in (full, part)]
    expected = (divergence + 1 - F.cosine_similarity(*features, dim=-1)).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {"pixel_values": pixels}), expected)


@pytest.mark.parametrize(
    ("options", "merging"),
    [({}, True), ({"area_pooling": True}, False)],
    ids=["merging", "area pooling"],
)
def test_a_mean_whose_weights_are_not_known_is_left_out_of_the_loss(options, merging, tmp_path):
    model = quadtree(use_cls_token=False, pooling="mean", **options)
    trainer = make_trainer(tmp_path, model, merging=merging, shares=(0.5, 0.6))
    pixels = torch.randn(2, 3, 16, 16)
    full = model(pixels, num_tokens=64).logits
    part = model(pixels, **trainer.call_of(trainer.budget_at(0))).logits
    expected = F.kl_div(part.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True)
    assert expected > 0
    torch.testing.assert_close(trainer.compute_loss(model, {"pixel_values": pixels}), expected)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 48), ("test", 12)):
        (folder / split).mkdir()
        for index in range(count):
            make_picture(index % 3, index).save(folder / split / f"{index}.png")
    return folder


def tune(data, output, source, **choices):
    defaults = {"tune_budgets": (0.1, 1.0), "epochs": 6, "batch_size": 8, "num_workers": 0, "learning_rate": 2e-3}
    return train(data, output, make_recipe(None, init_from=str(source), **{**defaults, **choices}), verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flexivit", "quadtree_vit"])
def test_tuning_brings_small_budgets_nearer_to_the_full_one(family, unlabelled, tmp_path):
    source = tmp_path / "source"
    if family == "quadtree_vit":
        quadtree().save_pretrained(source)
        QuadtreeViTImageProcessor(size=SIZE, max_patch_size=8).save_pretrained(source)
    else:
        torch.manual_seed(0)
        config = FlexiViTConfig(**SHAPE, base_patch_size=4, train_patch_sizes=[2, 4], patch_size=2, num_labels=4)
        FlexiViTForImageClassification(config).save_pretrained(source)
        FlexiViTImageProcessor(size=SIZE, crop_size=SIZE, do_center_crop=False).save_pretrained(source)
    before = tune(unlabelled, tmp_path / "before", source, learning_rate=1e-12, epochs=1)
    after = tune(unlabelled, tmp_path / "after", source)
    assert after["budgets"][0]["loss"] < 0.9 * before["budgets"][0]["loss"]
    assert [result["tokens"] for result in after["budgets"]] == sorted(result["tokens"] for result in after["budgets"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "after")
    assert model.config.num_labels == 4
    record = json.loads((tmp_path / "after" / "training.json").read_text())
    assert record["results"][0].keys() == {"budget", "tokens", "images", "agreement", "loss"}
    assert "agreement with the full budget" in (tmp_path / "after" / "README.md").read_text()


@pytest.mark.slow
def test_merging_is_tuned_and_the_card_says_how_to_call(unlabelled, tmp_path):
    torch.manual_seed(0)
    shape = {**SHAPE, "initializer_range": 0.5, "num_hidden_layers": 3}
    config = QuadtreeViTConfig(**shape, min_patch_size=2, max_patch_size=8, num_labels=4)
    QuadtreeViTForImageClassification(config).save_pretrained(tmp_path / "source")
    QuadtreeViTImageProcessor(size=SIZE, max_patch_size=8).save_pretrained(tmp_path / "source")
    choices = {"tune_by": "merging", "tune_budgets": (0.15, 0.6)}
    before = tune(unlabelled, tmp_path / "before", tmp_path / "source", learning_rate=1e-12, epochs=1, **choices)
    after = tune(unlabelled, tmp_path / "after", tmp_path / "source", learning_rate=2e-4, **choices)
    assert [result["budget"] for result in after["budgets"]] == [10, 19, 29, 38]
    assert after["budgets"][0]["loss"] < 0.7 * before["budgets"][0]["loss"]
    card = (tmp_path / "after" / "README.md").read_text()
    assert "num_tokens=64, merge_tokens_to=10" in card
    assert "| merge_tokens_to | tokens |" in card
    with pytest.raises(ValueError, match="`merge_tokens_to` must be at least 8 for 64 tokens and 3 layers"):
        tune(unlabelled, tmp_path / "few", tmp_path / "source", tune_by="merging", tune_budgets=(0.05, 1.0))


def test_merging_needs_budgets_to_tune():
    with pytest.raises(ValueError, match="`tune_by` 'merging' goes with `tune_budgets`"):
        make_recipe(None, tune_by="merging")
    with pytest.raises(ValueError, match="`tune_by` must be one of"):
        make_recipe(None, tune_by="heads", tune_budgets=(0.3, 1.0), init_from="x")


def test_an_embedding_is_what_a_projection_gives():
    model = quadtree(cls=QuadtreeViTModelWithProjection).eval()
    outputs = model(torch.randn(2, 3, 16, 16))
    assert torch.equal(features_of(outputs, model.config), outputs.image_embeds)
    assert not has_classes(model)


@pytest.mark.slow
def test_a_projection_is_tuned_too_and_kept(unlabelled, tmp_path):
    source = quadtree(cls=QuadtreeViTModelWithProjection).eval()
    source.save_pretrained(tmp_path / "source")
    QuadtreeViTImageProcessor(size=SIZE, max_patch_size=8).save_pretrained(tmp_path / "source")
    metrics = tune(unlabelled, tmp_path / "out", tmp_path / "source", epochs=1, learning_rate=1e-4)
    assert metrics["budgets"][-1].keys() == {"budget", "tokens", "images", "cosine", "loss"}
    tuned, info = QuadtreeViTModelWithProjection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    change = (tuned.projection.weight - source.projection.weight).abs().max()
    assert 0 < change < 0.01
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "from polyscale import QuadtreeViTModelWithProjection\n" in card
    assert "model = QuadtreeViTModelWithProjection.from_pretrained('out')\n" in card


@pytest.mark.slow
def test_a_tower_without_a_head_is_tuned_by_its_features(unlabelled, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    FlexiViTImageProcessor(size=SIZE, crop_size=SIZE, do_center_crop=False).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="a model of type 'vit' has no budget to choose"):
        tune(unlabelled, tmp_path / "out", tmp_path / "vit")
    metrics = tune(unlabelled, tmp_path / "out", tmp_path / "vit", family="quadtree_vit", epochs=1)
    assert metrics["budgets"][-1].keys() == {"budget", "tokens", "images", "cosine", "loss"}
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), QuadtreeViTModel)
