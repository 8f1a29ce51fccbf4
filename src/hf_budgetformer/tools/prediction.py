"""Labels for texts, many or few: streamed, in input order, and taken up where a run was cut off."""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextClassificationPipeline
from transformers.utils import logging

from ..budgets import problem_type
from ..configuration_budgetformer import is_share
from .batching import WINDOW, check_batch_size, tokenized
from .checkpoints import weights_digest
from .documents import answer_documents, check_chunks, split_documents
from .looking import Answers, answer_rows
from .results import write_json
from .tables import read_rows
from .tuning import decisions, warn_of_shift


def _check_budgeted(model: Any) -> None:
    if model.config.model_type != "budgetformer":
        raise ValueError(f"budget and what was spent need a BudgetFormer, got a {model.config.model_type} model.")


def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[Mapping[str, str], str | None]],
    batch_size: int = 32,
    max_length: int | None = None,
    budget: float | None = None,
    spent: bool = False,
    skip_bad: bool = False,
    first: int = 0,
    chunks: str | None = None,
    stride: int = 0,
) -> Iterator[dict[str, Any]]:
    """Classifies texts, reading 64 batches ahead, which are sorted by length; answers come in the order of the rows.

    Rows of these batches that a look doubts share full batches of the next one.

    Args:
        model: A classifier in eval mode, stock or BudgetFormer, or a regression.
        tokenizer: Of the model.
        rows: As `tools.tables.read_rows` gives them: text and, for pairs, text_pair; and what is wrong with the row.
        batch_size: Rows the model reads at a time, >= 1.
        max_length: Tokens kept of a text. None: all the tokenizer allows.
        budget: Share of the full model's work asked for, a float in (0, 1]; None: a plain call.
        spent: Whether to give `budget`, what was spent on the input.
        skip_bad: Whether a broken row gets an error in place of a label; or else it ends the work.
        first: Number of the first row.
        chunks: How answers to chunks of `max_length` tokens become the text's, see `tools.documents.pool_answers`; each
            chunk has looks of its own. None: what is longer is cut off.
        stride: Tokens that a chunk shares with the one before, >= 0.

    Yields:
        row, what `describe_answer` gives, and what else was asked for; or row and error.

    Raises:
        ValueError: An argument is not allowed, or a row is broken.
    """
    check_batch_size(batch_size)
    check_chunks(chunks, stride)
    if budget is not None and not is_share(budget):
        raise ValueError(f"budget must be a float in (0, 1], got {budget!r}.")
    if budget is not None or spent:
        _check_budgeted(model)
    numbered = enumerate(rows, first)
    counts = model.config.model_type == "budgetformer" and budget is None and chunks is None  # else of other texts
    doubted = counted = 0
    while window := list(itertools.islice(numbered, WINDOW * batch_size)):
        for number, (_, fault) in window:
            if fault and not skip_bad:
                raise ValueError(
                    f"row {number} {fault} (the first is row 0). Mend it, or go on: skip_bad=True (--skip-bad)."
                )
        answers: list[dict[str, Any]] = [{"row": number, "error": fault} for number, (_, fault) in window]
        sound = [(answer, row) for answer, (_, (row, fault)) in zip(answers, window, strict=True) if not fault]
        columns = {name: [row[name] for _, row in sound] for name in (sound[0][1] if sound else ())}
        batches: Iterable[Answers] = ()
        if sound and chunks is not None:
            parts = split_documents(columns, tokenizer, max_length, stride)
            batches = [answer_documents(model, parts, tokenizer, batch_size, budget, chunks)]
        elif sound:
            inputs = tokenized(columns, tokenizer, max_length)
            batches = answer_rows(model, inputs, tokenizer, batch_size, budget)
        for places, logits, budgets in batches:
            if counts:
                doubted, counted = doubted + int((budgets > 1.0).sum()), counted + len(places)
            for index, place in enumerate(places):
                answer = sound[place][0]
                del answer["error"]
                answer |= describe_answer(logits[index], model.config)
                if spent:
                    answer["budget"] = round(budgets[index].item(), 6)
        yield from answers
    if counted:
        warn_of_shift(model.config, doubted, counted)


def describe_answer(logits: torch.Tensor, config: Any) -> dict[str, Any]:
    """A classifier's answer to one input, for JSON.

    Args:
        logits: (num_labels,), float.
        config: Of the classifier.

    Returns:
        label and score, its probability; of several labels at once labels and scores, lists of those that hold; of a
        regression the score alone, a number, or a list of several.
    """
    problem = problem_type(config)
    if problem == "regression":
        values = [round(value, 6) for value in logits.tolist()]
        return {"score": values[0] if len(values) == 1 else values}
    answer = decisions(logits[None], problem)[0]
    if problem == "multi_label_classification":
        labels = answer.nonzero()[:, 0].tolist()
        scores = logits.sigmoid()[labels].tolist()
        return {"labels": [config.id2label[label] for label in labels], "scores": [round(x, 6) for x in scores]}
    label = int(answer)
    return {"label": config.id2label[label], "score": round(logits.softmax(-1)[label].item(), 6)}


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
        source: As in `tools.tables.read_rows`.
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
    partial, origin = (output.with_name(output.name + end) for end in (".partial", ".partial.json"))
    if origin.exists() and not partial.exists():
        origin.unlink()  # of a run that was cut off after its end
    if output.exists():
        raise FileExistsError(f"{output} is there already: remove it, or name another file.")
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
    done = _cut_to_windows(partial, WINDOW * batch_size)
    rows = itertools.islice(read_rows(source, split, columns), done, None)
    answers = predict(model, tokenizer, rows, batch_size, skip_bad=skip_bad, first=done, **options)
    total = None
    if sys.stderr.isatty():  # only there a bar is drawn: it is worth reading all rows once before
        total = sum(1 for _ in read_rows(source, split, columns))
    bar = {"desc": "Predicting", "initial": done, "total": total, "unit": " rows", "disable": None}
    with partial.open("a", encoding="utf-8", buffering=1) as file:
        for answer in logging.tqdm(answers, **bar):
            file.write(json.dumps(answer) + "\n")
    os.replace(partial, output)
    origin.unlink()
    return done


def _stamp(source: str) -> list[int]:
    """Size and time of a file, of anything else nothing."""
    if not os.path.isfile(source):
        return []
    status = os.stat(source)
    return [status.st_size, status.st_mtime_ns]


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


class BudgetTextClassificationPipeline(TextClassificationPipeline):
    """The stock pipeline, with one more option: `pipeline(...)(text, budget=0.25)`.

    It stands in for the stock one under its name, "text-classification"; without a budget it does the same, whatever
    the model.
    """

    def _sanitize_parameters(self, *args: Any, budget: float | None = None, **kwargs: Any) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(*args, **kwargs)
        if budget is not None:
            _check_budgeted(self.model)
            forward = {**forward, "budget": budget}
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: Any, **parameters: Any) -> Any:  # type: ignore[override]  # upstream's two differ
        return self.model(**model_inputs, **parameters) if parameters else super()._forward(model_inputs)


__all__ = ["BudgetTextClassificationPipeline", "describe_answer", "predict", "predict_file"]
