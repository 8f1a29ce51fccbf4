"""How alike the similarities of a narrow encoder are to the full one's, on docstrings of the standard library.

Trains as `examples/embed.py` does, on more texts; nothing is timed.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from inputs import checkpoint, keep_quiet
from measure import ROOT, environment, read_filled, table

from hf_budgetformer.tools.results import write_json


sys.path.append(str(ROOT / "examples"))


SETTINGS: dict[str, Any] = {
    "title": "",
    "model": "minilm",
    "seed": 0,
    "max_length": 64,
    "texts": 5000,
    "epochs": 6,
    "test_texts": 1000,
    "budgets": [0.5, 0.25],
}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Rank correlation of the cosine similarities of all pairs of test texts with the full encoder's."""
    from scipy.stats import spearmanr

    from docstrings import load_docstrings
    from embed import similarities, train_narrow, wrap

    splits = load_docstrings()
    texts = {split: list(splits[split].shuffle(seed=0)["text"]) for split in ("train", "test")}
    train, test = texts["train"][: settings["texts"]], texts["test"][: settings["test_texts"]]
    torch.manual_seed(settings["seed"])
    model, tokenizer = train_narrow(checkpoint(settings["model"]), train, settings["epochs"], settings["max_length"])
    with tempfile.TemporaryDirectory() as folder:
        encoder = wrap(model, tokenizer, folder)
    full, _ = similarities(encoder, test)
    correlations = {}
    for budget in settings["budgets"]:
        narrow, _ = similarities(encoder, test, budget=budget)
        correlations[str(budget)] = float(spearmanr(full, narrow)[0])
    digest = hashlib.sha256("\n".join([*train, *test]).encode()).hexdigest()
    data = {"trained": len(train), "compared": len(test), "sha256": digest}
    return {"settings": settings, "spearman": correlations, "data": data, "environment": environment()}


def section(result: dict[str, Any]) -> str:
    """For the report."""
    settings, data = result["settings"], result["data"]
    rows = [[budget, f"{value:.4f}"] for budget, value in result["spearman"].items()]
    return (
        f"\n## {settings['title']}\n\n`embedding.json`: a narrow encoder learns from {data['trained']:,} texts without "
        f"labels in {settings['epochs']} epochs; similarities of all pairs of {data['compared']:,} others, by the full "
        f"encoder and by the narrow one (sha256 of the texts {data['sha256'][:12]}).\n\n"
        + table(["budget", "Spearman to the full model's similarities"], rows)
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=ROOT / "benchmarks" / "embedding.json")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "embedding.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    settings = read_filled(options.settings, SETTINGS)
    keep_quiet()
    torch.set_num_threads(options.threads)
    write_json(options.output, measure(settings))
    print(options.output.read_text())


if __name__ == "__main__":
    main()
