"""The benchmarks' own code, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import level_model
import measure
import report
import run

from hf_budgetformer import BudgetFormerForSequenceClassification


TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
MODEL = {
    "level": "model",
    "title": "Tiny model",
    "model": TINY,
    "max_length": 16,
    "batch_size": 4,
    "batches": 2,
    "budgets": [1.0, 0.5, 0.25],
    "latency_inputs": 3,
}
TRAINING = {
    "level": "training",
    "title": "Tiny steps",
    "model": TINY,
    "cells": [{"batch_size": 2, "max_length": 8, "dtype": dtype} for dtype in ("float32", "bfloat16")],
}


@pytest.fixture
def measured(tmp_path):
    """Runs settings on a small file of texts; returns what was written."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"text {'and more ' * (number % 7)}{number}" for number in range(40)))

    def run_settings(settings, *arguments):
        path = tmp_path / f"{settings['level']}.json"
        path.write_text(json.dumps({"threads": [1], "repeats": 2, **settings}))
        output = tmp_path / "results"
        run.main([str(path), "--data", str(texts), "--output", str(output), *arguments])
        return json.loads((output / path.name).read_text())

    return run_settings


def check_the_frame(result):
    assert {"settings", "environment", "agreement", "data", "figures"} <= result.keys()
    assert result["environment"]["packages"]["torch"]
    assert result["agreement"]["checks"] > 0
    assert result["agreement"]["max_difference"] <= result["agreement"]["tolerance"]


def test_a_model_is_measured_in_every_way(measured):
    result = measured(MODEL)
    check_the_frame(result)
    assert result["data"]["name"] == "texts.txt"
    figures = result["figures"]
    assert figures["tokens"]["real"] <= figures["tokens"]["padded"]
    ways = ["stock", "ours 1", "ours 1/2", "ours 1/4", "looks 1/6, all for 10%", "looks 1/6, all for 20%", "cut 1/4"]
    assert list(figures["1"]["latency_ms"]) == ways
    assert list(figures["1"]["ways"]) == [*ways, "stock sorted", "ours 1/4 sorted"]
    for found in figures["1"]["ways"].values():
        assert found["ratio"]["q1"] <= found["ratio"]["median"] <= found["ratio"]["q3"]
    assert 1 / 6 <= figures["spent"]["10%"] <= figures["spent"]["20%"]


def test_training_steps_are_measured_with_the_full_model_learning_and_frozen(measured):
    result = measured(TRAINING)
    check_the_frame(result)
    cells = result["figures"]["1"]
    assert set(cells) == {"docstrings float32", "docstrings bfloat16"}
    for cell in cells.values():
        assert cell["stock"]["cost"]["median"] == 1.0
        for way in ("learning", "frozen"):
            assert cell[way]["cost"]["q1"] <= cell[way]["cost"]["median"]
            assert cell[way]["seconds_per_step"]["median"] > 0


@pytest.mark.parametrize("settings", [MODEL, TRAINING], ids=lambda settings: settings["level"])
def test_what_disagrees_is_not_timed(measured, monkeypatch, settings):
    answer = BudgetFormerForSequenceClassification.forward

    def wrong(self, *given, **options):
        outputs = answer(self, *given, **options)
        if options.get("executor") == "masked":
            outputs.logits = outputs.logits + 0.1
        return outputs

    monkeypatch.setattr(BudgetFormerForSequenceClassification, "forward", wrong)
    timed = []
    for module in (run.level_model, run.level_training):
        monkeypatch.setattr(module, "interleave", lambda *arguments: timed.append(arguments))
    with pytest.raises(SystemExit, match=r"differs by .* from the reference"):
        measured(settings)
    assert timed == []


def test_not_a_number_disagrees():
    with pytest.raises(SystemExit, match="differs by nan"):
        measure.Agreement("float32").check("x", torch.tensor([float("nan")]), torch.tensor([0.0]))


def test_a_result_that_is_there_is_not_measured_again(measured, capsys):
    measured(MODEL)
    capsys.readouterr()
    measured(MODEL, "--resume")
    assert "there already" in capsys.readouterr().out
    measured({**MODEL, "seed": 1}, "--resume")
    assert "there already" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**MODEL, "level": "layer"}, r"level must be one of .*, got 'layer'"),
        ({**MODEL, "lengths": [3]}, r"unknown settings \['lengths'\]"),
        ({**MODEL, "budgets": 3}, r"budgets must be a list, got 3"),
        ({**MODEL, "repeats": 0}, r"repeats must be >= 1, got 0"),
        ({**MODEL, "threads": []}, r"threads must be numbers >= 1"),
        ({**MODEL, "dtype": "int8"}, r"dtype must be one of .*, got 'int8'"),
        ({**MODEL, "batches": 100}, r"400 texts are needed, there are 40"),
        ({**TRAINING, "cells": [{"length": 3}]}, r"unknown settings \['length'\] in cells"),
    ],
)
def test_bad_settings_are_named(measured, settings, message):
    with pytest.raises(SystemExit, match=message):
        measured(settings)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match="not a readable JSON file"):
        run.main([str(tmp_path / "none.json")])
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**MODEL, "data": "ag_news"}))
    with pytest.raises(SystemExit, match="give the folder that holds it with --data"):
        run.main([str(path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no ag_news/test.parquet"):
        run.main([str(path), "--output", str(tmp_path), "--data", str(tmp_path)])


def test_every_experiment_has_valid_settings_and_every_target_a_source():
    settings = {path.stem: run.read_settings(path) for path in BENCHMARKS.glob("experiments/*.json")}
    assert all(x["repeats"] >= 7 for x in settings.values())
    for path in BENCHMARKS.glob("experiments/quick/*.json"):
        assert run.read_settings(path)["level"] in run.LEVELS
    for target in json.loads((BENCHMARKS / "targets.json").read_text()):
        threads, kind, name, *_ = target["path"]
        source = settings[target["result"]]
        assert int(threads) in source["threads"]
        if source["level"] == "training":
            assert kind in {f"{cell['data']} float32" for cell in source["cells"]}
        else:
            ways = [f"ours {level_model.name_of(budget)}" for budget in source["budgets"]]
            looks = f"looks {level_model.name_of(source['first_look'])}, all for "
            assert name in [*ways, *(f"{looks}{share:.0%}" for share in source["doubted"])]


def test_the_report_shows_results_and_nothing_else(measured, tmp_path):
    measured(MODEL)
    result = measured(TRAINING)
    frozen = {"cost": {"median": 0.123}}  # what a target asks for
    result["figures"]["2"] = {"ag_news float32": {"frozen": frozen}}
    (tmp_path / "results" / "training.json").write_text(json.dumps(result))
    (tmp_path / "results" / "other.json").write_text("{}")
    report.main([str(tmp_path / "results"), str(tmp_path / "report")])
    text = (tmp_path / "report" / "README.md").read_text()
    for found in ("## Tiny model", "## Tiny steps", "| ours 1/4 |", "| cut 1/4 |", "docstrings bfloat16"):
        assert found in text
    assert "| training step over stock's, AG News, full model frozen | 0.12 | <= 0.3 | yes |" in text
    assert text.count("| yes |") + text.count("| no |") == 1
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"README.md", "models.png"}


def test_the_report_says_that_there_is_nothing_yet(tmp_path):
    report.main([str(tmp_path / "none"), str(tmp_path / "report")])
    assert "no measurements of speed yet" in (tmp_path / "report" / "README.md").read_text()


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    path = report.write_report(BENCHMARKS / "results", tmp_path)
    assert path.read_text() == (BENCHMARKS / "README.md").read_text()
