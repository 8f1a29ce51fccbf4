"""Times of what is compared, beside the full model's: timing.json in the work folder. Nothing else may run then."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))
import datasets
import numpy as np
import torch
from accuracy.figures import MEANS, read_runs
from accuracy.methods import exit_head
from accuracy.rows import read_rows
from inputs import keep_quiet, make_batches, minilm
from measure import environment, interleave, read_json, spread, stopwatch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.attention import EVERYTHING
from hf_budgetformer.tools.tuning import Calibration


HERE = Path(__file__).resolve().parent
CONSTANTS = (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 2)
# First look, and share of the rows that the full model looks at.
LOOKS = ((1 / 6, 0.0833), (1 / 12, 0.1667), (1 / 6, 0.1633), (1 / 12, 0.2467), (1 / 6, 0.3333), (1 / 4, 0.25))
# Tokens of the rows that are timed, at most, and rows.
TOKENS, ROWS = 4096, 256


def time_rows(rows: datasets.Dataset, repeats: int, leaving: dict[float, np.ndarray]) -> dict[str, float]:
    """Shares of the full model's time, packed, in batches of 32 as they come: medians of the rounds."""
    batches = make_batches(rows["input_ids"][:], 32, by_length=False)
    stock: Any = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()
    ours: Any = BudgetFormerForSequenceClassification.from_pretrained(minilm(), num_labels=2, narrow_budget=0.5).eval()
    ours.narrow.steps.fill_(1)
    sure = Calibration(ours, batches, [1 / 12, 1 / 6, 1 / 4], full=False).confidence

    def run(model: Any, looks: list[float] | None = None, threshold: float = 0.0, **call: Any) -> Any:
        @torch.no_grad()
        def go() -> None:
            if looks:
                ours.config.looks, ours.config.confidence = looks, [threshold]
            for batch in batches:
                model(**batch, **call)

        return stopwatch(go)

    variants = {"full": run(ours, budget=1.0), "stock": run(stock)}
    for budget in CONSTANTS:
        variants[f"constant {budget:.4f}"] = run(ours, budget=budget)
    for budget, share in LOOKS:
        threshold = float(np.quantile(sure[budget], share))
        variants[f"look {budget:.4f}, then {share}"] = run(ours, [budget, 1.0], threshold)
    layers, width = ours.config.num_hidden_layers, ours.config.hidden_size
    heads = nn.ModuleList(exit_head(2 * width, ours.num_labels) for _ in range(layers - 1)).eval()

    def leave(left: np.ndarray) -> Any:
        @torch.no_grad()
        def go() -> None:
            for number, batch in enumerate(batches):
                exit_early(ours, heads, batch, left[32 * number : 32 * number + len(batch["input_ids"])])

        return stopwatch(go)

    for mean, left in leaving.items():
        variants[f"exits {mean}"] = leave(left)
    times = interleave(variants, repeats)
    medians = {}
    for key, seconds in times.items():
        medians[key] = spread([x / full for x, full in zip(seconds, times["full"], strict=True)])["median"]
    return medians


def exit_early(model: Any, heads: nn.ModuleList, batch: dict[str, torch.Tensor], left: np.ndarray) -> None:
    """The full model, packed, layer by layer: behind each a classifier answers, and some inputs leave.

    Args:
        model: A BudgetFormer.
        heads: One for each layer but the last.
        batch: Of B rows.
        left: (B,): the share of the layers behind which each leaves.
    """
    base = model.base_model
    embedded = model.embed(batch)
    hidden, packed, places = embedded.hidden, embedded.batch, np.arange(len(left))
    layers = model.full_layers()
    for number, layer in enumerate(layers, 1):
        last = number == len(layers)
        hidden = layer(hidden, sequences=packed.sequences, reach=EVERYTHING, first=last)
        if last:
            model.classifier(base.pooler(packed.unsort(hidden)[:, None]))
            return
        states = packed.pad(hidden)
        heads[number - 1](torch.cat([packed.first(hidden), states.mean(1)], -1)).softmax(-1)
        stay = np.flatnonzero(left[places] > number / len(layers) + 1e-6)
        if not len(stay):
            return
        if len(stay) < len(places):
            hidden, packed = packed.select(hidden, torch.from_numpy(stay))
            places = places[stay]


def main(arguments: list[str] | None = None) -> None:
    """Times every data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data-sets", nargs="*", help="some of the settings' only; others stay as they were timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    options = parser.parse_args(arguments)
    keep_quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    settings = read_json(options.settings)
    path = options.work / "timing.json"
    times: dict[str, Any] = read_json(path) if path.exists() else {}
    runs = read_runs(options.work, settings)
    for name in options.data_sets or settings["data"]:
        data_settings = settings["data"][name]
        limits = {**data_settings, "calibration": 1, "test": ROWS, "train": 16}
        exits = next(run["exits"] for (data, _), run in runs.items() if data == name and "exits" in run)
        leaving = {mean: exits.exits(mean)["left"] for mean in MEANS}
        rows = read_rows(options.data, name, limits).test
        count = max(32, int((np.cumsum([len(x) for x in rows["input_ids"][:]]) <= TOKENS).sum()))
        ratios = time_rows(rows.select(range(count)), options.repeats, leaving)
        times[name] = {"threads": options.threads, "rows": count, "environment": environment(), "ratios": ratios}
        print(name, {key: round(value, 3) for key, value in ratios.items()}, flush=True)
        path.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
