"""Measures experiments and writes what it found: run.py experiments/X.json -> results/X.json.

Each experiment first checks that outputs agree with the masked reference, and is not timed where they do not. One in
bfloat16 is skipped, and its result says so, where the processor has none.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import level_cells
import level_deferred
import level_exported
import level_model
import level_training
import torch
from inputs import keep_quiet
from measure import ROOT, TOLERANCE, environment, read_json

from hf_budgetformer.tools.rivals import RIVALS, check_against


COMMON = {"level": "", "title": "", "threads": [2], "repeats": 7, "seed": 0, "dtype": "float32"}
LEVELS: dict[str, Any] = {
    "model": level_model,
    "cells": level_cells,
    "training": level_training,
    "deferred": level_deferred,
    "exported": level_exported,
}


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of an experiment, defaults filled in; ends with a message that names what is wrong."""
    given = read_json(path)
    level = given.get("level")
    if level not in LEVELS:
        raise SystemExit(f"{path}: level must be one of {list(LEVELS)}, got {level!r}.")
    defaults = {**COMMON, **LEVELS[level].SETTINGS}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise SystemExit(f"{path}: unknown settings {unknown}; level {level!r} has {sorted(defaults)}.")
    settings = {**defaults, **given}
    for name, value in settings.items():
        kinds = (str, dict) if name == "model" else (type(defaults[name]),)
        if not isinstance(value, kinds):
            raise SystemExit(f"{path}: {name} must be a {' or '.join(k.__name__ for k in kinds)}, got {value!r}.")
    if settings["repeats"] < 1:
        raise SystemExit(f"{path}: repeats must be >= 1, got {settings['repeats']}.")
    if not settings["threads"] or not all(isinstance(x, int) and x >= 1 for x in settings["threads"]):
        raise SystemExit(f"{path}: threads must be numbers >= 1, at least one, got {settings['threads']}.")
    cells = settings.get("cells", [])
    if unknown := sorted({name for cell in cells for name in cell} - level_training.CELL.keys()):
        raise SystemExit(f"{path}: unknown settings {unknown} in cells, which have {sorted(level_training.CELL)}.")
    for dtype in (settings["dtype"], *(cell["dtype"] for cell in cells if "dtype" in cell)):
        if dtype not in TOLERANCE:
            raise SystemExit(f"{path}: dtype must be one of {list(TOLERANCE)}, got {dtype!r}.")
    try:
        check_against(settings.get("rivals", []), RIVALS)
    except ValueError as error:
        raise SystemExit(f"{path}: rivals: {error}") from None
    return settings


def main(arguments: list[str] | None = None) -> None:
    """Runs every experiment named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", type=Path, help="JSON files, see benchmarks/experiments")
    parser.add_argument("--data", type=Path, help="folder of <name>/test.parquet, or one file of texts for all")
    parser.add_argument("--checkpoints", type=Path, help="folder of trained models by data set, for exported looks")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--resume", action="store_true", help="skip what has a result of the same settings and commit")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.exists():
        parser.error(f"--data {options.data} does not exist")
    keep_quiet()
    experiments = {path: read_settings(path) for path in options.experiments}  # all, before hours go into the first
    threads = torch.get_num_threads()
    for path, settings in experiments.items():
        target, machine = options.output / f"{path.stem}.json", environment()
        if options.resume and target.exists():
            before = json.loads(target.read_text())
            if (before["settings"], before["environment"]["commit"]) == (settings, machine["commit"]):
                print(f"{target}: there already")
                continue
        start = time.perf_counter()
        try:
            result = LEVELS[settings["level"]].measure(settings, options)
        finally:
            torch.set_num_threads(threads)
        result = {
            "experiment": path.stem,
            "settings": settings,
            "environment": machine,
            "seconds": round(time.perf_counter() - start),
            **result,
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        if "skipped" in result:
            print(f"{target}: skipped, {result['skipped']}")
        else:
            print(f"{target}: {result['seconds']} s, outputs within {result['agreement']['max_difference']:.1g}")


if __name__ == "__main__":
    main()
