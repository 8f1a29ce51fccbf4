"""The README's Python blocks run as they are written, on local stand-ins for what the Hub would give."""

import json
import re
import sys

import pytest

from documents import README, ROOT, blocks, run_python, use_stand_ins


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, texts, tokenizer):
    use_stand_ins(monkeypatch, tmp_path, texts, tokenizer)
    found = blocks(README, "python")
    assert len(found) >= 3
    namespace = run_python("README.md", found)
    assert "teacher_logits" in namespace["train"].column_names
    assert namespace["out"].head_gates.shape == (2, 3, 4)
    assert set(namespace["classify"]("w1 w2")[0]) == {"label", "score"}


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


def test_the_speed_of_a_trained_checkpoint_is_what_was_measured():
    report = (ROOT / "benchmarks" / "README.md").read_text()
    [fastest] = re.findall(r"_ag_news_learned_time\.png.*?within half a point of [^:]*: (\S+) at 0\.25\.", report, re.S)
    assert f"one checkpoint for AG News is {fastest} as fast as the stock model at a\nquarter of the heads" in README


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_it_is_short():
    assert len(README.splitlines()) <= 235
