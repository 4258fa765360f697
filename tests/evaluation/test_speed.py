from itertools import pairwise

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from polyscale import FlexiViTConfig, FlexiViTForImageClassification
from polyscale.evaluation.speed import benchmark_budgets, time_alternating


@pytest.fixture(scope="module")
def model():
    config = FlexiViTConfig(
        image_size=32,
        base_patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        train_patch_sizes=[4, 16],
    )
    return FlexiViTForImageClassification(config).eval()


def test_calls_alternate_in_turned_order_after_one_untimed_call_each():
    order = []
    seconds = time_alternating({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_device_is_waited_for_around_every_timed_call():
    events = []
    time_alternating({"a": lambda: events.append("call")}, rounds=2, synchronize=lambda: events.append("wait"))
    assert events == ["call", "wait", "call", "wait", "wait", "call", "wait"]


def test_results_name_budgets_tokens_and_consistent_speeds(model):
    results = benchmark_budgets(model, [4, (8, 16), 16], batch_size=2, rounds=3)
    assert [(result.budget, result.tokens) for result in results] == [(4, 64), ((8, 16), 8), (16, 4)]
    assert results[0].speedup == 1
    for first, second in pairwise(results):
        faster = first.milliseconds / second.milliseconds
        assert second.speedup / first.speedup == pytest.approx(faster)
        assert second.images_per_second == pytest.approx(2000 / second.milliseconds)
    assert [result.budget for result in benchmark_budgets(model, rounds=1)] == [4, 16]
    assert benchmark_budgets(model, [8], image_size=(16, 24), rounds=1)[0].tokens == 6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_operations_are_counted_by_hand(model, implementation):
    model.set_attn_implementation(implementation)
    model.config.keep_all_tokens = True
    tokens, width, layers, classes = 16, 16, 1, 2
    products = tokens * 3 * 8 * 8 * width  # patches of the stored size: no kernel is resized
    products += layers * tokens * (4 * width * width + 2 * width * 16)  # projections and MLP
    products += layers * 2 * tokens * tokens * width  # attention
    products += width * classes
    (result,) = benchmark_budgets(model, [8], batch_size=2, rounds=1)
    assert result.gflops == pytest.approx(2 * products / 1e9, rel=0.05)  # positions are resized besides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": [64]}, "`patch_size` must not be larger"),
        ({"budgets": []}, "`budgets` is empty"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"image_size": 0}, "`image_size` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_budgets(model, **arguments)


def test_a_plain_model_is_timed_once_and_takes_no_budgets():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    model = ViTForImageClassification(config).eval()
    assert [result.budget for result in benchmark_budgets(model, rounds=1)] == [None]
    with pytest.raises(ValueError, match="`budgets` must be None"):
        benchmark_budgets(model, [16])
    assert torch.is_grad_enabled()
