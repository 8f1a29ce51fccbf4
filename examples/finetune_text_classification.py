"""Fine-tunes a stock classifier, makes a BudgetFormer of it, and compares both at several head budgets.

    python examples/finetune_text_classification.py
    python examples/finetune_text_classification.py --dataset reviews.csv --model FacebookAI/roberta-base
    python examples/finetune_text_classification.py "Waits until a lock is free."

Without arguments it trains all-MiniLM-L6-v2 on the docstrings of the Python standard library, offline, in about five
minutes on two idle processor cores. First the stock model is fine-tuned. From there three are trained once more, the
same way and with its answers as a second teacher: a BudgetFormer, and to compare it with, the model with all heads and
one cut down to its most important quarter of the heads.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from common import DOCSTRINGS, demo_checkpoint, metrics, print_table, read_config, read_texts, score, tokenized
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits
from hf_budgetformer.tools.baselines import head_importance, most_important, prune


BUDGETS = {"all heads": 1.0, "own budget": None, "1/2": 1 / 2, "1/4": 1 / 4, "1/12": 1 / 12}
# The stock model takes a larger rate than the default multiplier of the routers was made for.
ROUTER_LEARNING_RATE = 2e-3
SENTENCES = [
    "Wait until the lock is released by another thread.",
    "Return the median of the numbers, interpolating between the two middle values.",
    "Send the request to the server and read the headers of its response.",
]


def fine_tune(model: Any, train: Dataset, tokenizer: Any, args: argparse.Namespace) -> Trainer:
    """Trains either sort of model, the same way."""
    set_seed(args.seed)
    # More than half of a small model's weights are word embeddings; leaving them as they are saves much of a step.
    model.base_model.embeddings.requires_grad_(False)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            seed=args.seed,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[BudgetCallback()] if getattr(model.base_model, "own_budget", None) is not None else None,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def classify(model: Any, tokenizer: Any, sentences: Iterable[str], max_length: int) -> None:
    """Prints label, probability and share of heads for each sentence."""
    model.eval()
    for sentence in sentences:
        outputs = model(**tokenizer(sentence, truncation=True, max_length=max_length, return_tensors="pt"))
        probability, label = outputs.logits.softmax(-1)[0].max(-1)
        heads = outputs.head_budget.item()
        print(f"{model.config.id2label[label.item()]:<20} {probability:4.0%}   heads {heads:4.0%}   {sentence}")


def main(argv: list[str] | None = None) -> None:
    """Trains both, prints the comparison, saves the BudgetFormer, classifies sentences with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", help="to classify at the end; default: three, then those typed in")
    parser.add_argument("--model", help="BERT or RoBERTa: folder or Hub id (default: the one of the [demo] extra)")
    parser.add_argument("--dataset", default=DOCSTRINGS, help="file, folder or Hub id with columns text and label")
    parser.add_argument("--epochs", type=float, default=1.0, help="of each of the two models")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-train", type=int, default=2400, help="training texts used (time grows with it)")
    parser.add_argument("--max-test", type=int, default=800, help="test texts used")
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a text (time grows with it)")
    parser.add_argument("--output", default="demo-output", help="folder to save the model in")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    source = args.model or demo_checkpoint()
    texts = read_texts(args.dataset)
    labels = texts["train"].features["label"].names
    _, tokenizer = read_config(source, "Give a BERT or RoBERTa checkpoint: a folder, or a Hub id.")
    data = DatasetDict()
    for name, rows in (("train", args.max_train), ("test", args.max_test)):
        data[name] = tokenized(texts[name].select(range(min(rows, len(texts[name])))), tokenizer, args.max_length)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    stock = fine_tune(
        AutoModelForSequenceClassification.from_pretrained(source, **names), data["train"], tokenizer, args
    )
    stock.save_model(f"{args.output}/stock")
    train = add_teacher_logits(data["train"], stock.model, tokenizer)
    model = BudgetFormerForSequenceClassification.from_pretrained(
        f"{args.output}/stock",
        router_lr_multiplier=ROUTER_LEARNING_RATE / args.learning_rate,
        distillation_weight=0.5,  # the teacher has seen its texts but once and has much to learn itself
    )
    loader = stock.get_eval_dataloader(data["train"].select(range(min(256, len(data["train"])))))
    importance = head_importance(model, loader)
    every = importance.numel()
    pruned = {
        name: fine_tune(prune(model, most_important(importance, count)), train, tokenizer, args)
        for name, count in (("all heads, trained again", every), ("static 1/4, trained again", every // 4))
    }
    budgetformer = fine_tune(model, train, tokenizer, args)
    rows = [("stock model", *score(stock, data["test"]))]
    rows += [(name, *score(trainer, data["test"])) for name, trainer in pruned.items()]
    rows += [(f"BudgetFormer, {name}", *score(budgetformer, data["test"], budget)) for name, budget in BUDGETS.items()]
    print_table(rows)
    budgetformer.save_model()
    print(f"Saved in {args.output}: AutoModelForSequenceClassification.from_pretrained({args.output!r})")
    chosen = args.sentences or (SENTENCES if args.dataset == DOCSTRINGS else texts["test"]["text"][:3])
    classify(budgetformer.model, tokenizer, chosen, args.max_length)
    if not args.sentences and sys.stdin.isatty():
        print("Type a sentence, or nothing to end.")
        typed_in = iter(lambda: sys.stdin.readline().strip(), "")
        classify(budgetformer.model, tokenizer, typed_in, args.max_length)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
