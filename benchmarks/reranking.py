"""Reranks the standard library's definitions: `reranking.py train`, then `quality`, then `timing` on a quiet machine.

What BM25 finds for a query is scored by a cross encoder. Quality and speed are those of the stock model, of the same in
other runtimes, and of ours at a constant budget and in two stages: all candidates cheaply, the best of them once more.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from inputs import keep_quiet, minilm
from measure import ROOT, read_filled


sys.path.append(str(ROOT / "examples"))
from docstrings import load_retrieval


SETTINGS: dict[str, Any] = {
    "title": "",
    "seed": 0,
    "max_length": 64,
    "candidates": 100,  # of each query, the best by BM25; the answer takes the last place where BM25 misses it
    "train_queries": 2500,
    "hard_negatives": 2,  # of each query, drawn from the best 20 by BM25
    "batch_size": 16,
    "epochs": 1,
    "learning_rate": 1e-4,
    "narrow_candidates": 4,  # pairs of each query that the narrow encoder learns from: the answer and BM25's best
    "narrow_batch_size": 32,
    "narrow_epochs": 3,
    "narrow_learning_rate": 6e-4,
    "test_queries": 100,
    "first_look": 1 / 6,
    "constant": 1 / 4,
    "keep": 10,
    "timed_queries": 16,
    "timed_batch_size": 32,
    "repeats": 5,
}


class Searches(NamedTuple):
    """Queries of one split, and what is to be ranked for each.

    Args:
        queries: N texts.
        answers: (N,), int64, numbers of the passages that answer them.
        candidates: (N, candidates), int64, numbers of passages, the best by BM25 first; the answer is among them.
    """

    queries: list[str]
    answers: np.ndarray
    candidates: np.ndarray


def search(passages: list[str], asked: list[tuple[str, int]], count: int) -> Searches:
    """What BM25 finds for queries."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, stopwords=None, show_progress=False), show_progress=False)
    queries = [query for query, _ in asked]
    tokens = bm25s.tokenize(queries, stopwords=None, show_progress=False)
    candidates, _ = index.retrieve(tokens, k=count, show_progress=False, n_threads=1)
    candidates = candidates.astype(np.int64)
    answers = np.array([answer for _, answer in asked])
    missed = ~(candidates == answers[:, None]).any(-1)
    candidates[missed, -1] = answers[missed]
    return Searches(queries, answers, candidates)


def draw_searches(settings: dict[str, Any], split: str, count: int) -> tuple[list[str], Searches]:
    """All passages, and some queries of a split."""
    passages, queries = load_retrieval()
    asked = random.Random(settings["seed"]).sample(queries[split], count)
    return passages, search(passages, asked, settings["candidates"])


def train(settings: dict[str, Any], work: Path) -> None:
    """Makes `work/stock`, a cross encoder as sentence-transformers trains it, and `work/ours` from it."""
    passages, searches = draw_searches(settings, "train", settings["train_queries"])
    if not (work / "stock").exists():
        train_stock(settings, passages, searches, work / "stock")
    if not (work / "ours").exists():
        train_narrow(settings, passages, searches, work)


def train_stock(settings: dict[str, Any], passages: list[str], searches: Searches, folder: Path) -> None:
    """Fine-tunes MiniLM on answers and hard negatives, by binary cross entropy."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    draw = random.Random(settings["seed"])
    rows: dict[str, list[Any]] = {"query": [], "passage": [], "label": []}
    for query, answer, candidates in zip(*searches, strict=True):
        wrong = [number for number in candidates[:20] if number != answer]
        for number in [answer, *draw.sample(wrong, settings["hard_negatives"])]:
            rows["query"].append(query)
            rows["passage"].append(passages[number])
            rows["label"].append(float(number == answer))
    model = CrossEncoder(minilm(), num_labels=1, max_length=settings["max_length"], device="cpu")
    arguments = CrossEncoderTrainingArguments(
        str(folder.with_name("trainer")),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=0.1,
        seed=settings["seed"],
        save_strategy="no",
        report_to=[],
        logging_steps=20,
        use_cpu=True,
    )
    data = Dataset.from_dict(rows)
    CrossEncoderTrainer(model, arguments, train_dataset=data, loss=BinaryCrossEntropyLoss(model)).train()
    model.save_pretrained(str(folder))


def train_narrow(settings: dict[str, Any], passages: list[str], searches: Searches, work: Path) -> None:
    """Puts a narrow encoder beside the fine-tuned model, which stays as it is; no label is needed."""
    from accuracy.fits import fit
    from transformers import AutoTokenizer

    from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits

    tokenizer = AutoTokenizer.from_pretrained(work / "stock", model_max_length=settings["max_length"])
    rows: dict[str, list[Any]] = {"text": [], "text_pair": [], "labels": []}
    for query, answer, candidates in zip(*searches, strict=True):
        others = [number for number in candidates if number != answer]
        for number in [answer, *others[: settings["narrow_candidates"] - 1]]:
            rows["text"].append(query)
            rows["text_pair"].append(passages[number])
            rows["labels"].append(float(number == answer))
    data = add_teacher_logits(Dataset.from_dict(rows), str(work / "stock"), tokenizer)
    data = data.map(
        lambda row: tokenizer(row["text"], row["text_pair"], truncation=True),
        batched=True,
        remove_columns=["text", "text_pair"],
    )
    model = BudgetFormerForSequenceClassification.from_pretrained(work / "stock", freeze_full=True)
    fit(
        model,
        data,
        settings["narrow_epochs"],
        settings["narrow_learning_rate"],
        settings["seed"],
        settings["narrow_batch_size"],
        callbacks=[BudgetCallback()],
    )
    model.save_pretrained(work / "ours")
    tokenizer.save_pretrained(work / "ours")


def main(arguments: list[str] | None = None) -> None:
    """Does one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "quality", "timing"])
    parser.add_argument("--settings", type=Path, default=ROOT / "benchmarks" / "experiments" / "reranking.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reranking", help="what is made once, and kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    settings = read_filled(options.settings, SETTINGS)
    keep_quiet()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    {"train": train}[options.do](settings, options.work)


if __name__ == "__main__":
    main()
