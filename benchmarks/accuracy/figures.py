"""Figures of what run.py left in its work folder, added to results/<data set>.json; the means of all with intervals.

Results hold all that the means need, so that seeds may come from different folders, machines and days.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from measure import environment, read_json

from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.tuning import FirstLook, best_looks, find_looks


HERE = Path(__file__).resolve().parent
MEANS = (0.25, 0.33, 0.5)
LEVELS = (0.01, 0.02)
FIRST_LOOKS = (1 / 4, 1 / 6, 1 / 12)
REPLICATES = 2000


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def margin(logits: np.ndarray) -> np.ndarray:
    """How sure the product is of an answer, (N,)."""
    return confidence(torch.from_numpy(logits), None).numpy()


def stem(method: str) -> str:
    """Name, without its ending, of the file in which run.py keeps what a method answered."""
    return method.replace(" ", "-").replace("/", "_")


class Run:
    """What one method, trained once, answers; beside the full model's answers and the labels.

    Args:
        answers: Logits by split and cost.
        full: The full model's logits, by split.
        labels: By split.
        seconds: Of training.
    """

    def __init__(
        self,
        answers: dict[str, dict[float, np.ndarray]],
        full: dict[str, np.ndarray],
        labels: dict[str, np.ndarray],
        seconds: float = 0.0,
    ) -> None:
        self.answers, self.full, self.labels, self.seconds = answers, full, labels, seconds

    def score(self, decided: np.ndarray, cost: float) -> dict[str, Any]:
        """Of answers to the test rows: right and same, (N,) bool, and what they cost."""
        full = self.full["test"].argmax(-1)
        return {"right": decided == self.labels["test"], "same": decided == full, "cost": cost}

    def constant(self, budget: float) -> dict[str, Any]:
        """Every input alike."""
        cost = self.find(budget)
        return self.score(self.answers["test"][cost].argmax(-1), cost)

    def find(self, budget: float) -> float:
        """The key that is meant."""
        return min(self.answers["test"], key=lambda share: abs(share - budget))

    def look(self, budget: float, threshold: float) -> dict[str, Any]:
        """A first look, and the full model where it is less confident than `threshold`."""
        first = self.answers["test"][self.find(budget)]
        doubted = margin(first) < threshold
        decided = np.where(doubted, self.full["test"].argmax(-1), first.argmax(-1))
        return self.score(decided, budget + doubted.mean())

    def looks(self, mean: float, candidates: tuple[float, ...] = FIRST_LOOKS) -> dict[str, Any]:
        """The first look, and its threshold, that agree most at that mean cost on the calibration rows."""
        best: Any = None
        full = self.full["calibration"].argmax(-1)
        for budget in candidates:
            if budget > mean:
                continue
            first = self.answers["calibration"][self.find(budget)]
            sure = margin(first)
            threshold = np.quantile(sure, mean - budget) if mean > budget else 0.0
            same = np.where(sure < threshold, full, first.argmax(-1)) == full
            if best is None or same.mean() > best[0]:
                best = (same.mean(), budget, threshold)
        return {**self.look(best[1], best[2]), "first": best[1]}

    def tuned(self, level: float) -> dict[str, Any]:
        """What `tune` promises for that disagreement, and what comes of it."""
        full = self.full["calibration"].argmax(-1)
        first_looks = []
        for budget in FIRST_LOOKS:
            first = self.answers["calibration"][self.find(budget)]
            losses = (first.argmax(-1) != full).astype(int)
            first_looks.append(FirstLook(budget, budget, budget, margin(first), losses))
        try:
            best = best_looks(find_looks(first_looks, "disagreement", level), "disagreement")
        except ValueError:  # rows are too few
            best = None
        if best is None or best.budget == 1.0:
            outcome = {**self.score(self.full["test"].argmax(-1), 1.0), "first": 1.0}
        else:
            outcome = {**self.look(best.budget, best.threshold or 0.0), "first": best.budget}
        return {**outcome, "least": self.least(level)}

    def least(self, level: float) -> float:
        """What it would cost to differ on just that share of the test rows, were the threshold for it known."""
        full, costs = self.full["test"].argmax(-1), [1.0]
        for budget in FIRST_LOOKS:
            first = self.answers["test"][self.find(budget)]
            differs = (first.argmax(-1) != full)[margin(first).argsort()]  # the most doubtful first
            left = differs.sum() - np.concatenate([[0], differs.cumsum()])
            costs.append(budget + float(np.argmax(left <= level * len(full))) / len(full))
        return min(costs)

    def exits(self, mean: float) -> dict[str, Any]:
        """Early exit: each input leaves at the first layer whose answer is sure enough, one threshold for all layers.

        The threshold is that which spends the mean on the calibration rows.
        """
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.leave("calibration", middle)[1].mean() < mean else (low, middle)
        decided, left = self.leave("test", low)
        return {**self.score(decided, float(left.mean())), "left": left}

    def leave(self, split: str, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Answers of early exit, and where each row left, as a share of the layers."""
        decided = self.full[split].argmax(-1).copy()
        cost = np.ones(len(decided))
        for share in sorted(self.answers[split], reverse=True):
            logits = self.answers[split][share]
            sure = margin(logits) >= threshold
            decided[sure], cost[sure] = logits.argmax(-1)[sure], share
        return decided, cost


class Times:
    """Time of an input, as a share of the full model's, packed; work where it was not measured.

    Args:
        ratios: As timing.py measures them; None for work alone.
    """

    def __init__(self, ratios: dict[str, float] | None = None) -> None:
        self.ratios = ratios or {}

    def constant(self, budget: float) -> float:
        """Of every input at one budget."""
        return self.ratios.get(f"constant {budget:.4f}", budget)

    def second_look(self) -> float:
        """Of an input that goes on to the full model, in the small batch of those that do."""
        times = []
        for key, time in self.ratios.items():
            if key.startswith("look "):
                budget, share = key.removeprefix("look ").split(", then ")
                times.append((time - self.constant(float(budget))) / float(share))
        return float(np.median(times)) if times else 1.0

    def exits(self, mean: float) -> float:
        """Of early exit at that mean."""
        return self.ratios.get(f"exits {mean}", mean)

    def looks(self, budget: float, share: float) -> float:
        """Of a first look, after which `share` of the inputs go on."""
        return self.constant(budget) + share * self.second_look()


def read_runs(work: Path, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Run]]:
    """By data set and seed, and by method."""
    runs: dict[tuple[str, int], dict[str, Run]] = {}
    for name in settings["data"]:
        for folder in sorted(path.parent for path in work.glob(f"{name}-[0-9]/labels.npz")):
            full, labels = dict(np.load(folder / "full" / "logits.npz")), dict(np.load(folder / "labels.npz"))
            methods: dict[str, Run] = {}
            for method in settings["methods"]:
                if not (path := folder / f"{stem(method)}.npz").exists():
                    continue
                answers: dict[str, dict[float, np.ndarray]] = {"calibration": {}, "test": {}}
                stored = np.load(path)
                for key in stored.files:
                    if key != "seconds":
                        split, share = key.split(" ")
                        answers[split][float(share)] = stored[key]
                methods[method] = Run(answers, full, labels, float(stored["seconds"]))
            runs[name, int(folder.name[-1])] = methods
    return runs


def outcomes(runs: dict[str, Run], times: Times) -> dict[str, dict[str, Any]]:
    """Everything that is compared, of one data set and seed: right, same, cost of each."""
    outcome_of: dict[str, dict[str, Any]] = {}
    if run := runs.get("narrow"):
        full = run.full["test"].argmax(-1)
        outcome_of["full"] = run.score(full, 1.0)
        for budget, label in ((1 / 4, "1/4"), (1 / 6, "1/6"), (1 / 8, "1/8"), (1 / 12, "1/12")):
            outcome_of[f"constant {label}"] = run.constant(budget)
        for mean in MEANS:
            outcome_of[f"looks {mean}"] = run.looks(mean)
        for level in LEVELS:
            outcome_of[f"tuned {level}"] = run.tuned(level)
        first = 1 / 12
        share = max(0.0, times.constant(1 / 4) - times.constant(first)) / times.second_look()
        outcome_of["looks in the time of 1/4"] = run.looks(first + share, candidates=(first,))
    static = {"static 1/2": 1 / 2, "static 1/4": 1 / 4, "static 1/8": 1 / 8, "iterative 1/4": 1 / 4}
    for method, budget in static.items():
        if run := runs.get(method):
            outcome_of[method] = run.constant(budget)
    for method in ("random start", "truncated start"):
        if run := runs.get(method):
            outcome_of[f"{method}, constant 1/4"] = run.constant(1 / 4)
            outcome_of[f"{method}, looks 0.25"] = run.looks(0.25)
    if run := runs.get("layers"):
        outcome_of["layers 1/3"] = run.constant(1 / 3)
        outcome_of["layers 1/6"] = run.constant(1 / 6)
    if run := runs.get("exits"):
        for mean in MEANS:
            outcome_of[f"exits {mean}"] = run.exits(mean)
    if run := runs.get("shared widths"):
        outcome_of["shared widths, constant 1/4"] = run.constant(1 / 4)
        outcome_of["shared widths, constant 1/12"] = run.constant(1 / 12)
        outcome_of["shared widths, looks 0.25"] = run.looks(0.25)
    if run := runs.get("routers"):
        outcome_of["routers, 1/4 of the heads"] = run.constant(1 / 4)
    return outcome_of


def interval(counts: list[np.ndarray], seed: int = 0) -> list[float]:
    """95% interval, in points, of the mean over data sets of a mean difference, by resampling each one's rows.

    Args:
        counts: For each data set (S, 3): rows that are worse, alike and better in each of S seeds, which are of the
            same rows; that they may err on the same ones is allowed for, as if all always did.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    sums = np.zeros(REPLICATES)
    for runs in counts:
        drawn = draw.multinomial(runs[0].sum(), runs.sum(0) / runs.sum(), REPLICATES)
        sums += (drawn[:, 2] - drawn[:, 0]) / runs[0].sum()
    low, high = np.quantile(sums / len(counts), (0.025, 0.975))
    return [round(100 * float(low), 2), round(100 * float(high), 2)]


PAIRS = (
    *((f"looks {mean}", "full") for mean in MEANS),
    ("looks 0.25", "static 1/4"),
    ("looks 0.33", "static 1/4"),
    ("looks 0.25", "constant 1/4"),
    ("looks in the time of 1/4", "constant 1/4"),
    ("looks in the time of 1/4", "static 1/4"),
    ("constant 1/4", "static 1/4"),
    ("constant 1/8", "static 1/8"),
    ("looks 0.25", "iterative 1/4"),
    ("static 1/4", "iterative 1/4"),
    ("looks 0.5", "static 1/2"),
    ("looks 0.33", "layers 1/3"),
    *((f"looks {mean}", f"exits {mean}") for mean in MEANS),
    ("constant 1/4", "random start, constant 1/4"),
    ("constant 1/4", "truncated start, constant 1/4"),
    ("looks 0.25", "random start, looks 0.25"),
    ("looks 0.25", "truncated start, looks 0.25"),
    ("constant 1/4", "shared widths, constant 1/4"),
    ("constant 1/12", "shared widths, constant 1/12"),
    ("looks 0.25", "shared widths, looks 0.25"),
    ("looks 0.25", "routers, 1/4 of the heads"),
)


Outcomes = dict[str, dict[str, Any]]
KINDS = {"accuracy": "right", "agreement": "same"}


def describe_run(folder: Path, runs: dict[str, Run]) -> dict[str, Any]:
    """What is known of one data set and seed beside its results: machine, rows, files, seconds of training."""
    full, labels = np.load(folder / "full" / "logits.npz"), np.load(folder / "labels.npz")
    seconds = {"full": round(float(full["seconds"]), 1)}
    if (taught := folder / "taught.json").exists():
        seconds["taught"] = read_json(taught)["seconds"]
    seconds |= {method: round(run.seconds, 1) for method, run in runs.items()}
    rows = {split: len(labels[split]) for split in labels.files}
    about = {"rows": rows, "sha256": read_json(folder / "sha256.json"), "seconds": seconds}
    return {"environment": environment(), **about}


def tabulate(compared: Outcomes) -> dict[str, dict[str, float]]:
    """By what is compared: accuracy, agreement, cost; the first look, and the least cost, where there is one."""
    table: dict[str, dict[str, float]] = {}
    for label, x in compared.items():
        row = {name: round(float(x[kind].mean()), 5) for name, kind in KINDS.items()}
        row["cost"] = round(float(x["cost"]), 4)
        row |= {name: round(x[name], 4) for name in ("first", "least") if name in x}
        table[label] = row
    return table


def set_against(compared: Outcomes) -> dict[str, dict[str, list[int]]]:
    """For each pair on how many rows the first is worse, alike and better."""
    pairs: dict[str, dict[str, list[int]]] = {}
    for first, second in PAIRS:
        if first in compared and second in compared:
            entry = {}
            for name, kind in KINDS.items():
                difference = compared[first][kind].astype(int) - compared[second][kind].astype(int)
                entry[name] = [int((difference == x).sum()) for x in (-1, 0, 1)]
            pairs[f"{first} - {second}"] = entry
    return pairs


def compare(pair: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """Mean differences in points with their intervals, over seeds, then data sets; None where no run has both."""
    counts_of = {name: list(x["pairs"][pair].values()) for name, x in results.items() if x["pairs"].get(pair)}
    if not counts_of:
        return None
    entry: dict[str, Any] = {"runs": sum(map(len, counts_of.values())), "data_sets": len(counts_of)}
    for name in KINDS:
        counts = [np.array([run[name] for run in runs]) for runs in counts_of.values()]
        means = [(runs[:, 2] - runs[:, 0]).mean() / runs[0].sum() for runs in counts]
        entry[name] = round(100 * float(np.mean(means)), 2)
        entry[f"{name}_interval"] = interval(counts)
    return entry


def try_promise(level: float, results: dict[str, Any]) -> dict[str, Any]:
    """In how many runs it was kept on the test rows; what it cost, mean over seeds, then data sets."""
    tuned = [list(x["results"].get(f"tuned {level}", {}).values()) for x in results.values()]
    tuned = [runs for runs in tuned if runs]
    differ = [[1.0 - run["agreement"] for run in runs] for runs in tuned]

    def mean_of(figure: str) -> float:
        return round(float(np.mean([np.mean([run[figure] for run in runs]) for runs in tuned])), 4)

    return {
        "runs": sum(map(len, tuned)),
        "kept": sum(share <= level + 1e-9 for shares in differ for share in shares),
        "mean_cost": mean_of("cost"),
        "least_cost": mean_of("least"),
        "disagreement": round(float(np.mean([np.mean(shares) for shares in differ])), 5),
    }


def replace_seed(kept: dict[str, Any], seed: int, entries: dict[str, Any]) -> dict[str, Any]:
    """`kept`, by label and seed, with these entries for that seed and no others."""
    labels = [*dict.fromkeys([*kept, *entries])]
    merged = {label: {x: y for x, y in kept.get(label, {}).items() if x != str(seed)} for label in labels}
    for label, entry in entries.items():
        merged[label][str(seed)] = entry
    return {label: dict(sorted(by_seed.items())) for label, by_seed in merged.items() if by_seed}


def training_share(results: dict[str, Any]) -> dict[str, float] | None:
    """Seconds of asking the full model and training beside it, over those of fine-tuning it."""
    seconds = [run["seconds"] for x in results.values() for run in x["runs"].values()]
    shares = [(x["taught"] + x["narrow"]) / x["full"] for x in seconds if {"taught", "narrow"} <= x.keys()]
    if not shares:
        return None
    figures = {"median": np.median(shares), "least": min(shares), "most": max(shares)}
    return {"runs": len(shares), **{name: round(float(x), 3) for name, x in figures.items()}}


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Over all data sets, from their results alone."""
    pairs = {f"{first} - {second}": compare(f"{first} - {second}", results) for first, second in PAIRS}
    promises = {str(level): try_promise(level, results) for level in LEVELS}
    summary = {"pairs": {pair: entry for pair, entry in pairs.items() if entry}, "promises": promises}
    return {**summary, "training": training_share(results)}


def main(arguments: list[str] | None = None) -> None:
    """Adds to the results, and replaces what they had of the same seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    options = parser.parse_args(arguments)
    settings = read_json(options.settings)
    timing = options.work / "timing.json"
    times = read_json(timing) if timing.exists() else {}
    options.output.mkdir(parents=True, exist_ok=True)
    for (name, seed), runs in read_runs(options.work, settings).items():
        path = options.output / f"{name}.json"
        values: dict[str, Any] = read_json(path) if path.exists() else {"data": name}
        values["settings"] = {**settings["data"][name], "narrow": settings["narrow"]}
        if name in times:
            values["measured_time"] = times[name]
        compared = outcomes(runs, Times((values.get("measured_time") or {}).get("ratios")))
        values.setdefault("runs", {})[str(seed)] = describe_run(options.work / f"{name}-{seed}", runs)
        for part, entries in (("results", tabulate(compared)), ("pairs", set_against(compared))):
            values[part] = replace_seed(values.get(part, {}), seed, entries)
        path.write_text(json.dumps(values, indent=1) + "\n")
    paths = sorted(options.output.glob("*.json"))
    results = {path.stem: read_json(path) for path in paths if path.stem not in ("summary", "routers")}
    summary = summarize(results)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for pair, entry in summary["pairs"].items():
        print(f"{pair:50s} {entry}")
    print(summary["promises"])


if __name__ == "__main__":
    main()
