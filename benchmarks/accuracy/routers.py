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
from accuracy.figures import margin, read_runs, softmax
from measure import environment, read_json
from torch import nn


HERE = Path(__file__).resolve().parent
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
    found = [shares, np.log(shares + 1e-9), entropy(logits)[:, None], margin(logits)[:, None]]
    return np.concatenate(found if pooled is None else [*found, pooled], 1)


def agreement(sure: np.ndarray, own: np.ndarray, full: np.ndarray, count: int) -> float:
    """With the full model, where the `count` least sure rows go on to it."""
    order = np.argsort(sure, kind="stable")
    decided = own.copy()
    decided[order[:count]] = full[order[:count]]
    return float((decided == full).mean())


def main(arguments: list[str] | None = None) -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "routers.json")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are tiny
    runs = read_runs(options.work, read_json(options.settings))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    used = []
    for (name, seed), methods in runs.items():
        if run := methods.get("narrow"):
            used.append(f"{name}-{seed}")
            full = {split: x.argmax(-1) for split, x in run.full.items()}
            for budget, mean in COSTS:
                key = f"{budget:.3f}, mean {mean}"
                own = {split: run.answers[split][run.find(budget)] for split in ("calibration", "test")}
                count = round((mean - budget) * len(full["test"]))
                differs = own["calibration"].argmax(-1) != full["calibration"]
                t = temperature(own["calibration"], run.full["calibration"])
                test = own["test"]
                readings = {
                    "margin": margin(test),
                    "best probability": softmax(test).max(-1),
                    "entropy": -entropy(test),
                    "margin, temperature": margin(test / t),
                    "entropy, temperature": -entropy(test / t),
                    "margin of logits": np.sort(test, -1)[:, -1] - np.sort(test, -1)[:, -2],
                    "network, probabilities": network(features(own["calibration"]), differs, 16, seed)(features(test)),
                }
                paths = {x: options.work / f"{name}-{seed}" / f"pooled-{x}.npz" for x in ("calibration", "test")}
                if abs(budget - 1 / 6) < 1e-6 and paths["test"].exists():
                    pooled = {
                        x: np.load(path)["states"].astype(np.float32).reshape(len(full[x]), -1)
                        for x, path in paths.items()
                    }
                    inputs = {x: features(own[x], pooled[x]) for x in paths}
                    readings["network, state too"] = network(inputs["calibration"], differs, 32, seed)(inputs["test"])
                for reading, sure in readings.items():
                    found[key][reading].append(agreement(sure, test.argmax(-1), full["test"], count))
            # Three looks, thresholds by quantiles: 1/12, a part on to 1/4, a part of these on to the full model.
            for mean in (0.25, 0.33, 0.5):
                best: Any = None
                for share in (0.15, 0.25, 0.35, 0.5):
                    count = {x: len(full[x]) for x in ("calibration", "test")}
                    last = mean - 1 / 12 - share / 4
                    if not 0 < last <= share:
                        continue
                    scores = {}
                    for split in ("calibration", "test"):
                        first, second = (run.answers[split][run.find(b)] for b in (1 / 12, 1 / 4))
                        decided = first.argmax(-1).copy()
                        on = np.argsort(margin(first), kind="stable")[: round(share * count[split])]
                        decided[on] = second[on].argmax(-1)
                        further = on[np.argsort(margin(second[on]), kind="stable")[: round(last * count[split])]]
                        decided[further] = full[split][further]
                        scores[split] = float((decided == full[split]).mean())
                    if best is None or scores["calibration"] > best[0]:
                        best = (scores["calibration"], scores["test"])
                if best:
                    found[f"mean {mean}"]["three looks"].append(best[1])
                found[f"mean {mean}"]["two looks"].append(float(run.looks(mean)["same"].mean()))
            # Averaging the logits of both looks where both were taken: against the full model's own answer.
            own = run.answers["test"][run.find(1 / 6)]
            labels = run.labels["test"]
            found["second look, accuracy"]["full model's answer"].append(
                float((run.full["test"].argmax(-1) == labels).mean())
            )
            both = softmax(own) + softmax(run.full["test"])
            found["second look, accuracy"]["mean of both"].append(float((both.argmax(-1) == labels).mean()))
    values = {
        "runs": used,
        "environment": environment(),
        "agreement": {
            key: {x: [round(float(np.mean(v)), 5), len(v)] for x, v in readings.items()}
            for key, readings in found.items()
        },
    }
    options.output.write_text(json.dumps(values, indent=1) + "\n")
    for key, readings in values["agreement"].items():
        print(key, readings)


if __name__ == "__main__":
    main()
