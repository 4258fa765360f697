"""A budget for each image: policies against plain loops over what a model says at every budget."""

import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import polyscale
from polyscale import BudgetPolicy, calibrate_policy, classify_with_policy
from polyscale.assets import sample_photographs
from polyscale.budget_policy import _cheapest, _limits, _outcome, _Trials
from polyscale.classification import as_pipeline, classify_images
from polyscale.utils.images import open_image
from polyscale_cli import app

from .tiny_checkpoints import save_tiny_quadtree_vit, save_tiny_s2, save_tiny_sparseformer


def drawn(seed=0, budgets=3, images=40):
    rng = np.random.default_rng(seed)
    margins = np.round(rng.random((budgets, images)), 1)  # with equal ones
    agrees = rng.random((budgets, images)) < 0.4 + 0.6 * margins
    agrees[-1] = True
    tokens = np.sort(rng.integers(1, 100, (budgets, images)), axis=0).astype(float)
    return _Trials(agrees, margins, tokens)


def plain_outcome(trials, tried, limits):
    agreeing, spent = 0, 0
    for image in range(trials.margins.shape[1]):
        for place, limit in itertools.zip_longest(tried, limits, fillvalue=-1.0):
            spent += trials.tokens[place][image]
            if trials.margins[place][image] >= limit:
                agreeing += trials.agrees[place][image]
                break
    return agreeing / trials.margins.shape[1], spent / trials.margins.shape[1]


@pytest.mark.parametrize("seed", range(5))
def test_outcome_and_limits_are_those_of_a_plain_loop(seed):
    trials = drawn(seed)
    for risk in (0.0, 0.1, 0.4, 1.0):
        limits = _limits(trials, [0, 1], risk)
        left = range(trials.margins.shape[1])
        for place, limit in enumerate(limits):

            def share_wrong(least, place=place, left=left):
                taken = [image for image in left if trials.margins[place][image] >= least]
                return sum(not trials.agrees[place][image] for image in taken) / len(taken)

            fits = [least for least in trials.margins[place][list(left)] if share_wrong(least) <= risk]
            assert limit == (min(fits) if fits else pytest.approx(1.0))
            assert fits or limit > 1
            left = [image for image in left if trials.margins[place][image] < limit]
        np.testing.assert_allclose(_outcome(trials, [0, 1, 2], limits), plain_outcome(trials, [0, 1, 2], limits))


@pytest.mark.parametrize("agreement", [0.5, 0.8, 0.9, 1.0])
def test_calibration_agrees_as_wanted_and_costs_no_more_than_the_full_budget(agreement):
    for seed in range(3):
        trials = drawn(seed, budgets=4)
        tried, limits = _cheapest(trials, agreement)
        reached, spent = plain_outcome(trials, tried, limits)
        assert tried[-1] == 3
        assert reached >= agreement
        assert spent <= trials.tokens[-1].mean()
        single = [_limits(trials, [0], risk) for risk in np.linspace(0, 1, 64) ** 2]
        fitting = [one for one in (plain_outcome(trials, [0, 3], limit) for limit in single) if one[0] >= agreement]
        assert all(spent <= cost for _, cost in fitting)


def test_a_sure_small_budget_is_all_that_runs():
    trials = _Trials(np.ones((2, 10), dtype=bool), np.full((2, 10), 0.5), np.repeat([[10.0], [64.0]], 10, axis=1))
    assert _cheapest(trials, 1.0) == ([0, 1], [0.5])
    never = _Trials(np.array([[False] * 10, [True] * 10]), trials.margins, trials.tokens)
    assert _cheapest(never, 1.0) == ([1], [])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return as_pipeline(save_tiny_quadtree_vit(tmp_path_factory.mktemp("quadtree")), "cpu")


def margins_of(classifier, budget):
    """By transformers' own processing, one image at a time."""
    found = []
    for file in sample_photographs():
        inputs = classifier.image_processor(open_image(file), return_tensors="pt")
        with torch.no_grad():
            scores = classifier.model(**inputs, num_tokens=budget).logits[0].softmax(0)
        best, second = scores.topk(2).values.tolist()
        found.append(best - second)
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_image_gets_the_first_answer_that_is_sure_enough(classifier, batch_size):
    budgets = classifier.model.config.budget_ladder()[::3]
    margins = [sorted(margins_of(classifier, budget)) for budget in budgets[:-1]]
    limits = [(of_budget[3] + of_budget[4]) / 2 for of_budget in margins]  # some images on each side
    policy = BudgetPolicy(budgets, limits, "num_tokens")
    records, errors = classify_with_policy(sample_photographs(), policy, classifier, batch_size=batch_size)
    assert errors == []

    everything, _ = classify_images(sample_photographs(), classifier, budgets)
    by_file = [everything[start : start + len(budgets)] for start in range(0, len(everything), len(budgets))]
    sure = [margins_of(classifier, budget) for budget in budgets]
    used = set()
    for image, (record, answers) in enumerate(zip(records, by_file, strict=True)):
        spent = 0
        for place, answer in enumerate(answers):
            spent += answer["tokens"]
            if place == len(budgets) - 1 or sure[place][image] >= limits[place]:
                break
        used.add(place)
        assert record["file"] == answer["file"]
        assert (record["budget"], record["label"]) == (budgets[place], answer["label"])
        assert record["score"] == pytest.approx(answer["score"], abs=1e-5)
        assert record["tokens"] == spent
    assert len(used) > 1


def test_calibration_on_files_reports_what_the_policy_then_does(classifier, tmp_path):
    policy = calibrate_policy(sample_photographs(), classifier, agreement=0.8)
    assert policy.images == len(sample_photographs())
    assert policy.agreement >= policy.wanted_agreement == 0.8
    policy.save(tmp_path / "policy.json")
    assert BudgetPolicy.load(tmp_path / "policy.json") == policy
    records, _ = classify_with_policy(sample_photographs(), tmp_path / "policy.json", classifier)
    full, _ = classify_images(sample_photographs(), classifier, [policy.budgets[-1]])
    same = [one["label"] == other["label"] for one, other in zip(records, full, strict=True)]
    assert sum(same) / len(same) == pytest.approx(policy.agreement)
    assert sum(record["tokens"] for record in records) / len(records) == pytest.approx(policy.mean_tokens)


def test_budgets_are_ordered_by_their_tokens(tmp_path):
    policy = calibrate_policy(sample_photographs(), "flexivit-cifar10", [4, 16, 8], agreement=0.1)
    assert policy.budgets == [16, 4]
    assert policy.full_tokens == 64
    assert policy.margins[0] >= 0


def test_numbers_of_numpy_and_torch_are_kept_as_plain_ones(tmp_path, classifier):
    few, *_, many = classifier.model.config.budget_ladder()
    budgets = [torch.tensor(few), np.int64(many)]
    policy = calibrate_policy(sample_photographs(), classifier, budgets, agreement=np.float32(0.5))
    policy.save(tmp_path / "policy.json")
    assert BudgetPolicy.load(tmp_path / "policy.json") == policy
    assert {type(budget) for budget in policy.budgets} == {int}


def test_budgets_of_as_many_tokens_leave_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="all cost 16 tokens per image: there is nothing to save"):
        calibrate_policy(sample_photographs(), save_tiny_s2(tmp_path / "s2"), [[1, 2], [1, 3]])


def test_what_cannot_be_is_refused(tmp_path, classifier):
    sparse = save_tiny_sparseformer(tmp_path / "sparse")
    with pytest.raises(ValueError, match="there is one alone"):
        calibrate_policy(sample_photographs(), sparse)
    policy = BudgetPolicy([16, 4], [0.5], "patch_size")
    with pytest.raises(ValueError, match="whose budget is `patch_size`; this one, of type 'sparseformer', has no"):
        classify_with_policy(sample_photographs(), policy, sparse)
    with pytest.raises(ValueError, match="of type 'quadtree_vit', has the budget `num_tokens`"):
        classify_with_policy(sample_photographs(), policy, classifier)
    with pytest.raises(ValueError, match="`agreement` must be a share"):
        calibrate_policy(sample_photographs(), classifier, agreement=2)
    with pytest.raises(ValueError, match="`files` holds no image to calibrate on"):
        calibrate_policy([], classifier)
    with pytest.raises(ValueError, match="expected 1, got 0"):
        BudgetPolicy([16, 4], [], "patch_size")
    for margin in ("much", True, None, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="numbers of at least 0"):
            BudgetPolicy([16, 4], [margin], "patch_size")
    with pytest.raises(ValueError, match="`budget_argument` of a policy must be a name, got 3"):
        BudgetPolicy([16, 4], [0.5], 3)
    for budgets in ([], (16, 4), "16", None):
        with pytest.raises(ValueError, match="must be a list of at least one budget"):
            BudgetPolicy(budgets, [0.5], "patch_size")
    for name in ("wanted_agreement", "agreement", "mean_tokens", "full_tokens", "images"):
        for value in ("much", True, -1, float("nan")):
            with pytest.raises(ValueError, match=f"`{name}` of a policy must be a number"):
                BudgetPolicy([16, 4], [0.5], "patch_size", **{name: value})
    (tmp_path / "nan.json").write_text('{"budgets": [16, 4], "margins": [NaN], "budget_argument": "patch_size"}')
    with pytest.raises(ValueError, match=r"`policy` .*nan\.json: margins of a policy must be a list of numbers"):
        BudgetPolicy.load(tmp_path / "nan.json")
    for path in (5, "", None):
        with pytest.raises(ValueError, match="`policy` must be a path or a name"):
            BudgetPolicy.load(path)
    for size in (0, True, 1.5, "1"):
        with pytest.raises(ValueError, match="`batch_size` must be"):
            classify_with_policy(sample_photographs(), policy, "flexivit-cifar10", batch_size=size)
    for budget, message in ((80, "must not be larger than the image"), (True, "must be an int or a pair")):
        with pytest.raises(ValueError, match=f"`patch_size` {message}"):
            classify_with_policy(sample_photographs(), BudgetPolicy([budget, 4], [0.5], "patch_size"))
    for text in ("{", "[]", '{"budgets": [4]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"`policy` .*bad\.json is n"):
            BudgetPolicy.load(tmp_path / "bad.json")


def test_another_model_than_the_calibrated_one_is_said(tmp_path):
    photographs = sample_photographs()[:2]
    assert calibrate_policy(photographs, "flexivit-cifar10", [4, 16], agreement=0.5).model == "flexivit-cifar10"
    other = BudgetPolicy([16, 4], [0.5], "patch_size", model="my-model")
    with pytest.warns(UserWarning, match="calibrated on 'my-model', and this is 'flexivit-cifar10'"):
        classify_with_policy(photographs, other, "flexivit-cifar10")
    other.save(tmp_path / "policy.json")
    done = CliRunner().invoke(app, ["classify", str(photographs[0]), "--policy", str(tmp_path / "policy.json")])
    assert done.exit_code == 0
    assert "calibrated on 'my-model'" in done.stderr


def test_the_commands_calibrate_and_classify(tmp_path):
    files = [str(file) for file in sample_photographs()]
    policy = str(tmp_path / "policy.json")
    run = CliRunner().invoke
    result = run(app, ["calibrate", *files, "--output", policy, "--agreement", "0.5", "--budgets", "4,16"])
    assert result.exit_code == 0, result.output
    assert "patch_size 4: else" in result.output
    assert "6 images are few" in result.output
    result = run(app, ["classify", *files, "--policy", policy, "--json"])
    records = json.loads(result.stdout)
    expected, _ = polyscale.classify_with_policy(files, policy)
    assert [(record["budget"], record["tokens"], record["label"]) for record in records] == [
        (record["budget"], record["tokens"], record["label"]) for record in expected
    ]
    assert "tokens per image, all tries together" in run(app, ["classify", *files, "--policy", policy]).output
    result = run(app, ["classify", *files, "--policy", policy, "--budgets", "4"])
    assert result.exit_code == 2
    assert "`--policy` chooses the budgets and runs each once: leave `--budgets` out" in result.output


def test_another_image_size_or_other_weights_are_said(tmp_path):
    photographs = sample_photographs()
    first = save_tiny_quadtree_vit(tmp_path / "model")
    policy = calibrate_policy(photographs, first, [16, 64], agreement=0.1, image_size=64)
    assert policy.processing["size"] == {"height": 64, "width": 64}
    assert policy.full_tokens == 64
    policy.save(tmp_path / "policy.json")

    def said(model, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classify_with_policy(photographs, tmp_path / "policy.json", model, **options)
        return [str(warning.message) for warning in caught]

    assert said(first, image_size=64) == []
    (message,) = said(first)
    assert "prepared otherwise: size height was 64 and is 32; size width was 64 and is 32. How often" in message
    renamed = shutil.copytree(first, tmp_path / "renamed")
    assert said(renamed, image_size=64) == []
    torch.manual_seed(1)
    other = save_tiny_quadtree_vit(tmp_path / "other" / "model", initializer_range=0.1)
    (message,) = said(other, image_size=64)
    assert "calibrated on 'model', and this is 'model' with other weights" in message

    arguments = ["classify", str(photographs[0]), "--policy", str(tmp_path / "policy.json"), "--model", str(first)]
    done = CliRunner().invoke(app, arguments, env={"PYTHONWARNINGS": "ignore"})
    assert done.exit_code == 0
    assert "size height was 64 and is 32" in done.stderr
    assert CliRunner().invoke(app, [*arguments, "--image-size", "64"]).stderr == ""


def test_calibration_at_an_image_size_of_the_command(tmp_path):
    model, policy = save_tiny_quadtree_vit(tmp_path / "model"), tmp_path / "policy.json"
    files = [str(file) for file in sample_photographs()]
    arguments = ["--model", str(model), "--output", str(policy), "--budgets", "16,64", "--image-size", "64"]
    done = CliRunner().invoke(app, ["calibrate", *files, *arguments, "--agreement", "0.1"])
    assert done.exit_code == 0, done.output
    assert BudgetPolicy.load(policy).processing["size"] == {"height": 64, "width": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": 5}, "`budgets` must be a list of budgets, got 5"),
        ({"budgets": "48"}, "`budgets` must be a list of budgets, got '48'"),
        ({"budgets": [4, 4]}, "`budgets` holds 4 twice"),
        ({"budgets": [4, True]}, "`budgets` True: `num_tokens` must be an int"),
        ({"files": "x.png"}, "`files` must be a list of image files and folders, got 'x.png'"),
        ({"files": [5]}, "`files` must be a path or a name, got 5"),
        ({"agreement": True}, "`agreement` must be a share above 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"progress": 5}, "`progress` must be a function or None"),
        ({"image_size": 48}, "`image_size` is for a model that is not loaded yet"),
    ],
)
def test_arguments_of_a_calibration(classifier, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_policy(**{"files": sample_photographs()[:1], "model": classifier, **options})


def test_a_policy_s_budgets_are_each_one_of_the_model(classifier):
    for budgets, message in (([4, 4], "`policy` holds 4 twice"), (["4", 16], "`policy` '4': `num_tokens` must be an")):
        with pytest.raises(ValueError, match=message):
            classify_with_policy(sample_photographs(), BudgetPolicy(budgets, [0.5], "num_tokens"), classifier)
    with pytest.raises(ValueError, match="`model` must be a checkpoint's name, a pipeline, or `LoadedModel"):
        classify_images(sample_photographs(), classifier.model)
