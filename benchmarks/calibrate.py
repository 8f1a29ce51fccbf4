"""Measures the executors on this machine and fits the constants `_COSTS` of attention.py, by which one is chosen."""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import ROOT, environment, interleave, spread, stopwatch
from torch import nn

from hf_budgetformer import BudgetFormerConfig, attention
from hf_budgetformer.attention import EXECUTORS, GatedSelfAttention, OpenHeads, choose_executor, executor_work
from hf_budgetformer.packing import find_packing


GRID: dict[str, Sequence[Any]] = {
    "width": (384, 768),
    "batch": (1, 4, 16, 32),
    "lengths": ("16", "64", "256", "20-90", "60-500"),  # all alike, or uniform between two
    "open_heads": (1, 3, 6, 10),
    "same": ("all", "some", "none"),  # inputs that chose the same heads
}
HEADS = 12
SHARED_BY_THREADS = 2  # the first constants are divided by the number of threads, see `choose_executor`


def cases(grid: dict[str, Sequence[Any]], longest: int) -> Iterator[dict[str, Any]]:
    """The grid's cells, but for those of more than `longest` tokens or that say the same twice."""
    chance = random.Random(0)
    for values in product(*grid.values()):
        case = dict(zip(grid, values, strict=True))
        low, _, high = case["lengths"].partition("-")
        lengths = [chance.randint(int(low), int(high or low)) for _ in range(case["batch"])]
        if sum(lengths) <= longest and (case["batch"] > 1 or case["same"] == "all"):
            yield {**case, "lengths": lengths}


@torch.no_grad()
def measure(case: dict[str, Any], threads: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Microseconds and work of every executor, for each number of threads."""
    torch.manual_seed(0)
    config = BudgetFormerConfig(hidden_size=case["width"], num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    layer = GatedSelfAttention(config).eval(), nn.Linear(case["width"], case["width"])
    rows, lengths = case["batch"], case["lengths"]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packing = find_packing(mask, tuple(mask.shape), mask.device)
    packed = packing.pack(torch.randn(*mask.shape, case["width"]))
    gates = (torch.rand(rows, HEADS).argsort(-1) < case["open_heads"]).float()
    kinds = {"all": 1, "some": max(1, rows // 4), "none": rows}[case["same"]]
    gates = gates[torch.arange(rows) % kinds]
    open_heads = OpenHeads(gates.tolist())
    work = executor_work(packing.lengths, open_heads, HEADS, case["width"] // HEADS)
    for count in threads:
        torch.set_num_threads(count)
        arguments = {name: gates if name == "all_heads" else open_heads for name in EXECUTORS}
        runs = {
            name: stopwatch(partial(run, *layer, packed, packing, arguments[name]), 0.01)
            for name, run in EXECUTORS.items()
        }
        times = interleave(runs, repeats)
        seconds = {name: spread(x)["median"] for name, x in times.items()}
        yield {
            **case,
            "lengths": packing.lengths,
            "threads": count,
            "work": work,
            "open": open_heads,
            "microseconds": {name: x * 1e6 for name, x in seconds.items()},
        }


def fit(rows: list[list[float]], targets: list[float]) -> list[float]:
    """Non-negative constants that make `rows @ constants` closest to the targets in relative error."""
    scaled = torch.tensor(rows, dtype=torch.float64) / torch.tensor(targets, dtype=torch.float64)[:, None]
    products, wanted = (scaled.t() @ scaled).tolist(), scaled.sum(0).tolist()
    constants = [0.0] * len(wanted)
    for _ in range(5_000):  # one constant at a time, cut at zero: converges, for the problem is convex
        for j, row in enumerate(products):
            rest = sum(x * y for x, y in zip(row, constants, strict=True))
            constants[j] = max(0.0, constants[j] + (wanted[j] - rest) / row[j]) if row[j] else 0.0
    return constants


def calibrate(grid: dict[str, Sequence[Any]], threads: Sequence[int], repeats: int, longest: int) -> dict[str, Any]:
    """Measures, fits, and judges the choices that follow, by `choose_executor` itself."""
    found = [row for case in cases(grid, longest) for row in measure(case, threads, repeats)]
    rows, targets = [], []
    for case, name in product(found, EXECUTORS):
        amounts = case["work"][name]
        rows.append([x / case["threads"] if i < SHARED_BY_THREADS else x for i, x in enumerate(amounts)])
        targets.append(case["microseconds"][name])
    costs = tuple(float(f"{x:.3g}") for x in fit(rows, targets))
    guesses = [sum(x * y for x, y in zip(row, costs, strict=True)) for row in rows]
    errors = [abs(guess / target - 1) for guess, target in zip(guesses, targets, strict=True)]
    losses = []
    with mock.patch.object(attention, "_COSTS", costs):
        for case in found:
            size = case["width"] // HEADS
            case["chosen"] = choose_executor(case["lengths"], case.pop("open"), HEADS, size, case["threads"])
            losses.append(case["microseconds"][case["chosen"]] / min(case["microseconds"].values()) - 1)
    return {
        "costs": costs,
        "before": attention._COSTS,
        "relative_error": spread(errors),
        "share_losing_3_percent": sum(loss > 0.03 for loss in losses) / len(losses),
        "worst_loss": max(losses),
        "mean_loss": sum(losses) / len(losses),
        "cases": found,
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes results/calibration.json and prints the constants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the largest batch")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibration.json")
    options = parser.parse_args(arguments)
    machine, before = environment(), torch.get_num_threads()
    try:
        result = calibrate(GRID, options.threads, options.repeats, options.longest)
    finally:
        torch.set_num_threads(before)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": machine, **result}) + "\n")
    print(f"_COSTS = {result['costs']}")
    print(
        f"relative error {result['relative_error']}; {result['share_losing_3_percent']:.1%} of {len(result['cases'])} "
        f"cases lose more than 3%, {result['worst_loss']:.0%} at worst"
    )


if __name__ == "__main__":
    main()
