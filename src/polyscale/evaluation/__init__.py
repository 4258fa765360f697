"""Accuracy and speed across token budgets."""

from .accuracy import BudgetResult, evaluate_budgets, load_classifier
from .metrics import TopKAccuracy
from .report import plot_results, results_table, write_json


__all__ = [
    "BudgetResult",
    "TopKAccuracy",
    "evaluate_budgets",
    "load_classifier",
    "plot_results",
    "results_table",
    "write_json",
]
