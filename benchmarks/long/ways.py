"""Ways to read documents, judged by what the model said of their chunks: accuracy, agreement, and what they cost."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.documents import POOLINGS, Chunks, DocumentLook, look_through


PROBLEM = "single_label_classification"
# Agreement with all open on all chunks that looks must keep on calibration rows.
KEPT = 0.99
FIRST_LOOKS = (1 / 12, 1 / 6, 1 / 4)
CASCADES = {
    "width: all chunks at 1/12, then open": [(None, 1 / 12), (None, 1.0)],
    "width: all chunks at 1/4, then open": [(None, 1 / 4), (None, 1.0)],
    "length: a chunk open, then all": [(1, 1.0), (None, 1.0)],
    "both: a chunk at 1/12, then all open": [(1, 1 / 12), (None, 1.0)],
    "both: a chunk at 1/12, all at 1/12, all open": [(1, 1 / 12), (None, 1 / 12), (None, 1.0)],
    "both: a chunk at 1/4, all at 1/4, all open": [(1, 1 / 4), (None, 1 / 4), (None, 1.0)],
}
COSTS = (0.15, 0.25, 0.33, 0.5)
# Of confidence; fine at both ends, for with many labels most margins are small.
GRID = np.concatenate([
    [0.0], np.linspace(0.005, 0.045, 9), np.linspace(0.05, 0.95, 19), [0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0]
])  # fmt: skip


class Answered(NamedTuple):
    """What a model says of the documents of a split.

    Args:
        chunks: By budget, logits (N, num_labels) of every chunk.
        ends: By budget, logits (D, num_labels) of the beginning and end of each document.
        owners: (N,), the document of each chunk.
        lengths: (N,), tokens of each chunk.
        tokens_of_ends: (D,).
        labels: (D,).
    """

    chunks: dict[float, np.ndarray]
    ends: dict[float, np.ndarray]
    owners: np.ndarray
    lengths: np.ndarray
    tokens_of_ends: np.ndarray
    labels: np.ndarray

    def through(
        self, looks: Sequence[tuple[int | None, float]], thresholds: Sequence[float], pooling: str = "mean"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answers (D,) and what they cost (D,), by looks at the documents."""
        rows = {"input_ids": [range(x) for x in self.lengths]}

        def ask(places: np.ndarray, budget: float | None) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(self.chunks[budget][places]), torch.full((len(places),), budget)  # type: ignore[index, call-overload]

        answers = look_through(
            ask, Chunks(rows, self.owners), [DocumentLook(*x) for x in looks], thresholds, pooling, PROBLEM
        )
        return answers.logits.argmax(-1).numpy(), answers.spent.numpy()

    def looked(self, first: float, threshold: float, of: str) -> tuple[np.ndarray, np.ndarray]:
        """The same, by looks at each chunk ("chunks"), at the first alone ("first"), or at both ends ("ends")."""
        part = self.ends if of == "ends" else self.chunks
        owners = np.arange(len(self.labels)) if of == "ends" else self.owners
        lengths = self.tokens_of_ends if of == "ends" else self.lengths
        doubted = (confidence(torch.from_numpy(part[first]), PROBLEM) < threshold).numpy()
        logits = np.where(doubted[:, None], part[1.0], part[first])
        cost = first + doubted
        places = np.unique(owners, return_index=True)[1] if of == "first" else np.arange(len(owners))

        def ask(at: np.ndarray, budget: float | None) -> tuple[torch.Tensor, torch.Tensor]:
            rows = places[at]
            return torch.from_numpy(logits[rows]), torch.from_numpy(cost[rows].astype(np.float32))

        chunks = Chunks({"input_ids": [range(x) for x in lengths[places]]}, owners[places])
        answers = look_through(ask, chunks, [DocumentLook(None, None)], [], "mean", PROBLEM)
        # Of the work on the whole document.
        whole = np.bincount(self.owners, self.lengths)
        share = np.bincount(owners[places], lengths[places], len(whole)) / whole
        return answers.logits.argmax(-1).numpy(), answers.spent.numpy() * share


def _score(answers: np.ndarray, spent: np.ndarray, documents: Answered, reference: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((answers == documents.labels).mean()),
        "agreement": float((answers == reference).mean()),
        "cost": float(spent.mean()),
    }


def _cheapest(trials: dict[Any, tuple[np.ndarray, np.ndarray]], reference: np.ndarray, kept: float = KEPT) -> Any:
    """The key of the cheapest answers that agree enough; where none do, of those that agree most."""
    agreement = {key: (answers == reference).mean() for key, (answers, _) in trials.items()}
    good = [key for key in trials if agreement[key] >= kept]
    return min(good, key=lambda key: trials[key][1].mean()) if good else max(agreement, key=lambda key: agreement[key])


def _thresholds(looks: Sequence[Any]) -> list[tuple[float, ...]]:
    """Of every look but the last; where there are two, a coarser grid of pairs."""
    grid = GRID if len(looks) == 2 else GRID[::2]
    return [tuple(x) for x in product(grid, repeat=len(looks) - 1)]


def judge(calibration: Answered, test: Answered) -> dict[str, Any]:
    """Every way: its figures on test rows, with thresholds from calibration rows."""
    whole = [(None, 1.0)]
    reference = {split: part.through(whole, [])[0] for split, part in (("calibration", calibration), ("test", test))}
    ways: dict[str, Any] = {}

    def add(name: str, result: tuple[np.ndarray, np.ndarray], **more: Any) -> None:
        ways[name] = {**_score(*result, test, reference["test"]), **more}

    for pooling in POOLINGS:
        add("chunks" if pooling == "mean" else f"chunks, {pooling}", test.through(whole, [], pooling))
    for budget in FIRST_LOOKS:
        add(f"chunks at 1/{1 / budget:.3g}", test.through([(None, budget)], []))
    for of in ("first", "ends", "chunks"):
        if of != "chunks":
            add(of, test.looked(1.0, 0.0, of))
        expected = calibration.looked(1.0, 0.0, of)[0]
        tried = {(b, t): calibration.looked(b, t, of) for b in FIRST_LOOKS for t in GRID}
        budget, threshold = _cheapest(tried, expected)
        looks = {"chunk_looks": [budget, 1.0], "thresholds": [float(threshold)], "of": of}
        add(f"{of}, looks", test.looked(budget, threshold, of), **looks)
    at_cost: dict[str, Any] = {f"{cost}": {} for cost in COSTS}
    chosen: dict[float, tuple[float, float, str, Any]] = {}  # of each cost: agreement and cost on calibration rows
    for name, looks in CASCADES.items():
        tried = {x: calibration.through(looks, x) for x in _thresholds(looks)}
        thresholds = _cheapest(tried, reference["calibration"])
        add(name, test.through(looks, thresholds), looks=looks, thresholds=list(map(float, thresholds)))
        for cost in COSTS:  # the thresholds of that cost that agree most on calibration rows
            paid = {
                x: (float((answers == reference["calibration"]).mean()), float(spent.mean()))
                for x, (answers, spent) in tried.items()
                if spent.mean() <= cost
            }
            if paid:
                best = max(paid, key=lambda x: paid[x])
                at_cost[f"{cost}"][name] = _score(*test.through(looks, best), test, reference["test"])
                chosen[cost] = max(chosen.get(cost, (0.0, 0.0, "", ())), (*paid[best], name, best))
    for cost, (_, _, name, thresholds) in chosen.items():
        looks = CASCADES[name]
        result = test.through(looks, thresholds)
        add(f"looks, {cost} of the work", result, looks=looks, thresholds=list(map(float, thresholds)), kind=name)
    return {**ways, "at_cost": at_cost}


def scores_of_needles(
    logits: dict[str, dict[float, np.ndarray]], labels: dict[str, np.ndarray], hops: np.ndarray, depth: np.ndarray
) -> dict[str, Any]:
    """What was spent against known difficulty.

    Args:
        logits: By split and budget, (N, 2).
        labels: By split, (N,).
        hops: Of the test rows, (N,).
        depth: Of the test rows, (N,).
    """
    looks = [(None, 1 / 12), (None, 1 / 4), (None, 1.0)]
    parts = {}
    for split, by_budget in logits.items():
        count = len(labels[split])
        ones = np.ones(count, dtype=np.int64)
        parts[split] = Answered(by_budget, by_budget, np.arange(count), ones, ones, labels[split])
    reference = {split: part.through([(None, 1.0)], [])[0] for split, part in parts.items()}
    tried = {x: parts["calibration"].through(looks, x) for x in _thresholds(looks)}
    thresholds = _cheapest(tried, reference["calibration"])
    answers, spent = parts["test"].through(looks, thresholds)
    test = parts["test"]
    by_hops = {}
    for number in sorted(set(hops.tolist())):
        rows = hops == number
        by_hops[str(number)] = {
            "open": float((reference["test"] == test.labels)[rows].mean()),
            **{f"1/{1 / b:.3g}": float((chunk_logits.argmax(-1) == test.labels)[rows].mean())
               for b, chunk_logits in test.chunks.items() if b < 1.0},
            "looks": float((answers == test.labels)[rows].mean()),
            "spent": float(spent[rows].mean()),
        }  # fmt: skip
    return {
        "open": _score(reference["test"], np.ones(len(hops)), test, reference["test"]),
        "looks": {**_score(answers, spent, test, reference["test"]), "thresholds": list(map(float, thresholds))},
        "by_hops": by_hops,
        "spearman": {
            "hops": float(spearmanr(spent, hops).statistic),
            "depth": float(spearmanr(spent, depth).statistic),
            "wrong": float(spearmanr(spent, reference["test"] != test.labels).statistic),
            "doubt": float(spearmanr(spent, -confidence(torch.from_numpy(test.chunks[1.0]), PROBLEM)).statistic),
        },
    }
