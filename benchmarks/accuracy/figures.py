"""Figures of what run.py left in its work folder: results/<data set>.json, and the means over all with intervals."""

import argparse
import json
import sys
from collections import defaultdict
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


def stem(method: str, seed: int | str) -> str:
    """Name, without its ending, of the file in which run.py keeps what a method answered; "*" for all seeds."""
    return f"{method.replace(' ', '-').replace('/', '_')}-{seed}"


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
        own = self.answers["test"][self.find(budget)]
        doubted = margin(own) < threshold
        decided = np.where(doubted, self.full["test"].argmax(-1), own.argmax(-1))
        return self.score(decided, budget + doubted.mean())

    def looks(self, mean: float, candidates: tuple[float, ...] = FIRST_LOOKS) -> dict[str, Any]:
        """The first look, and its threshold, that agree most at that mean cost on the calibration rows."""
        best: Any = None
        full = self.full["calibration"].argmax(-1)
        for budget in candidates:
            if budget > mean:
                continue
            own = self.answers["calibration"][self.find(budget)]
            sure = margin(own)
            threshold = np.quantile(sure, mean - budget) if mean > budget else 0.0
            same = np.where(sure < threshold, full, own.argmax(-1)) == full
            if best is None or same.mean() > best[0]:
                best = (same.mean(), budget, threshold)
        return {**self.look(best[1], best[2]), "first": best[1]}

    def tuned(self, level: float) -> dict[str, Any]:
        """What `tune` promises for that disagreement, and what comes of it."""
        full = self.full["calibration"].argmax(-1)
        found = []
        for budget in FIRST_LOOKS:
            own = self.answers["calibration"][self.find(budget)]
            losses = (own.argmax(-1) != full).astype(int)
            found.append(FirstLook(budget, budget, budget, margin(own), losses))
        try:
            best = best_looks(find_looks(found, "disagreement", level), "disagreement")
        except ValueError:  # rows are too few
            best = None
        if best is None or best.budget == 1.0:
            return {**self.score(self.full["test"].argmax(-1), 1.0), "first": 1.0}
        return {**self.look(best.budget, best.threshold or 0.0), "first": best.budget}

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
            own = self.answers[split][share]
            sure = margin(own) >= threshold
            decided[sure], cost[sure] = own.argmax(-1)[sure], share
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
        found = []
        for key, time in self.ratios.items():
            if key.startswith("look "):
                budget, share = key.removeprefix("look ").split(", then ")
                found.append((time - self.constant(float(budget))) / float(share))
        return float(np.median(found)) if found else 1.0

    def exits(self, mean: float) -> float:
        """Of early exit at that mean."""
        return self.ratios.get(f"exits {mean}", mean)

    def looks(self, budget: float, share: float) -> float:
        """Of a first look, after which `share` of the inputs go on."""
        return self.constant(budget) + share * self.second_look()


def read_runs(work: Path, settings: dict[str, Any]) -> dict[str, dict[str, dict[int, Run]]]:
    """By data set, method and seed."""
    found: dict[str, dict[str, dict[int, Run]]] = {}
    for name in settings["data"]:
        folder = work / name
        if not (folder / "labels.npz").exists():
            continue
        full, labels = dict(np.load(folder / "full" / "logits.npz")), dict(np.load(folder / "labels.npz"))
        found[name] = defaultdict(dict)
        for method in settings["methods"]:
            for path in sorted(folder.glob(f"{stem(method, '[0-9]')}.npz")):
                answers: dict[str, dict[float, np.ndarray]] = {"calibration": {}, "test": {}}
                stored = np.load(path)
                for key in stored.files:
                    if key != "seconds":
                        split, share = key.split(" ")
                        answers[split][float(share)] = stored[key]
                run = Run(answers, full, labels, float(stored["seconds"]))
                found[name][method][int(path.stem[-1])] = run
    return found


def outcomes(runs: dict[str, dict[int, Run]], seed: int, times: Times) -> dict[str, dict[str, Any]]:
    """Everything that is compared, of one data set and seed: right, same, cost of each."""
    found: dict[str, dict[str, Any]] = {}
    if run := runs["narrow"].get(seed):
        full = run.full["test"].argmax(-1)
        found["full"] = run.score(full, 1.0)
        for budget, label in ((1 / 4, "1/4"), (1 / 6, "1/6"), (1 / 8, "1/8"), (1 / 12, "1/12")):
            found[f"constant {label}"] = run.constant(budget)
        for mean in MEANS:
            found[f"looks {mean}"] = run.looks(mean)
        for level in LEVELS:
            found[f"tuned {level}"] = run.tuned(level)
        first = 1 / 12
        share = max(0.0, times.constant(1 / 4) - times.constant(first)) / times.second_look()
        found["looks in the time of 1/4"] = run.looks(first + share, candidates=(first,))
    for method, budget in (("static 1/2", 1 / 2), ("static 1/4", 1 / 4), ("static 1/8", 1 / 8)):
        if run := runs[method].get(seed):
            found[method] = run.constant(budget)
    for method in ("random start", "truncated start"):
        if run := runs[method].get(seed):
            found[f"{method}, constant 1/4"] = run.constant(1 / 4)
            found[f"{method}, looks 0.25"] = run.looks(0.25)
    if run := runs["layers"].get(seed):
        found["layers 1/3"] = run.constant(1 / 3)
        found["layers 1/6"] = run.constant(1 / 6)
    if run := runs["exits"].get(seed):
        for mean in MEANS:
            found[f"exits {mean}"] = run.exits(mean)
    if run := runs["shared widths"].get(seed):
        found["shared widths, constant 1/4"] = run.constant(1 / 4)
        found["shared widths, looks 0.25"] = run.looks(0.25)
    if run := runs["routers"].get(seed):
        found["routers, 1/4 of the heads"] = run.constant(1 / 4)
    return found


def interval(differences: list[np.ndarray], seed: int = 0) -> list[float]:
    """95% interval of the mean over runs of their mean difference, by resampling each run's rows."""
    draw = np.random.default_rng(seed)
    sums = np.zeros(REPLICATES)
    for difference in differences:
        values, counts = np.unique(difference, return_counts=True)
        sums += draw.multinomial(len(difference), counts / len(difference), REPLICATES) @ values / len(difference)
    low, high = np.quantile(sums / len(differences), (0.025, 0.975))
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
    ("looks 0.5", "static 1/2"),
    ("looks 0.33", "layers 1/3"),
    *((f"looks {mean}", f"exits {mean}") for mean in MEANS),
    ("constant 1/4", "random start, constant 1/4"),
    ("constant 1/4", "truncated start, constant 1/4"),
    ("looks 0.25", "random start, looks 0.25"),
    ("looks 0.25", "truncated start, looks 0.25"),
    ("constant 1/4", "shared widths, constant 1/4"),
    ("looks 0.25", "shared widths, looks 0.25"),
    ("looks 0.25", "routers, 1/4 of the heads"),
)


Outcomes = dict[str, dict[str, Any]]


def describe_runs(work: Path, name: str, methods: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """What is known of one data set beside its results: rows, files, seconds of training."""
    full, labels = np.load(work / name / "full" / "logits.npz"), np.load(work / name / "labels.npz")
    teacher = float(full["teacher_seconds"]) if "teacher_seconds" in full else None
    seconds: dict[str, Any] = {"full": float(full["seconds"]), "teacher": teacher}
    for method, runs in methods.items():
        seconds[method] = {seed: round(run.seconds, 1) for seed, run in runs.items()}
    rows = {split: len(labels[split]) for split in labels.files}
    return {"rows": rows, "sha256": read_json(work / name / "sha256.json"), "seconds": seconds}


def tabulate(outcomes_by_seed: dict[int, Outcomes]) -> dict[str, dict[int, dict[str, float]]]:
    """By what is compared and seed: accuracy, agreement, cost, and the first look where there is one."""
    table: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for seed, found in outcomes_by_seed.items():
        for label, x in found.items():
            row = {"accuracy": round(float(x["right"].mean()), 5), "agreement": round(float(x["same"].mean()), 5)}
            row["cost"] = round(float(x["cost"]), 4)
            if "first" in x:
                row["first"] = round(x["first"], 4)
            table[label][seed] = row
    return table


def compare(first: str, second: str, everything: dict[tuple[str, int], Outcomes]) -> dict[str, Any] | None:
    """Mean differences in points with their intervals, over the runs that have both; None where there is none."""
    both = {key: found for key, found in everything.items() if first in found and second in found}
    if not both:
        return None
    entry: dict[str, Any] = {"runs": len(both), "data_sets": len({name for name, _ in both})}
    for kind, name in (("right", "accuracy"), ("same", "agreement")):
        differences = [found[first][kind].astype(int) - found[second][kind].astype(int) for found in both.values()]
        entry[name] = round(100 * float(np.mean([x.mean() for x in differences])), 2)
        entry[f"{name}_interval"] = interval(differences)
    return entry


def try_promise(level: float, everything: dict[tuple[str, int], Outcomes]) -> dict[str, Any]:
    """In how many runs it was kept on the test rows, and what it cost."""
    tuned = [found[f"tuned {level}"] for found in everything.values() if f"tuned {level}" in found]
    differ = [float((~x["same"]).mean()) for x in tuned]
    return {
        "runs": len(tuned),
        "kept": sum(share <= level for share in differ),
        "mean_cost": round(float(np.mean([x["cost"] for x in tuned])), 4),
        "disagreement": round(float(np.mean(differ)), 5),
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    options = parser.parse_args(arguments)
    settings = read_json(options.settings)
    timing = options.work / "timing.json"
    times = read_json(timing) if timing.exists() else {}
    everything: dict[tuple[str, int], Outcomes] = {}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, methods in read_runs(options.work, settings).items():
        ratios = Times(times.get(name, {}).get("ratios"))
        seeds = sorted({seed for runs in methods.values() for seed in runs})
        found = {seed: outcomes(methods, seed, ratios) for seed in seeds}
        everything |= {(name, seed): x for seed, x in found.items()}
        values = {"data": name, "settings": {**settings["data"][name], "narrow": settings["narrow"]}}
        values |= {"environment": environment(), **describe_runs(options.work, name, methods)}
        values |= {"measured_time": times.get(name), "results": tabulate(found)}
        (options.output / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    pairs = {f"{first} - {second}": compare(first, second, everything) for first, second in PAIRS}
    summary = {
        "pairs": {pair: entry for pair, entry in pairs.items() if entry},
        "promises": {str(level): try_promise(level, everything) for level in LEVELS},
    }
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for pair, entry in summary["pairs"].items():
        print(f"{pair:50s} {entry}")
    print(summary["promises"])


if __name__ == "__main__":
    main()
