"""The promise: the cheapest looks whose answers differ from the full model's on at most so many inputs like these."""

import bisect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..budgets import TRAINED_SHARES, first_look_budget, has_confidence
from ..budgets import confidence as margin_of
from ..configuration_budgetformer import is_share
from .batching import WINDOW, batches_by_length, check_batch_size
from .checkpoints import check_classifier
from .results import describe_looks
from .tables import label_ids


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


logger = logging.get_logger(__name__)

# Of confidence, falling; chosen before any row is seen, and denser where confident models put their answers: two
# hundred for each tenfold distance from 1. A promise gets cheaper with each of them, and no weaker.
THRESHOLDS = (1.0, *dict.fromkeys((1.0 - np.logspace(-6.0, 0.0, 1201)).round(7).tolist()))
# Of the error of a promise, what goes to the first look that costs least. It is nearly always the one that is
# chosen, and the more error it is allowed the fewer answers it has to doubt. The others share the rest.
_LEAST_LOOKS_ERROR = 0.8
RISKS = ("disagreement", "tolerance", "mean_budget")
# Shares of the capital that one row may lose. Spaced evenly, for where few differences are not zero large bets decide.
_BETS = np.linspace(0.05, 0.95, 10)
# Quantiles of the margin that are stored.
_QUANTILES = 101
# Of the test whether new inputs are doubted as often as those of the calibration.
_SHIFT_ERROR = 0.01
# Work is a sum of shares: a mean budget of 1/4 pays for a first look of 1/4, whatever the last bit says.
_SLACK = 1e-6


def look_budgets(config: Any) -> list[float]:
    """The first looks that `tune` chooses from: those that the narrow encoder is trained at."""
    return [share * config.narrow_budget for share in TRAINED_SHARES]


@dataclass(frozen=True)
class FirstLook:
    """What one first look made of the calibration rows.

    Attributes:
        budget: Asked for.
        work: Share of the full model's FLOPs.
        seconds: Share of the full model's time, measured on these rows.
        confidence: (N,), float, in [0, 1].
        losses: (N,), integers in {-1, 0, 1}: what is lost where the look's answer stands. Of a disagreement 1 where the
            full model answers differently; of accuracy (right in full) - (right at this look).
        doubted_losses: (N,), the same where the answer is doubted; None: the full model answers then, and nothing is
            lost. One that was quantised loses something too.
    """

    budget: float
    work: float
    seconds: float
    confidence: np.ndarray
    losses: np.ndarray
    doubted_losses: np.ndarray | None = None


@dataclass(frozen=True)
class TestedLooks:
    """One first look and the threshold that it was found to allow.

    Attributes:
        budget: Of the first look.
        threshold: Answers less confident are doubted: 0 doubts none. None: no threshold keeps the promise.
        doubted: Share of the rows that the full model looks at.
        work: Mean share of the full model's FLOPs, both looks together.
        seconds: Mean share of the full model's time, as measured, both looks together.
        risk: What was lost on the rows: accuracy for a tolerance, else agreement with the full model.
        bound: Upper bound of what is promised, for inputs like these at this threshold: of the risk, or of the work for
            a mean budget. All looks' bounds hold at once with the confidence asked for; never above the level.
    """

    budget: float
    threshold: float | None
    doubted: float
    work: float
    seconds: float
    risk: float
    bound: float


def log_capital(counts: Any, mean: float, values: Any = (-1.0, 0.0, 1.0)) -> np.ndarray:
    """Log of the capital, 1 at the start, after betting that the differences' true mean is below `mean`, in (-1, 1).

    If it is not, the capital reaches 1 / alpha with probability alpha at most. Waudby-Smith and Ramdas, "Estimating
    means of bounded random variables by betting" (arXiv 2010.09686), averaged over a grid of constant bets.

    Args:
        counts: (..., n), how often each of the differences was seen.
        mean: In (-1, 1).
        values: (n,), the differences, in [-1, 1].

    Returns:
        (...), float64.
    """
    gains = np.log1p(_BETS * (mean - np.asarray(values)[:, None]) / (1.0 - mean))  # (n, bets)
    capital: np.ndarray = np.logaddexp.reduce(np.asarray(counts) @ gains, axis=-1) - math.log(len(_BETS))
    return capital


def _binomial_cdf(counts: np.ndarray, rows: int, share: float) -> np.ndarray:
    """Probability of at most `counts` (T,) successes in `rows` draws, each of probability `share`, in (0, 1)."""
    number = np.arange(1, counts.max() + 1)
    steps = np.log((rows - number + 1) / number) + math.log(share) - math.log1p(-share)
    logs = rows * math.log1p(-share) + np.concatenate([[0.0], steps.cumsum()])
    cdf: np.ndarray = np.exp(np.minimum(np.logaddexp.accumulate(logs), 0.0))
    return cdf[counts]


def p_values(counts: np.ndarray, level: float, signed: bool) -> np.ndarray:
    """(T, 3) counts of -1, 0 and 1 -> (T,) largest probability of so little loss if its mean were `level` or more."""
    if level <= 0.0:
        return np.ones(len(counts))
    if signed:
        return np.exp(np.minimum(-log_capital(counts, level), 0.0))
    return _binomial_cdf(counts[:, 2], int(counts[0].sum()), level)


def upper_bound(p_value: Callable[[float], float], error: float) -> float:
    """The level from which on what was lost has a probability, falling with the level, of at most `error`."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if p_value(middle) <= error:
            high = middle
        else:
            low = middle
    return high


def rows_needed(risk: str, level: float, error: float) -> int:
    """Rows that it takes to show a disagreement or tolerance of `level`, at that error, if no answer changes."""
    if risk == "disagreement":
        return math.ceil(math.log(error) / math.log1p(-level))
    return bisect.bisect_left(range(2**40), -math.log(error), key=lambda rows: float(log_capital([0, rows, 0], level)))


def share_error(error: float, works: Sequence[float]) -> list[float]:
    """What of an error each of some first looks is tested at, by what they cost, so that all of them hold at once."""
    if len(works) == 1:
        return [error]
    errors = [(1.0 - _LEAST_LOOKS_ERROR) * error / (len(works) - 1)] * len(works)
    errors[works.index(min(works))] = _LEAST_LOOKS_ERROR * error
    return errors


def _check_promise(risk: str, level: float, confidence: float, rows: int, works: Sequence[float]) -> None:
    """Raises ValueError unless first looks of these `works` can be tested for the promise on so many rows."""
    if risk not in RISKS:
        raise ValueError(f"risk must be one of {list(RISKS)}, got {risk!r}.")
    for name, value in ((risk, level), ("confidence", confidence)):
        if not isinstance(value, float) or not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be a float in (0, 1), got {value!r}.")
    if not works or not rows:
        raise ValueError(f"there must be at least one first look and one row, got {len(works)} and {rows}.")
    if risk == "mean_budget":
        if level < min(works) - _SLACK:
            raise ValueError(f"mean_budget must pay for a first look at least, {min(works):.4g}, got {level:g}.")
        return
    needed = rows_needed(risk, level, max(share_error(1.0 - confidence, works)))
    if rows < needed:
        raise ValueError(
            f"{risk} must be larger for {rows} rows, got {level:g}: even if no answer changed, it would take {needed} "
            f"rows to promise that with confidence {confidence:g} and {len(works)} first looks to choose from."
        )


def find_looks(looks: Sequence[FirstLook], risk: str, level: float, confidence: float = 0.95) -> list[TestedLooks]:
    """Finds for each first look the cheapest threshold that keeps the promise; knows nothing of models.

    Learn-then-Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing: for each look the thresholds of
    a fixed grid are tested from the safest on, up to the first that fails, at its part of the error 1 - confidence, see
    `share_error`, so that all that is kept holds at once. Disagreements and spent budgets are tested by the binomial
    law, differences of accuracy by betting. The promise is of inputs that the rows are independent draws from.

    Args:
        looks: At least one, all of the same rows.
        risk: "disagreement" with the full model, "tolerance" (accuracy lost), or "mean_budget" (work spent).
        level: What the risk may be, in (0, 1).
        confidence: In (0, 1).

    Returns:
        One for each look, in their order.

    Raises:
        ValueError: An argument is not allowed, or rows are too few to show the level at all; says how many it takes.
    """
    rows = len(looks[0].losses) if looks else 0
    _check_promise(risk, level, confidence, rows, [look.work for look in looks])
    errors = share_error(1.0 - confidence, [look.work for look in looks])
    return [_find_threshold(look, risk, level, error) for look, error in zip(looks, errors, strict=True)]


def _find_threshold(look: FirstLook, risk: str, level: float, error: float) -> TestedLooks:
    rows, signed = len(look.losses), risk == "tolerance"
    thresholds = np.array(THRESHOLDS, look.confidence.dtype)  # compared in the precision that a model compares them in
    first = np.searchsorted(-thresholds, -look.confidence)  # the first threshold at which each row's answer stands
    lost = _count_losses(first, look.losses)[:-1].cumsum(0)  # (T, 3)
    doubted = rows - lost.sum(-1)
    if look.doubted_losses is None:
        lost[:, 1] += doubted
    else:
        after = _count_losses(first, look.doubted_losses)
        lost += after.sum(0) - after[:-1].cumsum(0)
    if risk == "mean_budget":  # the safest doubts none; what is left for second looks is a share of the rows
        tested, limit = np.stack([0 * doubted, rows - doubted, doubted], axis=-1), level - look.work
        chances = p_values(tested, limit, signed)
        chances[-1] = float(limit < -_SLACK)  # without second looks nothing is left to chance
        passed = count_passed(chances[::-1], error)
        place = len(thresholds) - passed
    else:
        tested = lost
        passed = count_passed(p_values(tested, level, signed), error)
        place = passed - 1
    if not passed:
        return TestedLooks(look.budget, None, 1.0, 1.0, 1.0, 0.0, 0.0)
    share = float(doubted[place] / rows)
    bound = upper_bound(lambda mean: p_values(tested[place][None], mean, signed)[0], error)
    if risk == "mean_budget":
        bound = look.work + (bound if THRESHOLDS[place] else 0.0)
    return TestedLooks(
        budget=look.budget,
        threshold=THRESHOLDS[place],
        doubted=share,
        work=look.work + share,
        seconds=look.seconds + share,
        risk=float((lost[place, 2] - lost[place, 0]) / rows),
        bound=bound,
    )


def _count_losses(first: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """How many rows lose -1, 0 and 1, (T + 1, 3), by the `first` (N,) of T thresholds at which their answers stand."""
    counts: np.ndarray = np.bincount(3 * first + losses + 1, minlength=3 * len(THRESHOLDS) + 3).reshape(-1, 3)
    return counts


def count_passed(chances: np.ndarray, error: float) -> int:
    """Tests, in order, of p-values (T,) that pass before the first one that fails."""
    failed = chances > error
    return int(failed.argmax()) if failed.any() else len(failed)


@dataclass(frozen=True)
class Tuning:
    """The answer of `tune`.

    Attributes:
        looks: For `config.looks`; [1.0] where no first look keeps the promise and saves work.
        confidence: For `config.confidence`.
        promise: For `config.promise`: `settings`, `looks` and their `thresholds`, the `bound`, how many rows were
            `doubted`, and the share `lost`, that is the risk on the rows.
        tested: What each first look allows.
        settings: What was asked for, and of how many rows.
    """

    looks: list[float]
    confidence: list[float] | None
    promise: dict[str, Any]
    tested: list[TestedLooks]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tuning":
        """From what `to_dict` returned, through JSON or not."""
        return cls(**{**values, "tested": [TestedLooks(**test) for test in values["tested"]]})

    def __str__(self) -> str:
        risk = self.settings["risk"]
        lost = "accuracy lost" if risk == "tolerance" else "disagreement"
        bounded = "work, at most" if risk == "mean_budget" else "at most"
        lines = [f"{'first look':>10}{'threshold':>12}{'doubted':>9}{'work':>7}{'time':>7}{lost:>15}  {bounded}"]
        for test in self.tested:
            if test.threshold is None:
                lines.append(f"{test.budget:>10.3f}{'none keeps the promise':>25}")
                continue
            cost = f"{test.threshold:>12.5f}{test.doubted:>9.1%}{test.work:>7.3f}{test.seconds:>7.3f}"
            bound = f"{test.bound:.3f}" if risk == "mean_budget" else f"{test.bound:.2%}"
            lines.append(f"{test.budget:>10.3f}{cost}{test.risk:>15.2%}  {bound}")
        call = describe_looks(self.looks, self.confidence)
        return "\n".join([*lines, f"A plain call {call}. {describe_promise(self.promise)}"])


def describe_promise(promise: Mapping[str, Any] | None) -> str:
    """What a plain call promises by `config.promise`, in words; nothing where there is none."""
    if promise is None:
        return ""
    level, risk = promise["level"], promise["risk"]
    texts = f"texts like the {promise['rows']:,} of the calibration"
    sure = f"with {100 * promise['confidence']:.3g}% confidence"
    if risk == "mean_budget":
        return (
            f"It spends at most {level:.3g} of the full model's work in the mean over {texts}, {sure}; "
            f"{promise['lost']:.2%} of those were answered otherwise than by the full model."
        )
    goal = f"differ from the full model's on at most {100 * level:.3g}% of {texts}, {sure}."
    if risk == "tolerance":
        goal = f"lose at most {100 * level:.3g} points of accuracy on the full model's for {texts}, {sure}."
    if promise["looks"] == [1.0]:
        return f"No first look that saves work was shown to give answers that {goal}"
    return f"Its answers {goal}"


def kept_promise(config: Any) -> dict[str, Any] | None:
    """`config.promise`, as long as the looks of a plain call are those that it was made for."""
    promise = config.promise
    if promise is None:
        return None
    now = (list(config.looks or ()), list(config.confidence or ()))
    return promise if now == (promise["looks"], promise["thresholds"]) else None


def decisions(logits: Any, problem_type: str | None) -> Any:
    """What is answered, by logits of a problem that is no regression.

    Args:
        logits: (B, num_labels), a tensor or an array.
        problem_type: As in a configuration.

    Returns:
        Alike, (B,) int64, the label; or for several labels (B, num_labels) bool, whether each is on.
    """
    return logits > 0 if problem_type == "multi_label_classification" else logits.argmax(-1)


def check_looks_twice(model: nn.Module) -> Any:
    """Returns the model; raises ValueError unless it is a classifier with a narrow encoder beside a full one."""
    ours: Any = model
    check_classifier(model)
    if ours.narrow is None or not ours.config.full_encoder or not has_confidence(ours.config):
        config = ours.config
        raise ValueError(
            "model must look twice: with a narrow encoder beside a full one, and labels to choose from, got "
            f"router={config.router!r}, full_encoder={config.full_encoder} and num_labels={config.num_labels}."
        )
    return ours


def _check_first_looks(budgets: Iterable[float], config: Any) -> list[float]:
    """Each budget once, in their order; raises ValueError where one is none of a first look, or none is given."""
    distinct = list(dict.fromkeys(budgets))
    if not distinct:
        raise ValueError("budgets must hold at least one, that of a first look, got none.")
    for budget in distinct:
        if not is_share(budget) or budget > config.narrow_budget:
            narrow = f"narrow_budget={config.narrow_budget:g}"
            raise ValueError(f"budget must be at most {narrow}, that of a first look, got {budget!r}.")
    return distinct


def find_losses(answers: np.ndarray, full: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """What each of N rows loses if `answers` stand in place of the full model's.

    Args:
        answers: (N,) labels, or (N, num_labels) whether each is on.
        full: The full model's, of the same shape.
        labels: (N,), for differences of accuracy; None: for disagreements.

    Returns:
        (N,), integers in {-1, 0, 1}, as `FirstLook.losses`.
    """
    if labels is not None:
        return (full == labels).astype(int) - (answers == labels).astype(int)
    differs = answers != full
    return (differs if differs.ndim == 1 else differs.any(-1)).astype(int)


_NOT_INPUTS = ("label", "labels", "teacher_logits")


class Calibration:
    """What the full model and first looks say of rows, for promises and margins alike.

    Args:
        model: A BudgetFormer classifier that looks twice; asked in eval mode, and left in the mode it was in.
        batches: What `forward` takes; labels and teachers' answers are ignored.
        budgets: Of first looks, each at most `config.narrow_budget`.
        full: Whether the full model is asked too.

    Attributes:
        budgets: Each once.
        work: For each budget its share of the full model's FLOPs.
        answers: For each budget (N,) labels, or (N, num_labels) whether each is on; of the full model those at 1.0.
        confidence: For each budget (N,), in the precision of a call, at least float32.
        seconds: For each budget what all rows took, and for 1.0 too.

    Raises:
        ValueError: The model is of another kind, a budget is none of a first look, or there is no batch.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, torch.Tensor]],
        budgets: Sequence[float],
        full: bool = True,
    ) -> None:
        ours = check_looks_twice(model)
        self.budgets = _check_first_looks(budgets, ours.config)
        levels = [*self.budgets, 1.0] if full else self.budgets
        answers: dict[float, list[torch.Tensor]] = {budget: [] for budget in levels}
        confidence: dict[float, list[torch.Tensor]] = {budget: [] for budget in levels}
        self.seconds = dict.fromkeys(levels, 0.0)
        was_training, device, kind = model.training, ours.narrow.steps.device, ours.config.problem_type
        model.eval()
        try:
            for batch in batches:
                inputs = {name: x for name, x in batch.items() if name not in _NOT_INPUTS}
                inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
                for budget in levels:
                    start = time.perf_counter()
                    logits = ours(**inputs, budget=budget).logits
                    confidence[budget].append(margin_of(logits, kind).cpu())
                    answers[budget].append(decisions(logits, kind).cpu())
                    self.seconds[budget] += time.perf_counter() - start
        finally:
            model.train(was_training)
        if not confidence[levels[0]]:
            raise ValueError("batches must hold at least one batch, got none.")
        self.work = {budget: ours.narrow.order.look(budget).cost for budget in self.budgets}
        self.answers = {budget: torch.cat(parts).numpy() for budget, parts in answers.items()}
        self.confidence = {budget: torch.cat(parts).numpy() for budget, parts in confidence.items()}

    def first_looks(self, labels: np.ndarray | None = None) -> list[FirstLook]:
        """For `find_looks`: disagreements with the full model, or with `labels` (N,) differences of accuracy."""
        looks = []
        for budget in self.budgets:
            losses = find_losses(self.answers[budget], self.answers[1.0], labels)
            seconds = self.seconds[budget] / self.seconds[1.0]
            looks.append(FirstLook(budget, self.work[budget], seconds, self.confidence[budget], losses))
        return looks

    def margins(self, budget: float) -> dict[str, Any]:
        """For `config.margins`."""
        quantiles = np.quantile(self.confidence[budget].astype(np.float64), np.linspace(0, 1, _QUANTILES))
        return {"budget": budget, "quantiles": [round(x, 6) for x in quantiles.tolist()]}


def calibrate_margins(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], budget: float | None = None
) -> None:
    """Stores how sure the first look is of its answers, so that budgets in between can be asked for.

    A budget between `config.narrow_budget` and 1 is a mean: the share of inputs that the full encoder may look at are
    those with the smallest margins, by the quantiles stored here in `config.margins`. No labels are needed.

    Args:
        model: A BudgetFormer classifier with a narrow encoder; asked in eval mode, and left in the mode it was in.
        batches: What `forward` takes, a few hundred rows like those to come; labels are ignored.
        budget: Of the first look, at most `config.narrow_budget`. None: the first of `config.looks`, or 1/12.

    Raises:
        ValueError: The model is of another kind, the budget is none of a first look, or there is no batch.
    """
    ours = check_looks_twice(model)
    budget = first_look_budget(ours.config) if budget is None else budget
    ours.config.margins = Calibration(model, batches, [budget], full=False).margins(budget)


def best_looks(tested: Sequence[TestedLooks], risk: str) -> TestedLooks:
    """What `find_looks` found cheapest, of a mean budget what differs least; a budget of 1 where nothing saves work."""
    kept = [test for test in tested if test.threshold is not None and test.work < 1.0]
    alone = TestedLooks(1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    if risk == "mean_budget":
        return min(kept, key=lambda test: (test.risk, test.work), default=alone)
    return min(kept, key=lambda test: (test.work, test.risk), default=alone)


def choose_looks(
    calibration: Calibration, risk: str, level: float, confidence: float = 0.95, labels: np.ndarray | None = None
) -> Tuning:
    """The cheapest looks, by their work, that keep a promise; of a mean budget those that differ least.

    Work and not the seconds measured decides, so that the answer is the same on every machine and in every process.

    Args:
        calibration: Of the rows, the full model's answers too.
        risk: As in `find_looks`.
        level: As in `find_looks`.
        confidence: As in `find_looks`.
        labels: (N,), for the risk "tolerance".

    Raises:
        ValueError: As in `find_looks`.
    """
    if risk == "tolerance" and labels is None:
        raise ValueError("labels must be given for a tolerance, got None.")
    return tune_looks(calibration.first_looks(labels if risk == "tolerance" else None), risk, level, confidence)


def tune_looks(first_looks: Sequence[FirstLook], risk: str, level: float, confidence: float = 0.95) -> Tuning:
    """As `choose_looks`, of what first looks made of the rows; knows nothing of models."""
    tested = find_looks(first_looks, risk, level, confidence)
    rows = len(first_looks[0].losses)
    best = best_looks(tested, risk)
    thresholds = [best.threshold] if best.threshold else []
    looks = [best.budget, 1.0] if thresholds else [best.budget]
    settings = {"risk": risk, "level": level, "confidence": confidence, "rows": rows}
    promise = {**settings, "looks": looks, "thresholds": thresholds, "bound": round(best.bound, 6)}
    promise |= {"lost": round(best.risk, 6), "doubted": round(best.doubted * rows)}
    return Tuning(looks, thresholds or None, promise, tested, settings)


def apply_tuning(config: Any, tuning: Tuning, calibration: Calibration) -> None:
    """Makes what was found the looks of a plain call: sets `looks`, `confidence`, `promise` and `margins`."""
    config.confidence, config.looks = None, tuning.looks
    config.confidence, config.promise = tuning.confidence, tuning.promise
    config.margins = calibration.margins(min(tuning.looks[0], max(calibration.budgets)))


def tune(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    disagreement: float | None = None,
    tolerance: float | None = None,
    mean_budget: float | None = None,
    confidence: float = 0.95,
    budgets: Iterable[float] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    write: bool = True,
) -> Tuning:
    """Finds the cheapest looks that keep a promise on inputs like these, and makes them those of a plain call.

    One of three promises, `disagreement=0.01` if none is named. The method is that of `find_looks`; among the first
    looks that keep the promise the one that costs least work is chosen, second looks counted. The time that the looks
    took on the rows is shown beside.

    ```python
    print(tune(model, data["validation"], tokenizer, disagreement=0.01))
    model.save_pretrained("my-tuned-budgetformer")
    ```

    Args:
        model: A BudgetFormer classifier that looks twice; weights and mode stay as they are.
        dataset: Rows that the model was not trained on: tokenized, or texts in the columns `text` and, for pairs,
            `text_pair`. Labels, as in `tools.tables.label_ids`, are needed for a tolerance only.
        tokenizer: Of the model.
        disagreement: Share of the inputs, in (0, 1), on which answers may differ from the full model's.
        tolerance: Accuracy that may be lost, as a fraction: 0.005 is half a point. One label for each input.
        mean_budget: Mean share of the full model's work that may be spent; answers differ as little as it allows.
        confidence: In (0, 1).
        budgets: First looks to choose from, each at most `config.narrow_budget`. None: see `look_budgets`.
        batch_size: Rows the model reads at a time, >= 1; sorted by length within 64 batches.
        max_length: Tokens kept of a text; only for rows that are not tokenized yet. None: all the tokenizer allows.
        write: Whether `config.looks`, `confidence`, `promise` and `margins` are set.

    Raises:
        ValueError: An argument is not allowed, or rows are too few to show the level at all; says how many it takes.
    """
    ours = check_looks_twice(model)
    promises = {"disagreement": disagreement, "tolerance": tolerance, "mean_budget": mean_budget}
    named = {name: level for name, level in promises.items() if level is not None} or {"disagreement": 0.01}
    if len(named) > 1:
        raise ValueError(f"one of disagreement, tolerance and mean_budget must be given, got {named}.")
    [(risk, level)] = named.items()
    check_batch_size(batch_size)
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not {"input_ids", "text"} & set(columns) or not len(dataset):
        raise ValueError(
            "dataset must be a datasets.Dataset of at least one row, with a column 'input_ids' or 'text', got "
            f"{type(dataset).__name__} with {columns}."
        )
    labels = label_ids(dataset, ours.config) if risk == "tolerance" else None
    candidates = _check_first_looks(look_budgets(ours.config) if budgets is None else budgets, ours.config)
    works = [ours.narrow.order.look(budget).cost for budget in candidates]
    _check_promise(risk, level, confidence, len(dataset), works)  # before the model is asked, which takes long
    plain, order = dataset.with_format(None), []

    def batches() -> Iterable[Any]:
        step = WINDOW * batch_size
        with logging.tqdm(total=len(dataset), desc="Tuning", leave=False, disable=None) as bar:
            for start in range(0, len(dataset), step):
                for places, batch in batches_by_length(plain[start : start + step], tokenizer, batch_size, max_length):
                    order.append(start + places)
                    yield batch
                    bar.update(len(places))

    calibration = Calibration(model, batches(), candidates)
    if labels is not None:
        labels = labels[np.concatenate(order)]
    tuning = choose_looks(calibration, risk, level, confidence, labels)
    if write:
        apply_tuning(ours.config, tuning, calibration)
    return tuning


def warn_of_shift(config: Any, doubted: int, rows: int) -> None:
    """Warns where new inputs are doubted more or less often than calibration saw, which voids `config.promise`.

    Fisher's exact test of two proportions, two-sided, at 1%. It sees shifts that change how sure the first look is, no
    others.

    Args:
        config: Of the model that looked, by `config.looks`.
        doubted: New inputs that spent more than the first look.
        rows: All new inputs.
    """
    promise = kept_promise(config)
    if promise is None or len(promise["looks"]) < 2 or not rows:
        return
    before, most = promise["doubted"], promise["rows"]
    # How the doubtful could have fallen on new inputs and those of the calibration, if all were alike.
    falls = torch.arange(max(0, before + doubted - most), min(rows, before + doubted) + 1, dtype=torch.float64)
    cells = torch.stack([falls, rows - falls, before + doubted - falls, most - before - doubted + falls])
    chances = (-torch.lgamma(cells + 1.0).sum(0)).softmax(0)
    as_rare = chances <= chances[doubted - int(falls[0])] * (1.0 + 1e-7)
    if chances[as_rare].sum() < _SHIFT_ERROR:
        logger.warning(
            f"{doubted / rows:.1%} of these {rows:,} inputs were doubted, but {before / most:.1%} of those that the "
            "promise was calibrated on: they are not alike, and the promise does not hold here. Tune again on inputs "
            "like these."
        )


__all__ = [
    "Calibration",
    "FirstLook",
    "TestedLooks",
    "Tuning",
    "apply_tuning",
    "best_looks",
    "calibrate_margins",
    "check_looks_twice",
    "choose_looks",
    "count_passed",
    "decisions",
    "describe_promise",
    "find_looks",
    "find_losses",
    "kept_promise",
    "log_capital",
    "look_budgets",
    "p_values",
    "rows_needed",
    "share_error",
    "tune",
    "tune_looks",
    "upper_bound",
    "warn_of_shift",
]
