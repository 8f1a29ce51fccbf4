"""Times and scores a checkpoint, baked and exported to ONNX, beside the stock model with its weights and all heads.

export_times.py CHECKPOINT DATA --head-budget 0.25 -> results/export/CHECKPOINT_0.25.json. All take turns on the same
texts; nothing is timed before ONNX in float32 has answered as torch does on all rows of the test set. A ratio is the
time of stock torch over one's own, "alike" that of the stock model run the same way: above 1 is faster.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from datasets import load_dataset
from inputs import keep_quiet, make_batches, tokenize
from measure import ROOT, environment, interleave, ratio, spread, stopwatch
from onnxruntime.quantization import quantize_dynamic

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools.export import INT8, bake, export_onnx
from hf_budgetformer.tools.profiling import stock_model


TOLERANCE = 1e-4
# Rows of the training set to bake on, and of the test set to time, in batches and one by one.
SETTINGS = {"baked_on": 512, "batch_size": 32, "timed": 256, "singles": 64, "max_length": 128}


def export_stock(stock: Any, path: Path) -> None:
    """Writes a stock BERT classifier as ONNX, for batches and lengths of any size."""
    names, ids = ["input_ids", "attention_mask", "token_type_ids"], torch.ones(3, 8, dtype=torch.int64)
    example = dict(zip(names, (ids, ids.tril(6), ids * 0), strict=True))  # padded, or the mask would be left out
    shapes = {name: {0: "batch", 1: "length"} for name in names}
    options: dict[str, Any] = {"kwargs": example, "dynamic_shapes": shapes, "output_names": ["logits"]}
    torch.onnx.export(stock, dynamo=True, verbose=False, **options).save(path, external_data=False)


def load_onnx(path: Path, threads: int) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Takes a batch, gives logits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        given = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
        return torch.from_numpy(session.run(["logits"], {name: x.numpy() for name, x in given.items()})[0])

    return run


def score(logits: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, and how far from what torch answers."""
    same, difference = logits.argmax(-1) == expected.argmax(-1), (logits - expected).abs().max()
    found = {"accuracy": (logits.argmax(-1) == labels).double().mean(), "same_labels": same.double().mean()}
    found["difference"] = difference / expected.abs().max().clamp(min=1.0)
    return {name: x.item() for name, x in found.items()}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Bakes, exports, checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a BudgetFormer on BERT that reads MiniLM's tokens")
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet: text, label")
    parser.add_argument("--head-budget", type=float, default=0.25)
    parser.add_argument("--rows", type=int, help="of the test set; default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "export")
    options = parser.parse_args(arguments)
    keep_quiet()
    start, machine, longest, size = time.perf_counter(), environment(), SETTINGS["max_length"], SETTINGS["batch_size"]
    machine["packages"] |= {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    torch.set_num_threads(options.threads)
    files = {name: options.data / f"{name}.parquet" for name in ("train", "test")}
    data = load_dataset("parquet", data_files={name: str(path) for name, path in files.items()})
    rows = data["test"][: options.rows]
    test, labels = tokenize(rows["text"], longest), torch.tensor(rows["label"])
    typical = make_batches(tokenize(data["train"][: SETTINGS["baked_on"]]["text"], longest), size, by_length=True)

    model = BudgetFormerForSequenceClassification.from_pretrained(options.checkpoint).eval()
    baked = bake(model, typical, options.head_budget)
    runs: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name, owner, export in (("stock", stock_model(model), export_stock), ("baked", baked, export_onnx)):
            paths = {kind: Path(folder) / f"{name}_{kind}.onnx" for kind in ("onnx", "int8")}
            export(owner, paths["onnx"])
            quantize_dynamic(paths["onnx"], paths["int8"], **INT8)
            runs[f"{name} torch"] = lambda batch, owner=owner: owner(**batch).logits
            runs |= {f"{name} {kind}": load_onnx(path, options.threads) for kind, path in paths.items()}
    batches = make_batches(test, size, by_length=False)
    answers = {name: torch.cat([*map(run, batches)]) for name, run in runs.items()}
    quality = {name: score(x, answers[f"{name.split()[0]} torch"], labels) for name, x in answers.items()}
    for name, x in quality.items():
        if name.endswith("onnx") and not (x["difference"] <= TOLERANCE and x["same_labels"] == 1.0):
            raise SystemExit(f"{name}: differs by {x['difference']:.2g} from torch: what is not right is not timed.")

    figures, timed, singles = {}, test[: SETTINGS["timed"]], test[: SETTINGS["singles"]]
    for case, part, count in (("as they come", timed, size), ("sorted", timed, size), ("single", singles, 1)):
        batches = make_batches(part, count, by_length=case == "sorted")
        calls = {name: partial(lambda run, given: [*map(run, given)], run, batches) for name, run in runs.items()}
        times = interleave({name: stopwatch(call) for name, call in calls.items()}, options.repeats)
        figures[case] = {}
        for name, seconds in times.items():
            ms, alike = spread([1e3 * x / len(part) for x in seconds]), ratio(times, name, f"stock {name[6:]}")
            figures[case][name] = {"ms_per_input": ms, "ratio": ratio(times, name, "stock torch"), "alike": alike}
    settings = {**SETTINGS, **vars(options), "checkpoint": options.checkpoint.name, "data": options.data.name}
    del settings["output"]
    settings["sha256"] = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    result = {"settings": settings, "environment": machine, "seconds": round(time.perf_counter() - start)}
    result |= {"static_heads": baked.config.static_heads, "quality": quality, "figures": figures}
    target = options.output / f"{options.checkpoint.name}_{options.head_budget:g}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{target}: {result['seconds']} s")


if __name__ == "__main__":
    main()
