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
from polyscale.training import make_recipe, train, tuning_watch
from polyscale.training.tuning import BudgetTuningTrainer, features_of, has_classes
from polyscale.training.tuning_watch import TuningWatch, comparison_text, is_worse

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


def tune(data, output, source, verbose=False, **choices):
    defaults = {"tune_budgets": (0.1, 1.0), "epochs": 6, "batch_size": 8, "num_workers": 0, "learning_rate": 2e-3}
    return train(data, output, make_recipe(None, init_from=str(source), **{**defaults, **choices}), verbose=verbose)


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


@pytest.fixture(scope="module")
def mergeable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mergeable")
    torch.manual_seed(0)
    shape = {**SHAPE, "initializer_range": 0.5, "num_hidden_layers": 3}
    config = QuadtreeViTConfig(**shape, min_patch_size=2, max_patch_size=8, num_labels=4)
    QuadtreeViTForImageClassification(config).save_pretrained(folder)
    QuadtreeViTImageProcessor(size=SIZE, max_patch_size=8).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_merging_is_tuned_and_the_card_says_how_to_call(unlabelled, mergeable, tmp_path):
    choices = {"tune_by": "merging", "tune_budgets": (0.15, 0.6)}
    before = tune(unlabelled, tmp_path / "before", mergeable, learning_rate=1e-12, epochs=1, **choices)
    after = tune(unlabelled, tmp_path / "after", mergeable, learning_rate=2e-4, **choices)
    assert [result["budget"] for result in after["budgets"]] == [10, 19, 29, 38]
    assert after["budgets"][0]["loss"] < 0.7 * before["budgets"][0]["loss"]
    card = (tmp_path / "after" / "README.md").read_text()
    assert "num_tokens=64, merge_tokens_to=10" in card
    assert "| merge_tokens_to | tokens |" in card
    with pytest.raises(ValueError, match="`merge_tokens_to` must be at least 8 for 64 tokens and 3 layers"):
        tune(unlabelled, tmp_path / "few", mergeable, tune_by="merging", tune_budgets=(0.05, 1.0))


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


def test_the_loss_on_kept_images_is_a_mean_over_images_and_budgets(tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(40)]
    trainer = make_trainer(tmp_path, quadtree(), eval_dataset=rows, data_collator=torch.utils.data.default_collate)
    kept = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 26, 28, 29, 30, 31, 33, 34, 35]
    kept += [36, 38, 39]
    assert torch.equal(trainer.kept_images, torch.stack([rows[index]["pixel_values"] for index in kept]))
    before = trainer.kept_losses(trainer.teacher)
    assert before.shape == (32,)
    assert before.min() > 0
    assert torch.equal(trainer.kept_losses(trainer.model), before)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.model.train()
    state = torch.get_rng_state()
    losses = trainer.kept_losses(trainer.model)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trainer.kept_losses(trainer.teacher), before)

    trainer.model.eval()
    options = {"output_hidden_states": True}
    expected = []
    with torch.no_grad():
        full = trainer.teacher(trainer.kept_images, num_tokens=64, **options)
        for budget in (19, 34, 49, 64):
            part = trainer.model(trainer.kept_images, num_tokens=budget, **options)
            target, student = full.logits.softmax(-1), part.logits.softmax(-1)
            divergence = (target * (target.log() - student.log())).sum(-1)
            features = [outputs.hidden_states[-1][:, 0] for outputs in (full, part)]
            expected.append(divergence + 1 - F.cosine_similarity(*features, dim=-1))
    torch.testing.assert_close(losses.float(), torch.stack(expected).mean(dim=0))
    compared = TuningWatch(trainer, None).compare(trainer.model)
    change = (losses - before).numpy()
    assert (compared["loss_before"], compared["loss_after"]) == pytest.approx(
        (before.mean().item(), losses.mean().item())
    )
    margin = 1.96 * change.std(ddof=1) / 32**0.5
    assert compared["loss_change"] == pytest.approx([change.mean() - margin, change.mean() + margin])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.0, False),
        (1e-6, 1e-5, False),  # rounding
        (-0.002, -0.001, False),
        (-0.001, 0.002, False),  # chance
        (0.001, 0.002, True),
        (float("nan"), float("nan"), True),
    ],
)
def test_weights_are_worse_where_all_of_the_interval_is_above_zero(low, high, expected):
    assert is_worse({"loss_before": 0.02, "loss_change": [low, high]}) is expected


def test_a_change_that_may_be_chance_is_called_so():
    compared = {
        "loss_before": 0.152,
        "loss_after": 0.153,
        "images": 32,
        "held_out": True,
        "loss_change": [-0.001, 0.003],
    }
    assert comparison_text(compared) == (
        "loss on 32 held-out images, against the full budget: 0.152 before tuning, 0.153 after (-0.001 to +0.003, "
        "which may be chance)"
    )
    compared |= {"loss_after": 0.0612, "loss_change": [0.03456, 0.0478], "held_out": False}
    assert comparison_text(compared) == (
        "loss on 32 training images, against the full budget: 0.152 before tuning, 0.0612 after (+0.035 to +0.048)"
    )


@pytest.fixture(scope="module")
def tunable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tunable")
    quadtree().save_pretrained(folder)
    QuadtreeViTImageProcessor(size=SIZE, max_patch_size=8).save_pretrained(folder)
    return folder


def test_a_tuning_that_harms_is_said_while_it_lasts_at_its_end_and_in_the_card(unlabelled, tunable, tmp_path, capsys):
    metrics = tune(unlabelled, tmp_path / "out", tunable, epochs=2, learning_rate=0.3, verbose=True)
    tuning = metrics["tuning"]
    assert tuning["loss_after"] > 2 * tuning["loss_before"] > 0
    assert (tuning["images"], tuning["held_out"]) == (12, True)
    said = capsys.readouterr().out
    compared = comparison_text(tuning)
    numbers = f"{tuning['loss_before']:.3g} before tuning, {tuning['loss_after']:.3g} after (+"
    assert compared.startswith(f"loss on 12 held-out images, against the full budget: {numbers}")
    assert (
        f"Warning: {compared}. The tuned weights are worse than those that they were made from: keep those, and tune "
        "again with a lower `learning_rate` (`--learning-rate`), such as 0.03."
    ) in said
    on_the_way = [line for line in said.splitlines() if "So far the weights are worse" in line]
    assert [line.split()[:3] for line in on_the_way] == [["Warning:", "step", f"{step}/12"] for step in (3, 6, 9)]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"- {compared}. **The weights that it was tuned from are better.**" in card
    assert json.loads((tmp_path / "out/training.json").read_text())["metrics"]["tuning"] == tuning


@pytest.mark.slow
def test_a_tuning_that_helps_says_by_how_much(unlabelled, mergeable, tmp_path, capsys, monkeypatch):
    warned = []
    monkeypatch.setattr(tuning_watch.logger, "warning", warned.append)
    choices = {"tune_by": "merging", "tune_budgets": (0.15, 0.6), "learning_rate": 2e-4, "verbose": True}
    metrics = tune(unlabelled, tmp_path / "out", mergeable, **choices)
    tuning = metrics["tuning"]
    assert 0 < tuning["loss_after"] < 0.7 * tuning["loss_before"]
    # all 12 evaluation images are kept
    losses = [result["loss"] for result in metrics["budgets"]]
    assert tuning["loss_after"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    said = capsys.readouterr().out
    assert f"\n{comparison_text(tuning)}\n" in said
    assert said.count("before tuning") == 4
    assert "worse" not in said
    assert f"- {comparison_text(tuning)}.\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert warned == []


def test_the_same_weights_are_not_worse(unlabelled, tunable, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(tuning_watch.logger, "warning", warned.append)
    tuning = tune(unlabelled, tmp_path / "out", tunable, epochs=1, learning_rate=1e-12)["tuning"]
    assert tuning["loss_after"] == pytest.approx(tuning["loss_before"], rel=1e-4)
    assert tuning["loss_before"] > 0.01
    assert warned == []


def test_without_a_console_the_log_warns_and_without_held_out_images_training_images_are_compared(
    unlabelled, tunable, tmp_path, monkeypatch
):
    warned = []
    monkeypatch.setattr(tuning_watch.logger, "warning", warned.append)
    choices = {"epochs": 1, "batch_size": 16, "learning_rate": 0.3, "ema_decay": 0.1}
    tuning = tune(unlabelled / "train", tmp_path / "out", tunable, **choices)["tuning"]  # 48 images
    assert (tuning["images"], tuning["held_out"]) == (32, False)
    assert "The tuned weights are worse than those that they were made from: keep those" in warned[2]
    assert [text.partition(":")[0] for text in warned] == [
        "step 1/3  loss on 32 training images, against the full budget",
        "step 2/3  loss on 32 training images, against the full budget",
        "loss on 32 training images, against the full budget",
    ]
