"""Self-attention and output projection alone, over a grid of sizes, batches, lengths and open heads."""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from measure import Agreement, interleave, ratio, spread, stopwatch
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from hf_budgetformer import BudgetFormerConfig
from hf_budgetformer.attention import EXECUTORS, GatedSelfAttention, OpenHeads, gated_attention
from hf_budgetformer.packing import find_packing


SETTINGS: dict[str, Any] = {
    "sizes": {"MiniLM": {"hidden_size": 384, "num_attention_heads": 12}},
    "batch": [32],
    "length": [128],
    "extra_cells": [],  # [size, batch, length]
    "open_heads": [3],
    "least_seconds": 0.02,  # a sample of a small cell is the mean of as many calls
}


@torch.no_grad()
def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Self-attention and output projection alone, against the stock ones on the same batch."""
    agreement = Agreement(settings["dtype"])
    found: dict[str, dict[str, Any]] = {str(threads): {} for threads in settings["threads"]}
    grid = [(size, *cell) for size in settings["sizes"] for cell in product(settings["batch"], settings["length"])]
    for size, rows, length in [*grid, *map(tuple, settings["extra_cells"])]:
        if size not in settings["sizes"]:
            raise SystemExit(f"extra_cells: size must be one of {list(settings['sizes'])}, got {size!r}.")
        torch.manual_seed(settings["seed"])
        config = BudgetFormerConfig(**settings["sizes"][size])
        config._attn_implementation = "sdpa"
        dtype, width, heads = getattr(torch, settings["dtype"]), config.hidden_size, config.num_attention_heads
        attention, output = GatedSelfAttention(config).eval().to(dtype), nn.Linear(width, width).to(dtype)
        hidden = torch.randn(rows, length, width, dtype=dtype)
        packing = find_packing(None, (rows, length), hidden.device)
        packed = packing.pack(hidden)

        variants: dict[str, Callable[[], Any]] = {"stock": partial(stock_block, attention, output, hidden)}
        executors: dict[str, Callable[[], Any]] = {}
        chosen: dict[str, str] = {}
        for count, heads_of in product(settings["open_heads"], ("same", "different")):
            if heads_of == "different" and (rows == 1 or count == heads):
                continue
            gates = (torch.rand(rows, heads).argsort(-1) < count).to(dtype)
            gates = gates[:1].expand(rows, -1).contiguous() if heads_of == "same" else gates
            name = f"{count} {heads_of}"
            variants[name] = partial(gated_attention, attention, output, packed, packing, gates, "auto")
            open_heads = OpenHeads(gates.tolist())
            for executor, run in EXECUTORS.items():
                argument: Any = gates if executor == "all_heads" else open_heads
                executors[f"{name} {executor}"] = partial(run, attention, output, packed, packing, argument)
            expected = packing.pack(output(attention(hidden, None, gates=gates)[0]))
            for label, run in {name: variants[name], **executors}.items():
                if label.startswith(name):
                    agreement.check(f"{size} {rows}x{length}, {label}", run(), expected)
            chosen[name] = executor_that_runs(variants[name])
        for threads, cells in found.items():
            torch.set_num_threads(int(threads))
            least = settings["least_seconds"]
            times = interleave({name: stopwatch(run, least) for name, run in variants.items()}, settings["repeats"])
            # Only there to judge the choice by, so fewer rounds do; beside the choice, for a fair comparison.
            judged = {name: stopwatch(run, least) for name, run in {**variants, **executors}.items() if name != "stock"}
            alone = interleave(judged, min(3, settings["repeats"]))
            cells[f"{size} {rows}x{length}"] = {"stock": {"seconds": spread(times["stock"])}} | {
                name: {
                    "seconds": spread(times[name]),
                    "ratio": ratio(times, name, "stock"),
                    "chosen": chosen[name],
                    "auto_seconds": spread(alone[name])["median"],
                    "executor_seconds": {x: spread(alone[f"{name} {x}"])["median"] for x in EXECUTORS},
                }
                for name in chosen
            }
    worst = {
        threads: min(x["ratio"]["median"] for cell in cells.values() for x in cell.values() if "ratio" in x)
        for threads, cells in found.items()
    }
    return {"agreement": agreement.to_dict(), "data": None, "figures": {"worst_ratio": worst, **found}}


def stock_block(attention: GatedSelfAttention, output: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """What transformers computes; nothing is padded, so there is no mask."""
    return output(BertSelfAttention.forward(attention, hidden)[0])


def executor_that_runs(run: Callable[[], Any]) -> str:
    """Name of the executor a call of `gated_attention` takes."""
    names: list[str] = []

    def spy(name: str, executor: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (names.append(name), executor(*arguments))[1]

    with mock.patch.dict(EXECUTORS, {name: spy(name, executor) for name, executor in EXECUTORS.items()}):
        run()
    return names[0] if names else "all_heads"  # which is called by its own name where no head is closed
