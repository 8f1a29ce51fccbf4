"""Accuracy, agreement with the full model and work spent by budget, on labelled rows."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..budgets import problem_type
from ..metrics.budgetformer.budgetformer import describe_answers
from .batching import WINDOW, check_batch_size, tokenized
from .checkpoints import distinct_budgets
from .looking import answer_rows
from .tables import label_values
from .tuning import decisions, warn_of_shift


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

BUDGETS = (1.0, 1 / 4, 1 / 6, 1 / 12, None)
# Inputs whose length, entropy and spent budget are kept.
MOST_INPUTS = 2000


@dataclass(frozen=True)
class BudgetResult:
    """What came of one budget; the figures are those of the metric in `metrics/budgetformer`.

    Attributes:
        asked: The budget asked for; None: a plain call.
        correct: Rows answered rightly, of several labels in all of them; None, as the next two, for a regression.
        accuracy: Their share.
        interval: Bounds of the accuracy on rows like these, 95% (Wilson's score interval).
        agreement: Share of the rows that get the full model's label; None where 1.0 was not among the budgets, and for
            a regression.
        spent: Mean share of the full model's work, all looks together.
        doubtful: Share of the rows that the full model looked at after a cheaper look; None where it was not recorded.
        error: Root of the mean squared error, of a regression alone.
    """

    asked: float | None
    correct: int | None
    accuracy: float | None
    interval: tuple[float, float] | None
    agreement: float | None
    spent: float
    doubtful: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set, at several budgets.

    Attributes:
        rows: Rows that each budget was tried on.
        results: One for each budget, in the order asked.
        inputs: Of at most 2,000 rows, spread evenly over the data, one value for each: "length" in tokens; "entropy"
            in nats, of the full model's answer, if it was asked for (or the only answer there is) and is no
            regression's; "spent" by a plain call, if it was tried.
        settings: What was run.
    """

    rows: int
    results: list[BudgetResult]
    inputs: dict[str, list[float]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """From what `to_dict` returned, through JSON or not."""
        results = []
        for result in values["results"]:
            interval = result["interval"]
            results.append(BudgetResult(**{**result, "interval": None if interval is None else tuple(interval)}))
        return cls(**{**values, "results": results})

    def __str__(self) -> str:
        is_regression = any(result.error is not None for result in self.results)
        head = f"{'error':>10}" if is_regression else f"{'accuracy':>10}  {'95% interval':<16}{'agreement':>11}"
        lines = [f"{'budget':>6}{head}{'spent':>8}{'doubtful':>10}"]
        for result in self.results:
            name = "plain" if result.asked is None else f"{result.asked:.3f}"
            kept = f"{result.error:>10.4f}" if is_regression else _kept_columns(result)
            doubtful = _percent(result.doubtful)
            lines.append(f"{name:>6}{kept}{result.spent:>8.3f}{doubtful:>10}")
        return "\n".join([*lines, f"{self.rows} rows"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _kept_columns(result: BudgetResult) -> str:
    low, high = result.interval or (math.nan, math.nan)
    interval = f"[{low:.1%}, {high:.1%}]"
    return f"{_percent(result.accuracy):>10}  {interval:<16}{_percent(result.agreement):>11}"


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """Wilson's score interval, 95%."""
    z = NormalDist().inv_cdf(0.975)
    share, scale = correct / rows, 1.0 + z * z / rows
    centre = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1.0 - share) / rows + z * z / (4 * rows * rows))
    return (centre - half) / scale, (centre + half) / scale


def _entropy(logits: torch.Tensor, problem: str) -> torch.Tensor:
    """(B, num_labels) -> (B,), in nats; of several labels the sum over them."""
    if problem == "multi_label_classification":
        return torch.distributions.Bernoulli(logits=logits).entropy().sum(-1)
    return torch.distributions.Categorical(logits=logits).entropy()


def evaluate_budgets(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float | None] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Evaluation:
    """Tries a classifier at several budgets, each on every row.

    Args:
        model: A classifier, or a regression of one number; asked in eval mode, and left in the mode it was in.
        dataset: Rows that the model was not trained on, as in `tools.tables.label_values`.
        tokenizer: Of the model.
        budgets: Floats in (0, 1], and None for a plain call. If there are none, `BUDGETS`; a stock model or one that
            was cut is then tried once, as it is.
        batch_size: Rows the model reads at a time, >= 1; sorted by length within 64 batches, whose doubted rows share
            full batches of the next look.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.

    Raises:
        ValueError: An argument is not allowed, or the model cannot spend a budget.
    """
    ours: Any = model
    budgeted = ours.config.model_type == "budgetformer"
    looks_twice = budgeted and ours.config.full_encoder
    full = 1.0 if looks_twice else None
    if budgets is None:
        budgets = BUDGETS if looks_twice else [None]
    levels = distinct_budgets(budgets)
    if not budgeted and levels != [None]:
        raise ValueError(f"budgets must be None for a {ours.config.model_type} model, which takes none, got {levels}.")
    check_batch_size(batch_size)
    labels, problem = label_values(dataset, ours.config), problem_type(ours.config)
    rows, plain = len(labels), dataset.with_format(None)
    answers = np.zeros((len(levels), *labels.shape), dtype=labels.dtype)
    spent = np.ones((len(levels), rows))
    lengths, entropy = np.zeros(rows), np.zeros(rows)

    def ask(start: int, inputs: Any, bar: Any) -> None:
        for index, budget in enumerate(levels):
            for places, logits, budgets in answer_rows(ours, inputs, tokenizer, batch_size, budget):
                places = start + places
                spent[index, places] = budgets
                if problem == "regression":
                    answers[index, places] = logits[:, 0]
                else:
                    answers[index, places] = decisions(logits, problem)
                if budget == full and problem != "regression":
                    entropy[places] = _entropy(logits, problem)
                bar.update(len(places))

    was_training, step = model.training, WINDOW * batch_size
    model.eval()
    try:
        with logging.tqdm(total=rows * len(levels), desc="Evaluating", leave=False, disable=None) as bar:
            for start in range(0, rows, step):
                inputs = tokenized(plain[start : start + step], tokenizer, max_length)
                masks = inputs.get("attention_mask")
                counts = map(len, inputs["input_ids"]) if masks is None else map(sum, masks)
                lengths[start : start + step] = list(counts)
                ask(start, inputs, bar)
    finally:
        model.train(was_training)

    if budgeted and None in levels:
        warn_of_shift(ours.config, int((spent[levels.index(None)] > 1.0).sum()), rows)
    sample = np.unique(np.linspace(0, rows - 1, min(rows, MOST_INPUTS)).astype(int))
    inputs = {"length": lengths[sample].tolist()}
    if full in levels and problem != "regression":
        inputs["entropy"] = entropy[sample].tolist()
    if None in levels:
        inputs["spent"] = spent[levels.index(None)][sample].tolist()
    full_answers = answers[levels.index(1.0)] if 1.0 in levels else None
    results = []
    for index, budget in enumerate(levels):
        figures = describe_answers(answers[index], labels, full_answers, spent[index])
        work, doubtful = figures["mean_budget"], figures["doubtful"]
        if problem == "regression":
            error = float(np.sqrt(np.square(answers[index] - labels, dtype=np.float64).mean()))
            results.append(BudgetResult(budget, None, None, None, None, work, doubtful, error))
            continue
        correct = round(figures["accuracy"] * rows)
        interval = wilson_interval(correct, rows)
        results.append(
            BudgetResult(budget, correct, figures["accuracy"], interval, figures.get("agreement"), work, doubtful)
        )
    settings = {"checkpoint": ours.name_or_path, "batch_size": batch_size, "max_length": max_length}
    return Evaluation(rows, results, inputs, settings)


__all__ = ["BudgetResult", "Evaluation", "evaluate_budgets", "wilson_interval"]
