"""What a budget costs a classifier: accuracy, agreement with the full model, mean budget, share of doubtful inputs.

This file stands alone: `evaluate.load` copies it, and so does a Space.
"""

from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate
import numpy as np


_DESCRIPTION = """
What is kept, and what is spent, where a classifier looks at some inputs cheaply and at others in full.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: (rows,) labels that were given; with the configuration "multilabel" (rows, labels), 0 or 1.
    references: The right ones, alike.
    full_predictions: What the full model gives, alike; optional.
    budgets: (rows,) shares of the full model's work that were spent, all looks together; optional.

Returns:
    accuracy: share of the rows whose label is right; of several labels, all of them.
    agreement: share of the rows that get the full model's label; with full_predictions.
    mean_budget: mean share of the full model's work; with budgets.
    doubtful: share of the rows that the full model looked at after a cheaper look, and that thus spent more than 1;
        with budgets.

Examples:
    >>> metric = evaluate.load("budgetformer")
    >>> metric.compute(predictions=[0, 1], references=[0, 0], full_predictions=[0, 0], budgets=[0.25, 1.25])
    {'accuracy': 0.5, 'agreement': 0.5, 'mean_budget': 0.75, 'doubtful': 0.5}
"""
_CITATION = """@misc{budgetformer, title = {BudgetFormer}, note = {arXiv:2604.22583}, year = {2026}}
"""


def _share_alike(left: Any, right: Any, name: str) -> float:
    """Share of the rows in which two arrays are the same."""
    left = np.asarray(left)
    right = np.asarray(right)
    if left.shape != right.shape:
        raise ValueError(f"{name} must have the shape of predictions, {left.shape}, got {right.shape}.")
    alike = left == right
    if alike.ndim > 1:
        alike = alike.all(-1)
    return float(alike.mean())


def describe_answers(
    predictions: Any, references: Any, full_predictions: Any = None, budgets: Any = None
) -> dict[str, float]:
    """The figures of the metric, without the metric's machinery.

    Args:
        predictions: (rows,) integers, or (rows, labels) 0 or 1, of one row or more.
        references: Alike.
        full_predictions: Alike; None: there is no "agreement".
        budgets: (rows,) floats > 0; None: there is no "mean_budget" and no "doubtful".

    Raises:
        ValueError: Shapes differ.
    """
    figures = {"accuracy": _share_alike(predictions, references, "references")}
    if full_predictions is not None:
        figures["agreement"] = _share_alike(predictions, full_predictions, "full_predictions")
    if budgets is not None:
        spent = np.asarray(budgets)
        if spent.shape != (len(predictions),):
            raise ValueError(f"budgets must have one value for each of {len(predictions)} rows, got {spent.shape}.")
        figures["mean_budget"] = float(spent.mean())
        figures["doubtful"] = float((spent > 1.0).mean())
    return figures


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BudgetFormerMetric(evaluate.Metric):
    """The metric, for `evaluate.load`."""

    def _info(self) -> Any:
        label = datasets.Value("int32")
        kind = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": kind, "references": kind}),
            reference_urls=["https://arxiv.org/abs/2604.22583"],
        )

    def _compute(
        self, predictions: Any, references: Any, full_predictions: Any = None, budgets: Any = None
    ) -> dict[str, float]:
        return describe_answers(predictions, references, full_predictions, budgets)


__all__ = ["BudgetFormerMetric", "describe_answers"]
