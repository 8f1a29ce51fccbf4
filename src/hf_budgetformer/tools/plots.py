"""Plots of what the other tools measured, each of which answers one question; none needs a display."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluation import BudgetResult, Evaluation
    from .profiling import CostCard


# Safe for the colour-blind (Okabe and Ito).
COLORS = {"ours": "#0072B2", "own": "#009E73", "equal": "#E69F00", "static": "#D55E00", "stock": "#000000"}


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
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a PNG at once, into folders made as needed; the same plot gives the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    return path


def short_name(source: Any) -> str:
    """A Hub id as it is; of a longer path, what tells data apart and not where it lies: its last two parts."""
    return "/".join(str(source).replace("\\", "/").strip("/").split("/")[-2:])


def _title(figure: "Figure", question: str, settings: Mapping[str, Any], rows: int | None) -> None:
    """The question, and what it is answered with, as far as known."""
    data = [short_name(settings["data"])] if settings.get("data") else []
    count = [] if rows is None else [f"n = {rows:,}"]
    seed = [] if settings.get("seed") is None else [f"seed {settings['seed']}"]
    figure.suptitle(f"{question}\n{', '.join(data + count + seed)}", fontsize=9)


def _points(axis: "Axes", results: Iterable["BudgetResult"], **look: Any) -> None:
    """Accuracy with intervals against heads."""
    for index, x in enumerate(results):
        errors = [[x.accuracy - x.interval[0]], [x.interval[1] - x.accuracy]]
        axis.errorbar(x.heads, x.accuracy, errors, capsize=3, **{**look, "label": None if index else look["label"]})


def plot_accuracy(evaluation: "Evaluation", path: str | Path, static: Iterable["Evaluation"] = ()) -> Path:
    """What do closed heads cost in accuracy? Accuracy against the mean share of heads that ran.

    Args:
        evaluation: Of the model, see `evaluate_budgets`.
        path: Of the PNG.
        static: Evaluations of static models, on the same rows.
    """
    figure, [axis] = new_figure()
    asked = sorted((x for x in evaluation.results if x.asked is not None), key=lambda x: x.heads)
    if asked:
        heads, accuracy = [x.heads for x in asked], [x.accuracy for x in asked]
        low, high = zip(*(x.interval for x in asked), strict=True)
        axis.plot(heads, accuracy, color=COLORS["ours"], marker="o", label="budget asked for")
        axis.fill_between(heads, low, high, color=COLORS["ours"], alpha=0.15, linewidth=0)
    for x in asked:
        spot, where = (x.heads, x.accuracy), "offset points"
        axis.annotate(f"{x.asked:.3g}", spot, (-4, 5), textcoords=where, ha="right", fontsize=7)
        if x.asked == 1.0:
            axis.axhline(x.accuracy, color="grey", linewidth=0.8, linestyle="--", label="all heads")
    own = (x for x in evaluation.results if x.asked is None)
    _points(axis, own, color=COLORS["own"], marker="D", linestyle="none", label="its own budget")
    cut = (x for other in static for x in other.results)
    _points(axis, cut, color=COLORS["static"], marker="^", linestyle="none", label="static heads")
    axis.set(xlabel="mean share of heads that ran", ylabel="accuracy, 95% interval", xlim=(0, 1.06))
    axis.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    _title(figure, "What do closed heads cost in accuracy?", evaluation.settings, evaluation.rows)
    return save_figure(figure, path)


def plot_layers(evaluation: "Evaluation", path: str | Path) -> Path:
    """Where do heads run? The share of each layer's heads that ran, at each budget."""
    results = sorted(evaluation.results, key=lambda x: x.heads, reverse=True)
    shares = np.array([x.heads_by_layer for x in results])  # (budgets, layers)
    layers = shares.shape[1]
    figure, [axis] = new_figure(width=max(5.0, 0.45 * layers + 2.0), height=0.42 * len(results) + 1.5)
    image = axis.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(*shares.shape):
        color = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", color=color, fontsize=7)
    asked = ["its own" if x.asked is None else f"{x.asked:.3g}" for x in results]
    axis.set(xlabel="layer", ylabel="budget", xticks=range(layers), yticks=range(len(results)), yticklabels=asked)
    figure.colorbar(image, ax=axis, label="share of heads that ran")
    _title(figure, "Where do heads run?", evaluation.settings, evaluation.rows)
    return save_figure(figure, path)


def _by_group(x: Sequence[float], y: Sequence[float], groups: int = 10) -> np.ndarray:
    """Rows in equal groups by rising x: mean x, mean y and half of its 95% interval, (3, groups)."""
    order = np.array_split(np.argsort(x, kind="stable"), min(groups, len(x)))
    left, right = np.asarray(x), np.asarray(y)
    return np.array([
        (left[group].mean(), right[group].mean(), 1.96 * right[group].std() / len(group) ** 0.5) for group in order
    ]).T  # fmt: skip


def plot_inputs(evaluation: "Evaluation", path: str | Path) -> Path:
    """Do budgets follow the input? Heads at the model's own budget, by difficulty and by length.

    Difficulty is the entropy of what the model answers with all heads.

    Raises:
        ValueError: Not both all heads and the own budget were tried.
    """
    columns = evaluation.inputs
    if not {"entropy", "heads"} <= columns.keys():
        raise ValueError(f"evaluation must have tried the budgets 1.0 and None, got inputs with {sorted(columns)}.")
    heads = columns["heads"]
    figure, [left, right] = new_figure(2, width=7.5, sharey=True)
    _, mean, error = _by_group(columns["entropy"], heads)
    left.errorbar(range(1, len(mean) + 1), mean, error, color=COLORS["ours"], marker="o", capsize=2)
    left.set(xlabel="decile of entropy with all heads, 10 is hardest", xticks=range(1, len(mean) + 1))
    left.set_ylabel("mean share of heads, 95% interval")
    length, mean, error = _by_group(columns["length"], heads)
    right.errorbar(length, mean, error, color=COLORS["ours"], marker="o", capsize=2)
    right.set(xlabel="tokens, mean of each decile")
    for axis in (left, right):
        axis.axhline(float(np.mean(heads)), color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    _title(figure, "Do budgets follow the input? (its own budget; dashed: mean)", evaluation.settings, len(heads))
    return save_figure(figure, path)


def plot_time(costs: "CostCard", path: str | Path) -> Path:
    """What time do closed heads save? Time of an input in batches and alone, against the mean share of heads that ran.

    Beside the stock model, and the ceiling: the time with all heads, divided by what closing heads can save at most.
    """
    results = sorted(costs.results, key=lambda x: x.heads)
    heads = [x.heads for x in results]
    figure, [left, right] = new_figure(2, width=7.5)
    left.plot(heads, [1e3 / x.throughput for x in results], color=COLORS["ours"], marker="o", label="this model")
    left.axhline(1e3 / costs.stock.throughput, color=COLORS["stock"], linestyle="--", label="stock, padded")
    for x in results:
        if x.asked == 1.0:
            least = 1e3 / x.throughput / costs.ceiling.ratio
            left.axhline(least, color=COLORS["static"], linestyle=":", label="ceiling: no attention at all")
    left.set_title(f"batches of {costs.settings['batch_size']}", fontsize=9)
    for name, style in (("p50", "-"), ("p95", ":")):
        times = [getattr(x, f"latency_{name}") for x in results]
        right.plot(heads, times, color=COLORS["ours"], marker="o", linestyle=style, label=f"this model, {name}")
        stock = getattr(costs.stock, f"latency_{name}")
        right.axhline(stock, color=COLORS["stock"], linestyle="--" if name == "p50" else ":", label=f"stock, {name}")
    right.set_title("one input at a time", fontsize=9)
    for axis in (left, right):
        axis.set(xlabel="mean share of heads that ran", ylabel="milliseconds an input", xlim=(0, 1.06), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    _title(figure, "What time do closed heads save?", costs.settings, costs.settings["rows"])
    return save_figure(figure, path)


def plot_training(training: Mapping[str, Any], path: str | Path) -> Path:
    """Has training settled? Budget and temperature as `BudgetCallback` logged them.

    Args:
        training: `log_history` of the Trainer; for the title `dataset`, `rows`, and `arguments` with `seed`.
        path: Of the PNG.

    Raises:
        ValueError: Nothing was logged.
    """
    logs = [entry for entry in training["log_history"] if "budget" in entry and "temperature" in entry]
    if not logs:
        raise ValueError("training must have a log_history with 'budget' and 'temperature': use BudgetCallback.")
    step, budget, temperature = (
        np.array([entry[name] for entry in logs]) for name in ("step", "budget", "temperature")
    )
    near = max(1, len(logs) // 10)
    smooth = [budget[max(0, n - near) : n + near + 1].mean() for n in range(len(logs))]
    figure, [left, right] = new_figure(2, width=7.5)
    left.plot(step, budget, ".", color="grey", markersize=3, label="one batch, at a drawn budget or its own")
    left.plot(step, smooth, color=COLORS["ours"], label=f"mean of {2 * near + 1} logs")
    left.set(ylabel="budget, share of heads", ylim=(0, 1.02))
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    right.plot(step, temperature, color=COLORS["ours"])
    right.set(ylabel="temperature of the scores", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
    settings = {"data": training.get("dataset"), "seed": training.get("arguments", {}).get("seed")}
    _title(figure, "Has training settled?", settings, training.get("rows"))
    return save_figure(figure, path)


__all__ = ["plot_accuracy", "plot_inputs", "plot_layers", "plot_time", "plot_training"]
