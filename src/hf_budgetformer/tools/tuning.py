"""How sure a first look is, and the smallest budget that keeps accuracy, found on as few evaluations as it takes."""

import bisect
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..budgets import confidence as margin_of
from ..budgets import first_look_budget, has_confidence, plan_budget
from ..configuration_budgetformer import is_share
from .batching import batches_by_length, check_batch_size
from .checkpoints import check_classifier
from .tables import label_ids


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


# Shares of the capital that one row may lose. Spaced evenly, for where few differences are not zero large bets decide.
_BETS = np.linspace(0.05, 0.95, 10)
# Standard errors by which the rows to come may turn out better than those seen before a test is given up: less saves
# more evaluations and finds larger budgets.
_OPTIMISM = 1.25
# Quantiles of the margin that are stored.
_QUANTILES = 101
# Candidates above the narrow budget: means to spend.
_MEAN_BUDGETS = (0.3, 0.35, 0.4, 0.5, 0.6, 0.75)


@torch.no_grad()
def calibrate_margins(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], budget: float | None = None
) -> None:
    """Stores how sure the first look is of its answers, so that budgets in between can be asked for.

    A budget between `config.narrow_budget` and 1 is a mean: the share of inputs that the full encoder may look at are
    those with the smallest margins, by the quantiles stored here in `config.margins`. No labels are needed.

    Args:
        model: A BudgetFormer classifier with a narrow encoder; asked in eval mode, and left in the mode it was in.
        batches: What `forward` takes, a few hundred rows like those to come; labels are ignored.
        budget: Of the first look, at most `config.narrow_budget`. None: the first of `config.looks`, or 1/6.

    Raises:
        ValueError: The model is of another kind, the budget is none of a first look, or there is no batch.
    """
    ours: Any = model
    check_classifier(model)
    if ours.narrow is None or not ours.config.full_encoder or not has_confidence(ours.config):
        raise ValueError("model must look twice: with a narrow encoder beside a full one, and labels to choose from.")
    budget = first_look_budget(ours.config) if budget is None else budget
    if budget > ours.config.narrow_budget:
        narrow = f"narrow_budget={ours.config.narrow_budget:g}"
        raise ValueError(f"budget must be at most {narrow}, that of a first look, got {budget}.")
    found, was_training = [], model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: x for name, x in batch.items() if name not in ("label", "labels", "teacher_logits")}
            device = ours.narrow.steps.device
            inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            found.append(margin_of(ours(**inputs, budget=budget).logits, ours.config.problem_type).cpu())
    finally:
        model.train(was_training)
    if not found:
        raise ValueError("batches must hold at least one batch, got none.")
    quantiles = torch.cat(found).double().quantile(torch.linspace(0, 1, _QUANTILES).double())
    ours.config.margins = {"budget": budget, "quantiles": [round(x, 6) for x in quantiles.tolist()]}


@dataclass(frozen=True)
class BudgetTest:
    """What was found out about one budget that was asked for.

    Attributes:
        rows: Inputs evaluated at it.
        difference: Accuracy lost on them: mean of (right in full) - (right at this budget), in [-1, 1].
        interval: Bounds of the accuracy lost on inputs like these; each of the two holds with the confidence asked for.
        decision: Whether the accuracy lost is "within" the tolerance, "exceeds" it, or is "undecided".
        spent: Mean share of the full model's work.
    """

    budget: float
    rows: int
    difference: float
    interval: tuple[float, float]
    decision: str
    spent: float | None = None


@dataclass(frozen=True)
class TunedBudget:
    """The answer of `tune_budget`: the smallest budget found to be within the tolerance, 1.0 if none below is.

    Attributes:
        accuracy: Of the full model, on the rows that were looked at.
        curve: The budgets that were tested, rising.
        evaluations: Inputs run through the model, in full too.
        grid_evaluations: Inputs that all budgets on all rows would have taken.
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
        lines = [f"{'budget':>6}{'spent':>8}{'rows':>8}  {'points lost':<23}decision"]
        for test in self.curve:
            low, high = test.interval
            lost = f"{100 * test.difference:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append(f"{test.budget:>6.3f}{test.spent:>8.3f}{test.rows:>8}  {lost:<23}{test.decision}")
        asked = f"within {100 * self.settings['tolerance']:g} points of the full model ({self.accuracy:.1%})"
        lines.append(f"smallest budget {asked}, confidence {self.settings['confidence']:g}: {self.budget:.3f}")
        share = self.evaluations / self.grid_evaluations
        return "\n".join([*lines, f"{self.evaluations} evaluations, {share:.1%} of the full grid"])


def log_capital(counts: Any, mean: float) -> float:
    """Log of the capital, 1 at the start, after betting that the differences' true mean is below `mean`, in (-1, 1).

    If it is not, the capital ever reaches 1 / alpha with probability alpha at most. Counts (3,) are of -1, 0 and 1.
    """
    logs = np.asarray(counts) @ np.log1p(_BETS * (mean - np.array([[-1.0], [0.0], [1.0]])) / (1.0 - mean))
    return float(np.logaddexp.reduce(logs)) - math.log(len(_BETS))


def _upper_bound(counts: np.ndarray, threshold: float) -> float:
    low, high = -1.0, 1.0
    while high - low > 1e-9:  # the capital rises with the mean it bets against
        middle = (low + high) / 2
        low, high = (low, middle) if log_capital(counts, middle) >= threshold else (middle, high)
    return high


def _is_futile(counts: np.ndarray, rows: int, tolerance: float, threshold: float) -> bool:
    """Whether all `rows` would not do even if those to come were somewhat better than those seen."""
    seen = counts.sum()
    gained, lost = counts[0] + _OPTIMISM * counts[0] ** 0.5, max(counts[2] - _OPTIMISM * counts[2] ** 0.5, 0.0)
    hoped = np.array([gained, max(seen - gained - lost, 0.0), lost])
    return log_capital(counts + hoped * (rows - seen) / seen, tolerance) < threshold


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
            (rows,) integers in {-1, 0, 1}: (right in full) - (right at the budget).
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
    needed = bisect.bisect_left(range(2**62), threshold, key=lambda zeros: log_capital([0, zeros, 0], tolerance))
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
            if log_capital(counts, tolerance) >= threshold:
                decision = "within"
            elif log_capital(counts[::-1], -tolerance) >= threshold:
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


def candidate_budgets(config: Any) -> list[float]:
    """What `tune_budget` looks among: thirds of the narrow budget, and means to spend above it."""
    narrow = [config.narrow_budget * share for share in (1 / 3, 2 / 3, 1.0)]
    return narrow + [budget for budget in _MEAN_BUDGETS if budget > config.narrow_budget]


def set_budget(config: Any, order: Any, budget: float) -> None:
    """Makes a budget what a plain call spends: sets `config.looks` and `config.confidence`.

    Args:
        config: A `BudgetFormerConfig`; changed.
        order: The model's opening order, `model.narrow.order`.
        budget: As in a call.
    """
    plan = plan_budget(config, order, budget)
    looks = [budget] if len(plan.looks) == 1 else [config.margins["budget"], 1.0]
    config.confidence, config.looks = None, looks
    config.confidence = list(plan.thresholds) or None


def tune_budget(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float] | None = None,
    tolerance: float = 0.005,
    confidence: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
    max_length: int | None = None,
    futility: bool = True,
    write: bool = False,
) -> TunedBudget:
    """Finds the smallest budget that keeps accuracy within `tolerance` of the full model, with `confidence`.

    The method, and what it promises where accuracy does not rise with the budget, is that of `race`. Margins of the
    first look that are not stored yet are calibrated on the rows, see `calibrate_margins`.

    ```python
    print(tune_budget(model, data["validation"], tokenizer, write=True))
    model.save_pretrained("my-tuned-budgetformer")
    ```

    Args:
        model: A BudgetFormer classifier that looks twice, one label for each input; weights and mode stay as they are.
        dataset: Rows that the model was not trained on, as in `tools.tables.label_ids`: tokenized, or texts in the
            columns `text` and, for pairs, `text_pair`.
        tokenizer: Of the model.
        budgets: Candidates in (0, 1]; the fewer, the fewer rows it takes. None: see `candidate_budgets`.
        tolerance: Accuracy that may be lost, as a fraction: 0.005 is half a point.
        confidence: In (0, 1).
        batch_size: Rows the model reads at a time, >= 1; sorted by length within eight batches.
        seed: Of the order in which rows are looked at.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.
        futility: As in `race`.
        write: Whether plain calls spend the answer from now on, see `set_budget`.

    Raises:
        ValueError: An argument is not allowed, or the rows are too few to show the tolerance at all.
    """
    ours: Any = model
    check_classifier(model)
    if ours.narrow is None or not ours.config.full_encoder:
        raise ValueError("model must have a narrow encoder beside a full one (router='look', not cut).")
    labels = label_ids(dataset, ours.config)
    check_batch_size(batch_size)
    budgets = candidate_budgets(ours.config) if budgets is None else list(budgets)
    settings = {"tolerance": tolerance, "confidence": confidence, "budgets": budgets, "rows": len(dataset)}
    settings |= {"batch_size": batch_size, "seed": seed, "max_length": max_length, "futility": futility}
    plain, chunk = dataset.with_format(None), 8 * batch_size
    order = np.random.default_rng(seed).permutation(len(dataset))
    log: dict[float, list[np.ndarray]] = defaultdict(list)  # by budget: (2, B), spent and whether right

    def batches(rows: Iterable[int]) -> list[tuple[Any, np.ndarray]]:
        chosen = order[list(rows)]
        found = batches_by_length(plain[chosen.tolist()], tokenizer, batch_size, max_length)
        return [(batch.to(ours.device), labels[chosen[places]]) for places, batch in found]

    def answer(batch: Any, expected: np.ndarray, budget: float) -> np.ndarray:
        out = ours(**batch, budget=budget)
        right = out.logits.argmax(-1).cpu().numpy() == expected
        log[budget].append(np.stack([out.budget.float().cpu().numpy(), right]))
        bar.update(len(right))
        return right.astype(int)

    @functools.cache
    def read(rows: range) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        return [(batch, expected, answer(batch, expected, 1.0)) for batch, expected in batches(rows)]

    def losses(budget: float, rows: range) -> np.ndarray:
        return np.concatenate([right - answer(batch, expected, budget) for batch, expected, right in read(rows)])

    before, was_training = ours.config.margins, model.training
    model.eval()
    bar = logging.tqdm(desc="Tuning", unit=" evaluations", leave=False, disable=None)
    try:
        with torch.no_grad(), bar:
            if before is None:
                calibrate_margins(model, (batch for batch, _ in batches(range(min(len(dataset), 4 * chunk)))))
            budget, tests = race(losses, budgets, len(dataset), tolerance, confidence, chunk, futility)
            seen = {asked: np.concatenate(parts, axis=1) for asked, parts in log.items()}
            if write:
                set_budget(ours.config, ours.narrow.order, budget)
    finally:
        model.train(was_training)
        if not write:
            ours.config.margins = before
    curve = [
        replace(test, spent=float(seen[test.budget][0].mean())) for test in sorted(tests, key=lambda test: test.budget)
    ]
    return TunedBudget(
        budget=budget,
        accuracy=float(seen[1.0][1].mean()),
        curve=curve,
        evaluations=sum(x.shape[1] for x in seen.values()),
        grid_evaluations=len({*budgets, 1.0}) * len(dataset),
        settings=settings,
    )


__all__ = [
    "BudgetTest",
    "TunedBudget",
    "calibrate_margins",
    "candidate_budgets",
    "log_capital",
    "race",
    "set_budget",
    "tune_budget",
]
