"""What the tests of README and documents share: their blocks, and local stand-ins for what the Hub would give."""

import re
from pathlib import Path

import datasets
from datasets import ClassLabel, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments

from conftest import STOCK, stock_config, stock_folder
from hf_budgetformer import BudgetFormerPreTrainedModel


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    """The fenced blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def use_stand_ins(monkeypatch, folder, texts, tokenizer):
    """Makes `folder` the working directory and the Hub: models and data have the names that the pages use."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    for name in ("bert-base-uncased", "me/my-fine-tuned-bert"):
        (folder / name).mkdir(parents=True)
        stock_folder("bert", folder / name, num_labels=2, hidden_size=64, intermediate_size=256)
        tokenizer.save_pretrained(folder / name)
    stock_folder("bert", folder / "me/my-reranker", num_labels=1)
    STOCK["bert"][1](stock_config("bert")).save_pretrained(folder / "me/my-encoder")
    rows = texts.filter(lambda row: row["label"] < 2).rename_column("text", "sentence")
    rows = rows.cast_column("label", ClassLabel(names=["negative", "positive"]))
    many = concatenate_datasets([rows] * 12)  # as many as it takes to promise 1%
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(train=rows, validation=many))
    for published in (BudgetFormerPreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(published, "push_to_hub", lambda self, name: self.save_pretrained(name))
    initialise = TrainingArguments.__post_init__
    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: (setattr(self, "use_cpu", True), initialise(self))
    )


def run_python(name, sources, namespace=None):
    """Runs blocks one after the other in one namespace, which it returns."""
    namespace = {} if namespace is None else namespace
    for block in sources:
        exec(compile(block, name, "exec"), namespace)
    return namespace
