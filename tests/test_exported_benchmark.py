"""The benchmark of exported looks, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import pytest

from conftest import budgetformer


for package in ("onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(package)
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import level_exported
import report
import run


SETTINGS = {
    "level": "exported",
    "title": "Tiny exports",
    "data": "tiny",
    "max_length": 16,
    "batch_size": 4,
    "calibration_rows": 40,
    "test_rows": 20,
    "timed_rows": 10,
    "graphs": ["openvino"],
    "latency_inputs": 3,
    "threads": [1],
    "repeats": 2,
}
WAYS = ["stock, torch", "looks, torch", "stock, openvino", "looks, openvino"]


@pytest.fixture
def measured(tmp_path, texts, tokenizer, monkeypatch):
    """Runs the settings on a small model and data set; returns what was written."""
    model = budgetformer("bert", num_hidden_layers=1, looks=[0.25, 1.0], confidence=[0.1])
    model.config.promise = {
        "risk": "disagreement", "level": 0.9, "confidence": 0.5, "rows": 1, "looks": [0.25, 1.0],
        "thresholds": [0.1], "bound": 0.9, "lost": 0.0, "doubted": 0,
    }  # fmt: skip
    model.save_pretrained(tmp_path / "models" / "tiny")
    tokenizer.save_pretrained(tmp_path / "models" / "tiny")
    for split in ("train", "test"):
        texts.to_parquet(tmp_path / "data" / "tiny" / f"{split}.parquet")
    # The tokenizer of the other levels is that of a real model.
    monkeypatch.setattr("level_deferred.load_tokenizer", lambda: tokenizer)

    def run_settings(*more, **settings):
        path = tmp_path / "exported.json"
        path.write_text(json.dumps({**SETTINGS, **settings}))
        output = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "results")]
        run.main([str(path), *output, *more])
        return json.loads((tmp_path / "results" / "exported.json").read_text())

    return run_settings


@pytest.mark.slow
def test_exported_looks_are_measured_beside_the_stock_model_and_reported(measured, tmp_path):
    result = measured("--checkpoints", str(tmp_path / "models"), disagreement=0.8)
    assert "at most 80%" in result["figures"]["promise"]
    figures = result["figures"]["1"]
    assert list(figures) == WAYS
    for name in WAYS:
        assert 0.0 <= figures[name]["accuracy"] <= 1.0
        assert figures[name]["p50"] <= figures[name]["p95"]
        assert figures[name]["spent"] == 1.0 if name.startswith("stock") else figures[name]["spent"] > 0.0
    assert figures["stock, openvino"]["agreement"] == 1.0
    report.main([str(tmp_path / "results"), str(tmp_path / "report")])
    text = (tmp_path / "report" / report.PAGE).read_text()
    assert "10 texts in batches of 4 sorted by length, cut at 16 tokens" in text
    assert all(f"| {name} | " in text for name in WAYS)


def test_what_is_missing_is_named(measured, tmp_path):
    with pytest.raises(SystemExit, match="--data and --checkpoints are needed"):
        measured()
    with pytest.raises(SystemExit, match=r"graphs must be of .*, got \['tvm'\]"):
        measured("--checkpoints", str(tmp_path / "models"), graphs=["tvm"])
    with pytest.raises(SystemExit, match=r"there is no ag_news/train.parquet in it"):
        measured("--checkpoints", str(tmp_path / "models"), data="ag_news")
    assert set(level_exported.SETTINGS) <= set(SETTINGS) | {"trained_rows", "disagreement"}
