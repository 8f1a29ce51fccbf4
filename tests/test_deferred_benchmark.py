"""The benchmark of doubted rows, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import pytest


pytest.importorskip("litserve")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import level_deferred
import report
import run


SETTINGS = {
    "level": "deferred",
    "title": "Tiny looks",
    "model": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32},
    "max_length": 16,
    "batch_size": 4,
    "batches": 10,
    "first_look": 0.25,
    "max_wait": 60.0,
    "threads": [1],
    "repeats": 2,
}
WAYS = ["stock sorted", "looks, split", "looks, shared", "served, split", "served, shared"]


@pytest.fixture
def measured(tmp_path):
    """Runs the settings on a small file of texts; returns what was written."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"text {'and more ' * (number % 7)}{number}" for number in range(40)))

    def run_settings(**settings):
        path = tmp_path / "deferred.json"
        path.write_text(json.dumps({**SETTINGS, **settings}))
        run.main([str(path), "--data", str(texts), "--output", str(tmp_path / "results")])
        return json.loads((tmp_path / "results" / "deferred.json").read_text())

    return run_settings


@pytest.mark.slow
def test_shared_batches_are_measured_beside_split_ones_and_reported(measured, tmp_path):
    result = measured()
    assert result["agreement"]["checks"] == 6
    figures = result["figures"]
    assert figures["device"] == "cpu"
    assert figures["doubted"] == pytest.approx(0.1, abs=0.026)
    assert list(figures["1"]) == WAYS
    for name, way in figures["1"].items():
        assert way["rows_per_second"]["median"] > 0
        assert (way["ratio_to_split"] is not None) == name.endswith("shared")
    report.main([str(tmp_path / "results"), str(tmp_path / "report")])
    text = (tmp_path / "report" / report.PAGE).read_text()
    assert "10 batches of 4, cut at 16 tokens, on cpu; of the rows 10% are doubted" in text
    assert all(f"| {name} | " in text for name in WAYS)


def test_what_is_not_served_needs_no_server(measured):
    assert list(measured(served=False)["figures"]["1"]) == WAYS[:3]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["answer_shared", "make_server"])
def test_what_answers_otherwise_is_not_timed(measured, monkeypatch, way):
    right = getattr(level_deferred, way)

    def wrong(*given):
        if way == "answer_shared":
            logits, spent = right(*given)
            return logits + 0.1 * (spent > 1.0)[:, None], spent
        answer = right(*given)
        return lambda: answer()[::-1]

    timed = []
    monkeypatch.setattr(level_deferred, way, wrong)
    monkeypatch.setattr(level_deferred, "interleave", lambda *arguments: timed.append(arguments))
    with pytest.raises(SystemExit, match=r"differs by .* from the reference"):
        measured()
    assert timed == []


def test_a_request_that_is_answered_twice_or_not_at_all_ends_the_run():
    answers = level_deferred.Answers()
    answers.send((3, ({"score": 0.5}, "OK", None, None)), 0)
    with pytest.raises(SystemExit, match="request 3 was answered twice, or with OK"):
        answers.send((3, ({"score": 0.5}, "OK", None, None)), 0)
    with pytest.raises(SystemExit, match="request 4 was answered twice, or with ERROR"):
        answers.send((4, (b"", "ERROR", None, None)), 0)


def test_the_settings_for_a_gpu_are_valid():
    settings = [run.read_settings(path) for path in BENCHMARKS.glob("experiments/gpu/*.json")]
    assert {x["device"] for x in settings if x["level"] == "deferred"} == {"cuda"}
