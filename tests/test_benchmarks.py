"""The benchmarks' own code, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import calibrate
import level_model
import measure
import report
import run

from hf_budgetformer.attention import EXECUTORS


TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
BLOCK = {
    "level": "block",
    "title": "Tiny block",
    "sizes": {"tiny": {"hidden_size": 24, "num_attention_heads": 6}},
    "batch": [1, 3],
    "length": [4],
    "open_heads": [2, 6],
    "extra_cells": [["tiny", 2, 5]],
    "least_seconds": 0.0,
}
MODEL = {
    "level": "model",
    "title": "Tiny model",
    "model": TINY,
    "max_length": 16,
    "batch_size": 4,
    "batches": 2,
    "open_heads": [6, 2],
    "sorted_open_heads": [2],
    "static_open_heads": [2],
    "budgets": [0.5],
    "memory": ["ours 2"],
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


def test_a_block_is_measured_in_every_cell(measured):
    result = measured(BLOCK)
    check_the_frame(result)
    cells = result["figures"]["1"]
    assert set(cells) == {"tiny 1x4", "tiny 3x4", "tiny 2x5"}
    assert set(cells["tiny 3x4"]) == {"stock", "2 same", "2 different", "6 same"}
    for name in ("2 same", "2 different", "6 same"):
        found = cells["tiny 3x4"][name]
        assert found["ratio"]["q1"] <= found["ratio"]["median"] <= found["ratio"]["q3"]
        assert found["chosen"] in found["executor_seconds"]
        assert found["executor_seconds"].keys() == EXECUTORS.keys()
    assert cells["tiny 3x4"]["6 same"]["chosen"] == "all_heads"


def test_a_model_is_measured_with_every_variant(measured, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    level_model.build_models({**MODEL, "seed": 3, "dtype": "float32"})[1].save_pretrained(checkpoint)
    result = measured(MODEL, "--checkpoint", str(checkpoint))
    check_the_frame(result)
    assert result["data"]["name"] == "texts.txt"
    figures = result["figures"]
    assert figures["heads"]["ours 6"] == 1.0
    assert figures["heads"]["ours 2"] == pytest.approx(2 / 6)
    assert figures["flops_ratio"]["ours 2"] < figures["flops_ratio"]["ours 6"] < 1.0
    assert figures["peak_memory_mib"]["ours 2"]["peak"] >= figures["peak_memory_mib"]["ours 2"]["loaded"] > 0
    assert figures["tokens"]["real"] <= figures["tokens"]["padded_sorted"] <= figures["tokens"]["padded"]
    found = figures["1"]
    names = ["stock", "stock sorted", "ours 6", "ours 2", "ours 2 sorted", "static 2", "learned 0.5"]
    assert list(found["variants"]) == names
    assert found["latency_ms"].keys() == {name for name in names if "sorted" not in name}
    assert 0 < found["router_share"]["median"] < 1


def test_what_is_patched_for_a_variant_is_put_back():
    _, ours = level_model.build_models({**MODEL, "seed": 0, "dtype": "float32"})
    batch = {"input_ids": torch.arange(5, 13).view(2, 4)}
    with torch.no_grad():
        before = ours(**batch, output_head_gates=True).head_gates
        [got] = level_model.Variant(ours, count=2)([batch], output_head_gates=True)
        assert (got.head_gates.sum(-1) == 2).all()
        level_model.router_share(level_model.Variant(ours), [batch])
        assert torch.equal(ours(**batch, output_head_gates=True).head_gates, before)
    assert not any("_choose" in vars(layer.router) or layer.router._forward_hooks for layer in ours.bert.encoder.layer)


def test_training_steps_are_measured(measured):
    result = measured(TRAINING)
    check_the_frame(result)
    cells = result["figures"]["1"]
    assert set(cells) == {"docstrings float32", "docstrings bfloat16"}
    assert cells["docstrings float32"]["ratio"]["median"] > 0


@pytest.mark.parametrize("settings", [BLOCK, MODEL, TRAINING])
def test_what_disagrees_is_not_timed(measured, monkeypatch, settings):
    attend = EXECUTORS["all_heads"]
    for name, executor in EXECUTORS.items():
        monkeypatch.setitem(EXECUTORS, name, lambda *arguments, run=executor: run(*arguments) + 0.1)
    wrong = lambda *arguments: attend(*arguments) + torch.linspace(0, 1, 24)  # noqa: E731
    monkeypatch.setattr("hf_budgetformer.attention.attend_all_heads", wrong)
    timed = []
    for module in (run.level_block, run.level_model, run.level_training):
        monkeypatch.setattr(module, "interleave", lambda *arguments: timed.append(arguments))
    with pytest.raises(SystemExit, match=r"differs by .* from the reference"):
        measured(settings)
    assert timed == []


def test_not_a_number_disagrees():
    with pytest.raises(SystemExit, match="differs by nan"):
        measure.Agreement("float32").check("x", torch.tensor([float("nan")]), torch.tensor([0.0]))


def test_a_result_that_is_there_is_not_measured_again(measured, capsys):
    measured(BLOCK)
    capsys.readouterr()
    measured(BLOCK, "--resume")
    assert "there already" in capsys.readouterr().out
    measured({**BLOCK, "seed": 1}, "--resume")
    assert "there already" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**BLOCK, "level": "layer"}, r"level must be one of .*, got 'layer'"),
        ({**BLOCK, "lengths": [3]}, r"unknown settings \['lengths'\]"),
        ({**BLOCK, "batch": 3}, r"batch must be a list, got 3"),
        ({**BLOCK, "repeats": 0}, r"repeats must be >= 1, got 0"),
        ({**BLOCK, "threads": []}, r"threads must be numbers >= 1"),
        ({**BLOCK, "dtype": "int8"}, r"dtype must be one of .*, got 'int8'"),
        ({**BLOCK, "extra_cells": [["huge", 1, 1]]}, r"size must be one of \['tiny'\], got 'huge'"),
        ({**MODEL, "open_heads": [7]}, r"open_heads must be numbers in \[1, 6\]"),
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
    with pytest.raises(SystemExit, match="there are no results"):
        report.main([str(tmp_path), str(tmp_path)])


def test_every_experiment_has_valid_settings_and_every_target_a_source():
    paths = [*BENCHMARKS.glob("experiments/*.json"), *BENCHMARKS.glob("experiments/quick/*.json")]
    assert len(paths) == 12
    assert all(run.read_settings(path)["repeats"] >= 7 for path in paths)
    stems = {path.stem for path in paths}
    assert {target["result"] for target in json.loads((BENCHMARKS / "targets.json").read_text())} <= stems


def test_the_report_shows_results_and_nothing_else(measured, tmp_path):
    for settings in (BLOCK, {**MODEL, "budgets": [], "memory": []}, TRAINING):
        result = measured(settings)
    result["figures"]["2"] = {"imdb float32": {"ratio": {"median": 1.234567}}}  # what a target asks for
    (tmp_path / "results" / "training.json").write_text(json.dumps(result))
    (tmp_path / "results" / "calibration.json").write_text("{}")
    report.main([str(tmp_path / "results"), str(tmp_path / "report")])
    text = (tmp_path / "report" / "README.md").read_text()
    for found in ("## Tiny block", "## Tiny model", "## Tiny steps", "| ours 2 |", "| 6 same |", "docstrings bfloat16"):
        assert found in text
    assert "| training step, imdb float32 | 1.23 | >= 1 | yes |" in text
    assert text.count("| yes |") + text.count("| no |") == 1
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"README.md", "block.png", "model.png"}


def test_calibration_finds_constants_and_judges_their_choices():
    grid = {**calibrate.GRID, "width": (24,), "batch": (1, 4), "lengths": ("4", "2-9"), "open_heads": (2, 10)}
    before = calibrate.attention._COSTS
    result = calibrate.calibrate(grid, [1], repeats=1, longest=40)
    assert before == calibrate.attention._COSTS
    assert len(result["costs"]) == len(before)
    assert all(cost >= 0 for cost in result["costs"])
    assert all(case["chosen"] in EXECUTORS for case in result["cases"])
    assert 0 <= result["share_losing_3_percent"] <= 1
    json.dumps(result)


def test_the_fit_recovers_constants_and_keeps_them_from_going_negative():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    for truth in ([3.0, 0.5, 20.0], [3.0, 0.0, 1.0]):
        targets = rows @ torch.tensor(truth, dtype=torch.float64)
        assert calibrate.fit(rows.tolist(), targets.tolist()) == pytest.approx(truth, abs=1e-6)
    assert min(calibrate.fit(rows.tolist(), (rows @ torch.tensor([9.0, -1.0, 9.0]).double()).abs().tolist())) >= 0
