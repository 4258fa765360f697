"""Metrics as `evaluate.Metric` classes: part of the package, so nothing is downloaded and no foreign code runs."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """The share of pictures whose label is among the k classes with the highest scores.

    `compute(predictions=scores, references=labels)` takes scores (pictures, classes) and integer labels (pictures,),
    and returns `{"top1": ..., "top5": ...}`, one entry for each of `ks`, in [0, 1]. Of equal scores the lower class
    index counts as the higher score. With fewer classes than k the share is 1.

    Args:
        ks: the values of k.
    """

    def __init__(self, ks: tuple[int, ...] = (1, 5), **kwargs):
        self.ks = ks
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k accuracy of class scores.",
            citation="",
            inputs_description="predictions: scores (pictures, classes); references: labels (pictures,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        ranking = np.argsort(-scores, axis=1, kind="stable")
        return {f"top{k}": float((ranking[:, :k] == labels[:, None]).any(axis=1).mean()) for k in self.ks}


__all__ = ["TopKAccuracy"]
