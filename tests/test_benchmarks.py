"""The benchmarks' own code, on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu
import inputs
import level_cells
import level_model
import measure
import report
import run

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools import rivals


TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
MODEL = {
    "level": "model",
    "title": "Tiny model",
    "model": TINY,
    "max_length": 16,
    "batch_size": 4,
    "batches": 2,
    "budgets": [1.0, 0.5, 0.25],
    "cut_budgets": [0.25],
    "looks": [[1 / 6, 0.1], [1 / 6, 0.2], [1 / 12, 0.1]],
    "rivals": [],
    "latency_inputs": 3,
}
CELLS = {
    "level": "cells",
    "title": "Tiny cells",
    "model": TINY,
    "batch_sizes": [1, 3],
    "lengths": [4, 8],
    "ragged": [[9, 4, 2]],
    "budgets": [1.0, 0.25],
    "cell_seconds": 0.0,
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
    looks = ["looks 1/6, all for 10%", "looks 1/6, all for 20%", "looks 1/12, all for 10%"]
    ways = ["stock", "ours 1", "ours 1/2", "ours 1/4", *looks, "cut 1/4"]
    by_length = [f"{name} sorted" for name in ("stock", "ours 1", "ours 1/4", *looks)]
    assert list(figures["1"]["latency_ms"]) == ways
    assert list(figures["1"]["ways"]) == [*ways, *by_length]
    for way in figures["1"]["ways"].values():
        assert way["ratio"]["q1"] <= way["ratio"]["median"] <= way["ratio"]["q3"]
    assert set(figures["1"]["ways"]["ours 1/4"]["ratio_to_cut"]) == {"q1", "median", "q3"}
    assert figures["tokens"]["padded_sorted"] <= figures["tokens"]["padded"]
    assert figures["memory"]["stock"]["ratio"] == 1.0
    assert figures["memory"]["ours 1/4"]["ratio_beside_weights"] < 1.0
    assert set(figures["1"]["routing_share"]) == set(looks)


def test_looks_ask_the_full_model_about_the_share_that_was_asked_for(measured):
    # All of the means lie below the narrow budget, where a mean budget would be the narrow encoder's alone.
    looks = measured({**MODEL, "batch_size": 5, "batches": 4})["figures"]["looks"]
    assert [x["doubted"] for x in looks.values()] == pytest.approx([0.1, 0.2, 0.1], abs=0.051)
    for x in looks.values():
        assert x["spent"] >= x["doubted"]


@pytest.mark.slow
def test_other_runtimes_are_timed_on_the_same_rows(measured, monkeypatch):
    calls = []

    def make_rivals(names, model, batches, threads):
        calls.append((names, threads, sum(len(batch["input_ids"]) for batch in batches)))
        return {"onnx": rivals.Rival(lambda batch: model(**batch, budget=1.0).logits, 0.5)}

    monkeypatch.setattr(level_model, "make_rivals", make_rivals)
    figures = measured({**MODEL, "rivals": ["onnx"]})["figures"]["1"]
    assert calls == [(["onnx"], 1, 8)]
    assert {"onnx", "onnx sorted"} <= figures["ways"].keys()
    assert figures["ways"]["onnx sorted"]["ratio_to_rivals"]["onnx"]["median"] == 1.0
    assert figures["same_labels"] == {"onnx": 0.5}
    assert "onnx" in figures["latency_ms"]


def test_the_worst_cell_is_found(measured):
    result = measured(CELLS)
    check_the_frame(result)
    figures = result["figures"]["1"]
    assert [(x["batch"], x["length"], x["budget"]) for x in figures["cells"]][:3] == [
        (1, 4, 1.0),
        (1, 4, 0.25),
        (1, 8, 1.0),
    ]
    assert len(figures["cells"]) == 10
    assert (figures["cells"][-1]["batch"], figures["cells"][-1]["length"], figures["cells"][-1]["tokens"]) == (3, 9, 15)
    assert figures["cells"][-1]["ratio_to_all_open"]["median"] > 0
    assert figures["worst"]["ratio"]["median"] == min(x["ratio"]["median"] for x in figures["cells"])
    assert {x["rounds"] for x in figures["cells"]} == {2}


def test_rounds_end_when_the_time_is_over_but_some_count():
    rounds = []
    variants = {"a": lambda number: rounds.append(number) or 1.0}
    assert len(measure.interleave(variants, 9, seconds=0.0)["a"]) == measure.LEAST_ROUNDS
    assert rounds == list(range(measure.LEAST_ROUNDS + 1))
    assert len(measure.interleave(variants, 2, seconds=0.0)["a"]) == 2
    assert len(measure.interleave(variants, 9)["a"]) == 9


def test_bfloat16_is_skipped_where_the_processor_has_none(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(level_model, "has_bfloat16", lambda: False)
    result = measured({**MODEL, "dtype": "bfloat16"})
    assert "figures" not in result
    assert "no bfloat16" in result["skipped"]
    text = report.write_report(tmp_path / "results", tmp_path / "report").read_text()
    assert "skipped, the processor has no bfloat16" in text
    monkeypatch.setattr(level_model, "has_bfloat16", lambda: True)
    assert measured({**MODEL, "dtype": "bfloat16"})["agreement"]["tolerance"] == 0.01


def test_pairs_are_read_and_tokenized_as_pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = {"text": ["a cat", "two dogs"], "text_pair": ["an animal sleeps", "birds"]}
    Dataset.from_dict(rows).to_parquet(folder / "test.parquet")
    pairs, _ = inputs.read_texts("pairs", tmp_path, 2, 0)
    assert sorted(pairs) == [("a cat", "an animal sleeps"), ("two dogs", "birds")]
    [ids] = inputs.tokenize([("a cat", "an animal sleeps")], 32)
    separator = inputs.load_tokenizer().sep_token_id
    assert ids.count(separator) == 2


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MODEL, CELLS, TRAINING], ids=lambda settings: settings["level"])
def test_what_disagrees_is_not_timed(measured, monkeypatch, settings):
    answer = BudgetFormerForSequenceClassification.forward

    def wrong(self, *given, **options):
        outputs = answer(self, *given, **options)
        if options.get("executor") == "masked":
            outputs.logits = outputs.logits + 0.1
        return outputs

    monkeypatch.setattr(BudgetFormerForSequenceClassification, "forward", wrong)
    timed = []
    for module in (run.level_model, run.level_cells, run.level_training):
        monkeypatch.setattr(module, "interleave", lambda *arguments: timed.append(arguments))
    with pytest.raises(SystemExit, match=r"differs by .* from the reference"):
        measured(settings)
    assert timed == []


@pytest.fixture
def dry_run(tmp_path):
    """Runs the GPU's benchmark at tiny shapes on the CPU; returns what was written."""

    def run_dry(*arguments):
        path = tmp_path / "gpu.json"
        gpu.main(["--dry-run", "--output", str(path), *arguments])
        return json.loads(path.read_text())

    return run_dry


@pytest.mark.slow
def test_the_benchmark_of_the_gpu_runs_dry(dry_run):
    result = dry_run()
    assert [cell["kind"] for cell in result["cells"]] == ["inference", "inference", "training"]
    assert result["left_out"] == []
    first, _, training = result["cells"]
    names = [f"{name} {dtype}" for dtype in ("bf16", "fp32") for name in ("stock", "all open", "1/2", "1/4", "looks")]
    assert list(first["ways"]) == names
    for way in first["ways"].values():
        assert set(way["over"]) == {"stock bf16", "stock fp32", gpu.BASELINE}
    assert first["ways"][gpu.BASELINE]["over"][gpu.BASELINE]["median"] == 1.0
    assert 0.0 < first["max_difference"] < 0.1
    assert 0.0 < first["padding"] < 0.75
    assert first["doubted"]["fp32"] == 0.25  # of four rows
    assert list(training["ways"]) == ["stock", "learning", "frozen"]


@pytest.mark.slow
def test_the_benchmark_of_the_gpu_keeps_what_it_has_when_the_time_is_over(dry_run, monkeypatch):
    clock = [0.0]

    def measure_slowly(*given):
        clock[0] += 20.0
        return {}

    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(gpu, "measure_inference", measure_slowly)
    result = dry_run("--seconds", "30")
    assert [cell["batch"] for cell in result["cells"]] == [4]
    assert [(place["kind"], place["batch"]) for place in result["left_out"]] == [("inference", 2), ("training", 4)]


@pytest.mark.slow
def test_what_disagrees_on_the_gpu_is_not_timed(dry_run, monkeypatch):
    answer = BudgetFormerForSequenceClassification.forward

    def wrong(self, *given, **options):
        outputs = answer(self, *given, **options)
        if options.get("budget") == 0.25 and options.get("executor") is None:
            outputs.logits = outputs.logits + 0.5
        return outputs

    monkeypatch.setattr(BudgetFormerForSequenceClassification, "forward", wrong)
    first, _, training = dry_run()["cells"]
    assert "1/4 bf16 differs by" in first["failed"]
    assert "ways" not in first
    assert "ways" in training


def test_without_a_gpu_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


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
        ({**MODEL, "rivals": ["tvm"]}, r"rivals: against must be of .*, got \['tvm'\]"),
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
    settings |= {path.stem: run.read_settings(path) for path in BENCHMARKS.glob("experiments/exported/*.json")}
    slow = ("exported", "cells")  # a round takes minutes
    assert all(x["repeats"] >= (3 if x["level"] in slow else 7) for x in settings.values())
    for path in BENCHMARKS.glob("experiments/quick/*.json"):
        assert run.read_settings(path)["level"] in run.LEVELS
    for target in json.loads((BENCHMARKS / "targets.json").read_text()):
        if target["result"] in ("reranking", "embedding"):  # their own tests read what they write
            continue
        source, path = settings[target["result"]], target["path"]
        if path[0] == "memory":
            assert path[1] == "ours 1/4"
            assert 0.25 in source["budgets"]
            continue
        threads, kind, *rest = path
        assert int(threads) in source["threads"]
        if source["level"] == "training":
            assert kind in {f"{cell['data']} float32" for cell in source["cells"]}
        elif source["level"] == "cells":
            cells = len(level_cells.list_cells(source)) * len(source["budgets"])
            assert kind == "worst" or rest[0] < cells
        elif source["level"] == "exported":
            assert kind in {f"looks, {name}" for name in source["graphs"]}
        else:
            ways = [f"ours {level_model.name_of(budget)}" for budget in source["budgets"]]
            looks = [level_model.looks_name(*pair) for pair in source["looks"]]
            assert rest[0] in [*ways, *looks, *(f"{name} sorted" for name in looks)]
            if rest[1] == "ratio_to_rivals":
                assert rest[2] in source["rivals"]


@pytest.mark.slow
def test_the_report_shows_results_and_nothing_else(measured, tmp_path):
    measured(MODEL)
    measured(CELLS)
    result = measured(TRAINING)
    frozen = {"ratio": {"median": 5.123}}  # what a target asks for
    result["figures"]["2"] = {"ag_news float32": {"frozen": frozen}}
    (tmp_path / "results" / "training.json").write_text(json.dumps(result))
    (tmp_path / "results" / "other.json").write_text("{}")
    report.main([str(tmp_path / "results"), str(tmp_path / "report")])
    text = (tmp_path / "report" / report.PAGE).read_text()
    rows = ("| ours 1/4 |", "| cut 1/4 |", "| 3 | 8 |", "docstrings bfloat16")
    for fragment in ("## Tiny model", "## Tiny cells", "## Tiny steps", *rows):
        assert fragment in text
    assert "| training step, AG News, stock's over ours with the full model frozen | 5.12 | >= 5 | yes |" in text
    assert text.count("| yes |") + text.count("| no |") == 1
    assert {path.name for path in (tmp_path / "report").rglob("*.*")} == {report.PAGE, "models.png"}


def test_the_report_says_that_there_is_nothing_yet(tmp_path):
    report.main([str(tmp_path / "none"), str(tmp_path / "report")])
    assert "no measurements of speed yet" in (tmp_path / "report" / report.PAGE).read_text()


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    path = report.write_report(BENCHMARKS / "results", tmp_path)
    assert path.read_text() == (report.DOCS / report.PAGE).read_text()
