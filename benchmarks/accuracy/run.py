"""What accuracy and agreement cost: trains and scores every method on every data set.

    python benchmarks/accuracy/run.py --data FOLDER --work FOLDER

A seed is that of the full model and of all that stands beside it. What is in the work folder already is not made again.
Then `figures.py` makes results of it; the folder is not needed afterwards, and another one adds seeds to them.
"""

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))
import datasets
import numpy as np
import torch
from accuracy.figures import stem
from accuracy.fits import ask, fine_tune
from accuracy.methods import METHODS, Task
from accuracy.rows import Rows, read_rows
from inputs import keep_quiet, load_tokenizer
from measure import read_json
from transformers import AutoModelForSequenceClassification

from hf_budgetformer.tools.recipe import taught_rows


HERE = Path(__file__).resolve().parent
SPLITS = ("calibration", "test")


def full_model(rows: Rows, settings: dict[str, Any], folder: Path, seed: int) -> None:
    """Fine-tunes MiniLM, the full model, and keeps it with its logits."""
    model, seconds = fine_tune(AutoModelForSequenceClassification, rows, settings, seed)
    model.save_pretrained(folder)
    logits = {split: ask(model, getattr(rows, split)) for split in SPLITS}
    np.savez(folder / "logits.npz", seconds=seconds, **logits)


def taught(rows: Rows, full: Path, seed: int, recipe: dict[str, Any]) -> Any:
    """Rows to train on, mixed ones too, with the full model's answers; made once for all methods."""
    folder = full.parent / "taught"
    if not folder.exists():
        start = time.perf_counter()
        rows_taught = taught_rows(rows.train, str(full), load_tokenizer(), mixed=recipe["mixed"], seed=seed)
        seconds = time.perf_counter() - start
        rows_taught.save_to_disk(folder)
        about = {"rows": len(rows_taught), "seconds": round(seconds, 1)}
        (full.parent / "taught.json").write_text(json.dumps(about) + "\n")
        print(f"{full.parent.name}: asked about {len(rows_taught)} rows in {seconds:.0f} s", flush=True)
    return datasets.load_from_disk(str(folder))


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, cheap data sets first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, default=HERE / "settings.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>/{train,validation,test}.parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logits")
    parser.add_argument("--data-sets", nargs="*", help="some of the settings' only")
    parser.add_argument("--methods", nargs="*", help="some of the settings' only; none for the full models alone")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    settings = read_json(options.settings)
    methods = (
        settings["methods"]
        if options.methods is None
        else {name: settings["methods"][name] for name in options.methods}
    )
    seeds = sorted({seed for wanted in settings["methods"].values() for seed in wanted})
    names = options.data_sets or settings["data"]
    limits = {"calibration": settings["calibration_rows"], "test": settings["test_rows"]}
    rows_of = {name: read_rows(options.data, name, {**limits, **settings["data"][name]}) for name in names}
    for seed, name in product(seeds if options.seeds is None else options.seeds, names):
        data_settings, rows, folder = settings["data"][name], rows_of[name], options.work / f"{name}-{seed}"
        full = folder / "full"
        if not (full / "logits.npz").exists():
            full_model(rows, {**settings, **data_settings}, full, seed)
        logits = np.load(full / "logits.npz")
        labels = np.array(rows.test["labels"])
        accuracy = (logits["test"].argmax(-1) == labels).mean()
        print(f"{name}, seed {seed}: full {accuracy:.4f}, {float(logits['seconds']):.0f} s", flush=True)
        (folder / "sha256.json").write_text(json.dumps(rows.sha256, indent=1) + "\n")
        if not (folder / "labels.npz").exists():
            np.savez(folder / "labels.npz", **{x: np.array(getattr(rows, x)["labels"]) for x in SPLITS})
        recipe = settings["narrow"]
        # Passes over the rows that are taught.
        epochs = recipe["steps"] * data_settings["epochs"] / (1 + recipe["mixed"])
        for method, wanted in methods.items():
            target = folder / f"{stem(method)}.npz"
            if target.exists() or (options.methods is None and seed not in wanted):
                continue
            task = Task(full, rows, taught(rows, full, seed, recipe), epochs, recipe, seed)
            answers, seconds = METHODS[method](task)
            kept = {f"{part} {share:.9f}": x for part, by_share in answers.items() for share, x in by_share.items()}
            np.savez_compressed(target, seconds=seconds, **kept)
            scores, full_answers = [], logits["test"].argmax(-1)
            for share, x in answers["test"].items():
                right, same = (x.argmax(-1) == labels).mean(), (x.argmax(-1) == full_answers).mean()
                scores.append(f"{share:.3f}: {right:.4f}, {same:.4f}")
            line = "; ".join(scores)
            print(f"{name}, {method}, seed {seed}: {seconds:.0f} s; accuracy, agreement {line}", flush=True)


if __name__ == "__main__":
    main()
