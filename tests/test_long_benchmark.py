"""The benchmark of long documents: its generator, its arithmetic on answers made up here, and a run of no meaning."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import BertConfig, BertForSequenceClassification


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from long import report, run, ways
from long.needles import OBJECTS, PEOPLE, TASKS, make_documents
from long.ways import Answered, judge, scores_of_needles


ANYBODY = "|".join(PEOPLE)


def solve_handed(row):
    """Reads the statements in order."""
    holders, links = {}, dict.fromkeys(OBJECTS, 0)
    pattern = rf"({ANYBODY}) has the (\w+)\.|({ANYBODY}) (?:gives|hands|passes) the (\w+) (?:on )?to ({ANYBODY})\."
    for first, owned, giver, thing, taker in re.findall(pattern, row["text"]):
        if first:
            holders[owned] = first
        else:
            assert holders[thing] == giver
            holders[thing], links[thing] = taker, links[thing] + 1
    [thing] = re.fullmatch(r"Who has the (\w+)\?", row["text_pair"]).groups()
    return holders[thing], links[thing]


def solve_scattered(row):
    """Follows the thing that is asked about from its first owner."""
    pattern = rf"({ANYBODY}) (?:gives|hands|passes) the (\w+) (?:on )?to ({ANYBODY})\."
    passes = {(giver, thing): taker for giver, thing, taker in re.findall(pattern, row["text"])}
    owners = {thing: owner for owner, thing in re.findall(rf"({ANYBODY}) has the (\w+)\.", row["text"])}
    assert len(passes) + len(owners) == 5
    [thing] = re.fullmatch(r"Who has the (\w+) at the end\?", row["text_pair"]).groups()
    person, links = owners[thing], 0
    while (person, thing) in passes:
        person, links = passes[person, thing], links + 1
    return person, links


def solve_reported(row):
    """Goes up from the one who is asked about; the documents of all hops say as much."""
    above = dict(re.findall(rf"({ANYBODY}) (?:reports to|works for|is led by) ({ANYBODY})\.", row["text"]))
    assert len(above) == 5
    [person] = re.fullmatch(rf"Who is at the top above ({ANYBODY})\?", row["text_pair"]).groups()
    assert person not in above.values()
    links = 0
    while person in above:
        person, links = above[person], links + 1
    return person, links - 1


@pytest.mark.parametrize(
    ("task", "solve"), [("handed", solve_handed), ("scattered", solve_scattered), ("reported", solve_reported)]
)
def test_the_answer_follows_from_the_document(task, solve):
    rows = list(make_documents(task, ["some words about it.", "Other words."], 80, 0, 20))
    for row in rows:
        assert solve(row) == (PEOPLE[row["label"]], row["hops"])
        assert 0.0 <= row["depth"] <= 1.0
    assert [sum(row["hops"] == x for row in rows) for x in range(4)] == [20] * 4
    assert rows == list(make_documents(task, ["some words about it.", "Other words."], 80, 0, 20))


def made_up(seed):
    """30 documents of 1 to 4 chunks; a narrow look is right where it is sure."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 5, 30)
    owners = np.repeat(np.arange(30), counts)
    labels = draw.integers(0, 2, 30)
    full = np.where(np.eye(2)[labels[owners]] > 0, 4.0, 0.0).astype(np.float32)
    sure = draw.random(len(owners)) < 0.7
    narrow = np.where(sure[:, None], full, np.float32([[0.1, 0.0]])).astype(np.float32)
    chunks = {1.0: full, 1 / 4: full * 0.9, 1 / 6: narrow, 1 / 12: narrow}
    first = np.unique(owners, return_index=True)[1]
    ends = {budget: logits[first] for budget, logits in chunks.items()}
    return Answered(chunks, ends, owners, np.full(len(owners), 10), np.full(30, 10), labels)


@pytest.fixture(autouse=True)
def few_thresholds(monkeypatch):
    monkeypatch.setattr(ways, "GRID", np.array([0.0, 0.5, 0.9, 1.0]))


def test_ways_are_judged_by_what_they_answer_and_cost():
    calibration, test = made_up(0), made_up(1)
    scores = judge(calibration, test)
    assert scores["chunks"] == {"accuracy": 1.0, "agreement": 1.0, "cost": 1.0}
    assert scores["chunks at 1/4"]["cost"] == pytest.approx(0.25)
    counts = np.bincount(test.owners)
    assert scores["first"]["cost"] == pytest.approx((1 / counts).mean())
    # A quarter of the work is right everywhere here, so that looks stop there.
    assert scores["chunks, looks"]["cost"] <= 0.4
    assert scores["chunks, looks"]["agreement"] == 1.0
    cascade = scores["width: all chunks at 1/12, then open"]
    assert 1 / 12 < cascade["cost"] < 1.0 + 1 / 12
    assert all(way["cost"] <= 0.5 + 0.1 for way in scores["at_cost"]["0.5"].values())
    best = scores["looks, 0.5 of the work"]
    assert {x: best[x] for x in ("accuracy", "agreement", "cost")} == scores["at_cost"]["0.5"][best["kind"]]


def test_what_is_spent_is_held_against_hops():
    draw = np.random.default_rng(0)
    hops, labels = np.arange(80) % 4, draw.integers(0, 2, 80)
    full = np.where(np.eye(2)[labels] > 0, 4.0, 0.0).astype(np.float32)
    narrow = np.where((hops > 1)[:, None], np.float32([[0.1, 0.0]]), full).astype(np.float32)
    logits = {1.0: full, 1 / 4: full, 1 / 6: narrow, 1 / 12: narrow}
    scores = scores_of_needles(
        {x: logits for x in ("calibration", "test")}, {x: labels for x in ("calibration", "test")}, hops, hops / 3
    )
    assert scores["looks"]["agreement"] == 1.0
    assert scores["spearman"]["hops"] > 0.8
    assert scores["by_hops"]["0"]["spent"] == pytest.approx(1 / 12)
    assert scores["by_hops"]["3"]["spent"] == pytest.approx(1 / 12 + 1 / 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny").mkdir()
    for split, count in (("train", 24), ("validation", 12), ("test", 12)):
        texts = [" ".join(["goal match" if row % 2 else "market share"] * (5 + row)) for row in range(count)]
        columns = {"text": texts, "label": [row % 2 for row in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "tiny" / f"{split}.parquet")
    return folder


@pytest.mark.slow
def test_a_run_trains_judges_times_and_is_told(data, tmp_path, monkeypatch):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(tmp_path / "model")
    run.load_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(run, "minilm", lambda: str(tmp_path / "model"))
    config = {"train": 24, "calibration": 12, "test": 12, "epochs": 1, "batch_size": 8, "long": 8}
    settings = {"data": {"tiny": config}, "chunk": 16, "long": 64, "learning_rate": 1e-4}
    options = argparse.Namespace(data=data, work=tmp_path / "work", starts=None, time=True, no_long=False)
    results = run.run_documents("tiny", options, settings, 0)
    assert results["ways"]["chunks"]["agreement"] == 1.0
    assert results["timing"]["chunks"]["of_chunks"]["median"] == 1.0
    assert 0.0 <= results["long"]["interpolated, untrained"]["accuracy"] <= 1.0
    assert results["long"]["tiled"]["chunks"]["cost"] == results["long"]["interpolated"]["chunks"]["cost"] == 1.0
    assert 0.0 <= results["svm"]["accuracy"] <= 1.0
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "".join(f"<!-- [start:{x}] -->\n<!-- [end:{x}] -->\n" for x in ("ways", "worth", *TASKS, "lengths"))
    )
    (tmp_path / "results").mkdir()
    run.write(tmp_path / "results", "tiny", 0, settings, 1, results)
    report.main([str(tmp_path / "results"), str(page)])
    assert "TF-IDF and a linear SVM" in page.read_text()
    assert (page.parent / "images" / "long_documents.png").stat().st_size > 1000
