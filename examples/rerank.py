"""Reranks in two stages: all candidates cheaply, and the best of them once more.

    python examples/rerank.py
    python examples/rerank.py --model cross-encoder/ms-marco-MiniLM-L6-v2 "where are temporary files made"

Without arguments MiniLM is fine-tuned to search the standard library, by sentence-transformers, for a few minutes. A
narrow encoder learns what it, or the cross encoder that is named, says; how many candidates it must look at again is
found on held-out queries. Needs `pip install "hf-budgetformer[demo,retrieval]"`.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from common import demo_checkpoint
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits
from hf_budgetformer.tools.reranking import ndcg, rank, tune_ranking
from retrieval import Searches, draw_searches, load_retrieval


def make_pairs(searches: Searches, wrong: int) -> Dataset:
    """Each query with its answer and with some of those that BM25 wrongly finds."""
    draw = random.Random(0)
    rows: dict[str, list[Any]] = {"text": [], "text_pair": [], "label": []}
    for query, candidates, relevant in zip(*searches, strict=True):
        others = [number for number in range(len(candidates)) if number not in relevant]
        for number in [*relevant, *draw.sample(others, min(wrong, len(others)))]:
            rows["text"].append(query)
            rows["text_pair"].append(candidates[number])
            rows["label"].append(float(number in relevant))
    return Dataset.from_dict(rows)


def fine_tune(checkpoint: str, pairs: Dataset, max_length: int, folder: str) -> None:
    """Makes a cross encoder, a stock one, and saves it."""
    model = CrossEncoder(checkpoint, num_labels=1, max_length=max_length)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = CrossEncoderTrainingArguments(
            scratch,
            num_train_epochs=1,
            learning_rate=1e-4,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to=[],
        )
        loss = BinaryCrossEntropyLoss(model)
        CrossEncoderTrainer(model, arguments, train_dataset=pairs, loss=loss).train()
    model.save_pretrained(folder)


def train_narrow(checkpoint: str, pairs: Dataset, max_length: int) -> tuple[Any, Any]:
    """A BudgetFormer around a cross encoder, which stays as it is, and its tokenizer; labels only order the units."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, model_max_length=max_length)
    model = BudgetFormerForSequenceClassification.from_pretrained(checkpoint, freeze_full=True)
    taught = add_teacher_logits(pairs, checkpoint, tokenizer)
    taught = taught.map(lambda row: tokenizer(row["text"], row["text_pair"], truncation=True), batched=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=3,
            learning_rate=6e-4,
            warmup_steps=0.1,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to=[],
        )
        trainer = Trainer(
            model, arguments, train_dataset=taught, processing_class=tokenizer, callbacks=[BudgetCallback()]
        )
        trainer.train()
    return model.eval(), tokenizer


def judge(model: Any, tokenizer: Any, searches: Searches, keep: int | float) -> tuple[float, float]:
    """NDCG@10, and the mean share of the full model's work for a candidate."""
    gains, spent = [], []
    for query, candidates, relevant in zip(*searches, strict=True):
        hits = rank(model, tokenizer, query, candidates, keep=keep)
        gains.append(ndcg(np.array([hit["corpus_id"] for hit in hits]), relevant))
        spent += [hit["spent"] for hit in hits]
    return float(np.mean(gains)), float(np.mean(spent))


def main(argv: list[str] | None = None) -> None:
    """Trains, tunes, compares, saves, and ranks for one query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="?", default="compress a file", help="what to search the standard library for")
    parser.add_argument("--model", help="folder or Hub id of a cross encoder with one label, taken as it is")
    parser.add_argument("--queries", type=int, default=400, help="that are trained on")
    parser.add_argument("--held-out", type=int, default=60, help="queries to tune on, and as many to compare on")
    parser.add_argument("--candidates", type=int, default=50, help="passages for each query, by BM25")
    parser.add_argument("--changed", type=float, default=0.2, help="share of the queries whose best three may change")
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a query and a passage")
    parser.add_argument("--output", default="rerank-output", help="folder the reranker is saved to")
    args = parser.parse_args(argv)

    retrieval = load_retrieval()
    pairs = make_pairs(draw_searches(retrieval, "train", args.queries, args.candidates), wrong=3)
    checkpoint = args.model
    if checkpoint is None:
        checkpoint = str(Path(args.output) / "stock")
        fine_tune(demo_checkpoint(), pairs, args.max_length, checkpoint)
    model, tokenizer = train_narrow(checkpoint, pairs, args.max_length)

    known = draw_searches(retrieval, "validation", args.held_out, args.candidates)
    tuned = tune_ranking(model, tokenizer, known.queries, known.candidates, changed=args.changed, top_k=3)
    print(tuned)
    test = draw_searches(retrieval, "test", args.held_out, args.candidates)
    print(f"\n{'':<12}NDCG@10    work")
    for name, keep in (("full model", 1.0), ("two stages", tuned.keep), ("first look", 0)):
        gain, work = judge(model, tokenizer, test, keep)
        print(f"{name:<12}{gain:>7.4f}{work:>8.3f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    search = draw_searches(retrieval._replace(queries={"asked": [(args.query, 0)]}), "asked", 1, args.candidates)
    print(f"\n{args.query}")
    for hit in rank(model, tokenizer, args.query, search.candidates[0], top_k=3):
        print(f"{hit['score']:>8.3f}  spent {hit['spent']:.3f}  {search.candidates[0][hit['corpus_id']][:90]}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
