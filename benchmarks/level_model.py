"""Whole models on real texts: time of batches as they come and sorted by length, and of single texts."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from inputs import build_models, make_batches, read_texts, tokenize
from measure import Agreement, interleave, ratio, spread, stopwatch

from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import calibrate_margins


SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "data": "docstrings",
    "max_length": 128,
    "batch_size": 32,
    "batches": 4,
    "narrow_budget": 0.5,
    "budgets": [1.0, 0.5, 0.25, 1 / 6, 1 / 12],
    "cut_budgets": [0.25],
    "first_look": 1 / 6,
    "doubted": [0.1, 0.2],
    "latency_inputs": 40,
}


def name_of(budget: float) -> str:
    """1, 1/2, 1/12 and so on."""
    return "1" if budget == 1.0 else f"1/{1 / budget:.3g}"


def make_ways(settings: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> dict[str, Callable[[Any], Any]]:
    """Each way to answer a batch: logits of the stock model, of ours at a budget or in looks, of a static one."""
    stock, ours = build_models(settings)
    calibrate_margins(ours, batches, settings["first_look"])
    ways: dict[str, Callable[[Any], Any]] = {"stock": lambda batch: stock(**batch).logits}
    for budget in settings["budgets"]:
        ways[f"ours {name_of(budget)}"] = lambda batch, budget=budget: ours(**batch, budget=budget).logits
    for share in settings["doubted"]:
        mean = settings["first_look"] + share
        name = f"looks {name_of(settings['first_look'])}, all for {share:.0%}"
        ways[name] = lambda batch, mean=mean: ours(**batch, budget=mean).logits
    for budget in settings["cut_budgets"]:
        static = cut(ours, budget)
        ways[f"cut {name_of(budget)}"] = lambda batch, static=static: static(**batch).logits
    check_ways(ways, stock, ours, batches, settings)
    return ways


def check_ways(ways: dict[str, Any], stock: Any, ours: Any, batches: Any, settings: dict[str, Any]) -> None:
    """Refuses to time what does not agree: the full model with stock, packed views with the masked reference."""
    agreement = settings["agreement"] = Agreement(settings["dtype"])
    for batch in batches:
        agreement.check("ours 1", ways["ours 1"](batch), stock(**batch).logits)
        for budget in settings["budgets"]:
            expected = ours(**batch, budget=budget, executor="masked").logits
            agreement.check(f"ours {name_of(budget)}", ways[f"ours {name_of(budget)}"](batch), expected)
        for budget in settings["cut_budgets"]:
            agreement.check("cut", ways[f"cut {name_of(budget)}"](batch), ours(**batch, budget=budget).logits)
    for share in settings["doubted"]:
        mean = settings["first_look"] + share
        spent = torch.cat([ours(**batch, budget=mean).budget for batch in batches]).mean().item()
        settings.setdefault("spent", {})[f"{share:.0%}"] = spent


def measure_latency(ways: dict[str, Any], rows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Milliseconds of single texts, unpadded, all ways in turn: median and 95th percentile over texts."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number, row in enumerate([*rows[:3], *rows]):  # the first three warm up
        batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
        for name, way in ways.items():
            start = time.perf_counter()
            way(batch)
            if number >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, samples in times.items():
        p50, p95 = torch.tensor(samples).quantile(torch.tensor([0.5, 0.95])).tolist()
        total = sum(times["stock"]) / sum(samples)
        found[name] = {"p50": p50, "p95": p95, "ratio": total}
    return found


@torch.inference_mode()
def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times every way, interleaved."""
    count = settings["batch_size"] * settings["batches"]
    texts, data = read_texts(settings["data"], options.data, count, settings["seed"])
    rows = tokenize(texts, settings["max_length"])
    plain, by_length = (make_batches(rows, settings["batch_size"], order) for order in (False, True))
    own = dict(settings)
    ways = make_ways(own, plain)
    figures: dict[str, Any] = {
        "tokens": {"real": sum(map(len, rows)), "padded": sum(b["input_ids"].numel() for b in plain)}
    }
    figures["spent"] = own["spent"]
    for threads in settings["threads"]:
        torch.set_num_threads(threads)
        runs = {name: stopwatch(lambda way=way: [way(batch) for batch in plain]) for name, way in ways.items()}
        for name in ("stock", "ours 1/4"):
            if name in ways:
                way = ways[name]
                runs[f"{name} sorted"] = stopwatch(lambda way=way: [way(batch) for batch in by_length])
        times = interleave(runs, settings["repeats"])
        found = {}
        for name in runs:
            found[name] = {
                "seconds_per_batch": spread([x / settings["batches"] for x in times[name]]),
                "ratio": ratio(times, name, "stock"),
                "ratio_to_sorted": ratio(times, name, "stock sorted"),
                "ratio_to_all_open": ratio(times, name, "ours 1"),
            }
        figures[str(threads)] = {"ways": found, "latency_ms": measure_latency(ways, rows[: settings["latency_inputs"]])}
    return {"agreement": own["agreement"].to_dict(), "data": data, "figures": figures}
