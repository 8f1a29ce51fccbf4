"""Whole models on real texts: time of batches, latency of single inputs, peak memory."""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from inputs import build_models, keep_quiet, make_batches, read_texts, tokenize
from measure import Agreement, interleave, ratio, spread, stopwatch

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.data import weights_digest
from hf_budgetformer.tools.profiling import profile, speed_ceiling


SETTINGS: dict[str, Any] = {
    "model": "minilm",  # or fields of BertConfig, for random weights
    "data": "docstrings",
    "max_length": 128,
    "batch_size": 32,
    "batches": 4,
    "open_heads": [12, 3],
    "sorted_open_heads": [],
    "static_open_heads": [3],
    "budgets": [],  # asked of --checkpoint
    "memory": [],  # names of variants
    "latency_inputs": 0,
}


@contextmanager
def choices(model: Any, make: Callable[[int, Any], Any]) -> Iterator[None]:
    """Replaces what routers choose, not what routing costs: `make` gives, for layer and own choice, the other one."""
    routers = [layer.router for layer in model.base_model.encoder.layer]
    for index, router in enumerate(routers):
        router._choose = make(index, router._choose)
    try:
        yield
    finally:
        for router in routers:
            del router._choose


def random_heads(count: int, index: int, choose: Any) -> Any:
    """Exactly `count` heads in every layer, different ones for each input."""
    return lambda asked, scores: choose(torch.full_like(asked, count), torch.rand_like(scores))


def first_heads(count: int, index: int, choose: Any) -> Any:
    """The heads that the static variants keep."""
    return lambda asked, scores: (torch.arange(scores.shape[-1]) < count).expand_as(scores).to(scores.dtype)


@dataclass
class Variant:
    """One way to run the texts.

    Args:
        model: To call.
        asked: What to call it with beside the batch.
        count: Open heads, at random for each input; None: as the model chooses.
        by_length: Whether texts come sorted by length.
    """

    model: Any
    asked: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    by_length: bool = False

    def chosen(self) -> Any:
        """While it lasts, routers choose as this variant wants."""
        return nullcontext() if self.count is None else choices(self.model, partial(random_heads, self.count))

    def __call__(self, batches: list[dict[str, torch.Tensor]], **asked: Any) -> list[Any]:
        """Outputs of all batches."""
        with self.chosen():
            return [self.model(**batch, **self.asked, **asked) for batch in batches]


def build_variants(settings: dict[str, Any], checkpoint: str | None, only: str | None = None) -> dict[str, Variant]:
    """The variants of an experiment by name; `only` one of them where the others' memory would disturb."""
    stock, ours = build_models(settings)
    heads = ours.config.num_attention_heads
    makers: dict[str, Callable[[], Variant]] = {
        "stock": lambda: Variant(stock),
        "stock sorted": lambda: Variant(stock, by_length=True),
    }
    if not settings["open_heads"] or not all(1 <= x <= heads for x in settings["open_heads"]):
        raise SystemExit(f"open_heads must be numbers in [1, {heads}], at least one, got {settings['open_heads']}.")
    for count in settings["open_heads"]:
        every = {"head_budget": 1.0} if count == heads else {}
        for suffix in ("", " sorted") if count in settings["sorted_open_heads"] else ("",):
            makers[f"ours {count}{suffix}"] = partial(Variant, ours, every, None if every else count, bool(suffix))
    for count in settings["static_open_heads"]:
        makers[f"static {count}"] = lambda count=count: Variant(
            prune(ours, [list(range(count))] * ours.config.num_hidden_layers)
        )
    if checkpoint is not None and settings["budgets"]:
        learned = BudgetFormerForSequenceClassification.from_pretrained(checkpoint).eval().to(ours.dtype)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(learned.config, name) != getattr(ours.config, name):
                raise SystemExit(
                    f"--checkpoint {checkpoint}: {name} is {getattr(learned.config, name)}, the "
                    f"experiment's model has {getattr(ours.config, name)}."
                )
        for budget in settings["budgets"]:
            makers[f"learned {budget:g}"] = partial(Variant, learned, {"head_budget": budget})
    if only is not None:
        if only not in makers:
            raise SystemExit(f"memory: there is no variant {only!r}, only {list(makers)}.")
        return {only: makers[only]()}
    return {name: make() for name, make in makers.items()}


def peak_memory(settings: dict[str, Any], checkpoint: str | None, name: str, rows: list[list[int]]) -> dict[str, float]:
    """MiB resident before the batches run, and at most while they run; for a process of its own."""
    keep_quiet()
    torch.set_num_threads(max(settings["threads"]))
    [variant] = build_variants(settings, checkpoint, name).values()
    batches = make_batches(rows, settings["batch_size"], variant.by_length)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # forgets the peak of loading; and ru_maxrss would begin at the parent's

    def peak() -> float:
        if not status.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) / 2**10

    before = peak()
    with torch.no_grad():
        variant(batches)
    return {"loaded": round(before, 1), "peak": round(peak(), 1)}


@torch.no_grad()
def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Whole models on real texts."""
    size = settings["batch_size"]
    texts, data = read_texts(settings["data"], options.data, size * settings["batches"], settings["seed"])
    rows = tokenize(texts, settings["max_length"])
    batches = {by_length: make_batches(rows, size, by_length) for by_length in (False, True)}
    variants = build_variants(settings, options.checkpoint)
    ours = next(variant.model for name, variant in variants.items() if name.startswith("ours"))
    agreement = check_models(ours, variants, {name: x[:8] for name, x in batches[False][0].items()}, settings)

    found: dict[str, Any] = {"heads": {}, "flops_ratio": {}}
    for name, variant in variants.items():
        if name.split()[0] in ("ours", "learned"):
            found["heads"][name] = torch.cat([x.head_budget for x in variant(batches[variant.by_length])]).mean().item()
            with variant.chosen():
                counts = [profile(variant.model, x, variant.asked.get("head_budget")) for x in batches[False]]
            spent, whole = (sum(sum(getattr(x, who).values()) for x in counts) for who in ("sparse", "backbone"))
            found["flops_ratio"][name] = spent / whole
    found["tokens"] = {"real": sum(map(len, rows))} | {
        name: sum(x["input_ids"].numel() for x in batches[by_length])
        for name, by_length in (("padded", False), ("padded_sorted", True))
    }
    found["peak_memory_mib"] = {}
    for name in settings["memory"]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            child = pool.submit(peak_memory, settings, options.checkpoint, name, rows)
            found["peak_memory_mib"][name] = child.result()
    if (stock_memory := found["peak_memory_mib"].get("stock")) is not None:
        found["memory_ratio"] = {
            name: x["peak"] / stock_memory["peak"] for name, x in found["peak_memory_mib"].items() if name != "stock"
        }
    for threads in settings["threads"]:
        torch.set_num_threads(threads)
        timed = {name: stopwatch(partial(x, batches[x.by_length])) for name, x in variants.items()}
        times = interleave(timed, settings["repeats"])
        figures: dict[str, Any] = {"variants": {}}
        for name in variants:
            baselines = {"ratio": "stock", "ratio_to_sorted": "stock sorted"}
            if name.startswith("ours") and (static := f"static {name.split()[1]}") in variants:
                baselines["ratio_to_static"] = static
            figures["variants"][name] = {
                "seconds_per_batch": spread([x / settings["batches"] for x in times[name]]),
                **{key: ratio(times, name, baseline) for key, baseline in baselines.items()},
            }
        figures["latency_ms"] = measure_latency(variants, rows[: settings["latency_inputs"]])
        quarter = Variant(ours, count=max(1, ours.config.num_attention_heads // 4))
        figures["router_share"] = spread([router_share(quarter, batches[False]) for _ in range(settings["repeats"])])
        ceiling = speed_ceiling(ours, batches[False][0], repeats=settings["repeats"])
        figures["ceiling"] = {
            "all_heads_s": ceiling.all_heads,
            "unavoidable_s": ceiling.unavoidable,
            "ratio": ceiling.ratio,
        }
        found[str(threads)] = figures
    learned = next((x.model for name, x in variants.items() if name.startswith("learned")), None)
    checkpoint = None if learned is None else weights_digest(learned)
    return {"agreement": agreement.to_dict(), "data": data, "checkpoint": checkpoint, "figures": found}


def check_models(
    reference: Any, variants: dict[str, Variant], batch: dict[str, torch.Tensor], settings: dict[str, Any]
) -> Agreement:
    """Compares every variant of ours, and the pruned models, with the masked reference of the same heads."""
    agreement = Agreement(settings["dtype"])
    for name, variant in variants.items():
        kind = name.split()[0]
        if kind in ("ours", "learned"):
            [got] = variant([batch], output_head_gates=True)
            # In number types of low precision the routers of the reference might see, and choose, otherwise.
            with choices(variant.model, lambda index, choose: lambda *given: got.head_gates[:, index]):  # noqa: B023
                expected = variant.model(**batch, **variant.asked, executor="masked")
        elif kind == "static":
            [got] = variant([batch])
            with choices(reference, partial(first_heads, int(name.split()[1]))):
                expected = reference(**batch, executor="masked")
        else:
            got, expected = variant([batch])[0], reference(**batch, head_budget=1.0, executor="masked")
        agreement.check(name, got.logits, expected.logits)
    return agreement


def measure_latency(variants: dict[str, Variant], rows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Milliseconds of single inputs, unpadded, all variants in turn: median and 95th percentile over inputs."""
    runs = {name: variant for name, variant in variants.items() if not variant.by_length}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number, row in enumerate([*rows[:3], *rows]):  # the first three warm up
        batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
        for name, variant in runs.items():
            start = time.perf_counter()
            variant([batch])
            if number >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    quantiles = {name: torch.tensor(x).quantile(torch.tensor([0.5, 0.95])).tolist() for name, x in times.items() if x}
    return {name: {"p50": p50, "p95": p95} for name, (p50, p95) in quantiles.items()}


def router_share(variant: Variant, batches: list[dict[str, torch.Tensor]]) -> float:
    """Share of the time from the start of each layer to its router's answer, pooling included."""
    spent, handles = [], []
    for layer in variant.model.base_model.encoder.layer:
        handles.append(layer.register_forward_pre_hook(lambda *_: spent.append(-time.perf_counter())))
        handles.append(layer.router.register_forward_hook(lambda *_: spent.append(time.perf_counter())))
    try:
        start = time.perf_counter()
        variant(batches)
        return sum(spent) / (time.perf_counter() - start)
    finally:
        for handle in handles:
            handle.remove()
