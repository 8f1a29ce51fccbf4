"""Accuracy and heads by budget, on labelled rows."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .data import batches_by_length, check_batch_size, distinct_budgets, label_ids


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


_MOST_INPUTS = 2000
# Rows are sorted by length within so many batches: memory does not grow with the data, and padding is rare.
_WINDOW = 64


@dataclass(frozen=True)
class BudgetResult:
    """What came of one budget.

    Attributes:
        asked: Share of the heads asked for; None: nothing was, and the model did what it does by itself.
        correct: Rows answered rightly.
        accuracy: Their share.
        interval: Bounds of the accuracy on rows like these, 95% (Wilson's score interval).
        heads: Mean share of the heads that ran.
        heads_by_layer: The same for each layer, (layers,).
    """

    asked: float | None
    correct: int
    accuracy: float
    interval: tuple[float, float]
    heads: float
    heads_by_layer: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and heads of one model at several budgets.

    Attributes:
        rows: Rows that each budget was tried on.
        results: One for each budget, in the order asked.
        inputs: Of at most 2,000 rows, spread evenly over the data, one value for each: "length" in tokens; "entropy"
            in nats, of the answer with all heads, if these were asked for (or the only answer there is); "heads", the
            share that ran when nothing was asked, if this was tried.
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
        lines = [f"{'budget':>6}{'accuracy':>10}  {'95% interval':<16}{'heads':>8}"]
        for result in self.results:
            asked = "own" if result.asked is None else f"{result.asked:.3f}"
            interval = "[{:.1%}, {:.1%}]".format(*result.interval)
            lines.append(f"{asked:>6}{result.accuracy:>10.1%}  {interval:<16}{result.heads:>8.1%}")
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
    budgets: Iterable[float | None] = (1.0, 0.5, 0.25, 0.125, None),
    batch_size: int = 32,
    max_length: int | None = None,
) -> Evaluation:
    """Tries a classifier at several head budgets, each on every row.

    Args:
        model: A classifier, one label for each input; asked in eval mode, and left in the mode it was in. One that
            takes no budgets, stock or cut down to static heads, is tried once, whatever `budgets` are.
        dataset: Rows that the model was not trained on, as in `tools.data.label_ids`.
        tokenizer: Of the model.
        budgets: Shares in (0, 1]; None: `config.head_budget`, or the budget the model chooses where that is None.
        batch_size: Rows the model reads at a time, >= 1; sorted by length within 64 batches.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.

    Raises:
        ValueError: An argument is not allowed.
        ImportError: scipy is not installed.
    """
    ours: Any = model
    config, budgets = ours.config, distinct_budgets(budgets)
    check_batch_size(batch_size)
    labels, plain = label_ids(dataset, config), dataset.with_format(None)
    budgeted = config.model_type == "budgetformer"
    routed = budgeted and config.static_heads is None
    asked = budgets if routed else [None]
    correct, opened = np.zeros(len(asked), int), torch.zeros(len(asked), config.num_hidden_layers)
    columns: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(labels)))

    def answer(places: np.ndarray, batch: Any, index: int, budget: float | None) -> None:
        gates = torch.ones(len(places), config.num_hidden_layers, 1)
        if budgeted:
            out = ours(**batch, head_budget=budget, output_head_gates=True)
            gates = out.head_gates.cpu()  # (B, layers, H)
        else:
            out = ours(**batch)
        logits = out.logits.float().cpu()
        correct[index] += (logits.argmax(-1).numpy() == labels[places]).sum()
        opened[index] += gates.mean(-1).sum(0)
        if budget == 1.0 or not routed:
            columns["entropy"][places] = torch.distributions.Categorical(logits=logits).entropy()
        if budget is None:
            columns["heads"][places] = gates.mean((1, 2))

    was_training, step = model.training, _WINDOW * batch_size
    model.eval()
    try:
        with torch.no_grad(), logging.tqdm(total=len(labels), desc="Evaluating", leave=False, disable=None) as bar:
            for start in range(0, len(labels), step):
                for places, batch in batches_by_length(plain[start : start + step], tokenizer, batch_size, max_length):
                    columns["length"][start + places] = batch["attention_mask"].sum(-1)
                    batch = batch.to(ours.device)
                    for index, budget in enumerate(asked):
                        answer(start + places, batch, index, budget)
                    bar.update(len(places))
    finally:
        model.train(was_training)
    shares = opened.double() / len(labels)  # (budgets, layers)
    sample = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), _MOST_INPUTS)).astype(int))
    return Evaluation(
        rows=len(labels),
        results=[
            BudgetResult(
                asked=budget,
                correct=int(right),
                accuracy=int(right) / len(labels),
                interval=_wilson_interval(int(right), len(labels)),
                heads=share.mean().item(),
                heads_by_layer=share.tolist(),
            )
            for budget, right, share in zip(asked, correct, shares, strict=True)
        ],
        inputs={name: values[sample].tolist() for name, values in columns.items()},
        settings={"checkpoint": ours.name_or_path, "batch_size": batch_size, "max_length": max_length},
    )


__all__ = ["BudgetResult", "Evaluation", "evaluate_budgets"]
