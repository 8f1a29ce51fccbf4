"""Cells: ours against the stock model on every size of batch and length, inputs of full length; and ragged batches."""

import argparse
from typing import Any

import torch
from inputs import build_models
from measure import Agreement, interleave, ratio, spread, stopwatch


SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "narrow_budget": 0.25,
    "batch_sizes": [1, 2, 4, 8, 16, 32, 64],
    "lengths": [8, 32, 128, 512],
    "ragged": [],  # batches beside those, each the lengths of its inputs
    "budgets": [1.0, 0.25, 1 / 12],
    "cell_seconds": 3.0,  # for the rounds of a cell, of which there are `repeats` at most
}


def make_batch(config: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random tokens of inputs of such lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(config.vocab_size, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}


def list_cells(settings: dict[str, Any]) -> list[list[int]]:
    """Lengths of the inputs of each batch."""
    even = [[length] * rows for rows in settings["batch_sizes"] for length in settings["lengths"]]
    return even + settings["ragged"]


def check_cell(
    stock: Any, ours: Any, batch: dict[str, torch.Tensor], budgets: list[float], agreement: Agreement
) -> None:
    """The full model with stock, every row; the budgets with the masked reference, on two rows."""
    agreement.check("ours 1", ours(**batch, budget=1.0).logits, stock(**batch).logits)
    some = {name: x[:2] for name, x in batch.items()}
    for budget in budgets:
        got = ours(**batch, budget=budget).logits[:2]
        agreement.check(f"ours {budget:.3g}", got, ours(**some, budget=budget, executor="masked").logits)


def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times stock and budgets in turn, cell by cell; the worst has the lowest ratio."""
    stock, ours = build_models(settings)
    agreement = Agreement(settings["dtype"])
    figures: dict[str, Any] = {}
    for threads in settings["threads"]:
        torch.set_num_threads(threads)
        cells = []
        for lengths in list_cells(settings):
            batch = make_batch(stock.config, lengths)
            with torch.inference_mode():
                check_cell(stock, ours, batch, settings["budgets"], agreement)
                runs = {"stock": stopwatch(lambda batch=batch: stock(**batch))}
                for budget in settings["budgets"]:
                    runs[f"{budget:.4g}"] = stopwatch(lambda x=batch, budget=budget: ours(**x, budget=budget))
                times = interleave(runs, settings["repeats"], settings["cell_seconds"])
            for budget in settings["budgets"]:
                name = f"{budget:.4g}"
                cell = {
                    "batch": len(lengths),
                    "length": max(lengths),
                    "tokens": sum(lengths),
                    "budget": budget,
                    "rounds": len(times["stock"]),
                    "stock_seconds": spread(times["stock"]),
                    "ratio": ratio(times, name, "stock"),
                    "ratio_to_all_open": ratio(times, name, "1") if "1" in times else None,
                }
                cells.append(cell)
        worst = min(cells, key=lambda cell: cell["ratio"]["median"])
        figures[str(threads)] = {"cells": cells, "worst": worst}
    return {"agreement": agreement.to_dict(), "data": [], "figures": figures}
