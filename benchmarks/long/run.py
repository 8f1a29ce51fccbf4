"""Long documents: trains, asks and times what can read them; run.py --data FOLDER --work FOLDER [--data-sets ...].

What is in the work folder already is not made again. Results are `results/<data set>-<seed>.json`; `report.py` makes
the page of them.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import datasets
import numpy as np
import torch
from datasets import Dataset
from inputs import keep_quiet, load_tokenizer, minilm
from level_cells import make_batch
from long.needles import TASKS, make_documents
from long.ways import Answered, judge, scores_of_needles
from measure import environment, interleave, read_json, spread, stopwatch
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.positions import extend_positions
from hf_budgetformer.tools.batching import tokenized
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.documents import Chunks, DocumentLook, answer_documents, keep_ends, split_documents
from hf_budgetformer.tools.looking import answer_rows
from hf_budgetformer.tools.profiling import HeldMemory
from hf_budgetformer.tools.recipe import train_classifier


HERE = Path(__file__).resolve().parent
BUDGETS = (1.0, 1 / 4, 1 / 6, 1 / 12)
BATCH = 16
ROUNDS = 3
# Documents that are timed, at most.
TIMED = 32


def read_documents(folder: Path, name: str, setup: dict[str, Any]) -> dict[str, Dataset]:
    """Training, calibration and test rows, drawn the same way for all seeds."""
    import pyarrow.parquet

    splits = {}
    for split in ("train", "validation", "test"):
        path = folder / name / f"{split}.parquet"
        if path.is_file():
            table = pyarrow.parquet.read_table(path)
            kept = [x for x in ("text", "text_pair", "label") if x in table.column_names]
            rows = Dataset(table.select(kept).combine_chunks()).shuffle(seed=0)
            splits[split] = rows.filter(lambda row: bool(row["text"].strip()))
    if "validation" not in splits:  # of the rows that are not tested on
        test = splits["test"]
        splits["validation"] = test.skip(min(setup["test"], len(test)))
    sizes = {"train": setup["train"], "validation": setup["calibration"], "test": setup["test"]}
    parts = {split: rows.take(min(sizes[split], len(rows))) for split, rows in splits.items()}
    return {"train": parts["train"], "calibration": parts["validation"], "test": parts["test"]}


def pieces(rows: Dataset, length: int, seed: int) -> Dataset:
    """A piece of so many tokens of each document, wherever it begins, as text."""
    draw = random.Random(seed)

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        offsets = load_tokenizer()(row["text"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        start = draw.choice(range(0, max(1, len(offsets)), length))
        part = offsets[start : start + length]
        return {"text": row["text"][part[0][0] : part[-1][1]] if part else row["text"]}

    return rows.map(cut)


def train(
    start: str, rows: Dataset, folder: Path, settings: dict[str, Any], setup: dict[str, Any], **fields: Any
) -> Path:
    """A BudgetFormer by the recipe, unless it is there."""
    if not (folder / "budgetformer" / "training.json").exists():
        arguments = TrainingArguments(
            str(folder),
            num_train_epochs=setup["epochs"],
            learning_rate=setup.get("learning_rate", settings["learning_rate"]),
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            per_device_train_batch_size=setup["batch_size"],
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=25,
            use_cpu=True,
            seed=setup["seed"],
        )
        train_classifier(start, rows, arguments, **fields)
    return folder


def start_of(setup: dict[str, Any], starts: Path | None, folder: Path) -> tuple[str, dict[str, Any]]:
    """Where training starts, and how: a plain MiniLM, or one that the accuracy benchmark has fine-tuned.

    That is the full model as it is, unless its labels come in another "order", of a task that it is fine-tuned for.
    """
    if "start" not in setup:
        return minilm(), {}
    if starts is None:
        raise SystemExit(f"--starts must be the accuracy benchmark's work folder, for its model of {setup['start']}.")
    if not (folder / "config.json").exists():
        fine_tuned = starts / f"{setup['start']}-{setup['seed']}" / "full"
        model: Any = AutoModelForSequenceClassification.from_pretrained(fine_tuned)
        if "order" in setup:
            for part in model.classifier.parameters():
                part.data = part.data[setup["order"]]
        model.save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)
    return str(folder), {"fine_tuned": "order" not in setup}


def ask(model: Any, rows: Any, tokenizer: Any, budget: float) -> np.ndarray:
    """Logits of every row, (N, num_labels)."""
    logits = np.zeros((len(rows["input_ids"]), model.config.num_labels), np.float32)
    for answers in answer_rows(model, rows, tokenizer, BATCH, budget):
        logits[answers.places] = answers.logits
    return logits


def svm(rows: dict[str, Dataset]) -> dict[str, float]:
    """TF-IDF and a linear support vector machine, on whole documents."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    def texts(part: Dataset) -> list[str]:
        pairs = part["text_pair"] if "text_pair" in part.column_names else [""] * len(part)
        return [f"{text} {pair}" for text, pair in zip(part["text"], pairs, strict=True)]

    machine = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2), LinearSVC())
    machine.fit(texts(rows["train"]), rows["train"]["label"])
    start = time.perf_counter()
    answers = machine.predict(texts(rows["test"]))
    seconds = (time.perf_counter() - start) / len(answers)
    return {"accuracy": float((answers == np.array(rows["test"]["label"])).mean()), "seconds": seconds}


def answers_of(model: Any, tokenizer: Any, rows: Dataset, length: int, target: Path) -> Answered:
    """What the model says of every chunk, and of both ends, at every budget; kept in a file."""
    columns = rows.remove_columns("label")[:]
    chunks = split_documents(columns, tokenizer, length)
    if not target.exists():
        ends = keep_ends(columns, tokenizer, length)
        logits = {f"chunks {budget:.6f}": ask(model, chunks.rows, tokenizer, budget) for budget in BUDGETS}
        logits |= {f"ends {budget:.6f}": ask(model, ends, tokenizer, budget) for budget in BUDGETS}
        np.savez(target, tokens_of_ends=np.array([len(x) for x in ends["input_ids"]]), **logits)
    kept = np.load(target)
    part = {kind: {b: kept[f"{kind} {b:.6f}"] for b in BUDGETS} for kind in ("chunks", "ends")}
    return Answered(
        part["chunks"], part["ends"], chunks.owners, chunks.lengths(), kept["tokens_of_ends"], np.array(rows["label"])
    )


def time_ways(model: Any, tokenizer: Any, rows: Dataset, length: int, results: dict[str, Any]) -> dict[str, Any]:
    """Seconds a document of each way, in turn, and the most memory that weights and a batch hold."""
    some = rows.take(min(TIMED, len(rows)))
    columns = some.remove_columns("label")[:]
    chunks, ends = split_documents(columns, tokenizer, length), keep_ends(columns, tokenizer, length)
    first = Chunks(chunks.rows, chunks.owners).select(np.unique(chunks.owners, return_index=True)[1])

    def through(part: Chunks, looks: list[Any], thresholds: list[float]) -> Any:
        steps = [DocumentLook(count, budget) for count, budget in looks]
        return lambda: answer_documents(model, part, tokenizer, BATCH, looks=steps, thresholds=thresholds)

    def per_chunk(part: Chunks, looks: list[float], thresholds: list[float]) -> Any:
        def run() -> None:
            model.config.looks, model.config.confidence = looks, thresholds
            answer_documents(model, part, tokenizer, BATCH)

        return run

    both = Chunks(ends, np.arange(len(some)))
    ways = {"chunks": through(chunks, [(None, 1.0)], []), "first": through(first, [(None, 1.0)], [])}
    ways["ends"] = through(both, [(None, 1.0)], [])
    ways["chunks at 1/4"] = through(chunks, [(None, 1 / 4)], [])
    for name, way in results.items():
        if "kind" in way:  # the best looks of that work; other cascades are told by what they cost
            ways[name] = through(chunks, way["looks"], way["thresholds"])
        elif "chunk_looks" in way:
            part = {"chunks": chunks, "first": first, "ends": both}[way["of"]]
            ways[name] = per_chunk(part, way["chunk_looks"], way["thresholds"])
    times = interleave({name: stopwatch(way) for name, way in ways.items()}, ROUNDS)
    timing = {}
    for name, seconds in times.items():
        with HeldMemory([*model.parameters(), *model.buffers()]) as held:
            ways[name]()
        timing[name] = {
            "seconds": spread([x / len(some) for x in seconds]),
            "of_chunks": spread([x / whole for x, whole in zip(seconds, times["chunks"], strict=True)]),
            "mib": held.peak / 2**20,
        }
    return timing


def run_documents(name: str, options: argparse.Namespace, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """One data set of real documents."""
    setup = {**settings["data"][name], "seed": seed}
    rows, work = read_documents(options.data, name, setup), options.work / f"{name}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    length = settings["chunk"]
    start, how = start_of(setup, options.starts, work / "start")
    folder = train(
        start, pieces(rows["train"], length, seed), work / "chunk", settings, setup, max_length=length, **how
    )
    model, tokenizer = load_classifier(str(folder), budgeted=True, device="cpu")
    answered = {
        split: answers_of(model, tokenizer, rows[split], length, work / f"{split}.npz")
        for split in ("calibration", "test")
    }
    results: dict[str, Any] = {"svm": svm(rows), "ways": judge(answered["calibration"], answered["test"])}
    results["documents"] = {
        "rows": {split: len(part) for split, part in rows.items()},
        "tokens": spread(np.bincount(answered["test"].owners, answered["test"].lengths).tolist()),
        "chunks": float(len(answered["test"].owners) / len(answered["test"].labels)),
    }
    if "long" in setup and not options.no_long:
        results["long"] = run_long(rows, work, settings, setup)
    if options.time:
        results["timing"] = time_ways(model, tokenizer, rows["test"], length, results["ways"])
    return results


def interpolated(start: str, folder: Path, length: int) -> str:
    """The start with a position table of that length whose rows lie between its own, instead of repeating them."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(start)
    trained = model.base_model.embeddings.position_embeddings.weight.data.T[None]  # (1, D, rows)
    extend_positions(model, length)
    table = nn.functional.interpolate(trained, size=length, mode="linear", align_corners=True)[0].T
    model.base_model.embeddings.position_embeddings.weight.data = table.contiguous()
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return str(folder)


def run_long(rows: dict[str, Dataset], work: Path, settings: dict[str, Any], setup: dict[str, Any]) -> dict[str, Any]:
    """Models of all the document at once, their position tables extended in both ways: as they are, and trained."""
    length = settings["long"]
    start = str(work / "start" if "start" in setup else work / "chunk" / "teacher")
    results: dict[str, Any] = {"trained_on": setup["long"]}
    labels = {split: np.array(rows[split]["label"]) for split in ("calibration", "test")}

    def logits_of(model: Any, tokenizer: Any, split: str, target: Path, budgets: Sequence[float]) -> Any:
        if not target.exists():
            inputs = tokenized(rows[split].remove_columns("label")[:], tokenizer, length)
            np.savez(target, **{f"{b:.6f}": ask(model, inputs, tokenizer, b) for b in budgets})
        kept = np.load(target)
        return {b: kept[f"{b:.6f}"] for b in budgets}

    for way in ("tiled", "interpolated"):
        begin = start if way == "tiled" else interpolated(start, work / "start-interpolated", length)
        plain: Any = BudgetFormerForSequenceClassification.from_pretrained(begin, max_position_embeddings=length)
        answers = logits_of(plain.eval(), load_tokenizer(), "test", work / f"long-{way}-plain.npz", [1.0])[1.0]
        results[f"{way}, untrained"] = {"accuracy": float((answers.argmax(-1) == labels["test"]).mean())}
        if not setup["long"]:
            continue
        some, more = rows["train"].take(setup["long"]), {"max_length": length, "max_position_embeddings": length}
        folder = train(begin, some, work / f"long-{way}", settings, {**setup, "batch_size": 4, "epochs": 1}, **more)
        model, tokenizer = load_classifier(str(folder), budgeted=True, device="cpu")
        parts = {}
        for split in ("calibration", "test"):
            logits = logits_of(model, tokenizer, split, work / f"long-{way}-{split}.npz", BUDGETS)
            count, ones = len(rows[split]), np.ones(len(rows[split]), dtype=np.int64)
            parts[split] = Answered(logits, logits, np.arange(count), ones, ones, labels[split])
        results[way] = judge(parts["calibration"], parts["test"])
    return results


def run_needles(task: str, options: argparse.Namespace, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """A generated set, whose difficulty is known."""
    from docstrings import load_docstrings

    setup = {**settings["needles"], "seed": seed}
    work = options.work / f"{task}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    texts, rows = load_docstrings(), {}
    for number, split in enumerate(("train", "calibration", "test")):
        paragraphs = texts["validation" if split == "calibration" else split]["text"]
        made = make_documents(task, list(paragraphs), setup[split], 1000 * seed + number, setup["words"], setup["hops"])
        rows[split] = Dataset.from_list(list(made))
    plain = {split: part.remove_columns(["hops", "depth"]) for split, part in rows.items()}
    folder = train(minilm(), plain["train"], work / "model", settings, setup, max_length=setup["max_length"], mixed=0)
    model, tokenizer = load_classifier(str(folder), budgeted=True, device="cpu")
    logits = {}
    for split in ("calibration", "test"):
        target = work / f"{split}.npz"
        if not target.exists():
            inputs = tokenized(plain[split].remove_columns("label")[:], tokenizer, setup["max_length"])
            np.savez(target, **{f"{b:.6f}": ask(model, inputs, tokenizer, b) for b in BUDGETS})
        kept = np.load(target)
        logits[split] = {b: kept[f"{b:.6f}"] for b in BUDGETS}
    labels = {split: np.array(plain[split]["label"]) for split in logits}
    return scores_of_needles(logits, labels, np.array(rows["test"]["hops"]), np.array(rows["test"]["depth"]))


def run_lengths() -> dict[str, Any]:
    """Time and memory by length: our budgets, with and without a window, beside stock at 512 tokens."""
    lengths, windows, budgets = (512, 1024, 2048, 4096), (None, 512), (1.0, 1 / 4, 1 / 12)
    stock: Any = AutoModelForSequenceClassification.from_pretrained(minilm()).eval()
    models = {
        window: BudgetFormerForSequenceClassification.from_pretrained(
            minilm(), max_position_embeddings=max(lengths), attention_window=window
        ).eval()
        for window in windows
    }
    batches = {length: make_batch(stock.config, [length] * 4) for length in lengths}
    runs, cells = {"stock 512": stopwatch(lambda: stock(**batches[512]))}, {}
    with torch.inference_mode():
        for length, window, budget in product(lengths, windows, budgets):
            model, batch = models[window], batches[length]
            name = f"{length}, window {window}, {budget:.3g}"

            def run(model: Any = model, batch: Any = batch, budget: float = budget) -> Any:
                return model(**batch, budget=budget).logits

            few = {key: x[:1] for key, x in batch.items()}
            torch.testing.assert_close(run()[:1], model(**few, budget=budget, executor="masked").logits)
            with HeldMemory([*model.parameters(), *model.buffers()]) as held:
                run()
            cells[name] = {"length": length, "window": window, "budget": budget, "mib": held.peak / 2**20}
            runs[name] = stopwatch(run)
        times = interleave(runs, ROUNDS)
    base = [x / (4 * 512) for x in times["stock 512"]]
    for name, figures in cells.items():
        tokens = 4 * figures["length"]
        figures["of_stock_512"] = spread([x / tokens / y for x, y in zip(times[name], base, strict=True)])
    width = stock.config.hidden_size
    # Two products of each token with all others, beside twelve weights for each number of a token.
    share = {str(x): 4 * x * width / (4 * x * width + 24 * width**2) for x in lengths}
    return {"cells": list(cells.values()), "attention_share": share}


def write(folder: Path, name: str, seed: int, settings: Any, threads: int, results: dict[str, Any]) -> Path:
    """Keeps a result."""
    about = {"data": name, "seed": seed, "settings": settings, "threads": threads, "environment": environment()}
    path = folder / f"{name}-{seed}.json"
    path.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    return path


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>/{train,validation,test}.parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logits")
    parser.add_argument("--starts", type=Path, help="the accuracy benchmark's work folder, for models to start from")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--data-sets", nargs="*", help=f"some of the settings' only; generated: {[*TASKS]}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time", action="store_true", help="time too: nothing else may run then")
    parser.add_argument("--no-long", action="store_true", help="without models of whole documents")
    options = parser.parse_args()
    keep_quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    settings = read_json(options.settings)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.data_sets or [*TASKS, *settings["data"], *(["lengths"] if options.time else [])]:
        for seed in options.seeds:
            if name in TASKS:
                results = run_needles(name, options, settings, seed)
            elif name == "lengths":
                results = run_lengths()
            else:
                results = run_documents(name, options, settings, seed)
            print(write(options.output, name, seed, settings, options.threads, results), flush=True)


if __name__ == "__main__":
    main()
