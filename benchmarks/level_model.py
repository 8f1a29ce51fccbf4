"""Whole models on real texts, ours and what a user could pick instead.

Batches as they come and sorted by length, single texts, memory, and what routing costs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from inputs import build_models, make_batches, read_texts, tokenize
from measure import Agreement, has_bfloat16, interleave, ratio, spread, stopwatch

from hf_budgetformer.budgets import confidence, plan_looks
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.profiling import HeldMemory
from hf_budgetformer.tools.rivals import RIVALS, make_rivals
from hf_budgetformer.tools.tuning import Calibration


SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "data": "docstrings",
    "max_length": 128,
    "batch_size": 32,
    "batches": 4,
    "narrow_budget": 0.5,
    "budgets": [1.0, 0.5, 0.25, 1 / 6, 1 / 12],
    "sorted_budgets": [1.0, 0.25],  # of those, on sorted batches too
    "cut_budgets": [0.25, 1 / 12],
    "looks": [[1 / 6, 0.1], [1 / 6, 0.2], [1 / 12, 0.1]],  # first look, share of the inputs that it doubts
    "rivals": list(RIVALS),
    "latency_inputs": 40,
    "seconds": 160.0,  # for the rounds of a number of threads, of which there are `repeats` at most
}
Batches = Sequence[dict[str, torch.Tensor]]
Way = Callable[[Any], torch.Tensor]


def name_of(budget: float) -> str:
    """1, 1/2, 1/12 and so on."""
    return "1" if budget == 1.0 else f"1/{1 / budget:.3g}"


def looks_name(first_look: float, doubted: float) -> str:
    """Of a first look, and the full model for a share of the inputs."""
    return f"looks {name_of(first_look)}, all for {doubted:.0%}"


class Looks(NamedTuple):
    """A first look of our model, and the full one where its answer is not sure enough.

    A mean budget would not do: up to `narrow_budget`, a half here, it is the narrow encoder's alone.

    Args:
        model: Of which they are.
        first: Budget of the first look.
        threshold: Confidence below which its answer is doubted.
    """

    model: Any
    first: float
    threshold: float

    def choose(self) -> None:
        """Makes these the looks of a plain call."""
        self.model.config.looks, self.model.config.confidence = [self.first, 1.0], [self.threshold]

    def answer(self, batch: Any) -> Any:
        """The model's output."""
        self.choose()
        return self.model(**batch)

    def route(self, parts: Sequence[tuple[Any, torch.Tensor]]) -> None:
        """What looking twice does beside running encoders, of embedded batches and the first look's logits."""
        self.choose()
        config = self.model.config
        for embedded, logits in parts:
            plan = plan_looks(config, self.model.narrow.order)
            rows = (confidence(logits, config.problem_type) < plan.thresholds[0]).nonzero()[:, 0]
            if len(rows):
                embedded.select(rows)
                logits.index_copy(0, rows, logits[rows])

    def find_parts(self, batches: Batches) -> list[tuple[Any, torch.Tensor]]:
        """What `route` takes."""
        return [(self.model.embed(batch), self.model(**batch, budget=self.first).logits) for batch in batches]


def make_looks(ours: Any, batches: Batches, settings: dict[str, Any]) -> dict[str, Looks]:
    """Looks by name, with thresholds from the rows that are timed."""
    firsts = sorted({first_look for first_look, _ in settings["looks"]})
    if not firsts:
        return {}
    sure = Calibration(ours, batches, firsts, full=False).confidence
    return {
        looks_name(first_look, doubted): Looks(ours, first_look, float(np.quantile(sure[first_look], doubted)))
        for first_look, doubted in settings["looks"]
    }


def make_ways(stock: Any, ours: Any, looks: dict[str, Looks], settings: dict[str, Any]) -> dict[str, Way]:
    """Each way to answer a batch in plain PyTorch: the stock model, ours at a budget or in looks, static ones."""
    ways: dict[str, Way] = {"stock": lambda batch: stock(**batch).logits}
    for budget in settings["budgets"]:
        ways[f"ours {name_of(budget)}"] = lambda batch, budget=budget: ours(**batch, budget=budget).logits
    for name, pair in looks.items():
        ways[name] = lambda batch, pair=pair: pair.answer(batch).logits
    for budget in settings["cut_budgets"]:
        static = cut(ours, budget)
        ways[f"cut {name_of(budget)}"] = lambda batch, static=static: static(**batch).logits
    return ways


def check_ways(ways: dict[str, Way], ours: Any, batches: Batches, settings: dict[str, Any]) -> Agreement:
    """Refuses to time what does not agree: the full model with stock, packed views with the masked reference."""
    agreement = Agreement(settings["dtype"])
    for batch in batches:
        agreement.check("ours 1", ways["ours 1"](batch), ways["stock"](batch))
        for budget in settings["budgets"]:
            expected = ours(**batch, budget=budget, executor="masked").logits
            agreement.check(f"ours {name_of(budget)}", ways[f"ours {name_of(budget)}"](batch), expected)
        for budget in settings["cut_budgets"]:
            expected = ours(**batch, budget=budget).logits
            agreement.check("cut", ways[f"cut {name_of(budget)}"](batch), expected)
    return agreement


def check_looks(looks: dict[str, Looks], batches: Batches, agreement: Agreement) -> dict[str, dict[str, float]]:
    """Share of the inputs doubted and mean budget spent; each must be answered by the encoder that looked last."""
    figures = {}
    for name, pair in looks.items():
        spent = []
        for batch in batches:
            out = pair.answer(batch)
            first = pair.model(**batch, budget=pair.first).logits
            full = pair.model(**batch, budget=1.0).logits
            agreement.check(name, out.logits, torch.where((out.budget > 1.0)[:, None], full, first))
            spent.append(out.budget)
        budgets = torch.cat(spent)
        figures[name] = {"doubted": (budgets > 1.0).float().mean().item(), "spent": budgets.mean().item()}
    return figures


def measure_latency(ways: dict[str, Way], rows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Milliseconds of single texts, unpadded, all ways in turn: median and 95th percentile over texts.

    Every text is answered once before it counts, for other runtimes prepare for each length.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for counts in (False, True):
        for row in rows:
            batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
            for name, way in ways.items():
                start = time.perf_counter()
                way(batch)
                if counts:
                    times[name].append((time.perf_counter() - start) * 1e3)
    latencies = {}
    for name, samples in times.items():
        p50, p95 = torch.tensor(samples).quantile(torch.tensor([0.5, 0.95])).tolist()
        total = sum(times["stock"]) / sum(samples)
        latencies[name] = {"p50": p50, "p95": p95, "ratio": total}
    return latencies


def measure_memory(ways: dict[str, Way], owners: dict[str, Any], batch: Any) -> dict[str, dict[str, float]]:
    """MiB held at most while a batch runs, weights included, and beside them; and as shares of the stock model's."""
    memory = {}
    for name, owner in owners.items():
        with HeldMemory([*owner.parameters(), *owner.buffers()]) as held:
            weights = held.bytes
            ways[name](batch)
        memory[name] = {"peak": held.peak / 2**20, "beside_weights": (held.peak - weights) / 2**20}
    for x in memory.values():
        x["ratio"] = x["peak"] / memory["stock"]["peak"]
        x["ratio_beside_weights"] = x["beside_weights"] / memory["stock"]["beside_weights"]
    return memory


def run_all(way: Way, batches: Batches) -> None:
    """Answers every batch."""
    for batch in batches:
        way(batch)


def compare(times: dict[str, list[float]], settings: dict[str, Any]) -> dict[str, Any]:
    """Time of each way, and how many times faster it is than each baseline, round by round."""
    results: dict[str, Any] = {}
    for name in times:
        results[name] = {
            "seconds_per_batch": spread([x / settings["batches"] for x in times[name]]),
            "ratio": ratio(times, name, "stock"),
            "ratio_to_sorted": ratio(times, name, "stock sorted"),
            "ratio_to_all_open": ratio(times, name, "ours 1"),
            "ratio_to_rivals": {rival: ratio(times, name, f"{rival} sorted") for rival in settings["rivals"]},
        }
    for budget in settings["cut_budgets"]:
        name = f"ours {name_of(budget)}"
        if name in results:
            results[name]["ratio_to_cut"] = ratio(times, name, f"cut {name_of(budget)}")
    return results


def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times every way, interleaved."""
    if settings["dtype"] == "bfloat16" and not has_bfloat16():
        return {"skipped": "the processor has no bfloat16 (AVX512-BF16 or AMX)."}
    count = settings["batch_size"] * settings["batches"]
    texts, data = read_texts(settings["data"], options.data, count, settings["seed"])
    rows = tokenize(texts, settings["max_length"])
    plain, by_length = (make_batches(rows, settings["batch_size"], order) for order in (False, True))
    stock, ours = build_models(settings)
    with torch.inference_mode():
        looks = make_looks(ours, plain, settings)
        ways = make_ways(stock, ours, looks, settings)
        agreement = check_ways(ways, ours, plain, settings)
        figures: dict[str, Any] = {
            "tokens": {
                "real": sum(map(len, rows)),
                "padded": sum(x["input_ids"].numel() for x in plain),
                "padded_sorted": sum(x["input_ids"].numel() for x in by_length),
            },
            "looks": check_looks(looks, plain, agreement),
            "memory": measure_memory(ways, {"stock": stock, "ours 1/4": ours}, plain[0]) if "ours 1/4" in ways else {},
        }
    sorted_ways = ["stock", *(f"ours {name_of(x)}" for x in settings["sorted_budgets"]), *looks, *settings["rivals"]]
    for threads in settings["threads"]:
        torch.set_num_threads(threads)
        rivals = make_rivals(settings["rivals"], ours, by_length, threads)
        everything = {**ways, **{name: rival.answer for name, rival in rivals.items()}}
        with torch.inference_mode():
            runs = {name: stopwatch(partial(run_all, way, plain)) for name, way in everything.items()}
            for name in sorted_ways:
                runs[f"{name} sorted"] = stopwatch(partial(run_all, everything[name], by_length))
            routes = {
                f"routing of {name}": stopwatch(partial(pair.route, pair.find_parts(plain)), least_seconds=0.02)
                for name, pair in looks.items()
            }
            times = interleave({**runs, **routes}, settings["repeats"], settings["seconds"])
            routing = {
                name: spread(
                    [part / all_ for part, all_ in zip(times.pop(f"routing of {name}"), times[name], strict=True)]
                )
                for name in looks
            }
            figures[str(threads)] = {
                "rounds": len(times["stock"]),
                "ways": compare(times, settings),
                "latency_ms": measure_latency(everything, rows[: settings["latency_inputs"]]),
                "routing_share": routing,
                "same_labels": {name: rival.agreement for name, rival in rivals.items()},
            }
    return {"agreement": agreement.to_dict(), "data": data, "figures": figures}
