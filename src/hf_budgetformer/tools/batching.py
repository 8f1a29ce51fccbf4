"""Batches of rows of like length."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase


# Batches of rows that are read at once and sorted by length: memory does not grow with the data, and padding is rare.
WINDOW = 64


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError unless it is an integer >= 1."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}.")


def tokenized(
    columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Mapping[str, list[Any]]:
    """Rows as token ids, without padding.

    Args:
        columns: Lists of equal length: `input_ids` and what else the tokenizer makes, or `text` and, for pairs,
            `text_pair`. Others are ignored.
        tokenizer: Of the model.
        max_length: Tokens kept of a text that is not tokenized yet. None: all the tokenizer allows.

    Raises:
        ValueError: `max_length` is below 1.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be None or an integer >= 1, got {max_length}.")
    if "input_ids" in columns:
        return {name: columns[name] for name in tokenizer.model_input_names if name in columns}
    return tokenizer(columns["text"], columns.get("text_pair"), truncation=True, max_length=max_length)


def batches_by_length(
    columns: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int | None = None,
) -> Iterator[tuple[np.ndarray, BatchEncoding]]:
    """Batches of like length, shortest first, which saves padding.

    Args:
        columns: As in `tokenized`.
        tokenizer: Of the model.
        batch_size: Rows at a time, >= 1.
        max_length: As in `tokenized`.

    Yields:
        Positions of the rows, (B,) int64, and tensors (B, L) as a model takes them.

    Raises:
        ValueError: `max_length` is below 1.
    """
    encoded = tokenized(columns, tokenizer, max_length)
    order = np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = {name: [values[place] for place in places] for name, values in encoded.items()}
        yield places, tokenizer.pad(rows, return_tensors="pt")


__all__ = ["WINDOW", "batches_by_length", "check_batch_size", "tokenized"]
