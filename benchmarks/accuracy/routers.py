"""Which reading of a first look tells best whether the full model would differ: results/routers.json.

Everything is fitted on the calibration rows and scored on the test rows: agreement with the full model where the most
doubtful rows go on to it, as many as the mean cost allows.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from accuracy.figures import MEANS, Run, margin, read_runs, softmax
from measure import environment, read_json
from torch import nn


HERE = Path(__file__).resolve().parent
SPLITS = ("calibration", "test")
COSTS = ((1 / 6, 0.25), (1 / 12, 0.25), (1 / 6, 0.33), (1 / 12, 0.33), (1 / 6, 0.5), (1 / 4, 0.5))


def entropy(logits: np.ndarray) -> np.ndarray:
    """Of the answer, in nats, (N,)."""
    shares = softmax(logits)
    return -(shares * np.log(shares + 1e-12)).sum(-1)


def temperature(logits: np.ndarray, full: np.ndarray) -> float:
    """That which brings the answers nearest to the full model's."""
    target = softmax(full)
    candidates = np.geomspace(0.3, 3.0, 24)
    losses = [-(target * np.log(softmax(logits / t) + 1e-12)).sum(-1).mean() for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def network(inputs: np.ndarray, differs: np.ndarray, hidden: int, seed: int) -> Any:
    """A small network that tells whether the full model differs; returns its reading of inputs, (N, F) -> (N,)."""
    torch.manual_seed(seed)
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
    x = torch.from_numpy(((inputs - mean) / deviation).astype(np.float32))
    y = torch.from_numpy(differs.astype(np.float32))
    model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(hidden, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(30):
        for places in torch.randperm(len(x)).split(64):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[places])[:, 0], y[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    @torch.no_grad()
    def read(new: np.ndarray) -> np.ndarray:
        return -model(torch.from_numpy(((new - mean) / deviation).astype(np.float32)))[:, 0].numpy()

    return read


def features(logits: np.ndarray, pooled: np.ndarray | None = None) -> np.ndarray:
    """Best three probabilities, their logarithms, entropy; and the state the look ends in."""
    shares = np.sort(softmax(logits), -1)[:, ::-1]
    shares = shares[:, : min(3, shares.shape[1])]
    columns = [shares, np.log(shares + 1e-9), entropy(logits)[:, None], margin(logits)[:, None]]
    return np.concatenate(columns if pooled is None else [*columns, pooled], 1)


def agreement(sure: np.ndarray, first: np.ndarray, full: np.ndarray, count: int) -> float:
    """With the full model, where the `count` least sure rows go on to it."""
    order = np.argsort(sure, kind="stable")
    decided = first.copy()
    decided[order[:count]] = full[order[:count]]
    return float((decided == full).mean())


def read_doubt(run: Run, budget: float, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """How sure each reading is of the first look at the test rows, (N,), by its name.

    Args:
        run: Of the narrow encoder.
        budget: Of the first look.
        folder: Where run.py left the states that looks at 1/6 end in.
        seed: Of the networks.
    """
    logits = {split: run.answers[split][run.find(budget)] for split in SPLITS}
    differs = logits["calibration"].argmax(-1) != run.full["calibration"].argmax(-1)
    t = temperature(logits["calibration"], run.full["calibration"])
    test = logits["test"]
    best = np.sort(test, -1)
    read = network(features(logits["calibration"]), differs, 16, seed)
    readings = {
        "margin": margin(test),
        "best probability": softmax(test).max(-1),
        "entropy": -entropy(test),
        "margin, temperature": margin(test / t),
        "entropy, temperature": -entropy(test / t),
        "margin of logits": best[:, -1] - best[:, -2],
        "network, probabilities": read(features(test)),
    }
    paths = {split: folder / f"pooled-{split}.npz" for split in SPLITS}
    if abs(budget - 1 / 6) < 1e-6 and paths["test"].exists():
        inputs = {}
        for split, path in paths.items():
            states = np.load(path)["states"].astype(np.float32)
            inputs[split] = features(logits[split], states.reshape(len(states), -1))
        read = network(inputs["calibration"], differs, 32, seed)
        readings["network, state too"] = read(inputs["test"])
    return readings


def look_thrice(run: Run, split: str, share: float, last: float) -> float:
    """Agreement of looks at 1/12, at 1/4 for the most doubtful `share` of the rows, and the full model for `last`."""
    first, second = (run.answers[split][run.find(budget)] for budget in (1 / 12, 1 / 4))
    full = run.full[split].argmax(-1)
    decided = first.argmax(-1)
    doubted = np.argsort(margin(first), kind="stable")[: round(share * len(full))]
    decided[doubted] = second[doubted].argmax(-1)
    order = np.argsort(margin(second[doubted]), kind="stable")
    doubted = doubted[order[: round(last * len(full))]]
    decided[doubted] = full[doubted]
    return float((decided == full).mean())


def best_of_three(run: Run, mean: float) -> float | None:
    """Agreement on the test rows of the three looks that agree most on the calibration rows; None: none cost that."""
    candidates = []
    for share in (0.15, 0.25, 0.35, 0.5):
        last = mean - 1 / 12 - share / 4
        if 0 < last <= share:
            candidates.append((look_thrice(run, "calibration", share, last), share, last))
    if not candidates:
        return None
    _, share, last = max(candidates, key=lambda x: x[0])
    return look_thrice(run, "test", share, last)


def read_run(run: Run, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Everything that is compared of one run, by cost and by reading."""
    full = run.full["test"].argmax(-1)
    agreements: dict[str, dict[str, float]] = {}
    for budget, mean in COSTS:
        first = run.answers["test"][run.find(budget)].argmax(-1)
        count = round((mean - budget) * len(full))
        readings = read_doubt(run, budget, folder, seed)
        agreements[f"{budget:.3f}, mean {mean}"] = {
            reading: agreement(sure, first, full, count) for reading, sure in readings.items()
        }
    for mean in MEANS:
        looks = {"two looks": float(run.looks(mean)["same"].mean())}
        three = best_of_three(run, mean)
        if three is not None:
            looks["three looks"] = three
        agreements[f"mean {mean}"] = looks
    # Averaging the logits of both looks where both were taken: against the full model's own answer.
    both = softmax(run.answers["test"][run.find(1 / 6)]) + softmax(run.full["test"])
    labels = run.labels["test"]
    agreements["second look, accuracy"] = {
        "full model's answer": float((full == labels).mean()),
        "mean of both": float((both.argmax(-1) == labels).mean()),
    }
    return agreements


def main(arguments: list[str] | None = None) -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "routers.json")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are tiny
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    used = []
    for (name, seed), methods in read_runs(options.work, read_json(options.settings)).items():
        if "narrow" not in methods:
            continue
        used.append(f"{name}-{seed}")
        for cost, readings in read_run(methods["narrow"], options.work / used[-1], seed).items():
            for reading, value in readings.items():
                figures[cost][reading].append(value)
    means = {
        cost: {reading: [round(float(np.mean(x)), 5), len(x)] for reading, x in readings.items()}
        for cost, readings in figures.items()
    }
    values = {"runs": used, "environment": environment(), "agreement": means}
    options.output.write_text(json.dumps(values, indent=1) + "\n")
    for cost, readings in means.items():
        print(cost, readings)


if __name__ == "__main__":
    main()
