"""The smallest head budget that keeps a classifier's accuracy, found on as few evaluations as the answer needs."""

import bisect
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_budgetformer import is_share
from .data import batches_by_length, check_batch_size, check_classifier, label_ids
from .profiling import profile


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


# Shares of the capital that one row may lose. Spaced evenly, for where few differences are not zero large bets decide.
_BETS = np.linspace(0.05, 0.95, 10)
# Standard errors by which the rows to come may turn out better than those seen before a test is given up: less saves
# more evaluations and finds larger budgets.
_OPTIMISM = 1.25


@dataclass(frozen=True)
class BudgetTest:
    """What was found out about one budget, a share of the heads asked for.

    Attributes:
        rows: Inputs evaluated at it.
        difference: Accuracy lost on them: mean of (right with all heads) - (right at this budget), in [-1, 1].
        interval: Bounds of the accuracy lost on inputs like these; each of the two holds with the confidence asked for.
        decision: Whether the accuracy lost is "within" the tolerance, "exceeds" it, or is "undecided".
        heads: Mean share of the heads that ran.
        flops: FLOPs over those with all heads, on one batch of middling length, if asked for.
    """

    budget: float
    rows: int
    difference: float
    interval: tuple[float, float]
    decision: str
    heads: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class TunedBudget:
    """The answer of `tune_budget`: the smallest budget found to be within the tolerance, 1.0 if none below is.

    Attributes:
        accuracy: With all heads, on the rows that were looked at.
        curve: The budgets that were tested, rising.
        evaluations: Inputs run through the model, with all heads too; not counted is the batch that FLOPs are read off.
        grid_evaluations: Inputs that all budgets, and all heads, on all rows would have taken.
        settings: What was asked for.
    """

    budget: float
    accuracy: float
    curve: list[BudgetTest]
    evaluations: int
    grid_evaluations: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TunedBudget":
        """From what `to_dict` returned, through JSON or not."""
        curve = [BudgetTest(**{**test, "interval": tuple(test["interval"])}) for test in values["curve"]]
        return cls(**{**values, "curve": curve})

    def __str__(self) -> str:
        lines = [f"{'budget':>6}{'heads':>8}{'FLOPs':>8}{'rows':>8}  {'points lost':<23}decision"]
        for test in self.curve:
            flops = "-" if test.flops is None else f"{test.flops:.1%}"
            low, high = test.interval
            lost = f"{100 * test.difference:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append(f"{test.budget:>6.3f}{test.heads:>8.1%}{flops:>8}{test.rows:>8}  {lost:<23}{test.decision}")
        asked = f"within {100 * self.settings['tolerance']:g} points of all heads ({self.accuracy:.1%})"
        lines.append(f"smallest budget {asked}, confidence {self.settings['confidence']:g}: {self.budget:.3f}")
        share = self.evaluations / self.grid_evaluations
        return "\n".join([*lines, f"{self.evaluations} evaluations, {share:.1%} of the full grid"])


def _log_capital(counts: Any, mean: float) -> float:
    """Log of the capital, 1 at the start, after betting that the differences' true mean is below `mean`, in (-1, 1).

    If it is not, the capital ever reaches 1 / alpha with probability alpha at most. Counts (3,) are of -1, 0 and 1.
    """
    logs = np.asarray(counts) @ np.log1p(_BETS * (mean - np.array([[-1.0], [0.0], [1.0]])) / (1.0 - mean))
    return float(np.logaddexp.reduce(logs)) - math.log(len(_BETS))


def _upper_bound(counts: np.ndarray, threshold: float) -> float:
    low, high = -1.0, 1.0
    while high - low > 1e-9:  # the capital rises with the mean it bets against
        middle = (low + high) / 2
        low, high = (low, middle) if _log_capital(counts, middle) >= threshold else (middle, high)
    return high


def _is_futile(counts: np.ndarray, rows: int, tolerance: float, threshold: float) -> bool:
    """Whether all `rows` would not do even if those to come were somewhat better than those seen."""
    seen = counts.sum()
    gained, lost = counts[0] + _OPTIMISM * counts[0] ** 0.5, max(counts[2] - _OPTIMISM * counts[2] ** 0.5, 0.0)
    hoped = np.array([gained, max(seen - gained - lost, 0.0), lost])
    return _log_capital(counts + hoped * (rows - seen) / seen, tolerance) < threshold


def race(
    losses: Callable[[float, range], np.ndarray],
    budgets: Iterable[float],
    rows: int,
    tolerance: float = 0.005,
    confidence: float = 0.95,
    chunk: int = 256,
    futility: bool = True,
) -> tuple[float, list[BudgetTest]]:
    """Looks for the smallest budget whose mean loss is within `tolerance`, by bisection; knows nothing of models.

    A budget is tested on a growing sample until it is decided or nothing is left. The bounds are a confidence sequence,
    valid whenever one stops: the capital process of Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting" (arXiv 2010.09686), averaged over a grid of constant bets ("grid Kelly" there), each test at
    error (1 - confidence) / t, where t is the most tests bisection can take. The guarantee is about the inputs that the
    rows are independent draws from, which they stay when shuffled, so nothing is corrected for a finite sample. Thus a
    budget that all rows leave undecided stays so, though its loss on just these is then known exactly, and is not kept.

    That the budget returned is within the tolerance holds with `confidence` if all budgets below one that exceeds it
    exceed it too, which asks less than that the loss falls all along. Where even that fails, bisection returns a budget
    that passed its own test at error (1 - confidence) / t, not necessarily the smallest that would.

    Args:
        losses: Takes a budget and the next rows, positions in the shuffled sample and the same for every budget; gives
            (rows,) integers in {-1, 0, 1}: (right with all heads) - (right at the budget).
        budgets: Candidates in (0, 1]; 1.0 needs no test.
        rows: Size of the sample.
        tolerance: Mean loss allowed, in (0, 1).
        confidence: In (0, 1).
        chunk: Rows asked for at a time, >= 1.
        futility: Whether to give up a test when passing is out of reach; saves much and finds slightly larger budgets.

    Returns:
        the budget, 1.0 if none below passed, and the tests in the order they were made.

    Raises:
        ValueError: An argument is not allowed, or `rows` are too few to show the tolerance at all.
    """
    budgets = list(budgets)
    candidates = sorted({budget for budget in budgets if is_share(budget)} - {1.0})
    if not candidates or not all(map(is_share, budgets)):
        raise ValueError(f"budgets must be floats in (0, 1], at least one of them below 1, got {budgets}.")
    for name, value in (("tolerance", tolerance), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be in (0, 1), got {value}.")
    threshold = math.log(len(candidates).bit_length() / (1.0 - confidence))
    needed = bisect.bisect_left(range(2**62), threshold, key=lambda zeros: _log_capital([0, zeros, 0], tolerance))
    if needed > rows:
        raise ValueError(
            f"tolerance must be larger for {rows} rows, got {tolerance}: even if no answer changed, it would take "
            f"{needed} rows to show that with confidence {confidence} and {len(candidates)} budgets below 1."
        )

    def run_test(budget: float) -> BudgetTest:
        counts, seen, decision = np.zeros(3), 0, "undecided"
        while seen < rows and decision == "undecided":
            new = range(seen, min(seen + chunk, rows))
            counts += np.bincount(losses(budget, new) + 1, minlength=3)
            seen = new.stop
            if _log_capital(counts, tolerance) >= threshold:
                decision = "within"
            elif _log_capital(counts[::-1], -tolerance) >= threshold:
                decision = "exceeds"
            elif futility and _is_futile(counts, rows, tolerance, threshold):
                break
        interval = -_upper_bound(counts[::-1], threshold), _upper_bound(counts, threshold)
        return BudgetTest(budget, seen, float(counts[2] - counts[0]) / seen, interval, decision)

    tests: list[BudgetTest] = []
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        tests.append(run_test(candidates[middle]))
        low, high = (low, middle) if tests[-1].decision == "within" else (middle + 1, high)
    return [*candidates, 1.0][high], tests


def _check_model(model: Any) -> None:
    check_classifier(model)
    if model.config.static_heads is not None:
        raise ValueError("model must choose its heads, got one cut down to static heads, which takes no budget.")


def tune_budget(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float] | None = None,
    tolerance: float = 0.005,
    confidence: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
    cost: Literal["heads", "flops"] = "heads",
    max_length: int | None = None,
    futility: bool = True,
    write: bool = False,
) -> TunedBudget:
    """Finds the smallest head budget that keeps accuracy within `tolerance` of all heads, with `confidence`.

    The method, and what it promises where accuracy does not rise with the budget, is that of `race`.

    ```python
    print(tune_budget(model, data["validation"], tokenizer, write=True))
    model.save_pretrained("my-tuned-budgetformer")
    ```

    Args:
        model: A BudgetFormer classifier, one label for each input; its weights and mode stay as they are.
        dataset: Rows that the model was not trained on, as in `tools.data.label_ids`: tokenized, or texts in the
            columns `text` and, for pairs, `text_pair`.
        tokenizer: Of the model.
        budgets: Candidates in (0, 1]; the fewer, the fewer rows it takes. None: multiples of one head in each layer.
        tolerance: Accuracy that may be lost, as a fraction: 0.005 is half a point.
        confidence: In (0, 1).
        batch_size: Rows the model reads at a time, >= 1; sorted by length within eight batches.
        seed: Of the order in which rows are looked at.
        cost: What the curve tells: "heads", the share that ran, or "flops" too.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.
        futility: As in `race`.
        write: Whether to set `model.config.head_budget` to the answer.

    Raises:
        ValueError: An argument is not allowed, or the rows are too few to show the tolerance at all.
    """
    _check_model(model)
    ours = cast(Any, model)
    labels = label_ids(dataset, ours.config)
    check_batch_size(batch_size)
    if cost not in ("heads", "flops"):
        raise ValueError(f"cost must be 'heads' or 'flops', got {cost!r}.")
    heads = ours.config.num_attention_heads
    budgets = [(n + 1) / heads for n in range(heads)] if budgets is None else list(budgets)
    settings = {"tolerance": tolerance, "confidence": confidence, "budgets": budgets, "rows": len(dataset)}
    settings |= {"batch_size": batch_size, "seed": seed, "cost": cost, "max_length": max_length, "futility": futility}
    plain, chunk = dataset.with_format(None), 8 * batch_size
    order = np.random.default_rng(seed).permutation(len(dataset))
    log: dict[float, list[np.ndarray]] = defaultdict(list)  # by budget: (2, B), heads used and whether right

    def answer(batch: Any, expected: np.ndarray, budget: float) -> np.ndarray:
        out = ours(**batch, head_budget=budget)
        right = out.logits.argmax(-1).cpu().numpy() == expected
        log[budget].append(np.stack([out.head_budget.float().cpu().numpy(), right]))
        bar.update(len(right))
        return right.astype(int)

    @functools.cache
    def read(rows: range) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        chosen = order[rows.start : rows.stop]
        batches = batches_by_length(plain[chosen.tolist()], tokenizer, batch_size, max_length)
        found = [(batch.to(ours.device), labels[chosen[places]]) for places, batch in batches]
        return [(batch, expected, answer(batch, expected, 1.0)) for batch, expected in found]

    def losses(budget: float, rows: range) -> np.ndarray:
        return np.concatenate([right - answer(batch, expected, budget) for batch, expected, right in read(rows)])

    was_training = model.training
    model.eval()
    bar = logging.tqdm(desc="Tuning", unit=" evaluations", leave=False, disable=None)
    try:
        with torch.no_grad(), bar:
            budget, tests = race(losses, budgets, len(dataset), tolerance, confidence, chunk, futility)
            seen = {asked: np.concatenate(parts, axis=1) for asked, parts in log.items()}
            curve = [
                replace(test, heads=float(seen[test.budget][0].mean()))
                for test in sorted(tests, key=lambda test: test.budget)
            ]
            if cost == "flops":
                first = read(range(min(chunk, len(dataset))))
                batch = first[len(first) // 2][0]
                flops = [sum(profile(model, batch, x).sparse.values()) for x in (1.0, *(test.budget for test in curve))]
                curve = [replace(test, flops=x / flops[0]) for test, x in zip(curve, flops[1:], strict=True)]
    finally:
        model.train(was_training)
    if write:
        ours.config.head_budget = budget
    return TunedBudget(
        budget=budget,
        accuracy=float(seen[1.0][1].mean()),
        curve=curve,
        evaluations=sum(x.shape[1] for x in seen.values()),
        grid_evaluations=len({*budgets, 1.0}) * len(dataset),
        settings=settings,
    )


__all__ = ["BudgetTest", "TunedBudget", "race", "tune_budget"]
