"""Rows of a data set: those to train on, those to calibrate on, those to test on, tokenized."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # datasets brings it
from datasets import Dataset, concatenate_datasets
from inputs import load_tokenizer


# Of the draw of rows, which is the same for every model.
_SEED = 0


@dataclass
class Rows:
    """A data set: `train`, `calibration` and `test`, tokenized, with `labels`.

    Args:
        train: What the full model is trained on.
        calibration: For choices and promises; no model is trained on them.
        test: Looked at when everything is decided.
        beyond: Training rows beyond `train`, as they are: trials alone need them, see `spare`.
        max_length: In tokens.
        labels: Number of labels.
        sha256: Of the files, by split.
    """

    train: Dataset
    calibration: Dataset
    test: Dataset
    beyond: Dataset
    max_length: int
    labels: int
    sha256: dict[str, str]

    @cached_property
    def spare(self) -> Dataset:
        """`beyond`, tokenized, as text without labels."""
        return _tokenize(self.beyond, self.max_length)


def _read(path: Path) -> Dataset:
    table = pyarrow.parquet.read_table(path)
    wanted = [name for name in ("text", "text_pair", "label") if name in table.column_names]
    return Dataset(table.select(wanted).combine_chunks())


def _tokenize(rows: Dataset, max_length: int) -> Dataset:
    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = load_tokenizer()(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def read_rows(folder: Path, name: str, settings: dict[str, Any]) -> Rows:
    """Reads `folder`/`name`: validation rows calibrate, and where they are few, training rows beyond `train` too.

    Args:
        folder: Of the data sets.
        name: Of the data set.
        settings: "train", "calibration" and "test", most rows of each, and "max_length" in tokens.
    """
    paths = {split: folder / name / f"{split}.parquet" for split in ("train", "validation", "test")}
    if not paths["train"].is_file():
        raise SystemExit(f"--data {folder}: there is no {name}/train.parquet in it.")
    sha256 = {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in paths.items() if path.is_file()}
    shuffled = {split: _read(paths[split]).shuffle(seed=_SEED) for split in sha256}
    train = shuffled["train"]
    labels = len(np.unique(train["label"]))
    count = min(settings["train"], len(train))
    missing = settings["calibration"]
    parts = []
    if "validation" in shuffled:
        parts.append(shuffled["validation"].take(min(missing, len(shuffled["validation"]))))
        missing -= len(parts[0])
    beyond = min(missing, len(train) - count)
    parts.append(train.select(list(range(count, count + beyond))))
    spare = train.select(list(range(count + beyond, min(len(train), 4 * count + beyond))))
    test = shuffled["test"].take(min(settings["test"], len(shuffled["test"])))
    length = settings["max_length"]
    return Rows(
        train=_tokenize(train.take(count), length),
        calibration=_tokenize(concatenate_datasets(parts), length),
        test=_tokenize(test, length),
        beyond=spare,
        max_length=length,
        labels=labels,
        sha256=sha256,
    )
