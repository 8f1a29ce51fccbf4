"""The accuracy experiments on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from conftest import stock_folder


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accuracy import report, run

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools.data import weights_digest


TINY = {
    "title": "Tiny table",
    "data": [{"name": "tiny", "max_length": 12, "train": 24, "test": 10}],
    "seeds": [0],
    "methods": [
        "ours", "equal budgets", "fixed heads", "heads not ranked", "own teacher", "without teacher", "one stage",
        "static 0.25", "iterative 0.5", "per layer 0.5", "random 0.5", "layers 0.5",
    ],
    "budgets": [1.0, 0.5, 0.25, 0.125],
    "dense": {"epochs": 1.0},
    "budget_stage": {"epochs": 1.0},
}  # fmt: skip

TIMED = {
    "experiment": "model_tiny",
    "settings": {"level": "model", "title": "Tiny model", "threads": [2], "max_length": 16, "budgets": [0.5, 0.25]},
    "figures": {"2": {"variants": {name: {"ratio": {"median": ratio}} for name, ratio in (
        ("stock", 1.0), ("ours 12", 1.5), ("static 3", 3.2), ("learned 0.5", 2.0), ("learned 0.25", 3.0))}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a tiny model in MiniLM's place, and the results of all methods."""
    folder = tmp_path_factory.mktemp("accuracy")
    (folder / "data" / "tiny").mkdir(parents=True)
    for split, count in (("train", 30), ("test", 12)):
        columns = {
            "text": [f"{'goal match' if row % 2 else 'market share'} {'again ' * (row % 5)}" for row in range(count)],
            "label": [row % 2 for row in range(count)],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / "tiny" / f"{split}.parquet")
    stock_folder("bert", folder / "stock", vocab_size=30522, num_attention_heads=8, hidden_size=32, num_labels=2)
    (folder / "experiments").mkdir()
    (folder / "experiments" / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "minilm", lambda: str(folder / "stock"))
        run_chains(folder)
    return folder


def run_chains(folder):
    settings = run.read_settings(folder / "experiments" / "tiny.json")
    run.run_chain(settings["data"][0], 0, settings, folder / "data", folder / "results" / "tiny", folder / "models")


def test_every_method_leaves_its_figures(folder):
    runs = report.read_runs(folder / "results" / "tiny")
    assert {method for _, _, method in runs} == {"dense", *TINY["methods"]}
    ours = runs["tiny", 0, "ours"]
    assert [x["asked"] for x in ours["evaluations"]] == [1.0, 0.5, 0.25, 0.125, None]
    assert report.evaluation(ours, 1.0)["heads"] == 1.0
    assert report.evaluation(ours, 0.25)["heads"] < report.evaluation(ours, 0.5)["heads"] < 1.0
    assert all(len(x["correct"]) == len(x["agrees"]) == 10 for run_ in runs.values() for x in run_["evaluations"])
    assert report.evaluation(runs["tiny", 0, "static 0.25"], None)["heads"] == 0.25
    assert report.evaluation(runs["tiny", 0, "dense"], None)["agreement"] == 1.0
    shallow = report.evaluation(runs["tiny", 0, "layers 0.5"], None)  # of heads and FLOPs of the whole model
    assert shallow["heads"] == pytest.approx(2 / 3)
    assert shallow["flops_ratio"] == pytest.approx(2 / 3, abs=0.05)


def test_what_is_there_is_not_made_again(folder):
    places = sorted((folder / "results" / "tiny").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in places]
    run_chains(folder)
    assert [path.stat().st_mtime_ns for path in places] == before


def test_tables_and_a_plot_are_made_of_the_results(folder, tmp_path):
    text = report.section(folder / "results", tmp_path, [])
    assert "### Tiny table" in text
    assert "| ours, 0.25 |" in text
    assert "| static 0.25 |" in text
    assert (tmp_path / "accuracy_tiny.png").stat().st_size > 1000


def test_targets_are_set_beside_what_was_measured():
    def run_of(method, *figures):
        evaluations = [{"asked": asked, "correct": bits, "agrees": bits} for asked, bits in figures]
        return {"method": method, "evaluations": evaluations, "spearman": {"entropy": 0.7, "cost": 0.1}}

    ours, better = "1111100000", "1111110000"
    runs = {("a", 0, x["method"]): x for x in (
        run_of("ours", (0.5, ours), (0.25, better)), run_of("static 0.5", (None, better)),
        run_of("static 0.25", (None, ours)))}  # fmt: skip
    rows = [row.split(" | ")[1:] for row in report.targets(runs).splitlines()[2:]]
    assert [row[0].split(" [")[0] for row in rows] == ["-10.0", "+10.0", "0.70", "0.10"]
    assert [row[-1] for row in rows] == ["no |", "yes |", "yes |", "no |"]


def test_time_is_set_against_the_accuracy_of_the_checkpoint_that_was_timed(folder, tmp_path):
    weights = report.read_runs(folder / "results" / "tiny")["tiny", 0, "ours"]["weights"]
    model = BudgetFormerForSequenceClassification.from_pretrained(folder / "models" / "tiny-0-ours")
    assert weights_digest(model) == weights
    picture = tmp_path / "accuracy_tiny_model_tiny_time.png"
    for other in ({}, {"checkpoint": None}, {"checkpoint": "0" * 64}):
        assert "against time" not in report.section(folder / "results", tmp_path, [TIMED | other])
        assert not picture.exists()
    text = report.section(folder / "results", tmp_path, [TIMED | {"checkpoint": weights}])
    assert picture.stat().st_size > 1000
    assert "(ours, seed 0), its accuracy on 10 test rows cut at 12 tokens" in text
    assert re.search(r"dense model it started from: (none|2\.00x at 0\.5|3\.00x at 0\.25)\.", text)


def test_of_a_long_text_head_and_tail_are_kept():
    text = "one two three four five six seven eight"  # of one token each
    assert run.head_and_tail(text, None, 10) == text
    assert run.head_and_tail(text, None, 6) == "one two seven eight"
    assert run.head_and_tail(text, "a pair", 9) == "one two seven eight"


def test_the_interval_of_a_difference_is_that_of_paired_rows():
    mean, low, high = report.difference([("1111011110", "1111011110"), ("1" * 10, "0" * 10)])
    assert (mean, low, high) == (50.0, 50.0, 50.0)
    mean, low, high = report.difference([("10" * 200, "01" * 200)])
    assert mean == 0.0
    assert low == pytest.approx(-9.8, abs=1.0)  # 1.96 / sqrt(400)
    assert high == pytest.approx(9.8, abs=1.0)


def test_the_number_type_of_each_run_is_said():
    half, whole = ({"data": "a", "seed": seed, "settings": {"bf16": bf16}} for seed, bf16 in ((0, True), (1, False)))
    assert report.precision([whole, {"data": "b", "seed": 0, "settings": {}}]) == ""
    assert report.precision([half]) == ", bf16 autocast"
    assert report.precision([half, whole]) == ", bf16 autocast but for a with seed 1"


def test_settings_that_do_not_exist_are_named(tmp_path):
    for wrong, named in (
        ({"seed": 1}, r"unknown settings \['seed'\]"),
        ({"methods": ["x"]}, r"unknown methods \['x'\]"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(wrong))
        with pytest.raises(SystemExit, match=named):
            run.read_settings(tmp_path / "x.json")
