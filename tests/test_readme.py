"""The README's Python blocks run as they are written, on local stand-ins for what the Hub would give."""

import json
import re
import sys
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, DatasetDict
from transformers import PreTrainedTokenizerBase, TrainingArguments

from conftest import stock_folder
from hf_budgetformer import BudgetFormerConfig, BudgetFormerPreTrainedModel


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, texts, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("bert-base-uncased", "me/my-fine-tuned-bert"):
        (tmp_path / name).mkdir(parents=True)
        stock_folder("bert", tmp_path / name, num_labels=2)
    tokenizer.save_pretrained(tmp_path / "bert-base-uncased")
    rows = texts.filter(lambda row: row["label"] < 2).rename_column("text", "sentence")
    rows = rows.cast_column("label", ClassLabel(names=["negative", "positive"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(train=rows, validation=rows))
    for published in (BudgetFormerPreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(published, "push_to_hub", lambda self, name: self.save_pretrained(name))
    initialise = TrainingArguments.__post_init__
    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: (setattr(self, "use_cpu", True), initialise(self))
    )

    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "teacher_logits" in namespace["train"].column_names
    assert namespace["out"].head_gates.shape == (2, 3, 4)
    assert set(namespace["classify"]("w1 w2")[0]) == {"label", "score"}


def test_the_configuration_table_is_complete_and_true():
    table = README.split("## Configuration")[1].split("## Development")[0]
    documented = {}
    for names, defaults in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", table, flags=re.MULTILINE):
        fields, values = re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", ")
        documented.update(zip(fields, values, strict=True))
    config = BudgetFormerConfig()
    fields = config.__class__.__doc__.split("The remaining fields")[1].split("Raises:")[0]
    assert sorted(documented) == sorted(re.findall(r"^        (\w+): ", fields, flags=re.MULTILINE))
    for field, value in documented.items():
        actual = getattr(config, field)
        shown = actual if isinstance(actual, str) else f"{actual:g}" if actual is not None else "None"
        assert value.strip('"') == shown, field


@pytest.mark.parametrize(
    ("title", "result"),
    [("AG News, cut at 128 tokens", "model_minilm_ag_news"), ("IMDB, cut at 512 tokens", "model_minilm_imdb")],
)
def test_the_table_of_savings_is_what_was_measured(title, result):
    figures = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())["figures"]["2"]
    ratios = {name: variant["ratio"]["median"] for name, variant in figures["variants"].items()}
    shown = [ratios["stock sorted"], *(ratios[f"ours {heads}"] for heads in (12, 6, 3, 1))]
    shown.append(ratios["ours 12"] * figures["ceiling"]["ratio"])
    expected = f"| {title} | " + " | ".join(f"{ratio:.2f}x" for ratio in shown) + " |"
    assert expected in README


def test_the_table_of_accuracies_is_what_was_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from accuracy.report import comparisons, read_runs

    assert comparisons(read_runs(ROOT / "benchmarks" / "accuracy" / "results" / "main")) in README


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
