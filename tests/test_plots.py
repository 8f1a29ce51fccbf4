"""Plots show the figures they are given, say where these are from, and need no display."""

import sys

import numpy as np
import pytest

from hf_budgetformer.tools import plots
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.profiling import PARTS, BudgetCost, CostCard, SpeedCeiling


pytest.importorskip("matplotlib")


def result(asked, accuracy, heads):
    interval = (accuracy - 0.03, accuracy + 0.02)
    return BudgetResult(asked, round(400 * accuracy), accuracy, interval, heads, [heads - 0.05, heads, heads + 0.05])


def evaluation():
    """Heads rise with the entropy and do not depend on the length."""
    entropy = np.random.default_rng(0).permutation(400) / 400
    inputs = {"length": [5.0, 30.0] * 200, "entropy": entropy.tolist(), "heads": (0.3 + 0.4 * entropy).tolist()}
    results = [result(1.0, 0.9, 1.0), result(0.25, 0.8, 0.26), result(0.5, 0.85, 0.48), result(None, 0.86, 0.5)]
    return Evaluation(400, results, inputs, {"data": "emotion", "seed": 7})


def static():
    return Evaluation(400, [result(None, 0.78, 0.25)], {}, {"data": "emotion", "seed": 7, "budget": 0.25})


def training():
    logs = [
        {"step": 10 * n, "loss": 1.0, "budget": 0.2 + 0.1 * (n % 2), "temperature": 2.0 - n / 10} for n in range(20)
    ]
    logs += [{"step": 190, "eval_loss": 1.0}, {"step": 190, "train_runtime": 3.0}]
    return {"log_history": logs, "arguments": {"seed": 7}, "dataset": "emotion", "rows": 16000}


def costs():
    def cost(asked, heads, rate):
        return BudgetCost(asked, heads, dict.fromkeys(PARTS, 1e6), 2.0 + heads, 4.0, rate, 12.0)

    results = [cost(1.0, 1.0, 400.0), cost(0.25, 0.26, 800.0), cost(None, 0.5, 500.0)]
    settings = {"data": "/home/somebody/emotion", "seed": 7, "rows": 400, "batch_size": 32}
    return CostCard(2, 1, cost(None, 1.0, 200.0), results, SpeedCeiling(2.5, 1.0), None, {}, {}, settings)


PLOTS = {
    "accuracy": lambda path: plots.plot_accuracy(evaluation(), path, [static()]),
    "layers": lambda path: plots.plot_layers(evaluation(), path),
    "inputs": lambda path: plots.plot_inputs(evaluation(), path),
    "time": lambda path: plots.plot_time(costs(), path),
    "training": lambda path: plots.plot_training(training(), path),
}


@pytest.fixture
def figure(monkeypatch):
    """Returns what a plot would have saved."""

    def draw(name):
        kept = []
        monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
        PLOTS[name]("unused")
        return kept[0]

    return draw


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_one_png_and_needs_no_pyplot(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    path = PLOTS[name](str(tmp_path / "new" / "plot.png"))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.rglob("*.*")) == [path]


def test_the_same_figures_give_the_same_file(tmp_path):
    first, second = (PLOTS["layers"](tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_names_its_question_data_size_and_seed(name, figure):
    question, known = figure(name).get_suptitle().split("\n")
    assert "?" in question
    data = "somebody/emotion" if name == "time" else "emotion"
    assert known == f"{data}, n = {'16,000' if name == 'training' else '400'}, seed 7"


def test_what_is_not_known_is_not_made_up(figure, monkeypatch):
    monkeypatch.setitem(PLOTS, "bare", lambda path: plots.plot_layers(Evaluation(9, static().results, {}, {}), path))
    assert figure("bare").get_suptitle().endswith("\nn = 9")


def test_accuracy_is_drawn_at_the_heads_that_ran_with_its_interval(figure):
    [axis] = figure("accuracy").axes
    asked = next(line for line in axis.lines if line.get_label() == "budget asked for")
    assert asked.get_xydata().tolist() == [[0.26, 0.8], [0.48, 0.85], [1.0, 0.9]]
    band = axis.collections[0].get_paths()[0].vertices
    assert [0.26, 0.77] in np.round(band, 6).tolist()
    assert [0.26, 0.82] in np.round(band, 6).tolist()
    for bars, (heads, accuracy) in zip(axis.containers, [(0.5, 0.86), (0.25, 0.78)], strict=True):
        assert bars.lines[0].get_xydata().tolist() == [[heads, accuracy]]
        [[low, high]] = bars.lines[2][0].get_segments()
        assert (low[1], high[1]) == pytest.approx((accuracy - 0.03, accuracy + 0.02))


def test_heads_by_layer_are_sorted_by_budget(figure):
    axis = figure("layers").axes[0]
    np.testing.assert_allclose(axis.images[0].get_array()[:, 1], [1.0, 0.5, 0.48, 0.26])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "its own", "0.5", "0.25"]


def test_heads_are_told_by_deciles(figure):
    by_entropy, by_length = (axis.lines[0].get_xydata() for axis in figure("inputs").axes)
    np.testing.assert_allclose(by_entropy[:, 0], range(1, 11))
    np.testing.assert_allclose(by_entropy[:, 1], 0.32 - 0.0005 + 0.04 * np.arange(10))
    assert by_length[:, 0].tolist() == [5.0] * 5 + [30.0] * 5
    assert np.ptp(by_length[:, 1]) < np.ptp(by_entropy[:, 1]) / 3


def test_time_is_shown_beside_stock_and_the_ceiling(figure):
    left, right = figure("time").axes
    batches = {line.get_label(): line for line in left.lines}
    assert batches["this model"].get_xydata().tolist() == [[0.26, 1.25], [0.5, 2.0], [1.0, 2.5]]
    assert batches["stock, padded"].get_ydata()[0] == 5.0
    assert batches["ceiling: no attention at all"].get_ydata()[0] == 1.0
    alone = {line.get_label(): line.get_ydata()[0] for line in right.lines}
    assert alone == {"this model, p50": 2.26, "stock, p50": 3.0, "this model, p95": 4.0, "stock, p95": 4.0}


def test_training_shows_every_log_and_its_running_mean(figure):
    left, right = figure("training").axes
    assert left.lines[0].get_ydata().tolist() == [0.2 + 0.1 * (n % 2) for n in range(20)]
    assert left.lines[1].get_ydata()[10] == pytest.approx(0.24)  # of five
    assert right.lines[0].get_xydata()[-1].tolist() == pytest.approx([190, 0.1])


def test_figures_that_were_not_measured_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"tried the budgets 1.0 and None, got inputs with \['heads', 'length'\]"):
        plots.plot_inputs(Evaluation(2, [], {"heads": [1.0], "length": [2.0]}, {}), tmp_path / "x.png")
    with pytest.raises(ValueError, match="use BudgetCallback"):
        plots.plot_training({"log_history": [{"step": 1, "loss": 1.0}]}, tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[plots\]"'):
        plots.plot_layers(evaluation(), tmp_path / "x.png")


def test_a_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = PLOTS["layers"](tmp_path / "x.png")
    before = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: target.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PLOTS["layers"](path)
    assert path.read_bytes() == before
