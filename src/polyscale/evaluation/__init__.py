"""Accuracy and speed across token budgets."""

from ..loading import load_classifier
from .accuracy import BudgetResult, evaluate_budgets
from .labels import match_labels
from .metrics import TopKAccuracy, wilson_interval
from .plotting import plot_frontier, plot_results
from .report import results_table, write_csv, write_json
from .run import Evaluation, evaluate_checkpoints


__all__ = [
    "BudgetResult",
    "Evaluation",
    "TopKAccuracy",
    "evaluate_budgets",
    "evaluate_checkpoints",
    "load_classifier",
    "match_labels",
    "plot_frontier",
    "plot_results",
    "results_table",
    "wilson_interval",
    "write_csv",
    "write_json",
]
