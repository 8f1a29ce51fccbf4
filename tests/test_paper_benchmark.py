"""The paper's experiment on work so small that its figures mean nothing."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from conftest import batch_of, budgetformer


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from paper import flops, report, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


TINY = {
    "title": "Tiny news",
    "data": "tiny",
    "train_rows": 24,
    "max_length": 12,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "epochs": 1,
    "batch_size": 8,
    "seeds": [0],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny").mkdir()
    for split, count in (("train", 30), ("test", 10)):
        columns = {
            "text": [f"{'goal match' if row % 2 else 'market share'} {'again ' * (row % 5)}" for row in range(count)],
            "text_pair": [f"number {row}" for row in range(count)],
            "label": [row % 2 for row in range(count)],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "tiny" / f"{split}.parquet")
    return folder


def run_settings(settings, data, output, *arguments):
    path = output / "tiny_news.json"
    path.write_text(json.dumps(settings))
    run.main([str(path), "--data", str(data), "--output", str(output / "results"), *arguments])


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """Folder of the results of all variants."""
    output = tmp_path_factory.mktemp("output")
    run_settings(TINY, data, output)
    return output / "results"


def read(results, variant, seed=0):
    return json.loads((results / f"tiny_news-{variant}-{seed}.json").read_text())


@pytest.mark.slow
def test_every_variant_is_trained_and_measured(results):
    assert {path.name for path in results.iterdir()} == {f"tiny_news-{name}-0.json" for name in run.VARIANTS}
    for name, fields in run.VARIANTS.items():
        result = read(results, name)
        assert result["environment"]["packages"]["torch"]
        assert result["data"]["train"]["rows"] == 24
        assert result["data"]["train"]["rows_in_file"] == 30
        assert len(result["data"]["test"]["sha256"]) == 64
        assert result["settings"]["fields"] == fields
        assert result["figures"]["training"]["steps"] == 3
        evaluations = result["figures"]["evaluations"]
        wanted = {"own"} if "looks" in fields else {"own", "0.1", "0.25", "0.5", "1.0"}
        assert evaluations.keys() == wanted | ({"random"} if name == "literal" else set())
        for x in evaluations.values():
            assert 0 <= x["accuracy"] <= 1
            assert x["n"] == 10
            assert x["flops_cut"]["core_only"] >= 0
            assert (x["flops_cut"]["core_only"] == 0) == (x["head_share"] == 1)


@pytest.mark.slow
def test_full_attention_saves_nothing_and_budgets_are_kept(results):
    everything = read(results, "full")["figures"]["evaluations"]["own"]
    assert everything["head_share"] == everything["mean_budget"] == 1
    assert everything["flops_cut"] == {"core_only": 0, "true": 0}
    for variant, evaluation in (("literal", "1.0"), ("ours", "1.0"), ("literal-1.0", "own")):
        assert read(results, variant)["figures"]["evaluations"][evaluation]["head_share"] == 1
    literal = read(results, "literal")["figures"]["evaluations"]
    assert literal["random"]["mean_budget"] > 0
    assert literal["0.1"]["head_share"] == 1 / 4  # at least one head
    assert literal["0.1"]["mean_budget"] < literal["0.5"]["mean_budget"] < literal["1.0"]["mean_budget"] == 1


@pytest.mark.slow
def test_the_difference_of_soft_and_hard_gates_is_measured(results):
    explanation = read(results, "literal")["explanation"]
    assert explanation["norm_ratio"].keys() == {"own", "0.1", "0.25", "0.5", "1.0"}
    assert all(len(ratios) == 2 and min(ratios) > 0 for ratios in explanation["norm_ratio"].values())
    assert explanation["norm_ratio"]["1.0"][0] > explanation["norm_ratio"]["0.1"][0]
    assert explanation["soft_accuracy"].keys() == {"own", "1.0"}
    assert "explanation" not in read(results, "ours")


def test_soft_gates_are_those_of_training():
    model = budgetformer("bert", router="layer", **run.LITERAL, exploration_steps=0)
    batch = batch_of([5, 9, 3])
    with torch.no_grad():
        before = model(**batch).logits
        with run.soft_gates(model):
            soft = model(**batch, executor="masked").logits
        trained = model.train()(**batch, executor="masked").logits
        assert not torch.equal(soft, before)
        assert torch.allclose(soft, trained)
        assert torch.equal(model.eval()(**batch).logits, before)


def test_random_heads_are_as_many_and_the_routers_are_put_back():
    model = budgetformer("bert", stir=False, router="layer", **run.LITERAL)
    batch = batch_of([5, 9, 3, 7, 4, 8])
    with torch.no_grad():
        gates = model(**batch, output_head_gates=True, budget=0.3).head_gates
        with run.random_heads(model):
            drawn = model(**batch, output_head_gates=True, budget=0.3).head_gates
        assert (gates.sum(-1) == 2).all()
        assert (drawn.sum(-1) == 2).all()
        assert not torch.equal(gates[:, 0], drawn[:, 0])
        assert torch.equal(model(**batch, output_head_gates=True, budget=0.3).head_gates, gates)


@pytest.mark.parametrize("budget", [None, 0.5, 1.0])
def test_flops_are_those_that_torch_counts(budget):
    """The masked reference computes every head; what closed ones spare is counted off."""
    model = budgetformer("bert", router="layer", looks=[1.0])
    batch = batch_of([9, 9, 9])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gates = model(**batch, budget=budget, executor="masked", output_head_gates=True).head_gates
    parts, whole = flops.count_flops(model, batch, budget), flops.count_flops(model, batch, 1.0)
    assert (parts["router"] > 0) == (budget == 0.5)
    assert counter.get_total_flops() == pytest.approx(sum(whole.values()) + parts["router"], rel=0.015)
    for part in ("projections", "core"):
        assert parts[part] == pytest.approx(gates.mean().item() * whole[part])


@pytest.mark.slow
def test_an_interrupted_command_goes_on(data, tmp_path, monkeypatch, capsys):
    settings = {**TINY, "variants": ["full", "ours"]}
    run_settings({**settings, "variants": ["ours"]}, data, tmp_path)
    trained = []
    training = run.train
    monkeypatch.setattr(run, "train", lambda *given: trained.append(given[2]["variant"]) or training(*given))
    capsys.readouterr()
    run_settings(settings, data, tmp_path, "--resume")
    assert trained == ["full"]
    assert "tiny_news-ours-0.json: there already" in capsys.readouterr().out
    run_settings({**settings, "seeds": [0, 3]}, data, tmp_path, "--resume")
    assert trained == ["full", "full", "ours"]
    run_settings({**settings, "variants": ["ours"], "max_length": 10}, data, tmp_path, "--resume")
    assert trained == ["full", "full", "ours", "ours"]
    with pytest.raises(SystemExit, match="several settings"):
        report.tables(tmp_path / "results")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 3}, r"unknown settings \['rows'\]"),
        ({"batch_size": "3"}, r"batch_size must be a int, got '3'"),
        ({"epochs": 0}, r"epochs must be > 0, got 0"),
        ({"test_rows": -1}, r"test_rows must be >= 0, got -1"),
        ({"seeds": [0.5]}, r"seeds and ablation_seeds must hold integers"),
        ({"variants": ["mine"]}, r"unknown variants \['mine'\]"),
        ({"train_rows": 31}, r"31 rows are asked for, there are 30"),
        ({"data": "none"}, r"there is no none/train.parquet"),
    ],
)
def test_bad_settings_are_named(data, tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message):
        run_settings({**TINY, **settings}, data, tmp_path)


def test_files_that_do_not_serve_are_named(data, tmp_path):
    with pytest.raises(SystemExit, match="not a readable JSON file"):
        run.main([str(tmp_path / "none.json"), "--data", str(data)])
    (tmp_path / "tiny").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["x"]}), tmp_path / "tiny" / "train.parquet")
    with pytest.raises(SystemExit, match=r"lacks \['label', 'text'\]"):
        run_settings(TINY, tmp_path, tmp_path)


def test_the_experiment_of_the_paper_has_valid_settings():
    [path] = (BENCHMARKS / "paper").glob("*.json")
    settings = run.read_settings(path)
    assert settings["data"] in report.PUBLISHED
    assert len(run.list_runs(settings)) == 13


def test_the_committed_results_are_read():
    text = report.tables(BENCHMARKS / "paper" / "results")
    for row in ("full attention | 3", "paper-literal | 3", "ours | 3"):
        assert f"| {row} |" in text
    assert "| s = 0.25 |" in text


@pytest.mark.slow
def test_tables_show_results_and_published_figures(results, tmp_path):
    text = report.tables(results)
    accuracy = read(results, "ours")["figures"]["evaluations"]["own"]["accuracy"]
    assert "## The paper's experiment: Tiny news" in text
    assert f"| ours | 1 | {accuracy:.4f} |" in text
    assert "| published, AG News (full attention 0.9099) |  | 0.9022 | 0.212 | - | 2.7% | - |" in text
    assert "norm ratio, layer 2" in text
    for row in ("s = 0.1", "s = 1.0", "heads at random, own budget"):
        assert f"\n| {row} |" in text
    changed = read(results, "ours")
    for seed, value in enumerate((0.2, 0.4)):
        changed["figures"]["evaluations"]["own"]["accuracy"] = value
        (tmp_path / f"{seed}.json").write_text(json.dumps(changed))
    assert "| ours | 2 | 0.3000 [0.2000, 0.4000] |" in report.tables(tmp_path)
    assert report.tables(tmp_path / "none") == ""
