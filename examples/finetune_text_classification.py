"""Fine-tunes a stock classifier, puts a narrow encoder beside it, and compares the two at several budgets.

    python examples/finetune_text_classification.py
    python examples/finetune_text_classification.py --dataset reviews.csv --model FacebookAI/roberta-base
    python examples/finetune_text_classification.py "Waits until a lock is free."

Without arguments it takes all-MiniLM-L6-v2 and the docstrings of the Python standard library, offline, and a few
minutes on two processor cores. First the stock model is fine-tuned. It stays as it is from then on: the narrow encoder
learns beside it what it says of the training texts, and of as many that are mixed from them. An eighth of the training
texts is kept back from both, to measure on it how sure the first look is.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from common import DOCSTRINGS, answer, demo_checkpoint, make_batches, print_table, read_config, read_texts, tokenized
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification
from hf_budgetformer.tools.recipe import taught_rows


BUDGETS = {
    "ours at 1": 1.0,
    "ours at 1/4": 1 / 4,
    "ours at 1/6": 1 / 6,
    "ours at 1/12": 1 / 12,
    "looks, mean of .3": 0.3,
    "looks, mean of .4": 0.4,
}
SENTENCES = [
    "Wait until the lock is released by another thread.",
    "Return the median of the numbers, interpolating between the two middle values.",
    "Send the request to the server and read the headers of its response.",
]


def settings(args: argparse.Namespace, epochs: float, learning_rate: float) -> TrainingArguments:
    """Of the plain Trainer, for either stage."""
    return TrainingArguments(
        output_dir=args.output,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        seed=args.seed,
        report_to="none",
        dataloader_pin_memory=False,
    )


def fine_tune_stock(source: str, labels: list[str], train: Dataset, tokenizer: Any, args: argparse.Namespace) -> str:
    """Fine-tunes the stock model on its own; returns the folder it is saved in."""
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)}
    )
    # More than half of a small model's weights are word embeddings; leaving them as they are saves much of a step.
    model.base_model.embeddings.requires_grad_(False)
    trainer = Trainer(
        model, settings(args, args.epochs, args.learning_rate), train_dataset=train, processing_class=tokenizer
    )
    trainer.train()
    folder = f"{args.output}/stock"
    trainer.save_model(folder)
    return folder


def train_narrow(folder: str, train: Dataset, held_out: Dataset, tokenizer: Any, args: argparse.Namespace) -> Trainer:
    """Trains a narrow encoder beside a fine-tuned model, which stays as it is."""
    set_seed(args.seed)
    model = BudgetFormerForSequenceClassification.from_pretrained(folder, freeze_full=True)
    trainer = Trainer(
        model,
        settings(args, args.narrow_epochs, args.narrow_learning_rate),
        train_dataset=taught_rows(train, folder, tokenizer, seed=args.seed),
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[BudgetCallback()],
    )
    trainer.train()
    trainer.evaluate()  # the callback measures how sure the first look is
    return trainer


@torch.no_grad()
def classify(model: Any, tokenizer: Any, sentences: Iterable[str], max_length: int) -> None:
    """Prints label, probability and budget of each sentence, by plain calls."""
    model.eval()
    for sentence in sentences:
        batch = tokenizer(sentence, truncation=True, max_length=max_length, return_tensors="pt").to(model.device)
        outputs = model(**batch)
        probability, label = outputs.logits.softmax(-1)[0].max(-1)
        spent = outputs.budget.item()
        print(f"{model.config.id2label[label.item()]:<20} {probability:4.0%}   budget {spent:4.2f}   {sentence}")


def main(argv: list[str] | None = None) -> None:
    """Trains both, prints the comparison, saves the BudgetFormer, classifies sentences with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", help="to classify at the end; default: three, then those typed in")
    parser.add_argument("--model", help="BERT or RoBERTa: folder or Hub id (default: the one of the [demo] extra)")
    parser.add_argument("--dataset", default=DOCSTRINGS, help="file, folder or Hub id with columns text and label")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the stock model")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the stock model")
    parser.add_argument("--narrow-epochs", type=float, default=4.0, help="of the narrow encoder, over twice the rows")
    parser.add_argument("--narrow-learning-rate", type=float, default=6e-4, help="of the narrow encoder")
    parser.add_argument("--max-train", type=int, default=2400, help="training texts used (time grows with it)")
    parser.add_argument("--max-test", type=int, default=800, help="test texts used")
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a text (time grows with it)")
    parser.add_argument("--output", default="demo-output", help="folder to save the model in")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    source = args.model or demo_checkpoint()
    texts = read_texts(args.dataset)
    _, tokenizer = read_config(source, "Give a BERT or RoBERTa checkpoint: a folder, or a Hub id.")
    used = {"train": args.max_train, "test": args.max_test}
    data = {
        split: tokenized(texts[split].select(range(min(rows, len(texts[split])))), tokenizer, args.max_length)
        for split, rows in used.items()
    }
    parts = data["train"].train_test_split(1 / 8, seed=args.seed)
    labels = texts["train"].features["label"].names
    folder = fine_tune_stock(source, labels, parts["train"], tokenizer, args)
    budgetformer = train_narrow(folder, parts["train"], parts["test"], tokenizer, args)
    budgetformer.save_model()

    model: Any = budgetformer.model
    stock = AutoModelForSequenceClassification.from_pretrained(folder).to(model.device)
    batches = make_batches(data["test"], tokenizer)
    rows = {"stock": answer(stock, batches)}
    for name, budget in BUDGETS.items():
        rows[name] = answer(model, batches, budget)
    print_table(rows, reference="stock")
    print(f"Saved in {args.output}: AutoModelForSequenceClassification.from_pretrained({args.output!r})")
    chosen = args.sentences or (SENTENCES if args.dataset == DOCSTRINGS else texts["test"]["text"][:3])
    classify(model, tokenizer, chosen, args.max_length)
    if not args.sentences and sys.stdin.isatty():
        print("Type a sentence, or nothing to end.")
        typed_in = iter(lambda: sys.stdin.readline().strip(), "")
        classify(model, tokenizer, typed_in, args.max_length)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
