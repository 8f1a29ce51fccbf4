"""Scores one BudgetFormer checkpoint at a list of head budgets: one training, any cost.

    python examples/requested_budgets.py
    python examples/requested_budgets.py --model my-model --dataset reviews.csv --budgets 1 0.75 0.5 0.25

Without arguments it takes the checkpoint that `finetune_text_classification.py` saved and its test texts.
"""

import argparse
from fractions import Fraction

from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from common import DOCSTRINGS, metrics, print_table, read_config, read_texts, score, tokenized
from hf_budgetformer import BudgetFormerForSequenceClassification


def head_budget(text: str) -> float:
    """A share of the heads, as a decimal number or a fraction."""
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"a budget must be a share of the heads in (0, 1], 0.5 or 1/2, got {text!r}")
    return share


def main(argv: list[str] | None = None) -> None:
    """Prints accuracy and share of heads for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-output", help="folder or Hub id of a fine-tuned BudgetFormer")
    parser.add_argument("--dataset", default=DOCSTRINGS, help="file, folder or Hub id with columns text and label")
    parser.add_argument("--budgets", nargs="+", type=head_budget, default=[1.0, 0.75, 0.5, 1 / 3, 0.25, 1 / 6, 1 / 12])
    parser.add_argument("--max-test", type=int, default=800, help="test texts used")
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a text")
    args = parser.parse_args(argv)

    make = "python examples/finetune_text_classification.py"
    config, tokenizer = read_config(args.model, f"Make one: {make} --output {args.model}")
    if config.model_type != "budgetformer":
        raise SystemExit(
            f"--model {args.model} is a {config.model_type}, which knows no head budgets. "
            f"Fine-tune it first: {make} --model {args.model}"
        )
    model = BudgetFormerForSequenceClassification.from_pretrained(args.model)
    test = read_texts(args.dataset)["test"]
    known = set(config.label2id)
    if not set(test.features["label"].names) <= known:
        raise SystemExit(
            f"--dataset {args.dataset} has the labels {test.features['label'].names}, "
            f"but --model {args.model} was trained on {sorted(known)}."
        )
    # The model's numbers for the labels, which another file may count otherwise.
    test = test.align_labels_with_mapping(config.label2id, "label")
    test = tokenized(test.select(range(min(args.max_test, len(test)))), tokenizer, args.max_length)
    settings = TrainingArguments(
        args.model, per_device_eval_batch_size=32, report_to="none", dataloader_pin_memory=False
    )
    trainer = Trainer(model, settings, processing_class=tokenizer, compute_metrics=metrics)
    rows = [("own budget", *score(trainer, test, None))]
    rows += [(f"{budget:.3f}", *score(trainer, test, budget)) for budget in args.budgets]
    print_table(rows)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
