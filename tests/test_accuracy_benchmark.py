"""The accuracy benchmark on work so small that its figures mean nothing, and its arithmetic on answers made up here."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from conftest import batch_of, budgetformer


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accuracy import figures, methods, report, run
from accuracy.otherwise import opening_order, order_again
from accuracy.rows import read_rows

from hf_budgetformer import BudgetFormerConfig


LIMITS = {"max_length": 12, "train": 48, "calibration": 40, "test": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny").mkdir()
    for split, count in (("train", 100), ("validation", 30), ("test", 30)):
        texts = [f"{'goal match' if row % 2 else 'market share'} number {row} of {split}" for row in range(count)]
        columns = {"text": texts, "label": [row % 2 for row in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "tiny" / f"{split}.parquet")
    return folder


def test_rows_of_no_split_meet_those_of_another(data):
    rows = read_rows(data, "tiny", LIMITS)
    parts = {name: getattr(rows, name) for name in ("train", "calibration", "test", "spare")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 48,
        "calibration": 40,
        "test": 24,
        "spare": 42,
    }
    ids = [tuple(row) for part in parts.values() for row in part["input_ids"]]
    assert len(set(ids)) == len(ids)
    assert rows.labels == 2


@pytest.mark.slow
def test_every_method_is_trained_scored_and_told(data, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    settings = {
        "data": {"tiny": {"max_length": 12, "train": 48, "epochs": 1}},
        "calibration_rows": 40,
        "test_rows": 24,
        "batch_size": 16,
        "full_learning_rate": 1e-3,
        "model": str(tmp_path / "model"),
        "narrow": {"learning_rate": 1e-3, "steps": 1, "mixed": 1},
        "methods": {name: [0] for name in methods.METHODS},
    }
    path, work, results = tmp_path / "settings.json", tmp_path / "work", tmp_path / "results"
    path.write_text(json.dumps(settings))
    run.main(["--settings", str(path), "--data", str(data), "--work", str(work)])
    made = {file: file.stat().st_mtime_ns for file in work.rglob("*.npz")}
    run.main(["--settings", str(path), "--data", str(data), "--work", str(work)])
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.npz")} == made
    figures.main(["--settings", str(path), "--work", str(work), "--output", str(results)])
    scores = json.loads((results / "tiny.json").read_text())["results"]
    assert {"full", "looks 0.25", "tuned 0.01", "static 1/4", "exits 0.5", "layers 1/3"} <= scores.keys()
    assert scores["full"]["0"]["agreement"] == scores["full"]["0"]["cost"] == 1.0
    assert "| looks 0.25 against static 1/4 |" in report.tables(results)
    assert report.plot(tmp_path / "accuracy.png", results)
    # The results stand without their folder, and another seed from another folder joins them.
    before = json.loads((results / "summary.json").read_text())
    other = tmp_path / "other"
    arguments = ["--methods", "narrow", "--seeds", "1"]
    run.main(["--settings", str(path), "--data", str(data), "--work", str(other), *arguments])
    figures.main(["--settings", str(path), "--work", str(other), "--output", str(results)])
    contents = json.loads((results / "tiny.json").read_text())
    assert contents["results"]["constant 1/4"].keys() == contents["runs"].keys() == {"0", "1"}
    assert contents["results"]["static 1/4"].keys() == {"0"}
    after = json.loads((results / "summary.json").read_text())
    assert after["pairs"]["looks 0.25 - full"]["runs"] == 2
    assert after["pairs"]["looks 0.25 - static 1/4"] == before["pairs"]["looks 0.25 - static 1/4"]


def made_up(rows=400, seed=0):
    """Answers of a look that is wrong where it is unsure; of a full model that is always right."""
    draw = np.random.default_rng(seed)
    parts = {}
    for split in ("calibration", "test"):
        labels = draw.integers(0, 2, rows)
        gap = draw.normal(1.0, 1.0, rows)  # of the right answer's logit over the other's
        look = np.where(labels[:, None] == [0, 1], gap[:, None], 0.0)
        full = np.where(labels[:, None] == [0, 1], 5.0, 0.0)
        parts[split] = (look, full, labels)
    looks, fulls, labels = ({split: part[n] for split, part in parts.items()} for n in range(3))
    return figures.Run({split: {1 / 6: x} for split, x in looks.items()}, fulls, labels)


def test_looks_spend_what_they_are_asked_and_agree_more_the_more_they_spend():
    trial = made_up()
    alone = trial.constant(1 / 6)
    some, most = (trial.looks(mean, candidates=(1 / 6,)) for mean in (0.33, 0.6))
    assert some["cost"] == pytest.approx(0.33, abs=0.05)
    assert alone["same"].mean() < some["same"].mean() < most["same"].mean() <= 1.0
    doubted = figures.margin(trial.answers["test"][1 / 6])
    assert some["same"][np.argsort(doubted)[:40]].all()  # the most doubtful are answered by the full model


def test_a_tuned_look_is_dear_where_little_may_differ_and_all_of_the_work_where_rows_are_too_few():
    dear, cheap = (made_up(4000).tuned(level) for level in (0.01, 0.1))
    assert dear["cost"] > cheap["cost"]
    assert (~dear["same"]).mean() < 0.02
    assert made_up(50).tuned(0.01)["cost"] == 1.0


@pytest.mark.parametrize("level", [0.0, 0.02, 0.1, 0.5])
def test_the_least_cost_is_that_of_the_first_few_of_the_most_doubtful(level):
    trial = made_up()
    look = trial.answers["test"][1 / 6]
    doubtful = np.argsort(figures.margin(look))
    differs = look.argmax(-1) != trial.full["test"].argmax(-1)
    doubted = next(count for count in range(401) if differs[doubtful[count:]].sum() <= level * 400)
    assert trial.least(level) == pytest.approx(min(1.0, min(figures.FIRST_LOOKS) + doubted / 400))
    assert trial.tuned(level + 0.01)["cost"] >= trial.least(level + 0.01)


def test_early_exits_leave_at_the_first_layer_that_is_sure():
    sure, unsure = np.array([[4.0, 0.0]]), np.array([[0.1, 0.0]])
    answers = {1 / 3: np.concatenate([sure, unsure, unsure]), 2 / 3: np.concatenate([-sure, sure, unsure])}
    full = {split: np.array([[0.0, 1.0]] * 3) for split in ("calibration", "test")}
    labels = {split: np.ones(3, dtype=int) for split in full}
    outcome = figures.Run({split: answers for split in full}, full, labels).exits(0.7)
    assert outcome["cost"] == pytest.approx(2 / 3)
    assert outcome["same"].tolist() == [False, False, True]


def test_the_interval_holds_the_mean_in_95_of_100_draws():
    draw = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = figures.interval([draw.multinomial(300, [0.05, 0.85, 0.1], 1) for _ in range(3)], seed)
        held += low <= 5.0 <= high
    assert held >= 180


def test_means_are_over_seeds_then_data_sets_and_seeds_of_the_same_rows_make_no_interval_narrower():
    better = {"accuracy": [0, 90, 10], "agreement": [0, 80, 20]}
    worse = {"accuracy": [10, 90, 0], "agreement": [0, 100, 0]}
    data_sets = {"a": {"pairs": {"x - y": {"0": better, "1": better}}}, "b": {"pairs": {"x - y": {"0": worse}}}}
    entry = figures.compare("x - y", data_sets)
    assert (entry["runs"], entry["data_sets"], entry["accuracy"], entry["agreement"]) == (3, 2, 0.0, 10.0)
    once = figures.compare("x - y", {"a": {"pairs": {"x - y": {"0": better}}}, "b": data_sets["b"]})
    for kind in ("accuracy_interval", "agreement_interval"):
        assert entry[kind] == once[kind]
    assert figures.compare("y - x", {"c": {"pairs": {}}}) is None


def test_a_seed_that_is_scored_again_takes_the_place_of_what_was_said_of_it():
    kept = {"gone": {"0": 1}, "stays": {"0": 1, "1": 2}}
    assert figures.replace_seed(kept, 0, {"stays": 3, "new": 4}) == {"stays": {"0": 3, "1": 2}, "new": {"0": 4}}


def test_opening_orders_name_every_unit_once():
    config = BudgetFormerConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=6, intermediate_size=48)
    units = [sublayer for sublayer in range(8) for _ in range(6)]
    for kind in ("equal", "heads3", "neurons2", "late", "early", "layers", "skip:2.3"):
        assert sorted(opening_order(kind, config)) == units, kind
    assert opening_order("layers", config)[:12] == [0] * 6 + [1] * 6
    assert opening_order("skip:2.3", config)[-12:] == [2, 3] * 6
    assert opening_order("default", config) is None


def test_units_that_are_ordered_again_are_the_same_units():
    model, batch = budgetformer("bert", narrow_budget=0.5), batch_of([7, 5, 9, 4])
    rows = Dataset.from_dict({name: x.tolist() for name, x in batch.items()})
    teacher = model(**batch, budget=1.0).logits.tolist()
    before = {name: x.clone() for name, x in model.narrow.state_dict().items()}
    widest, half = (model(**batch, budget=budget).logits for budget in (0.5, 0.25))
    order_again(model, rows.add_column("teacher_logits", teacher))
    assert any(not torch.equal(x, before[name]) for name, x in model.narrow.state_dict().items())
    torch.testing.assert_close(model(**batch, budget=0.5).logits, widest)
    assert not torch.allclose(model(**batch, budget=0.25).logits, half)


def test_changes_of_the_recipe_stand_beside_it_on_the_same_full_model(tmp_path):
    def trial(name, seed, agreement, **recipe):
        scores = {budget: {"agreement": agreement, "divergence": 0.1} for budget in ("1/4", "1/6", "1/12")}
        about = {"data": "trec", "seed": seed, "trial": name, "recipe": {"epochs": 6, **recipe}}
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({**about, **scores}))

    for seed, agreement in enumerate((0.9, 0.92)):
        trial("R1", seed, agreement)
        trial("R1fold", seed, agreement + 0.01 * (seed + 1), fold=True)
    trial("R1fold", 2, 0.5, fold=True)  # there is no recipe beside it
    trial("base", 0, 0.8)
    began, changes = report.trials_table(tmp_path).split("What changes of it do")
    assert "| trec, 0 | epochs 6 | 80.0, 0.100 |" in began
    assert "fold" not in began
    assert "| fold True | trec (2) | +1.5, +0.000 | +1.5, +0.000 | +1.5, +0.000 | +1.5 |" in changes
