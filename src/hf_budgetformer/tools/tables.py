"""Texts and labels from anywhere, checked row by row."""

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..budgets import problem_type
from .checkpoints import check_single_label


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


FILES = (".parquet", ".csv", ".jsonl", ".json", ".txt")
logger = logging.getLogger(__name__)


def _read_file(path: Path) -> Iterator[Any]:
    """Rows, one after the other: a mapping for each, or an error that says what is wrong with it."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    # What is not UTF-8 becomes surrogates, which `_fault` finds row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix == ".txt":
            yield from ({"text": line.rstrip("\r\n")} for line in file)
        elif path.suffix == ".csv":
            table = csv.DictReader(file, strict=True)
            while True:
                try:
                    row = next(table)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield ValueError(f"is not csv ({error})")
                else:
                    yield ValueError("has more fields than the header") if None in row else row
        elif path.suffix == ".json" and file.read(1024).lstrip()[:1] == "[":
            file.seek(0)
            try:
                yield from json.load(file)  # one array: nothing to stream
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not json ({error}).") from None
        else:
            file.seek(0)
            for line in filter(str.strip, file):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield ValueError(f"is not json ({error})")


def _open(source: str, split: str | None) -> tuple[Iterator[Any], Mapping[str, Any]]:
    """Rows as `_read_file` gives them, and the features of those columns of which any are known."""
    from datasets import DatasetDict, Features, load_dataset  # here, for it takes long to import

    path = Path(source)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"{source}: the file's name must end in one of {', '.join(FILES)}.")
        if path.suffix != ".parquet":
            return _read_file(path), {}
        import pyarrow.parquet

        try:
            return _read_file(path), Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
        except ValueError as error:
            raise ValueError(f"{source} is no parquet file ({error}).") from None
    if path.suffix in FILES or (source.startswith((".", "/", "~")) and not path.is_dir()):
        raise FileNotFoundError(f"{source}: there is no such file or folder.")
    dataset = load_dataset(source, split=split)
    if isinstance(dataset, DatasetDict):
        if len(dataset) > 1:
            raise ValueError(f"{source}: split must be one of {list(dataset)}, got none (--split).")
        [dataset] = dataset.values()
    return iter(dataset), dataset.features


def _fault(row: Any, wanted: Mapping[str, str]) -> str | None:
    if not isinstance(row, Mapping):
        return str(row) if isinstance(row, ValueError) else f"is no mapping of columns but {row!r:.80}"
    for name, column in wanted.items():
        value = row.get(column)
        if value is None or (name == "label" and value == ""):
            return f"has no {column!r}"
        if name != "label" and not isinstance(value, str):
            return f"has no text as {column!r} but {value!r:.80}"
        try:
            str(value).encode()
        except UnicodeEncodeError:
            return f"is not UTF-8 in {column!r}"
    return None


def _check(
    rows: Iterable[Any], source: str, columns: Mapping[str, str] | None, labelled: bool | None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    names = {"text": "text", "text_pair": "text_pair", "label": "label"}
    if unknown := (columns or {}).keys() - names.keys():
        raise ValueError(f"columns must name those of {list(names)}, got {sorted(unknown)}.")
    names.update(columns or {})
    wanted: dict[str, str] = {}
    for row in rows:
        if not wanted and isinstance(row, Mapping):  # the first sound row tells which columns there are
            wanted = dict(names)
            if labelled is False or (labelled is None and names["label"] not in row):
                del wanted["label"]
            if "text_pair" not in (columns or {}) and names["text_pair"] not in row:
                del wanted["text_pair"]
            for name, column in wanted.items():
                if column not in row:
                    raise ValueError(
                        f"{source} must have a column {column!r}, got the columns {list(row)}: name the right one "
                        f"with columns={{{name!r}: NAME}} (--column {name}=NAME)."
                    )
        fault = _fault(row, wanted)
        yield ({} if fault else {name: row[column] for name, column in wanted.items()}), fault
    if not wanted:
        raise ValueError(f"{source} must hold at least one row that can be read, got none.")


def read_rows(source: str, split: str | None = None, columns: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Texts one after the other, in constant memory (but for a .json file that is one array).

    Args:
        source: A file (parquet, csv, jsonl, json, or txt with a text in each line), a folder of such files, or a data
            set's Hub id.
        split: Of a data set that has several.
        columns: Their names where they are others: {"text": "sentence", "text_pair": ..., "label": ...}.

    Yields:
        For each row its text, and text_pair if there is such a column, as a dictionary; and None, or what is wrong with
        the row.

    Raises:
        OSError: There is no such source.
        ValueError: It cannot be read, holds nothing, or lacks a column.
    """
    rows, _ = _open(source, split)
    return _check(rows, source, columns, labelled=False)


def read_table(
    source: str,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    labelled: bool | None = True,
) -> "Dataset":
    """Texts, all at once: the columns text, text_pair if there is one, and label.

    Args:
        source: As in `read_rows`.
        split: As in `read_rows`.
        columns: As in `read_rows`.
        skip_bad: Whether to go on without the rows that are broken, and log which; or else they are an error.
        labelled: Whether labels are needed, and read; None: they are read where there are any.

    Raises:
        OSError: There is no such source.
        ValueError: It cannot be read, holds nothing, lacks a column, or has broken rows.
    """
    from datasets import ClassLabel, Dataset

    rows, features = _open(source, split)
    good: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, (row, fault) in enumerate(_check(rows, source, columns, labelled)):
        if fault:
            bad.append(f"row {number} {fault}")
        else:
            good.append(row)
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        report = f"{source}: {len(bad)} of {len(good) + len(bad)} rows are broken (the first is row 0): "
        report += "; ".join(bad[:5]) + more
        if not skip_bad or not good:
            raise ValueError(f"{report}. Mend them, or go on without them: skip_bad=True (--skip-bad).")
        logger.warning("%s. Left out.", report)
    if not good or "label" not in good[0]:
        return Dataset.from_list(good)
    labels = [row["label"] for row in good]
    if source.endswith(".csv"):
        labels = _read_numbers(labels)
    if any(isinstance(label, float) for label in labels):  # 3 among 2.5 and 4.0
        labels = [float(label) if type(label) is int else label for label in labels]
    try:
        table = Dataset.from_list([{**row, "label": label} for row, label in zip(good, labels, strict=True)])
    except (TypeError, ValueError) as error:  # what pyarrow raises are both
        raise ValueError(f"{source} must have labels of one kind ({error}).") from None
    kind = features.get((columns or {}).get("label", "label"))
    return table.cast_column("label", kind) if isinstance(getattr(kind, "feature", kind), ClassLabel) else table


def _read_numbers(labels: list[str]) -> list[Any]:
    """Labels of a csv file as integers or floats, if all of them are, or else as they are."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return [int(label) for label in labels]
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return list(labels)
    if all(number.is_integer() for number in numbers):  # classes, as pandas writes them
        return [int(number) for number in numbers]
    return numbers


def label_ids(dataset: "Dataset", config: Any) -> np.ndarray:
    """The label of each row as the model's number; checks that the rows are what a classifier can be tried on.

    Args:
        dataset: Rows with `label` or `labels`, integers, bools or the names that `config.label2id` knows, and `text` or
            `input_ids`. Class labels whose names the model knows count by name.
        config: Of a model that chooses one label of several.

    Returns:
        (rows,) int64, in [0, num_labels).

    Raises:
        ValueError: The model chooses otherwise, a column is missing, there is no row, or a label is not the model's.
    """
    check_single_label(config)
    labels, kind, name = _label_column(dataset)
    numbers = _label_numbers(labels, kind, config)
    _check_known(labels, numbers, name, config)
    return np.array(numbers)


def label_values(dataset: "Dataset", config: Any) -> np.ndarray:
    """The label of each row as a loss takes it, whatever the model answers.

    Args:
        dataset: As in `label_ids`; for several labels at once the column holds a list for each row, of those that hold
            or a float 0 or 1 for each label, and for a regression a number.
        config: Of a classifier.

    Returns:
        As `label_ids`; of several labels (rows, num_labels) float32, 0 or 1; of a regression (rows,) float32.

    Raises:
        ValueError: A column is missing, there is no row, or a label is not one that the model could give.
    """
    problem = problem_type(config)
    if problem == "single_label_classification":
        return label_ids(dataset, config)
    labels, kind, name = _label_column(dataset)
    if problem == "regression":
        if config.num_labels != 1:
            raise ValueError(f"model must give one number for each input, got num_labels={config.num_labels}.")
        wrong = [label for label in labels if not isinstance(label, int | float) or not math.isfinite(label)]
        if wrong:
            raise ValueError(f"dataset must have finite numbers as {name!r}, got {wrong[0]!r} in {len(wrong)} rows.")
        return np.array(labels, np.float32)
    if wrong := [row for row in labels if not isinstance(row, list)]:
        raise ValueError(f"dataset must have lists of labels as {name!r}, got {wrong[0]!r} in {len(wrong)} rows.")
    values = np.zeros((len(labels), config.num_labels), np.float32)
    each = getattr(kind, "feature", kind)
    for row, row_labels in enumerate(labels):
        if len(row_labels) == config.num_labels and all(type(x) is float and x in (0.0, 1.0) for x in row_labels):
            values[row] = row_labels
            continue
        numbers = _label_numbers(row_labels, each, config)
        _check_known(row_labels, numbers, name, config)
        values[row, numbers] = 1.0
    return values


def _label_column(dataset: "Dataset") -> tuple[list[Any], Any, str]:
    """The labels of rows that a classifier can be tried on, their feature, and the name of their column."""
    from datasets import Dataset  # here, for it takes long to import

    if not isinstance(dataset, Dataset) or not len(dataset):
        got = "one without rows" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(f"dataset must be a datasets.Dataset with at least one row, got {got}.")
    columns = dataset.column_names
    for wanted in (("input_ids", "text"), ("label", "labels")):
        if not set(wanted) & set(columns):
            raise ValueError(f"dataset must have a column '{wanted[0]}' or '{wanted[1]}', got the columns {columns}.")
    name = "label" if "label" in columns else "labels"
    return dataset.with_format(None)[name][:], dataset.features[name], name


def _known_names(config: Any) -> dict[str, int]:
    return {str(key): number for key, number in (config.label2id or {}).items()}


def _label_numbers(labels: list[Any], kind: Any, config: Any) -> list[Any]:
    """Names and bools become the model's numbers; what is neither stays, and an unknown name becomes None."""
    known = _known_names(config)
    names = getattr(kind, "names", None)
    if names is not None and set(names) <= known.keys():
        labels = [names[number] if number in range(len(names)) else number for number in labels]
    numbers = []
    for label in labels:
        if isinstance(label, bool):
            label = known.get(str(label), int(label))
        elif isinstance(label, str):
            label = known.get(label)
        numbers.append(label)
    return numbers


def _check_known(labels: list[Any], numbers: list[Any], name: str, config: Any) -> None:
    allowed = range(config.num_labels)
    bad = [x for x, number in zip(labels, numbers, strict=True) if type(number) is not int or number not in allowed]
    if bad:
        raise ValueError(
            f"dataset must have integers in [0, {config.num_labels}) as {name!r}, got {bad[0]!r} "
            f"in {len(bad)} of {len(labels)} rows; names that the model knows are {list(_known_names(config))}."
        )


__all__ = ["label_ids", "label_values", "read_rows", "read_table"]
