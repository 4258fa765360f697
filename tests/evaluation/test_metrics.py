import numpy as np
import pytest

from polyscale.evaluation import TopKAccuracy


def test_top_k_is_the_share_among_the_k_best():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 10)), rng.integers(0, 10, 200)
    better = (scores > scores[np.arange(200), labels][:, None]).sum(axis=1)  # classes ranked above the label
    result = TopKAccuracy(ks=(1, 3, 5)).compute(predictions=scores, references=labels)
    for k in (1, 3, 5):
        assert result[f"top{k}"] == pytest.approx((better < k).mean())


def test_ties_go_to_the_lower_class_and_few_classes_are_all_right():
    metric = TopKAccuracy()
    assert metric.compute(predictions=[[1.0, 1.0], [1.0, 1.0]], references=[0, 1]) == {"top1": 0.5, "top5": 1.0}


def test_batches_add_up():
    metric = TopKAccuracy(ks=(1,))
    metric.add_batch(predictions=[[0.0, 1.0]], references=[1])
    metric.add_batch(predictions=[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], references=[0, 0, 0])
    assert metric.compute() == {"top1": 0.5}
