"""Metrics: part of the package, so nothing is downloaded and no foreign code runs."""

import math

import datasets
import evaluate
import numpy as np


def top_k_shares(scores: np.ndarray, labels: np.ndarray, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """`{"top1": ..., "top5": ...}` of scores (images, classes) and labels (images,), as `TopKAccuracy` defines it."""
    ranking = np.argsort(-scores, axis=1, kind="stable")
    return {f"top{k}": float((ranking[:, :k] == labels[:, None]).any(axis=1).mean()) for k in ks}


class TopKAccuracy(evaluate.Metric):
    """The share of images whose label is among the k classes with the highest scores.

    `compute(predictions=scores, references=labels)` takes scores (images, classes) and integer labels (images,),
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
            inputs_description="predictions: scores (images, classes); references: labels (images,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return top_k_shares(np.asarray(predictions), np.asarray(references), self.ks)


def wilson_interval(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The interval of a share of `count` independent images, by E. B. Wilson's score method (1927).

    Args:
        share (`float`): what was measured, in [0, 1].
        count (`int`): of how many images, at least 1.
        z (`float`, *optional*, defaults to 1.96, that is 95 %): standard deviations of the normal distribution.

    Returns:
        `(low, high)`, in [0, 1].
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    margin = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(centre - margin, 0.0), min(centre + margin, 1.0)


__all__ = ["TopKAccuracy", "top_k_shares", "wilson_interval"]
