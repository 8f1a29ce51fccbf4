"""Plots of what the other tools measured, each of which answers one question; none needs a display."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .results import short_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluation import Evaluation
    from .profiling import CostCard


# Safe for the colour-blind (Okabe and Ito).
COLORS = {"ours": "#0072B2", "plain": "#009E73", "equal": "#E69F00", "static": "#D55E00", "stock": "#000000"}


def new_figure(
    panels: int = 1, width: float = 5.0, height: float = 3.6, **options: Any
) -> tuple["Figure", list["Axes"]]:
    """A figure of its own, unknown to pyplot, and its axes in one row.

    Args:
        panels: How many axes.
        width: Of the figure, in inches.
        height: Of the figure, in inches.
        **options: Of `Figure.subplots`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "hf-budgetformer[plots]"') from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, **options)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a PNG at once, into folders made as needed; the same plot gives the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    return path


def _title(figure: "Figure", question: str, settings: Mapping[str, Any], rows: int | None) -> None:
    """The question, and what it is answered with, as far as known."""
    known = [short_name(settings["data"])] if settings.get("data") else []
    if settings.get("split"):
        known.append(settings["split"])
    if rows is not None:
        known.append(f"n = {rows:,}")
    if settings.get("seed") is not None:
        known.append(f"seed {settings['seed']}")
    figure.suptitle(f"{question}\n{', '.join(known)}", fontsize=9)


def plot_accuracy(evaluation: "Evaluation", path: str | Path) -> Path:
    """What does a smaller budget cost? Accuracy, and agreement where it is known, against the mean budget spent.

    Raises:
        ValueError: It is a regression's.
    """
    if any(x.error is not None for x in evaluation.results):
        raise ValueError("evaluation must be of a classifier, got that of a regression, which has no accuracy.")
    names = {"accuracy": "accuracy, 95% interval"}
    if any(x.agreement is not None for x in evaluation.results):
        names["agreement"] = "same label as the full model"
    figure, axes = new_figure(len(names), width=1.0 + 4.0 * len(names))
    results = sorted(evaluation.results, key=lambda x: x.spent)
    for axis, name in zip(axes, names, strict=True):
        known = [x for x in results if getattr(x, name) is not None]
        for uniform, color, marker in ((True, "ours", "o-"), (False, "plain", "D")):
            points = [(x.spent, getattr(x, name)) for x in known if (x.asked is not None) == uniform]
            label = "budget asked for" if uniform else "plain call"
            if points:
                axis.plot(*zip(*points, strict=True), marker, color=COLORS[color], label=label)
        most = max([1.0, *(x.spent for x in results)])
        axis.set(xlabel="mean budget spent", ylabel=names[name], xlim=(0, 1.06 * most))
    for x in results:
        color = COLORS["plain" if x.asked is None else "ours"]
        if x.accuracy is None or x.interval is None:
            continue
        axes[0].vlines(x.spent, *x.interval, color=color, linewidth=1)
        if x.asked is not None:
            place: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, -10), "fontsize": 7}
            axes[0].annotate(f"{x.asked:.3g}", (x.spent, x.accuracy), **place)
        if x.asked == 1.0:
            axes[0].axhline(x.accuracy, color="grey", linewidth=0.8, linestyle="--", label="full model")
    axes[0].legend(fontsize=7, loc="lower right")
    _title(figure, "What does a smaller budget cost in accuracy?", evaluation.settings, evaluation.rows)
    return save_figure(figure, path)


def _by_group(x: Sequence[float], y: Sequence[float], groups: int = 10) -> np.ndarray:
    """Rows in equal groups by rising x: mean x, mean y and half of its 95% interval, (3, groups)."""
    left, right = np.asarray(x), np.asarray(y)
    means = []
    for group in np.array_split(np.argsort(left, kind="stable"), min(groups, len(left))):
        error = 1.96 * right[group].std() / len(group) ** 0.5
        means.append((left[group].mean(), right[group].mean(), error))
    return np.array(means).T


def plot_inputs(evaluation: "Evaluation", path: str | Path) -> Path:
    """Do budgets follow the input? What a plain call spends, by difficulty and by length.

    Difficulty is the entropy of the full model's answer.

    Raises:
        ValueError: Not both the full model and a plain call were tried.
    """
    columns = evaluation.inputs
    if not {"entropy", "spent"} <= columns.keys():
        raise ValueError(f"evaluation must have tried the budgets 1.0 and None, got inputs with {sorted(columns)}.")
    spent = columns["spent"]
    figure, axes = new_figure(2, width=7.5, sharey=True)
    difficulty, length = (_by_group(columns[name], spent) for name in ("entropy", "length"))
    difficulty[0] = range(1, len(difficulty[0]) + 1)
    for axis, (x, mean, error) in zip(axes, (difficulty, length), strict=True):
        axis.errorbar(x, mean, error, color=COLORS["ours"], marker="o", capsize=2)
        axis.axhline(float(np.mean(spent)), color="grey", linewidth=0.8, linestyle="--")
    axes[0].set(xlabel="decile of the full model's entropy, 10 is hardest", xticks=difficulty[0])
    axes[0].set_ylabel("mean budget spent, 95% interval")
    axes[1].set_xlabel("tokens, mean of each decile")
    _title(figure, "Do budgets follow the input? (a plain call; dashed: mean)", evaluation.settings, len(spent))
    return save_figure(figure, path)


def plot_time(costs: "CostCard", path: str | Path) -> Path:
    """What time does a budget save? Time of an input in batches and alone, beside the stock model, by budget spent."""
    results = sorted(costs.results, key=lambda x: x.spent)
    spent = [x.spent for x in results]
    figure, [left, right] = new_figure(2, width=7.5)
    left.plot(spent, [1e3 / x.throughput for x in results], color=COLORS["ours"], marker="o", label="this model")
    left.set_title(f"batches of {costs.settings['batch_size']}", fontsize=9)
    right.set_title("one input at a time", fontsize=9)
    for name, style in (("p50", "-"), ("p95", ":")):
        times = [getattr(x, f"latency_{name}") for x in results]
        right.plot(spent, times, color=COLORS["ours"], marker="o", linestyle=style, label=f"this model, {name}")
    if costs.stock is not None:
        stock = costs.stock
        left.axhline(1e3 / stock.throughput, color=COLORS["stock"], linestyle="--", label="stock, padded")
        right.axhline(stock.latency_p50, color=COLORS["stock"], linestyle="--", label="stock, p50")
        right.axhline(stock.latency_p95, color=COLORS["stock"], linestyle=":", label="stock, p95")
    for axis in (left, right):
        axis.set(xlabel="mean budget spent", ylabel="milliseconds an input")
        axis.set(xlim=(0, max(1.06, 1.06 * spent[-1])), ylim=(0, None))
        axis.legend(fontsize=7, loc="lower right")
    _title(figure, "What time does a smaller budget save?", costs.settings, costs.settings.get("rows"))
    return save_figure(figure, path)


def plot_gains(costs: "CostCard", path: str | Path) -> Path:
    """What is an accuracy worth in time? Accuracy against inputs a second, ours and what one could pick instead.

    Raises:
        ValueError: The texts had no labels.
    """
    if any(x.accuracy is None for x in costs.results):
        raise ValueError("costs must have accuracies: profile on texts with labels.")
    figure, [axis] = new_figure(1, width=6.0)
    ours = sorted(costs.results, key=lambda x: x.throughput)
    uniform, plain = ([x for x in ours if (x.asked is not None) == kind] for kind in (True, False))
    others: list[Any] = [*([costs.stock] if costs.stock else []), *costs.rivals]
    points: Any
    for points, color, mark, label in (
        (uniform, "ours", "o-", "a budget for all"),
        (plain, "plain", "D", "a plain call"),
        (others, "static", "s", "the stock model"),
    ):
        if points:
            axis.plot(
                [x.throughput for x in points], [x.accuracy for x in points], mark, color=COLORS[color], label=label
            )
            for x in points:
                axis.vlines(x.throughput, *x.interval, color=COLORS[color], linewidth=0.8, alpha=0.6)
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, -10), "fontsize": 7}
    for x in uniform:
        axis.annotate(f"{x.asked:.3g}", (x.throughput, x.accuracy), **place)
    for number, rival in enumerate(sorted(costs.rivals, key=lambda x: x.throughput)):  # neighbours one above the other
        axis.annotate(rival.name, (rival.throughput, rival.accuracy), **{**place, "xytext": (4, 5 + 9 * (number % 2))})
    axis.set(xlabel="inputs a second", ylabel="accuracy, 95% interval", xscale="log")
    axis.margins(x=0.1)
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks("{x:g}")
    axis.legend(fontsize=7, loc="lower left")
    _title(figure, "What is an accuracy worth in time?", costs.settings, costs.settings.get("rows"))
    return save_figure(figure, path)


def _curves(training: Mapping[str, Any]) -> list[tuple[str, list[Any], str]]:
    """What a training logged that says whether it has settled: title, log and figure of each panel, in its order."""
    first, second = training.get("stage_one_log_history") or [], training["log_history"]
    curves = [
        ("plain model", first, "loss"),
        ("plain model", first, "eval_accuracy"),
        ("narrow encoder", second, "divergence"),
        ("full model", second, "task_loss"),
        ("plain calls", second, "eval_accuracy"),
    ]
    drawn = []
    for title, log, name in curves:
        logged = [entry for entry in log if name in entry]
        if len(logged) > 1 or (logged and name != "eval_accuracy"):  # one accuracy is no curve
            drawn.append((title, logged, name))
    return drawn


def can_plot_training(training: Mapping[str, Any]) -> bool:
    """Whether `plot_training` has something to draw."""
    return any(name != "eval_accuracy" for _, _, name in _curves(training))


def plot_training(training: Mapping[str, Any], path: str | Path) -> Path:
    """Has training settled? Of each stage the loss, and the accuracy on validation rows where it was logged.

    A batch's divergence is that at the budget drawn for it, which varies more than it falls: the running mean counts.

    Args:
        training: `log_history` of the Trainer, with what `BudgetCallback` logged, and `stage_one_log_history` where
            there was a stage before; for the title `dataset`, `rows`, and `arguments` with `seed`.
        path: Of the PNG.

    Raises:
        ValueError: Nothing was logged.
    """
    names = {
        "loss": "task loss",
        "task_loss": "task loss",
        "divergence": "divergence from the full model's answer",
        "eval_accuracy": "accuracy on the validation rows",
    }
    if not can_plot_training(training):
        raise ValueError("training must have a log_history with 'divergence' or 'task_loss': use BudgetCallback.")
    curves = _curves(training)
    figure, axes = new_figure(len(curves), width=1.0 + 3.5 * len(curves))
    for axis, (title, logged, name) in zip(axes, curves, strict=True):
        steps = [entry["step"] for entry in logged]
        values = np.array([entry[name] for entry in logged])
        axis.set(xlabel="training step", ylabel=names[name])
        axis.set_title(title, fontsize=9)
        if name == "eval_accuracy":
            axis.plot(steps, values, "o-", color=COLORS["ours"], markersize=3)
            continue
        near = max(1, len(values) // 10)
        smooth = [values[max(0, n - near) : n + near + 1].mean() for n in range(len(values))]
        axis.plot(steps, values, ".", color="grey", markersize=3, label="a batch")
        axis.plot(steps, smooth, color=COLORS["ours"], label=f"mean of {2 * near + 1} logs")
        axis.set(ylim=(0, None))
        axis.legend(fontsize=7)
    settings = {"data": training.get("dataset"), "seed": training.get("arguments", {}).get("seed")}
    _title(figure, "Has training settled?", settings, training.get("rows"))
    return save_figure(figure, path)


__all__ = ["can_plot_training", "plot_accuracy", "plot_gains", "plot_inputs", "plot_time", "plot_training"]
