"""Labels for texts, many or few: streamed, in input order, and taken up where a run was cut off."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_budgetformer import is_share
from .data import batches_by_length, check_batch_size, check_single_label, read_rows, weights_digest, write_json


# Rows are sorted by length within so many batches.
_WINDOW = 64


def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[Mapping[str, str], str | None]],
    batch_size: int = 32,
    max_length: int | None = None,
    head_budget: float | None = None,
    budgets: bool = False,
    gates: bool = False,
    skip_bad: bool = False,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Classifies texts, reading 64 batches ahead, which are sorted by length; answers come in the order of the rows.

    Args:
        model: A classifier in eval mode, stock or BudgetFormer, one label for each input.
        tokenizer: Of the model.
        rows: As `tools.data.read_rows` gives them: text and, for pairs, text_pair; and what is wrong with the row.
        batch_size: Rows the model reads at a time, >= 1.
        max_length: Tokens kept of a text. None: all the tokenizer allows.
        head_budget: Share of the heads asked for, a float in (0, 1]; None: the model's own.
        budgets: Whether to give `head_budget`, the share of heads that ran for the input.
        gates: Whether to give `head_gates`, for each layer a list of 0 and 1, one for each head.
        skip_bad: Whether a broken row gets an error in place of a label; or else it ends the work.
        first: Number of the first row.

    Yields:
        row, label and its probability, score, and what else was asked for; or row and error.

    Raises:
        ValueError: An argument is not allowed, or a row is broken.
    """
    check_single_label(model.config)
    check_batch_size(batch_size)
    asked: dict[str, Any] = {"output_head_gates": True} if gates else {}
    if head_budget is not None:
        if not is_share(head_budget):
            raise ValueError(f"head_budget must be a float in (0, 1], got {head_budget!r}.")
        asked["head_budget"] = head_budget
    if (asked or budgets) and model.config.model_type != "budgetformer":
        raise ValueError(f"budgets and gates need a BudgetFormer, got a {model.config.model_type} model.")
    numbered = enumerate(rows, first)
    while window := list(itertools.islice(numbered, _WINDOW * batch_size)):
        for number, (_, fault) in window:
            if fault and not skip_bad:
                raise ValueError(
                    f"row {number} {fault} (the first is row 0). Mend it, or go on: skip_bad=True (--skip-bad)."
                )
        answers: list[dict[str, Any]] = [{"row": number, "error": fault} for number, (_, fault) in window]
        sound = [(answer, row) for answer, (_, (row, fault)) in zip(answers, window, strict=True) if not fault]
        columns = {name: [row[name] for _, row in sound] for name in (sound[0][1] if sound else ())}
        for places, batch in batches_by_length(columns, tokenizer, batch_size, max_length) if sound else ():
            with torch.no_grad():
                out = model(**batch.to(model.device), **asked)
            scores, labels = out.logits.float().softmax(-1).max(-1)
            for index, (place, label) in enumerate(zip(places, labels.tolist(), strict=True)):
                answer = sound[place][0]
                del answer["error"]
                answer |= {"label": model.config.id2label[label], "score": round(scores[index].item(), 6)}
                if budgets:
                    answer["head_budget"] = round(out.head_budget[index].item(), 6)
                if gates:
                    answer["head_gates"] = out.head_gates[index].int().tolist()
        yield from answers


def predict_file(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    output: str | Path,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 32,
    skip_bad: bool = False,
    **options: Any,
) -> int:
    """Writes the answers of `predict` to a jsonl file, one for each row; a run that was cut off is taken up.

    Until all rows are answered, the file's name ends in ".partial", and what it was made from is beside it: only the
    same run is taken up, whole windows are kept of it, and the rest is answered again, so that the file comes out as if
    nothing had happened.

    Args:
        model: As in `predict`.
        tokenizer: Of the model.
        source: As in `tools.data.read_rows`.
        output: Of the jsonl file.
        split: As in `read_rows`.
        columns: As in `read_rows`.
        batch_size: As in `predict`.
        skip_bad: As in `predict`.
        **options: Further options of `predict`.

    Returns:
        Number of rows that were answered before, by the run that was cut off.

    Raises:
        OSError: There is such a file already, it cannot be written, or there is no such source.
        ValueError: As in `read_rows` and `predict`; or another run was cut off here.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: remove it, or name another file.")
    partial, origin = (output.with_name(output.name + end) for end in (".partial", ".partial.json"))
    run = {"source": source, "split": split, "columns": columns, "batch_size": batch_size, **options}
    run |= {"file": _stamp(source), "weights": weights_digest(model), "max_tokens": tokenizer.model_max_length}
    run = json.loads(json.dumps(run))
    before = json.loads(origin.read_text("utf-8")) if origin.exists() else None
    if before is not None and before != run:
        changed = sorted(name for name in {*run, *before} if run.get(name) != before.get(name))
        raise ValueError(
            f"{partial} is of a run with another {', '.join(changed)}: remove it and {origin} to start anew."
        )
    if before is None:
        partial.write_bytes(b"")
        write_json(origin, run)
    done = _cut_to_windows(partial, _WINDOW * batch_size)
    rows = itertools.islice(read_rows(source, split, columns), done, None)
    answers = predict(model, tokenizer, rows, batch_size, skip_bad=skip_bad, first=done, **options)
    with partial.open("a", encoding="utf-8", buffering=1) as file:
        for answer in logging.tqdm(answers, desc="Predicting", initial=done, unit=" rows", disable=None):
            file.write(json.dumps(answer) + "\n")
    os.replace(partial, output)
    origin.unlink()
    return done


def _stamp(source: str) -> list[int]:
    """Size and time of a file, of anything else nothing."""
    if not os.path.isfile(source):
        return []
    found = os.stat(source)
    return [found.st_size, found.st_mtime_ns]


def _cut_to_windows(path: Path, window: int) -> int:
    """Cuts off lines beyond the last whole window, and a line that is not complete; returns how many stay."""
    kept = size = lines = offset = 0
    with path.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, offset = lines + 1, offset + len(line)
                if lines % window == 0:
                    kept, size = lines, offset
        file.truncate(size)
    return kept


__all__ = ["predict", "predict_file"]
