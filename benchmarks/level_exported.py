"""Exported looks of a trained model beside the stock model: rows per second, single texts, accuracy and agreement.

Everything starts from texts: tokenizing and forming batches are included, and batches are sorted by length throughout.
"""

import argparse
import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from level_deferred import answer_shared, answer_split
from measure import Agreement, interleave, ratio, show_ratio, spread, stopwatch, table

from hf_budgetformer.runtime import LooksClassifier, OnnxClassifier, OpenVINOClassifier
from hf_budgetformer.tools.batching import tokenized
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.looks_export import export_looks
from hf_budgetformer.tools.narrowing import stock_model
from hf_budgetformer.tools.rivals import RIVALS
from hf_budgetformer.tools.tuning import describe_promise, kept_promise, tune


SETTINGS: dict[str, Any] = {
    "data": "",
    "max_length": 128,
    "batch_size": 32,
    "trained_rows": 0,  # of the shuffled training rows, which the checkpoint was trained on; those after calibrate
    "calibration_rows": 2000,
    "disagreement": 0.0,  # that looks are tuned for on the calibration rows; 0: they are those of the checkpoint
    "test_rows": 2000,
    "timed_rows": 512,
    "graphs": ["onnx-int8", "openvino", "openvino-int8"],
    "latency_inputs": 100,
}
STOCK = "stock, torch"
BASELINE = "stock, openvino-int8"
CLASSIFIERS: dict[str, type[LooksClassifier]] = {"onnx": OnnxClassifier, "openvino": OpenVINOClassifier}
# From texts to logits (N, num_labels) and what was spent (N,).
Way = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


def read_rows(data: Path, name: str, settings: dict[str, Any]) -> tuple[Dataset, Dataset, list[dict[str, Any]]]:
    """Rows to calibrate on and to test on, and where they are from."""
    splits, sources = {}, []
    for split in ("train", "test"):
        path = data / name / f"{split}.parquet"
        if not path.is_file():
            raise SystemExit(f"--data {data}: there is no {name}/{split}.parquet in it.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        splits[split] = Dataset.from_parquet(str(path)).shuffle(seed=0)
        sources.append({"name": f"{name}/{split}", "sha256": digest, "texts": len(splits[split])})
    first = settings["trained_rows"]
    calibration = splits["train"].select(list(range(first, first + settings["calibration_rows"])))
    return calibration, splits["test"].take(settings["test_rows"]), sources


def export_all(model: Any, tokenizer: Any, calibration: Dataset, settings: dict[str, Any], place: Path) -> None:
    """Writes each kind of graph twice: the looks, and the full model alone."""
    alone = copy.deepcopy(model)
    alone.config.looks, alone.config.confidence, alone.config.promise = [1.0], None, None
    for name in settings["graphs"]:
        runtime, _, dtype = name.partition("-")
        for kind, exported in (("looks", model), ("stock", alone)):
            folder = place / kind / name
            export_looks(exported, tokenizer, folder, runtime, dtype or "fp32", calibration, settings["max_length"])


def load_all(place: Path, settings: dict[str, Any], threads: int) -> dict[str, LooksClassifier]:
    """What `export_all` wrote, by the name of the way."""
    classifiers = {}
    for kind in ("stock", "looks"):
        for name in settings["graphs"]:
            runtime = name.partition("-")[0]
            classifiers[f"{kind}, {name}"] = CLASSIFIERS[runtime](place / kind / name, threads)
    return classifiers


def ask_torch(
    answer: Callable[..., tuple[torch.Tensor, torch.Tensor]], tokenizer: Any, settings: dict[str, Any], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and what was spent, by a function from token ids."""
    rows = tokenized({"text": texts}, tokenizer, settings["max_length"])
    logits, spent = answer(rows, settings["batch_size"])
    return logits.numpy(), spent.numpy()


def ask_graphs(
    classifier: LooksClassifier, settings: dict[str, Any], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and what was spent, by exported looks."""
    answers = classifier(texts, batch_size=settings["batch_size"])
    return answers.logits, answers.spent


def measure_latency(ways: dict[str, Way], texts: Sequence[str]) -> dict[str, list[float]]:
    """Milliseconds of single texts, all ways in turn; every text is answered once before it counts."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for counts in (False, True):
        for text in texts:
            for name, way in ways.items():
                start = time.perf_counter()
                way([text])
                if counts:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def judge(way: Way, texts: list[str], labels: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """Accuracy, agreement with the full model in float32, and what was spent."""
    logits, spent = way(texts)
    answers = logits.argmax(-1)
    return {
        "accuracy": float((answers == labels).mean()),
        "agreement": float((answers == full).mean()),
        "spent": float(spent.mean()),
    }


@torch.inference_mode()
def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Exports, then times each way, interleaved."""
    if options.data is None or options.checkpoints is None:
        raise SystemExit("--data and --checkpoints are needed for exported looks.")
    if unknown := [name for name in settings["graphs"] if name not in RIVALS]:
        raise SystemExit(f"graphs must be of {list(RIVALS)}, got {unknown}.")
    calibration, test, data = read_rows(options.data, settings["data"], settings)
    model, tokenizer = load_classifier(str(options.checkpoints / settings["data"]), budgeted=True, device="cpu")
    if settings["disagreement"]:
        tune(model, calibration, tokenizer, settings["disagreement"], max_length=settings["max_length"])
    stock = stock_model(model)
    of_torch: dict[str, Way] = {
        STOCK: partial(ask_torch, partial(answer_split, stock), tokenizer, settings),
        "looks, torch": partial(ask_torch, partial(answer_shared, model), tokenizer, settings),
    }
    texts, labels = list(test["text"]), np.array(test["label"])
    timed = texts[: settings["timed_rows"]]
    full = of_torch[STOCK](texts)[0]
    agreement = Agreement(settings["dtype"])
    ours = ask_torch(lambda rows, size: answer_split(model, rows, size, budget=1.0), tokenizer, settings, timed)[0]
    agreement.check("ours 1", torch.from_numpy(ours), torch.from_numpy(full[: len(timed)]))
    figures: dict[str, Any] = {"promise": describe_promise(kept_promise(model.config)) or None}
    with TemporaryDirectory() as place:
        export_all(model, tokenizer, calibration, settings, Path(place))
        for threads in settings["threads"]:
            torch.set_num_threads(threads)
            exported = load_all(Path(place), settings, threads)
            ways = {**of_torch, **{name: partial(ask_graphs, x, settings) for name, x in exported.items()}}
            judged = {name: judge(way, texts, labels, full.argmax(-1)) for name, way in ways.items()}
            times = interleave(
                {name: stopwatch(partial(way, timed)) for name, way in ways.items()}, settings["repeats"]
            )
            latency = measure_latency(ways, texts[: settings["latency_inputs"]])
            p50 = {name: float(np.median(samples)) for name, samples in latency.items()}
            results = {}
            for name in ways:
                stock_graph = name.replace("looks", "stock")
                results[name] = {
                    **judged[name],
                    "rows_per_second": spread([len(timed) / seconds for seconds in times[name]]),
                    "ratio": ratio(times, name, STOCK),
                    "ratio_to_own_stock": ratio(times, name, stock_graph),
                    "ratio_to_openvino_int8": ratio(times, name, BASELINE) if BASELINE in times else None,
                    "p50": p50[name],
                    "p95": float(np.quantile(latency[name], 0.95)),
                    "p50_share": p50[name] / p50[STOCK],
                    "p50_share_of_own_stock": p50[name] / p50[stock_graph],
                    "graphs": exported[name].looks.graphs if name in exported else None,
                    "thresholds": exported[name].looks.thresholds if name in exported else None,
                }
            figures[str(threads)] = results
    return {"agreement": agreement.to_dict(), "data": data, "figures": figures}


def section(result: dict[str, Any]) -> str:
    """For the report: a table for each number of threads."""
    settings, figures = result["settings"], result["figures"]
    text = (
        f"\n{settings['timed_rows']} texts in batches of {settings['batch_size']} sorted by length, cut at "
        f"{settings['max_length']} tokens; tokenizing is included. Accuracy and agreement with the full model in "
        f"float32 on {settings['test_rows']} rows; thresholds and int8 ranges from {settings['calibration_rows']} "
        "others.\n"
    )
    if figures["promise"]:
        text += f"\nOf the looks in torch: {figures['promise']}\n"
    head = ["", "rows per second", "stock, torch /", "stock, openvino-int8 /", "one text: p50 / p95, share of torch's"]
    head += ["accuracy", "agreement", "work"]
    for threads in settings["threads"]:
        rows = []
        for name, x in figures[str(threads)].items():
            ratios = [show_ratio(x["ratio"]), show_ratio(x["ratio_to_openvino_int8"])]
            latency = f"{x['p50']:.1f} / {x['p95']:.1f} ms, {x['p50_share']:.2f}"
            quality = [f"{x['accuracy']:.1%}", f"{x['agreement']:.1%}", f"{x['spent']:.3f}"]
            rows.append([name, f"{x['rows_per_second']['median']:.0f}", *ratios, latency, *quality])
        text += f"\n{threads} threads\n\n" + table(head, rows)
    return text
