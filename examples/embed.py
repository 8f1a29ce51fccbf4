"""Embeds texts at a half and a quarter of the work, and says how alike the similarities are.

    python examples/embed.py
    python examples/embed.py --model BAAI/bge-small-en-v1.5 --dataset my-texts.csv

Takes an encoder of sentence-transformers, whose weights stay as they are, and trains a narrow one beside it on texts
without labels; by default MiniLM on docstrings of the standard library, for a few minutes. Needs
`pip install "hf-budgetformer[demo,retrieval]"`.
"""

import argparse
import tempfile
import time
from typing import Any

import numpy as np
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from common import DOCSTRINGS, demo_checkpoint, read_texts
from hf_budgetformer import BudgetCallback, BudgetFormerModel


def train_narrow(checkpoint: str, texts: list[str], epochs: float, max_length: int) -> tuple[Any, Any]:
    """A BudgetFormer around an encoder, which stays as it is, and its tokenizer."""
    from datasets import Dataset  # type: ignore[import-untyped]

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BudgetFormerModel.from_pretrained(checkpoint, freeze_full=True, narrow_budget=0.5)
    rows = Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=max_length)))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=epochs,
            learning_rate=6e-4,
            warmup_steps=0.1,
            per_device_train_batch_size=32,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to=[],
        )
        trainer = Trainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[BudgetCallback()]
        )
        trainer.train()
    return model.eval(), tokenizer


def similarities(encoder: Any, texts: list[str], **options: float) -> tuple[np.ndarray, float]:
    """Cosine similarities of all pairs of texts, and seconds."""
    start = time.perf_counter()
    embedded = encoder.encode(texts, normalize_embeddings=True, **options)
    seconds = time.perf_counter() - start
    upper = np.triu_indices(len(texts), k=1)
    return (embedded @ embedded.T)[upper], seconds


def wrap(model: Any, tokenizer: Any, output: str) -> Any:
    """Saves an encoder, with mean pooling, as a folder of sentence-transformers whose `encode` takes a budget."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        encoder = SentenceTransformer(scratch)  # a pipeline of your own goes in `modules`
    encoder.module_kwargs = {"0": ["budget"]}
    encoder.save_pretrained(output)
    return SentenceTransformer(output)


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; default: all-MiniLM-L6-v2 of the [demo] extra")
    parser.add_argument("--dataset", default=DOCSTRINGS, help="file, folder or Hub id with columns text and label")
    parser.add_argument("--max-train", type=int, default=3000, help="texts trained on")
    parser.add_argument("--max-test", type=int, default=300, help="texts compared on")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a text in training")
    parser.add_argument("--output", default="embed-output", help="folder the encoder is saved to")
    args = parser.parse_args(argv)

    texts = read_texts(args.dataset)
    train = list(texts["train"]["text"])[: args.max_train]
    checkpoint = args.model or demo_checkpoint()
    model, tokenizer = train_narrow(checkpoint, train, args.epochs, args.max_length)
    encoder = wrap(model, tokenizer, args.output)
    test = list(texts["test"]["text"])[: args.max_test]
    full, seconds = similarities(encoder, test)
    print(f"\nbudget  Spearman to the full model  seconds\n{1:>6}{1:>28.4f}{seconds:>9.2f}")
    for budget in (0.5, 0.25):
        narrow, seconds = similarities(encoder, test, budget=budget)
        print(f"{budget:>6}{spearmanr(full, narrow)[0]:>28.4f}{seconds:>9.2f}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
