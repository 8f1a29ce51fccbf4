"""Trials of the recipe, each a change of one thing: choose.py --data FOLDER --work FOLDER --trials X --data-sets Y.

Scored on the calibration rows, never on the test rows; trials/<data set>-<trial>-<seed>.json, failed ones too.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))

import datasets
import numpy as np
import torch
from accuracy.figures import MEANS, margin
from accuracy.fits import ask, fine_tune
from accuracy.otherwise import DEFAULTS, augment, train_by_recipe
from accuracy.rows import Rows, read_rows
from inputs import keep_quiet
from measure import environment, read_json
from transformers import AutoModelForSequenceClassification

from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification
from hf_budgetformer.losses import teacher_divergence


HERE = Path(__file__).resolve().parent
BUDGETS = {"1/4": 1 / 4, "1/6": 1 / 6, "1/12": 1 / 12}


def score(narrow: np.ndarray, full: np.ndarray, labels: np.ndarray, budget: float) -> dict[str, Any]:
    """Of one first look: alone, and where the most doubtful rows go on to the full model.

    Args:
        narrow: Logits (N, num_labels).
        full: The full model's.
        labels: (N,).
        budget: Of the look.
    """
    expected = full.argmax(-1)
    divergence = teacher_divergence(torch.from_numpy(narrow), torch.from_numpy(full), "single_label_classification")

    def of(answers: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((answers == labels).mean()), "agreement": float((answers == expected).mean())}

    scores: dict[str, Any] = {**of(narrow.argmax(-1)), "divergence": float(divergence.mean())}
    doubtful = np.argsort(margin(narrow), kind="stable")
    for mean in MEANS:
        if mean >= budget:
            answers, on = narrow.argmax(-1).copy(), doubtful[: round((mean - budget) * len(full))]
            answers[on] = expected[on]
            scores[f"looks {mean}"] = of(answers)
    return scores


def taught_otherwise(full: Path, rows: Rows, recipe: dict[str, Any], seed: int) -> datasets.Dataset:
    """Training rows, and others by the recipe, with the full model's answers."""
    columns = [name for name in rows.train.column_names if name != "labels"]
    extra = []
    if recipe["spare"]:
        extra.append(rows.spare.take(min(len(rows.spare), recipe["spare"] * len(rows.train))))
    if recipe["extra"]:
        extra.append(augment(rows.train, recipe["extra"], recipe["extra_kind"], seed))
    train = rows.train.select_columns(columns)
    parts = [train, *(part.select_columns(columns).cast(train.features) for part in extra)]
    taught = datasets.concatenate_datasets(parts)
    teacher = AutoModelForSequenceClassification.from_pretrained(full)
    return taught.add_column("teacher_logits", ask(teacher, taught).tolist())


def main() -> None:
    """Runs the trials that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where run.py has left full models")
    parser.add_argument("--trials", nargs="+", required=True, help="names in trials.json")
    parser.add_argument("--data-sets", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    keep_quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    settings, trials = read_json(HERE / "settings.json"), read_json(HERE / "trials.json")
    for name in options.data_sets:
        limits = {"calibration": settings["calibration_rows"], "test": settings["test_rows"]}
        rows = read_rows(options.data, name, {**limits, **settings["data"][name]})
        labels = np.array(rows.calibration["labels"])
        for seed in options.seeds:
            folder = options.work / f"{name}-{seed}" / "full"
            taught_by: dict[tuple[Any, ...], datasets.Dataset] = {}  # asked once for all trials of the same rows
            for trial in options.trials:
                target = HERE / "trials" / f"{name}-{trial}-{seed}.json"
                if target.exists():
                    continue
                recipe = {**DEFAULTS, "order": "equal", **trials[trial]}  # as it was when the trials began
                if recipe.get("together"):
                    # As long as the full model alone, from labels.
                    options = {"callbacks": [BudgetCallback(order=False, disagreement=None)]}
                    merged = {**settings, **settings["data"][name]}
                    model, seconds = fine_tune(BudgetFormerForSequenceClassification, rows, merged, seed, **options)
                    full = ask(model, rows.calibration, budget=1.0)
                else:
                    full = np.load(folder / "logits.npz")["calibration"]
                    kind = recipe["spare"], recipe["extra"], recipe["extra_kind"]
                    if kind not in taught_by:
                        taught_by[kind] = taught_otherwise(folder, rows, recipe, seed)
                    taught = taught_by[kind]
                    recipe["epochs"] *= len(rows.train) / len(taught)
                    model, seconds = train_by_recipe(folder, rows.train, taught, recipe, seed)
                scores = {"full": {"accuracy": float((full.argmax(-1) == labels).mean())}}
                for label, budget in BUDGETS.items():
                    if norms := getattr(model, "norms", None):
                        norms.put_into(model.narrow.layer, budget / model.narrow.widest.cost)
                    scores[label] = score(ask(model, rows.calibration, budget=budget), full, labels, budget)
                about = {"data": name, "trial": trial, "seed": seed, "recipe": trials[trial], "seconds": round(seconds)}
                about |= {"sha256": rows.sha256, "environment": environment()}
                target.parent.mkdir(exist_ok=True)
                target.write_text(json.dumps({**about, **scores}, indent=1) + "\n")
                line = "; ".join(f"{x} {scores[x]['agreement']:.4f}, {scores[x]['divergence']:.4f}" for x in BUDGETS)
                print(f"{name}, {trial}, seed {seed}: {seconds:.0f} s; agreement, divergence: {line}", flush=True)


if __name__ == "__main__":
    main()
