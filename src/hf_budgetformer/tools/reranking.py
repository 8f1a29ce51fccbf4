"""Reranking in two stages: all candidates cheaply, and the best once more; how many, with a bound on the loss."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_budgetformer import is_share
from .batching import batches_by_length, check_batch_size, tokenized
from .checkpoints import check_classifier
from .tuning import count_passed, log_capital, p_values, rows_needed, upper_bound


# Of the look at all candidates, and of that at the best of them.
BUDGETS = (1 / 6, 1.0)
RISKS = ("lost_ndcg", "changed")


def merge_rankings(first: np.ndarray, last: np.ndarray, keep: int) -> np.ndarray:
    """The ranking of two stages: the best `keep` by first scores ranked by their last ones, the others behind them.

    Args:
        first: (n,), scores of the first look.
        last: (n,), scores of the last look; only those of the best are read.
        keep: How many are looked at again, >= 0.

    Returns:
        (n,), int64, numbers of the candidates, best first; of equal scores the earlier candidate comes first.
    """
    order = np.argsort(-first, kind="stable")
    kept, rest = np.sort(order[:keep]), order[keep:]
    return np.concatenate([kept[np.argsort(-last[kept], kind="stable")], rest])


def ndcg(order: np.ndarray, relevant: Collection[int], top_k: int = 10) -> float:
    """Normalised discounted cumulative gain of the best `top_k`; 0 where nothing is relevant.

    Args:
        order: (n,), numbers of the candidates, best first.
        relevant: Numbers of those that answer the query.
        top_k: Places that count, >= 1.
    """
    places = [place for place, number in enumerate(order[:top_k].tolist()) if number in relevant]
    most = sum(1.0 / math.log2(place + 2) for place in range(min(top_k, len(relevant))))
    return sum(1.0 / math.log2(place + 2) for place in places) / most if most else 0.0


def ranking_losses(
    first: np.ndarray, last: np.ndarray, relevant: Collection[int] | None = None, top_k: int = 10
) -> np.ndarray:
    """What two stages lose against the last look at all candidates of a query, for each number looked at again.

    Args:
        first: (n,), scores of the first look.
        last: (n,), scores of the last look.
        relevant: Numbers of the candidates that answer the query; None: it is asked whether the best `top_k` change.
        top_k: Places that count, >= 1.

    Returns:
        (n + 1,), of 0, 1... n looked at again: NDCG lost, in [-1, 1]; or 1 where the best candidates, or their order,
        are others, else 0.
    """
    orders = [merge_rankings(first, last, keep) for keep in range(len(first) + 1)]
    full = orders[-1]
    if relevant is None:
        return np.array([float(not np.array_equal(order[:top_k], full[:top_k])) for order in orders])
    best = ndcg(full, relevant, top_k)
    return np.array([best - ndcg(order, relevant, top_k) for order in orders])


def choose_keep(losses: np.ndarray, risk: str, level: float, confidence: float = 0.95) -> tuple[int, float]:
    """The smallest number to look at again whose expected loss is below a level; knows nothing of models.

    Learn-then-Test (Angelopoulos et al., arXiv 2110.01052): numbers are tested from all down to none, up to the first
    that fails. Changes are tested by the binomial law, lost NDCG by betting, as in `tools.tuning`. The promise is of
    queries that these are independent draws from.

    Args:
        losses: (N, K + 1), of each query when 0, 1... K candidates are looked at again; zeros in the last column.
        risk: "lost_ndcg" or "changed".
        level: What the mean loss may be, in (0, 1).
        confidence: In (0, 1).

    Returns:
        The number, and the upper bound of its mean loss at that confidence.

    Raises:
        ValueError: An argument is not allowed, or queries are too few to show the level at all; says how many it takes.
    """
    if risk not in RISKS:
        raise ValueError(f"risk must be one of {list(RISKS)}, got {risk!r}.")
    for name, value in ((risk, level), ("confidence", confidence)):
        if not isinstance(value, float) or not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be a float in (0, 1), got {value!r}.")
    error, signed = 1.0 - confidence, risk == "lost_ndcg"
    needed = rows_needed("tolerance" if signed else "disagreement", level, error)
    if len(losses) < needed:
        raise ValueError(
            f"{risk} must be larger for {len(losses)} queries, got {level:g}: even if nothing changed, it would take "
            f"{needed} queries to promise that with confidence {confidence:g}."
        )

    def test(keep: int, mean: float) -> float:
        """Largest probability of so little loss if its mean were `mean` or more."""
        lost = losses[:, keep]
        if signed:
            return math.exp(min(-float(log_capital(np.ones(len(lost)), mean, lost)), 0.0))
        changed = int(lost.sum())
        return float(p_values(np.array([[0, len(lost) - changed, changed]]), mean, signed=False)[0])

    most = losses.shape[1] - 1
    passed = count_passed(np.array([test(keep, level) for keep in range(most, -1, -1)]), error)
    keep = most + 1 - passed
    return keep, upper_bound(lambda mean: test(keep, mean), error)


@dataclass(frozen=True)
class RankingTuning:
    """The answer of `tune_ranking`.

    Attributes:
        keep: Candidates of a query that are looked at again; 1.0, that is all, where two stages would not save work.
        budgets: Of the two looks.
        work: Mean share of the full model's work that a candidate takes, both looks together.
        lost: On these queries: mean NDCG lost, or share of the queries whose best candidates change.
        bound: Upper bound of it for queries like these, at the confidence asked for.
        settings: What was asked for, and of how many queries.
    """

    keep: int | float
    budgets: tuple[float, float]
    work: float
    lost: float
    bound: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        settings = self.settings
        sure = f"with {100 * settings['confidence']:.3g}% confidence"
        of = f"queries like the {settings['queries']:,} of the calibration, {sure}"
        if settings["risk"] == "lost_ndcg":
            promise = f"loses at most {settings['level']:g} of NDCG@{settings['top_k']} on the full model's for {of}"
        else:
            share = f"{100 * settings['level']:.3g}%"
            promise = f"changes the full model's best {settings['top_k']} for at most {share} of {of}"
        if self.keep == 1.0 and isinstance(self.keep, float):
            return f"No ranking in two stages that saves work was shown to be one that {promise}."
        first, last = (f"{budget:.3g}" for budget in self.budgets)
        return (
            f"Looking at all candidates at a budget of {first} and again at the best {self.keep} at {last} {promise}; "
            f"here {self.lost:.4g}, bound {self.bound:.4g}, work {self.work:.3f}."
        )


def _check_ranker(model: nn.Module, budgets: Sequence[float]) -> Any:
    ours: Any = model
    check_classifier(model)
    if ours.num_labels != 1 or ours.narrow is None or not ours.config.full_encoder:
        raise ValueError(
            "model must have one label, and a narrow encoder beside a full one, to rank with, got "
            f"num_labels={ours.num_labels}, router={ours.config.router!r} and full_encoder={ours.config.full_encoder}."
        )
    narrow = ours.config.narrow_budget
    allowed = all(is_share(budget) and (budget <= narrow or budget == 1.0) for budget in budgets)
    if len(budgets) != 2 or not allowed or not budgets[0] < budgets[1]:
        raise ValueError(
            f"budgets must be two rising floats, each at most narrow_budget={narrow:g}, or 1.0, got {budgets!r}."
        )
    return ours


def _check_passages(name: str, passages: Any) -> None:
    if isinstance(passages, str) or not isinstance(passages, Sequence) or not len(passages):
        raise ValueError(f"{name} must be a list of at least one text, got {passages!r}.")


def _count_kept(keep: Any, passages: int) -> int:
    """How many of so many passages are looked at again."""
    if isinstance(keep, float) and 0.0 <= keep <= 1.0:
        return math.ceil(keep * passages - 1e-9)  # .07 of 100 is 7, whatever the last bit says
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0:
        return min(keep, passages)
    raise ValueError(
        f"keep must be a number of passages, an integer >= 0, or a share of them, a float in [0, 1], got {keep!r}: or "
        "let tune_ranking find and store it."
    )


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; the mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _score(
    model: Any, rows: Mapping[str, list[Any]], places: np.ndarray, tokenizer: Any, batch_size: int, budget: float
) -> np.ndarray:
    """Scores (n,) float32 of the rows at `places` (n,)."""
    scores = np.empty(len(places), np.float32)
    chosen = {name: [values[place] for place in places] for name, values in rows.items()}
    for indices, batch in batches_by_length(chosen, tokenizer, batch_size):
        scores[indices] = model(**batch.to(model.device), budget=budget).logits[:, 0].float().cpu().numpy()
    return scores


def _pairs(query: str, passages: Sequence[str]) -> dict[str, list[str]]:
    return {"text": [query] * len(passages), "text_pair": list(passages)}


def rank(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    passages: Sequence[str],
    budgets: tuple[float, float] | None = None,
    keep: int | float | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """Ranks passages for a query: a cheap look at all of them, and another at the best.

    ```python
    for hit in rank(model, tokenizer, "how many people live in Berlin?", passages, keep=10, top_k=3):
        print(hit["score"], passages[hit["corpus_id"]])
    ```

    Args:
        model: A BudgetFormer classifier with one label; asked in eval mode, and left in the mode it was in.
        tokenizer: Of the model.
        query: A text.
        passages: At least one text.
        budgets: Of the two looks, rising: each at most `config.narrow_budget`, or 1. None: those of `config.ranking`,
            which `tune_ranking` stores, or (1/6, 1).
        keep: How many of the best are looked at again: a number >= 0, or a share in [0, 1], a float, rounded up. Where
            that is all, there is no first look. None: that of `config.ranking`.
        top_k: How many are returned, >= 1; None: all.
        batch_size: Passages the model reads at a time, >= 1, sorted by length.
        max_length: Tokens kept of a query and a passage together; None: all the tokenizer allows.

    Returns:
        Best first, a dictionary each: `corpus_id`, the passage's number; `score`, the model's logit; `spent`, the share
        of the full model's work that it took. Those that were looked at again come before all others: scores of
        different looks are not compared.

    Raises:
        ValueError: An argument is not allowed, or `keep` is neither given nor stored.
    """
    config: Any = getattr(model, "config", None)
    stored = getattr(config, "ranking", None) or {}
    levels: Sequence[float] = budgets or stored.get("budgets", BUDGETS)
    ours = _check_ranker(model, levels)
    first, last = levels
    _check_passages("passages", passages)
    check_batch_size(batch_size)
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be None or an integer >= 1, got {top_k!r}.")
    count = len(passages)
    kept = _count_kept(stored.get("keep") if keep is None else keep, count)
    rows = tokenized(_pairs(query, passages), tokenizer, max_length)
    scores, spent = np.zeros(count, np.float32), np.zeros(count, np.float32)
    everything = np.arange(count)
    with _answering(model):
        if kept < count:
            scores = _score(ours, rows, everything, tokenizer, batch_size, first)
            spent += ours.narrow.order.look(first).cost
        best = np.argsort(-scores, kind="stable")[:kept]
        again = scores.copy()
        if kept:
            again[best] = _score(ours, rows, best, tokenizer, batch_size, last)
            spent[best] += 1.0 if last == 1.0 else ours.narrow.order.look(last).cost
    order = merge_rankings(scores, again, kept)[:top_k]
    return [
        {"corpus_id": int(number), "score": float(again[number]), "spent": float(spent[number])} for number in order
    ]


def tune_ranking(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    passages: Sequence[Sequence[str]],
    relevant: Sequence[Collection[int]] | None = None,
    lost_ndcg: float | None = None,
    changed: float | None = None,
    top_k: int = 10,
    budgets: tuple[float, float] = BUDGETS,
    confidence: float = 0.95,
    batch_size: int = 32,
    max_length: int | None = None,
    write: bool = True,
) -> RankingTuning:
    """Finds how few of the best passages must be looked at again, so that rankings keep a promise.

    One of two promises, `changed=0.05` if none is named. The method is that of `choose_keep`.

    ```python
    print(tune_ranking(model, tokenizer, queries, candidates, relevant, lost_ndcg=0.01))
    model.save_pretrained("my-reranker")
    ```

    Args:
        model: A BudgetFormer classifier with one label; weights and mode stay as they are.
        tokenizer: Of the model.
        queries: N texts like those to come.
        passages: The candidates of each query, at least one.
        relevant: Of each query the numbers of its candidates that answer it; needed for `lost_ndcg` only.
        lost_ndcg: What may be lost of the full model's mean NDCG of the best `top_k`, in (0, 1).
        changed: Share of the queries, in (0, 1), whose best `top_k` or their order may be others than the full model's.
        top_k: Places that count, >= 1.
        budgets: Of the two looks, as in `rank`.
        confidence: In (0, 1).
        batch_size: Passages the model reads at a time, >= 1.
        max_length: Tokens kept of a query and a passage together; None: all the tokenizer allows.
        write: Whether `config.ranking` is set, which `rank` reads.

    Raises:
        ValueError: An argument is not allowed, or queries are too few to show the level at all; says how many it takes.
    """
    ours = _check_ranker(model, budgets)
    check_batch_size(batch_size)
    promises = {"lost_ndcg": lost_ndcg, "changed": changed}
    named = {name: level for name, level in promises.items() if level is not None} or {"changed": 0.05}
    if len(named) > 1:
        raise ValueError(f"one of lost_ndcg and changed must be given, got {named}.")
    [(risk, level)] = named.items()
    if risk == "lost_ndcg" and relevant is None:
        raise ValueError("relevant must be given for lost_ndcg, got None.")
    if not len(queries) or len(passages) != len(queries) or (relevant is not None and len(relevant) != len(queries)):
        raise ValueError(
            f"queries, passages and relevant must be as many, at least one, got {len(queries)}, {len(passages)} and "
            f"{None if relevant is None else len(relevant)}."
        )
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be an integer >= 1, got {top_k!r}.")
    for number, given in enumerate(passages):
        _check_passages(f"passages[{number}]", given)
    choose_keep(np.zeros((len(queries), 1)), risk, level, confidence)  # before the model is asked, which takes long
    most = max(len(given) for given in passages)
    losses = np.zeros((len(queries), most + 1))
    with _answering(model), logging.tqdm(total=len(queries), desc="Tuning", leave=False, disable=None) as bar:
        for number, (query, given) in enumerate(zip(queries, passages, strict=True)):
            rows, places = tokenized(_pairs(query, given), tokenizer, max_length), np.arange(len(given))
            first, last = (_score(ours, rows, places, tokenizer, batch_size, budget) for budget in budgets)
            answers = relevant[number] if risk == "lost_ndcg" else None  # type: ignore[index]
            losses[number, : len(given) + 1] = ranking_losses(first, last, answers, top_k)
            bar.update(1)
    keep, bound = choose_keep(losses, risk, level, confidence)
    costs = [1.0 if budget == 1.0 else ours.narrow.order.look(budget).cost for budget in budgets]
    work = costs[0] + costs[1] * float(np.mean([min(keep, len(given)) / len(given) for given in passages]))
    settings = {"risk": risk, "level": level, "confidence": confidence, "queries": len(queries), "top_k": top_k}
    tuning = RankingTuning(keep, budgets, work, float(losses[:, keep].mean()), bound, settings)
    if work >= costs[1]:
        tuning = RankingTuning(1.0, budgets, costs[1], 0.0, 0.0, settings)
    if write:
        numbers = {"lost": round(tuning.lost, 6), "bound": round(tuning.bound, 6)}
        ours.config.ranking = {"budgets": list(budgets), "keep": tuning.keep, **settings, **numbers}
    return tuning


__all__ = [
    "BUDGETS",
    "RankingTuning",
    "choose_keep",
    "merge_rankings",
    "ndcg",
    "rank",
    "ranking_losses",
    "tune_ranking",
]
