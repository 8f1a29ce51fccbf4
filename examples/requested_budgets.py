"""Asks one BudgetFormer checkpoint for a list of budgets: one training, any cost.

    python examples/requested_budgets.py
    python examples/requested_budgets.py --model my-model --dataset reviews.csv --budgets 1 0.4 1/4 1/12

Without arguments it takes the checkpoint that `finetune_text_classification.py` saved and its test texts.
"""

import argparse
from fractions import Fraction

from transformers.utils import logging

from common import DOCSTRINGS, answer, make_batches, print_table, read_config, read_texts, tokenized
from hf_budgetformer import BudgetFormerForSequenceClassification


def budget(text: str) -> float:
    """A share of the full model's work, as a decimal number or a fraction."""
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"a budget must be a share of the work in (0, 1], 0.5 or 1/2, got {text!r}")
    return share


def main(argv: list[str] | None = None) -> None:
    """Prints accuracy, agreement with the full model, seconds and mean budget for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-output", help="folder or Hub id of a trained BudgetFormer")
    parser.add_argument("--dataset", default=DOCSTRINGS, help="file, folder or Hub id with columns text and label")
    parser.add_argument("--budgets", nargs="+", type=budget, default=[0.6, 0.4, 0.3, 1 / 4, 1 / 6, 1 / 12])
    parser.add_argument("--max-test", type=int, default=800, help="test texts used")
    parser.add_argument("--max-length", type=int, default=64, help="tokens read of a text")
    args = parser.parse_args(argv)

    make = "python examples/finetune_text_classification.py"
    config, tokenizer = read_config(args.model, f"Make one: {make} --output {args.model}")
    if config.model_type != "budgetformer":
        raise SystemExit(
            f"--model {args.model} is a {config.model_type}, which knows no budgets. "
            f"Put a narrow encoder beside it first: {make} --model {args.model}"
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
    batches = make_batches(test, tokenizer)
    rows = {"full model": answer(model, batches, 1.0), "plain call": answer(model, batches)}
    for share in args.budgets:
        if share < 1.0:
            rows[f"{share:.3f}"] = answer(model, batches, share)
    print_table(rows, reference="full model")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
