"""Accuracy, agreement with the full model and work spent by budget, on labelled rows."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .batching import WINDOW, check_batch_size, tokenized
from .checkpoints import distinct_budgets
from .looking import answer_rows
from .tables import label_ids
from .tuning import warn_of_shift


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

BUDGETS = (1.0, 1 / 4, 1 / 6, 1 / 12, None)
# Inputs whose length, entropy and spent budget are kept.
MOST_INPUTS = 2000


@dataclass(frozen=True)
class BudgetResult:
    """What came of one budget.

    Attributes:
        asked: The budget asked for; None: a plain call.
        correct: Rows answered rightly.
        accuracy: Their share.
        interval: Bounds of the accuracy on rows like these, 95% (Wilson's score interval).
        agreement: Share of the rows that get the full model's label; None where 1.0 was not among the budgets.
        spent: Mean share of the full model's work, all looks together.
    """

    asked: float | None
    correct: int
    accuracy: float
    interval: tuple[float, float]
    agreement: float | None
    spent: float


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set, at several budgets.

    Attributes:
        rows: Rows that each budget was tried on.
        results: One for each budget, in the order asked.
        inputs: Of at most 2,000 rows, spread evenly over the data, one value for each: "length" in tokens; "entropy"
            in nats, of the full model's answer, if it was asked for (or the only answer there is); "spent" by a plain
            call, if it was tried.
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
        results = [BudgetResult(**{**result, "interval": tuple(result["interval"])}) for result in values["results"]]
        return cls(**{**values, "results": results})

    def __str__(self) -> str:
        lines = [f"{'budget':>6}{'accuracy':>10}  {'95% interval':<16}{'agreement':>11}{'spent':>8}"]
        for result in self.results:
            asked = "plain" if result.asked is None else f"{result.asked:.3f}"
            interval = "[{:.1%}, {:.1%}]".format(*result.interval)
            agreement = "-" if result.agreement is None else f"{result.agreement:.1%}"
            lines.append(f"{asked:>6}{result.accuracy:>10.1%}  {interval:<16}{agreement:>11}{result.spent:>8.3f}")
        return "\n".join([*lines, f"{self.rows} rows"])


def _wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    try:
        from scipy.stats import binomtest  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError('Intervals need scipy: pip install "hf-budgetformer[cli]".') from None
    low, high = binomtest(correct, rows).proportion_ci(method="wilson")
    return float(low), float(high)


def evaluate_budgets(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float | None] = BUDGETS,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Evaluation:
    """Tries a classifier at several budgets, each on every row.

    Args:
        model: A classifier, one label for each input; asked in eval mode, and left in the mode it was in. One that
            takes no budgets, stock or cut, is tried once as it is, whatever `budgets` are.
        dataset: Rows that the model was not trained on, as in `tools.tables.label_ids`.
        tokenizer: Of the model.
        budgets: Floats in (0, 1]; None: a plain call.
        batch_size: Rows the model reads at a time, >= 1; sorted by length within 64 batches, whose doubted rows share
            full batches of the next look.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.

    Raises:
        ValueError: An argument is not allowed.
        ImportError: scipy is not installed.
    """
    ours: Any = model
    asked = distinct_budgets(budgets)
    check_batch_size(batch_size)
    labels = label_ids(dataset, ours.config)
    rows, plain = len(labels), dataset.with_format(None)
    budgeted = ours.config.model_type == "budgetformer"
    full: float | None = 1.0
    if not budgeted or not ours.config.full_encoder:
        asked, full = [None], None
    answers = np.zeros((len(asked), rows), dtype=np.int64)
    spent = np.ones((len(asked), rows))
    lengths, entropy = np.zeros(rows), np.zeros(rows)

    def ask(start: int, inputs: Any, bar: Any) -> None:
        for index, budget in enumerate(asked):
            for places, logits, budgets in answer_rows(ours, inputs, tokenizer, batch_size, budget):
                places = start + places
                answers[index, places] = logits.argmax(-1)
                spent[index, places] = budgets
                if budget == full:
                    entropy[places] = torch.distributions.Categorical(logits=logits).entropy()
                bar.update(len(places))

    was_training, step = model.training, WINDOW * batch_size
    model.eval()
    try:
        with logging.tqdm(total=rows * len(asked), desc="Evaluating", leave=False, disable=None) as bar:
            for start in range(0, rows, step):
                inputs = tokenized(plain[start : start + step], tokenizer, max_length)
                masks = inputs.get("attention_mask")
                counts = map(len, inputs["input_ids"]) if masks is None else map(sum, masks)
                lengths[start : start + step] = list(counts)
                ask(start, inputs, bar)
    finally:
        model.train(was_training)

    if budgeted and None in asked:
        warn_of_shift(ours.config, int((spent[asked.index(None)] > 1.0).sum()), rows)
    sample = np.unique(np.linspace(0, rows - 1, min(rows, MOST_INPUTS)).astype(int))
    inputs = {"length": lengths[sample].tolist()}
    if full in asked:
        inputs["entropy"] = entropy[sample].tolist()
    if None in asked:
        inputs["spent"] = spent[asked.index(None)][sample].tolist()
    results = []
    for index, budget in enumerate(asked):
        correct = int((answers[index] == labels).sum())
        same = float((answers[index] == answers[asked.index(1.0)]).mean()) if 1.0 in asked else None
        interval = _wilson_interval(correct, rows)
        results.append(BudgetResult(budget, correct, correct / rows, interval, same, float(spent[index].mean())))
    settings = {"checkpoint": ours.name_or_path, "batch_size": batch_size, "max_length": max_length}
    return Evaluation(rows, results, inputs, settings)


__all__ = ["BudgetResult", "Evaluation", "evaluate_budgets"]
