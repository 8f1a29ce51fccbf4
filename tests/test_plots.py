"""Plots show the figures they are given, say where these are from, and need no display."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from hf_budgetformer.tools import plots
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.profiling import BudgetCost, CostCard, RivalCost


pytest.importorskip("matplotlib")


def result(budget, accuracy, agreement, spent):
    return BudgetResult(budget, round(400 * accuracy), accuracy, (accuracy - 0.03, accuracy + 0.02), agreement, spent)


def evaluation():
    """What is spent rises with the entropy and does not depend on the length."""
    entropy = np.random.default_rng(0).permutation(400) / 400
    inputs = {"length": [5.0, 30.0] * 200, "entropy": entropy.tolist(), "spent": (0.3 + 0.4 * entropy).tolist()}
    results = [result(1.0, 0.9, 1.0, 1.0), result(0.25, 0.8, 0.93, 0.24), result(None, 0.86, 0.97, 0.5)]
    results.append(result(1 / 6, 0.75, 0.9, 0.16))
    return Evaluation(400, results, inputs, {"data": "emotion", "seed": 7})


def training():
    logs = [{"step": 10 * n, "loss": 1.0, "budget": 0.2, "divergence": 0.2 + 0.1 * (n % 2)} for n in range(20)]
    logs = [{**entry, "task_loss": 2.0 - n / 10} for n, entry in enumerate(logs)]
    logs += [{"step": 190, "eval_loss": 1.0}, {"step": 190, "train_runtime": 3.0}]
    return {"log_history": logs, "arguments": {"seed": 7}, "dataset": "emotion", "rows": 16000}


def costs(labelled=False):
    def cost(budget, spent, rate):
        kept = {"accuracy": 0.8, "interval": (0.76, 0.84)} if labelled else {}
        return BudgetCost(budget, spent, 1e6, 2.0 + spent, 4.0, rate, 12.0, **kept)

    results = [cost(1.0, 1.0, 400.0), cost(0.25, 0.25, 800.0), cost(None, 0.5, 500.0)]
    settings = {"data": "/home/somebody/emotion", "seed": 7, "rows": 400, "batch_size": 32}
    rivals = [RivalCost("onnx-int8", 1.0, 2.0, 450.0, 0.99, 0.79, (0.75, 0.83))] if labelled else []
    return CostCard(2, 1, cost(None, 1.0, 200.0), results, None, {}, {}, settings, rivals)


PLOTS = {
    "accuracy": lambda path: plots.plot_accuracy(evaluation(), path),
    "inputs": lambda path: plots.plot_inputs(evaluation(), path),
    "time": lambda path: plots.plot_time(costs(), path),
    "gains": lambda path: plots.plot_gains(costs(labelled=True), path),
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
    first, second = (PLOTS["accuracy"](tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_names_its_question_data_size_and_seed(name, figure):
    question, known = figure(name).get_suptitle().split("\n")
    assert "?" in question
    data = "somebody/emotion" if name in ("time", "gains") else "emotion"
    assert known == f"{data}, n = {'16,000' if name == 'training' else '400'}, seed 7"


def test_what_is_not_known_is_not_made_up(figure, monkeypatch):
    bare = Evaluation(9, [result(0.25, 0.8, None, 0.24)], {}, {})
    monkeypatch.setitem(PLOTS, "bare", lambda path: plots.plot_accuracy(bare, path))
    drawn = figure("bare")
    assert drawn.get_suptitle().endswith("\nn = 9")
    [axis] = drawn.axes  # none for the agreement
    assert "full model" not in {line.get_label() for line in axis.lines}


def test_accuracy_and_agreement_are_drawn_at_what_was_spent_with_the_full_model_as_a_line(figure):
    left, right = figure("accuracy").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert drawn["budget asked for"] == [[0.16, 0.75], [0.24, 0.8], [1.0, 0.9]]
    assert drawn["plain call"] == [[0.5, 0.86]]
    assert [y for _, y in drawn["full model"]] == [0.9, 0.9]
    intervals = [segment.tolist() for bars in left.collections for segment in bars.get_segments()]
    assert [[0.5, 0.83], [0.5, 0.88]] in np.round(intervals, 6).tolist()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert drawn == {"budget asked for": [[0.16, 0.9], [0.24, 0.93], [1.0, 1.0]], "plain call": [[0.5, 0.97]]}


def test_what_is_spent_is_told_by_deciles(figure):
    by_entropy, by_length = (axis.lines[0].get_xydata() for axis in figure("inputs").axes)
    np.testing.assert_allclose(by_entropy[:, 0], range(1, 11))
    np.testing.assert_allclose(by_entropy[:, 1], 0.32 - 0.0005 + 0.04 * np.arange(10))
    assert by_length[:, 0].tolist() == [5.0] * 5 + [30.0] * 5
    assert np.ptp(by_length[:, 1]) < np.ptp(by_entropy[:, 1]) / 3


def test_accuracy_is_shown_at_its_speed(figure):
    [axis] = figure("gains").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn["a budget for all"] == [[400.0, 0.8], [800.0, 0.8]]
    assert drawn["a plain call"] == [[500.0, 0.8]]
    assert drawn["the stock model"] == [[200.0, 0.8], [450.0, 0.79]]
    assert [text.get_text() for text in axis.texts] == ["1", "0.25", "onnx-int8"]
    with pytest.raises(ValueError, match="texts with labels"):
        plots.plot_gains(costs(), "unused")


def test_time_is_shown_beside_stock(figure, monkeypatch):
    left, right = figure("time").axes
    batches = {line.get_label(): line for line in left.lines}
    assert batches["this model"].get_xydata().tolist() == [[0.25, 1.25], [0.5, 2.0], [1.0, 2.5]]
    assert batches["stock, padded"].get_ydata()[0] == 5.0
    alone = {line.get_label(): line.get_ydata()[0] for line in right.lines}
    assert alone == {"this model, p50": 2.25, "stock, p50": 3.0, "this model, p95": 4.0, "stock, p95": 4.0}
    cut = replace(costs(), stock=None, stock_parameters=None)
    monkeypatch.setitem(PLOTS, "cut", lambda path: plots.plot_time(cut, path))
    assert [line.get_label() for line in figure("cut").axes[0].lines] == ["this model"]


def test_training_shows_every_log_and_its_running_mean(figure):
    left, right = figure("training").axes
    assert left.lines[0].get_ydata().tolist() == [0.2 + 0.1 * (n % 2) for n in range(20)]
    assert left.lines[1].get_ydata()[10] == pytest.approx(0.24)  # of five
    assert right.lines[0].get_xydata()[-1].tolist() == pytest.approx([190, 0.1])


def test_both_stages_are_drawn_with_the_accuracies_that_were_logged_more_than_once(figure, monkeypatch):
    first = [{"step": n, "loss": 1.0 - n / 10} for n in range(5)]
    first += [{"step": n, "eval_accuracy": n / 10} for n in (2, 4)]
    second = [{"step": n, "loss": 1.0, "divergence": 1.0} for n in range(3)] + [{"step": 3, "eval_accuracy": 0.9}]
    logs = {"log_history": second, "stage_one_log_history": first}
    monkeypatch.setitem(PLOTS, "stages", lambda path: plots.plot_training(logs, path))
    loss, accuracy, divergence = figure("stages").axes
    assert [axis.get_title() for axis in (loss, accuracy, divergence)] == ["plain model"] * 2 + ["narrow encoder"]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert accuracy.lines[0].get_xydata().tolist() == [[2.0, 0.2], [4.0, 0.4]]
    assert divergence.get_ylabel().startswith("divergence")


def test_a_regression_has_no_accuracy_to_draw(tmp_path):
    number = Evaluation(9, [BudgetResult(0.25, None, None, None, None, 0.24, 0.0, 1.5)], {}, {})
    with pytest.raises(ValueError, match="got that of a regression"):
        plots.plot_accuracy(number, tmp_path / "x.png")


def test_a_frozen_model_that_was_not_run_has_no_task_loss_to_draw(figure, monkeypatch):
    logs = [{"step": n, "loss": 1.0, "divergence": 1.0} for n in range(3)]
    monkeypatch.setitem(PLOTS, "frozen", lambda path: plots.plot_training({"log_history": logs}, path))
    [axis] = figure("frozen").axes
    assert axis.get_ylabel().startswith("divergence")


def test_figures_that_were_not_measured_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"tried the budgets 1.0 and None, got inputs with \['length', 'spent'\]"):
        plots.plot_inputs(Evaluation(2, [], {"spent": [1.0], "length": [2.0]}, {}), tmp_path / "x.png")
    with pytest.raises(ValueError, match="use BudgetCallback"):
        plots.plot_training({"log_history": [{"step": 1, "loss": 1.0}]}, tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[plots\]"'):
        plots.plot_accuracy(evaluation(), tmp_path / "x.png")


def test_a_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = PLOTS["accuracy"](tmp_path / "x.png")
    before = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: target.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PLOTS["accuracy"](path)
    assert path.read_bytes() == before
