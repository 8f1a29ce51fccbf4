"""Calibrates looser promises beside a checkpoint's own, for a server that may give them while many requests wait.

    python examples/promises.py CHECKPOINT validation.parquet --levels 0.02 0.05
    python examples/serve.py CHECKPOINT --load-aware

CHECKPOINT is a folder whose plain calls promise a disagreement, as `budgetformer tune` makes them. The first look stays
as it is; for each level, a larger share of answers that may differ from the full model's, a lower threshold is found on
the rows, which are best those that the checkpoint was tuned on. Writes CHECKPOINT/promises.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from hf_budgetformer.tools.batching import batches_by_length
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.results import write_json
from hf_budgetformer.tools.tables import read_table
from hf_budgetformer.tools.tuning import Calibration, choose_looks, kept_promise


PROMISES_FILE = "promises.json"
BATCH_SIZE = 32


class Level(NamedTuple):
    """A promise, and what keeps it.

    Args:
        promise: Share of the answers that may differ from the full model's, in (0, 1).
        threshold: Answers of the first look that are less confident are doubted, in [0, 1].
    """

    promise: float
    threshold: float


def own_promise(config: Any) -> dict[str, Any]:
    """What a checkpoint promises of its plain calls.

    Raises:
        ValueError: It does not look twice, or promises no disagreement.
    """
    promise = kept_promise(config)
    if promise is None or promise["risk"] != "disagreement" or len(promise["looks"]) != 2:
        got = "none" if promise is None else f"{promise['risk']} of {promise['level']:g} with looks {promise['looks']}"
        raise ValueError(
            "checkpoint must promise a disagreement of plain calls that look twice (budgetformer tune CHECKPOINT DATA "
            f"--disagreement 0.01), got {got}."
        )
    return promise


def calibrate(checkpoint: str, data: str, levels: Sequence[float]) -> list[dict[str, Any]]:
    """The checkpoint's own promise, and one for each level, loosest last; all of its first look.

    Args:
        checkpoint: Folder or Hub id of a model and its tokenizer.
        data: Texts, as `tools.tables.read_table` reads them; labels are not needed.
        levels: Shares of the answers that may differ from the full model's, in (0, 1), each above the own one.

    Raises:
        OSError: There is no such data.
        ValueError: The checkpoint promises no disagreement, a level is not allowed, or the rows are too few for it.
    """
    model, tokenizer = load_classifier(checkpoint, budgeted=True)
    promises = [own_promise(model.config)]
    first_look = promises[0]["looks"][0]
    for level in levels:
        if not promises[0]["level"] < level < 1.0:
            raise ValueError(f"levels must be in ({promises[0]['level']:g}, 1), above the own promise, got {level:g}.")
    rows = read_table(data, labelled=False)
    batches = (batch for _, batch in batches_by_length(rows[:], tokenizer, BATCH_SIZE))
    calibration = Calibration(model, batches, [first_look])
    for level in sorted(set(levels)):
        promise = choose_looks(calibration, "disagreement", level).promise
        before = promises[-1]
        if promise["looks"] == [1.0] or threshold_of(promise) > threshold_of(before):
            raise ValueError(
                f"levels must let fewer answers be doubted than {before['level']:g} does, got {level:g}, which these "
                f"{len(rows)} rows do not allow: tune the checkpoint on them first, or name a larger level."
            )
        promises.append(promise)
    return promises


def threshold_of(promise: dict[str, Any]) -> float:
    """Least confidence of a first look that is not doubted; 0 where none is."""
    return float(promise["thresholds"][0]) if promise["thresholds"] else 0.0


def read_promises(path: Path, config: Any) -> list[Level]:
    """The levels that `calibrate` found for this checkpoint, its own first.

    Raises:
        ValueError: There is no such file, it cannot be read, or it was made for other looks than the checkpoint's.
    """
    checkpoint_promise = own_promise(config)
    again = "run examples/promises.py CHECKPOINT DATA --levels 0.02 0.05"
    try:
        promises = json.loads(path.read_text("utf-8"))["promises"]
        levels = [Level(float(promise["level"]), threshold_of(promise)) for promise in promises]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} must hold promises: {again} ({type(error).__name__}: {error}).") from None
    if len(levels) < 2 or promises[0] != checkpoint_promise:
        raise ValueError(f"{path} must be of the checkpoint's own promise and of looser ones, got others: {again}.")
    shares, thresholds = [level.promise for level in levels], [level.threshold for level in levels]
    if shares != sorted(set(shares)) or thresholds != sorted(thresholds, reverse=True):
        raise ValueError(
            f"{path} must hold rising levels and falling thresholds, got {shares} and {thresholds}: {again}."
        )
    return levels


def main(arguments: list[str] | None = None) -> None:
    """Calibrates, writes, and says what each level is worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DATA", help="parquet, csv, jsonl or txt file of texts, or a data set's Hub id")
    parser.add_argument("--levels", type=float, nargs="+", required=True, help="of disagreement, e.g. 0.02 0.05")
    options = parser.parse_args(arguments)
    if not Path(options.checkpoint).is_dir():
        parser.error(f"CHECKPOINT must be a folder, got {options.checkpoint}")
    try:
        promises = calibrate(options.checkpoint, options.data, options.levels)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    path = Path(options.checkpoint) / PROMISES_FILE
    write_json(path, {"promises": promises})
    for promise in promises:
        doubted = promise["doubted"] / promise["rows"]
        print(f"at most {promise['level']:g} answered otherwise: {doubted:.1%} of {promise['rows']:,} rows are doubted")
    print(f"Written to {path}.")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
