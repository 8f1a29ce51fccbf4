"""One GPU, eight minutes: whole models and training steps at several shapes, beside stock and all open packed.

Attention is variable-length flash attention where ours is packed in bfloat16, so all open in bfloat16 is the baseline
that counts. The result is written after every cell; --dry-run does all of it at tiny shapes on the CPU.
"""

import argparse
import copy
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inputs import build_models, keep_quiet
from measure import ROOT, environment, interleave, ratio, spread, stopwatch
from torch import nn

from hf_budgetformer.budgets import confidence


SHAPES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
# Shape, batch, length; what is most wanted first, for the time may end before all are done.
CELLS = [
    ("base", 256, 128), ("base", 64, 512), ("base", 32, 128), ("base", 32, 512), ("base", 256, 512),
    ("large", 256, 128), ("large", 32, 512), ("large", 32, 128), ("large", 256, 512),
    ("base", 32, 2048), ("large", 32, 2048), ("base", 256, 2048), ("large", 256, 2048),
]  # fmt: skip
TRAINED = [("base", 32, 128), ("base", 32, 512)]
DRY_CELLS = [("tiny", 4, 8), ("tiny", 2, 16)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_LOOK, DOUBTED = 1 / 6, 0.1
BASELINE = "all open bf16"
# Beside what stock's own bfloat16 costs; relative where logits exceed 1.
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}
CHECKED_ROWS = 4
Batch = dict[str, torch.Tensor]
Way = Callable[[Batch], torch.Tensor]


def make_batch(vocabulary: int, rows: int, length: int, device: torch.device) -> Batch:
    """Random tokens of ragged lengths, a quarter of `length` up to all of it, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def make_models(shape: str, length: int, device: torch.device, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """Stock and ours of random weights, float32; logits are about 1, or no difference would show."""
    sizes = {**(TINY if shape == "tiny" else SHAPES[shape]), "max_position_embeddings": max(512, length)}
    settings = {"model": sizes, "seed": 0, "dtype": "float32", "narrow_budget": 0.5, **fields}
    with device:  # made there, for drawing the weights of large models takes a CPU long
        stock, ours = build_models(settings)
    nn.init.normal_(stock.classifier.weight, std=0.1)
    ours.classifier.load_state_dict(stock.classifier.state_dict())
    ours.copy_head()
    ours.narrow.steps.fill_(1)  # as if it had been trained, which no time depends on
    return stock, ours


def find_looks(model: Any, batch: Batch) -> tuple[list[float], list[float]]:
    """Looks and confidence by which the full model looks at the tenth that the first look is least sure of."""
    sure = confidence(model(**batch, budget=FIRST_LOOK).logits, None)
    return [FIRST_LOOK, 1.0], [sure.quantile(DOUBTED).item()]


def make_ways(models: dict[str, tuple[Any, Any]], batch: Batch) -> dict[str, Way]:
    """Ways to logits by name, stock and ours in each number type."""
    ways: dict[str, Way] = {}
    for dtype, (stock, ours) in models.items():
        ways[f"stock {dtype}"] = lambda x, stock=stock: stock(**x).logits
        for name, budget in (("all open", 1.0), ("1/2", 0.5), ("1/4", 0.25)):
            ways[f"{name} {dtype}"] = lambda x, ours=ours, budget=budget: ours(**x, budget=budget).logits
        ours.config.looks, ours.config.confidence = find_looks(ours, batch)
        ways[f"looks {dtype}"] = lambda x, ours=ours: ours(**x).logits
    return ways


def check(ways: dict[str, Way], models: dict[str, tuple[Any, Any]], batch: Batch) -> float:
    """Largest difference from the reference, which is float32 and masked, on some rows; raises ValueError if too large.

    Ours in bfloat16 may be off by twice as much as stock in bfloat16 is, and by the tolerance.
    """
    some = {name: x[:CHECKED_ROWS] for name, x in batch.items()}
    stock, ours = models["fp32"]
    open_ = stock(**some).logits
    scale = max(1.0, open_.abs().max().item())
    worst = 0.0
    for dtype in models:
        allowed = TOLERANCE[dtype] + 2 * (ways[f"stock {dtype}"](some).float() - open_).abs().max().item() / scale
        for name, budget in (("all open", 1.0), ("1/2", 0.5), ("1/4", 0.25)):
            expected = open_ if budget == 1.0 else ours(**some, budget=budget, executor="masked").logits
            difference = (ways[f"{name} {dtype}"](some).float() - expected).abs().max().item() / scale
            if not difference <= allowed:
                raise ValueError(f"{name} {dtype} differs by {difference:.2g}, more than {allowed:.2g}.")
            worst = max(worst, difference)
    return worst


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device, seconds: float) -> Callable[[int], float]:
    """What `interleave` takes: the device has finished when the clock stops."""

    def finish() -> None:
        run()
        synchronize(device)

    return stopwatch(finish, least_seconds=seconds)


def compare(times: dict[str, list[float]], baselines: list[str]) -> dict[str, Any]:
    """Seconds of each way, and how many times faster it is than each baseline."""
    results = {}
    for name in times:
        over = {baseline: ratio(times, name, baseline) for baseline in baselines}
        results[name] = {"seconds": spread(times[name]), "over": over}
    return results


def peak_memory(ways: dict[str, Way], batch: Batch, device: torch.device) -> dict[str, float]:
    """MiB that each way allocates at most beside what was there; empty on a CPU."""
    peaks: dict[str, float] = {}
    if device.type != "cuda":
        return peaks
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way(batch)
        synchronize(device)
        peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peaks


@torch.inference_mode()
def measure_inference(shape: str, rows: int, length: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """One cell: both number types, all ways in turn."""
    stock, ours = make_models(shape, length, device)
    models = {"bf16": (copy.deepcopy(stock).bfloat16(), copy.deepcopy(ours).bfloat16()), "fp32": (stock, ours)}
    batch = make_batch(stock.config.vocab_size, rows, length, device)
    ways = make_ways(models, batch)
    worst = check(ways, models, batch)
    memory = peak_memory(ways, batch, device)
    doubted = {dtype: (ours(**batch).budget > 1.0).float().mean().item() for dtype, (_, ours) in models.items()}
    runs = {name: timed(partial(way, batch), device, 0.02) for name, way in ways.items()}
    times = interleave(runs, repeats, seconds=12.0)
    return {
        "max_difference": worst,
        "padding": 1.0 - batch["attention_mask"].float().mean().item(),
        "doubted": doubted,
        "peak_mib": memory,
        "ways": compare(times, ["stock bf16", "stock fp32", BASELINE]),
    }


def training_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, device: torch.device) -> None:
    """Forward, backward and update under bfloat16 autocast."""
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_training(shape: str, rows: int, length: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """A step of the stock model, of ours learning whole, and of ours beside a frozen full model."""
    stock, learning = make_models(shape, length, device)
    _, frozen = make_models(shape, length, device, freeze_full=True)
    batch = make_batch(stock.config.vocab_size, rows, length, device)
    labels = {"labels": torch.arange(rows, device=device) % 2}
    taught = {**labels, "teacher_logits": torch.tensor([[0.5, -0.5]], device=device).repeat(rows, 1)}
    runs = {}
    for name, model, given in (("stock", stock, labels), ("learning", learning, labels), ("frozen", frozen, taught)):
        learned = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)
        runs[name] = timed(partial(training_step, model, optimizer, {**batch, **given}, device), device, 0.02)
    return {"ways": compare(interleave(runs, repeats, seconds=12.0), ["stock"])}


def list_cells(dry: bool) -> Iterator[tuple[str, Callable[..., dict[str, Any]], tuple[str, int, int]]]:
    """Kind, function and place of each cell; training follows the two cells that are most wanted."""
    inference = DRY_CELLS if dry else CELLS
    training = DRY_CELLS[:1] if dry else TRAINED
    for cells, kind, function in (
        (inference[:2], "inference", measure_inference),
        (training, "training", measure_training),
        (inference[2:], "inference", measure_inference),
    ):
        for cell in cells:
            yield kind, function, cell


def main(arguments: list[str] | None = None) -> None:
    """Measures cell after cell until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(os.environ.get("OUT", ROOT / "build" / "benchmarks")) / "gpu.json"
    parser.add_argument(
        "--output", type=Path, default=default, help="JSON file; default: gpu.json in $OUT, or in build"
    )
    parser.add_argument("--seconds", type=float, default=460.0, help="no cell begins that may not end in this time")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that it works")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here; --dry-run tries everything on the CPU.", file=sys.stderr)
        sys.exit(2)
    start = time.perf_counter()
    keep_quiet()
    device = torch.device("cpu" if options.dry_run else "cuda")
    result: dict[str, Any] = {
        "device": "cpu, dry run" if options.dry_run else torch.cuda.get_device_name(device),
        "environment": environment(),
        "baseline": BASELINE,
        "cells": [],
        "left_out": [],
    }
    longest = 0.0
    for kind, function, (shape, rows, length) in list_cells(options.dry_run):
        place = {"kind": kind, "shape": shape, "batch": rows, "length": length}
        begun = time.perf_counter()
        if begun - start + longest > options.seconds:
            result["left_out"].append(place)
            continue
        try:
            figures = function(shape, rows, length, device, 2 if options.dry_run else 7)
        except torch.cuda.OutOfMemoryError:
            figures = {"failed": "out of memory"}
        except ValueError as error:  # what is not right is not timed
            figures = {"failed": str(error)}
        gc.collect()  # before the next models are made
        if device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = time.perf_counter() - begun
        longest = max(longest, seconds)
        result["cells"].append({**place, "seconds": round(seconds, 1), **figures})
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{kind} {shape} {rows} x {length}: {figures.get('failed', 'done')}, {seconds:.0f} s", flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.output}: {len(result['cells'])} cells, {len(result['left_out'])} left out")


if __name__ == "__main__":
    main()
