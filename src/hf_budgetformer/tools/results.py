"""What was measured, beside the checkpoint: a file for each kind and data set, and whether it still holds."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..budgets import DEFAULT_CONFIDENCE, DEFAULT_LOOKS


@dataclass(frozen=True)
class Record:
    """One result, and what it was measured on.

    Attributes:
        data: Short name of the data; None where it has none.
        split: Of the data, where it has several.
        rows: How many were measured on.
        looks: `config.looks` of the checkpoint, then; None: the default.
        confidence: `config.confidence`, then.
        changed: What differs in the checkpoint since: "weights", "looks" (of a plain call, or their confidence).
        result: What was measured, as the tool's `to_dict` returned it.
    """

    data: str | None
    split: str | None
    rows: int
    looks: list[float] | None
    confidence: list[float] | None
    changed: tuple[str, ...]
    result: dict[str, Any]

    @property
    def stale(self) -> bool:
        """Whether the weights, or the looks of a plain call, have changed since."""
        return bool(self.changed)

    @property
    def source(self) -> str:
        """Data and split."""
        return ", ".join(filter(None, (self.data or "unnamed data", self.split)))

    def __str__(self) -> str:
        call = describe_looks(self.looks, self.confidence)
        text = f"On {self.rows:,} rows of {self.source}, by a model whose plain call {call}."
        if "weights" in self.changed:
            return f"{text} OUT OF DATE: the weights have changed since; measure it again."
        if self.stale:
            return f"{text} OUT OF DATE where it is of a plain call: its looks have changed since; measure it again."
        return text


def describe_looks(looks: Sequence[float] | None, confidence: Sequence[float] | None) -> str:
    """What a plain call does, in words, by `config.looks` and `config.confidence` of a trained model."""
    looks = looks or DEFAULT_LOOKS
    if len(looks) == 1:
        return "runs the full model" if looks[0] == 1.0 else f"looks once, at a budget of {looks[0]:.3g}"
    margins = confidence or [DEFAULT_CONFIDENCE] * (len(looks) - 1)
    budgets, known = (", then ".join(f"{value:.3g}" for value in values) for values in (looks, margins))
    return f"looks at budgets of {budgets}, until the margin reaches {known}"


def short_name(source: Any) -> str:
    """A Hub id as it is; of a longer path, what tells data apart and not where it lies: its last two parts."""
    return "/".join(str(source).replace("\\", "/").strip("/").split("/")[-2:])


def write_json(path: str | Path, values: Any) -> None:
    """Writes a JSON file at once, into folders made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_result(
    folder: str | Path, kind: str, result: dict[str, Any], data: str | None, split: str | None, rows: int
) -> Path | None:
    """Writes a result into the folder of its checkpoint, in place of an earlier one on the same data.

    Args:
        folder: A checkpoint as it was measured; None is returned where it is no directory, but a Hub id.
        kind: "evaluation", "tuning" or "costs".
        result: For JSON.
        data: Where the rows are from; its short name is kept.
        split: Of the data, where it has several.
        rows: How many.

    Returns:
        The file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    name = None if data is None else short_name(data)
    parts = [name or "unnamed", *([split] if split else []), f"{rows}-rows"]
    slug = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
    path = folder / "budgetformer" / kind / f"{slug}.json"
    state = {**_plain_call(folder), "weights": _weights_digest(folder)}
    write_json(path, {"data": name, "split": split, "rows": rows, **state, "result": result})
    return path


def read_results(folder: str | Path, kind: str) -> list[Record]:
    """What `save_result` left of a kind: those that still hold first, and those on more rows before others.

    Raises:
        ValueError: A file does not hold what it should.
    """
    folder = Path(folder)
    paths = sorted((folder / "budgetformer" / kind).glob("[!.]*.json"))
    if not paths:
        return []
    call, weights = _plain_call(folder), _weights_digest(folder)
    records = []
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            state = {name: values[name] for name in ("looks", "confidence")}
            changes = {"weights": values["weights"] != weights, "looks": state != call}
            changed = tuple(name for name, differs in changes.items() if differs)
            measured = {name: values[name] for name in ("data", "split", "rows")}
            records.append(Record(**measured, **state, changed=changed, result=dict(values["result"])))
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path} does not hold what it should ({error!r}): make it again, or delete it."
            raise ValueError(message) from error
    return sorted(records, key=lambda record: (record.stale, -record.rows))


def read_training(folder: str | Path) -> dict[str, Any]:
    """What `train` left beside a checkpoint, if anything."""
    path = Path(folder) / "budgetformer" / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain_call(folder: Path) -> dict[str, Any]:
    """What the checkpoint's configuration says of a plain call."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: config.get(name) for name in ("looks", "confidence")}


def _weights_digest(folder: Path) -> str:
    """sha256 of the files that hold the weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


__all__ = ["Record", "describe_looks", "read_results", "read_training", "save_result", "short_name", "write_json"]
