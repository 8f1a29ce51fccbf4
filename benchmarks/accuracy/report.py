"""Tables and the plot of the accuracy results, from JSON and from nothing else."""

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from accuracy.figures import Times
from measure import table

from hf_budgetformer.tools.plots import new_figure, save_figure


HERE = Path(__file__).resolve().parent
# The trial that became the recipe, as it is named in trials.json; changes of it begin alike.
RECIPE = "R1"
# What the issue asked for: of a pair or a method, the least that will do.
TARGETS: tuple[tuple[str, str, float], ...] = (
    ("looks 0.25 - full", "accuracy", -0.5),
    ("looks 0.33 - full", "accuracy", -0.2),
    ("looks 0.5 - full", "accuracy", 0.0),
    ("looks 0.25 - full", "agreement", -3.5),
    ("looks 0.33 - full", "agreement", -2.0),
    ("looks 0.5 - full", "agreement", -0.7),
    ("looks 0.25 - static 1/4", "accuracy", 0.3),
    ("looks 0.25 - static 1/4", "agreement", 2.0),
    ("looks 0.33 - static 1/4", "accuracy", 0.4),
    ("looks 0.33 - static 1/4", "agreement", 3.0),
    ("looks in the time of 1/4 - constant 1/4", "accuracy", 0.5),
    ("looks in the time of 1/4 - constant 1/4", "agreement", 2.5),
    ("constant 1/4 - static 1/4", "accuracy", -0.2),
    ("constant 1/8 - static 1/8", "accuracy", -0.3),
    ("looks 0.25 - exits 0.25", "agreement", 1.5),
    ("looks 0.33 - exits 0.33", "agreement", 1.5),
    ("looks 0.5 - exits 0.5", "agreement", 1.5),
)
# And of a promise, the most that it may cost.
COSTS = {"0.01": 0.4, "0.02": 0.3}
SERIES = {
    "looks": (["looks in the time of 1/4", "looks 0.25", "looks 0.33", "looks 0.5"], "o-", "#0072B2"),
    "every input alike": (["constant 1/12", "constant 1/8", "constant 1/6", "constant 1/4"], "s--", "#E69F00"),
    "static pruning, trained for each": (["static 1/8", "static 1/4", "static 1/2"], "^:", "#D55E00"),
    "early exit": (["exits 0.25", "exits 0.33", "exits 0.5"], "v:", "#CC79A7"),
    "fewer layers": (["layers 1/6", "layers 1/3"], "D:", "#999999"),
}


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """By data set; and the summary."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    summary = results.pop("summary", {})
    results.pop("routers", None)
    for result in results.values():
        result["means"] = {}
        for label, seeds in result["results"].items():
            figures = ("accuracy", "agreement", "cost")
            result["means"][label] = {x: float(np.mean([run[x] for run in seeds.values()])) for x in figures}
    return results, summary


def tables(folder: Path = HERE / "results") -> str:
    """Markdown; empty where there are no results."""
    results, summary = read_results(folder)
    if not summary:
        return ""
    text = "\n## Accuracy and agreement\n\n"
    text += (
        "`accuracy/results/`: MiniLM, fine-tuned on each data set once for each seed, and what stands beside it. "
        "Accuracy / agreement with the full model, on rows that nothing was chosen on, means over seeds, in %. Looks "
        "have the mean cost that they are named after, thresholds from calibration rows.\n\n"
    )
    columns = (
        "full",
        "looks 0.25",
        "looks 0.33",
        "looks 0.5",
        "constant 1/4",
        "constant 1/12",
        "static 1/4",
        "exits 0.33",
    )
    rows = []
    for name, result in results.items():
        cells = [f"{name} ({len(result['results'].get('constant 1/4', {}))})"]
        for label in columns:
            x = result["means"].get(label)
            cells.append("-" if x is None else f"{100 * x['accuracy']:.1f} / {100 * x['agreement']:.1f}")
        rows.append(cells)
    text += table(["data set (seeds)", *columns], rows)
    text += (
        "\nDifferences in points, means over seeds, then data sets, with the 95% interval of a paired bootstrap over "
        "rows; seeds of a data set, which are of the same rows, make it no narrower\n\n"
    )
    rows = []
    for pair, x in summary["pairs"].items():
        cells = [pair.replace(" - ", " against "), f"{x['data_sets']}, {x['runs']}"]
        for figure in ("accuracy", "agreement"):
            low, high = x[f"{figure}_interval"]
            cells.append(f"{x[figure]:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append(cells)
    text += table(["", "data sets, runs", "accuracy", "agreement"], rows)
    rows = []
    for pair, figure, least in TARGETS:
        if pair in summary["pairs"]:
            value = summary["pairs"][pair][figure]
            met = "yes" if value >= least else "no"
            rows.append([pair.replace(" - ", " against "), figure, f"{value:+.2f}", f">= {least:+.1f}", met])
    text += "\nTargets, in points\n\n" + table(["", "", "measured", "target", "met"], rows)
    if share := summary.get("training"):
        text += (
            f"\nA narrow encoder is trained in {share['median']:.2f} of the time that fine-tuning the full model took, "
            f"asking that included (median, from {share['least']:.2f} to {share['most']:.2f}; runs: {share['runs']}; "
            "0.6 was aimed for).\n"
        )
    rows = []
    for level, x in summary["promises"].items():
        target = f"<= {COSTS[level]:.2f}"
        cells = [f"{float(level):.0%}", str(x["runs"]), str(x["kept"]), f"{x['disagreement']:.2%}"]
        rows.append([*cells, f"{x['mean_cost']:.3f}", target, f"{x['least_cost']:.3f}"])
    text += (
        "\nTuned for a disagreement, on the calibration rows, and tried on the test rows. The least cost is that of "
        "thresholds which differ on just so many of the test rows: what is spent beyond it is the price of not knowing "
        "them, with 95% confidence, from so many calibration rows\n\n"
    )
    text += table(["promised", "runs", "kept", "mean disagreement", "mean cost", "target", "least cost"], rows)
    return text + trials_table(folder.parent / "trials")


def kept(folder: Path = HERE / "results") -> str:
    """What README shows: means over the data sets that have every row of the table."""
    results, _summary = read_results(folder)
    rows_of = {
        "full model": "full",
        "looks, a mean of 1/4": "looks 0.25",
        "looks, a mean of 1/3": "looks 0.33",
        "looks, a mean of 1/2": "looks 0.5",
        "looks, tuned for 1% disagreement": "tuned 0.01",
        "every input at 1/4": "constant 1/4",
        "static pruning, trained for 1/4": "static 1/4",
        "early exit, a mean of 1/4": "exits 0.25",
    }
    chosen = {name: x for name, x in results.items() if set(rows_of.values()) <= x["means"].keys()}
    if not chosen:
        return "Not measured yet for this version: `make accuracy DATA=folder` does, and fills this in.\n"
    rows = []
    for name, label in rows_of.items():
        accuracy, agreement, cost = (
            100 * np.mean([x["means"][label][figure] for x in chosen.values()])
            for figure in ("accuracy", "agreement", "cost")
        )
        rows.append([name, f"{cost / 100:.2f}", f"{accuracy:.1f}", f"{agreement:.1f}"])
    about = (
        f"Means over {len(chosen)} data sets ({', '.join(chosen)}), in %, on rows that nothing was trained or chosen "
        "on; MiniLM. Agreement is with the full model's answers, work is the mean share of the full model's FLOPs:"
    )
    return f"{textwrap.fill(about, 120)}\n\n" + table(["", "work", "accuracy", "agreement"], rows)


def trials_table(folder: Path) -> str:
    """Trials that led to the recipe, as they were scored; then changes of the recipe, beside it."""
    trials = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    trials.sort(key=lambda x: (x["data"], x["seed"], x["trial"]))
    recipe_of = {(x["data"], x["seed"]): x for x in trials if x["trial"] == RECIPE}
    if not recipe_of:
        return ""
    began: list[list[str]] = []
    changes: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["trial"].startswith(RECIPE) or "together" in trial["recipe"]:
            changes.setdefault(trial["trial"], []).append(trial)
        if trial["trial"] == RECIPE or trial["trial"] not in changes:
            about = [f"{trial['data']}, {trial['seed']}", _fields(trial["recipe"]) or "as it began"]
            began.append([*about, *_cells(_scores(trial), "")])
    recipe = next(iter(recipe_of.values()))["recipe"]
    rows: list[list[str]] = []
    for runs in changes.values():
        runs = [x for x in runs if (x["data"], x["seed"]) in recipe_of]
        changed = _fields({key: x for run in runs for key, x in run["recipe"].items() if recipe.get(key) != x})
        if changed:
            beyond = np.mean([_scores(x) - _scores(recipe_of[x["data"], x["seed"]]) for x in runs], axis=0)
            count = Counter(x["data"] for x in runs)
            rows.append([changed, ", ".join(f"{x} ({number})" for x, number in count.items()), *_cells(beyond, "+")])
    head = ["1/4", "1/6", "1/12", "looks at .25"]
    return (
        "\n### Trials of the recipe\n\nOn calibration rows: agreement with the full model in % and divergence from it "
        "in nats, of each budget alone, and agreement of looks at a mean of a quarter. How the recipe came about; "
        "compare trials of the same data set and seed, which is that of the full model too:\n\n"
        + table(["data set, seed", "what it changes", *head], began)
        + "\nWhat changes of it do, in points and nats beside the recipe on the same full models, means over runs. The "
        f"recipe: {_fields(recipe)}.\n\n" + table(["what it changes", "data sets (runs)", *head], rows)
    )


def _scores(trial: dict[str, Any]) -> np.ndarray:
    """Agreement in % and divergence at each of three budgets, then agreement of looks at a mean of a quarter: (7,)."""
    budgets = [trial[budget] for budget in ("1/4", "1/6", "1/12")]
    looks = max(x.get("looks 0.25", x)["agreement"] for x in budgets)
    return np.array([figure for x in budgets for figure in (100 * x["agreement"], x["divergence"])] + [100 * looks])


def _cells(scores: np.ndarray, sign: str) -> list[str]:
    """Of `_scores`, a cell for each budget and one for looks; `sign` is how numbers show theirs."""
    pairs = zip(scores[:-1:2], scores[1::2], strict=True)
    budgets = [f"{agreement:{sign}.1f}, {divergence:{sign}.3f}" for agreement, divergence in pairs]
    return [*budgets, f"{scores[-1]:{sign}.1f}"]


def _fields(recipe: dict[str, Any]) -> str:
    def say(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(say, value))}]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {say(value)}" for key, value in recipe.items())


def plot(path: Path, folder: Path = HERE / "results") -> bool:
    """Agreement and accuracy beside the full model, against time; whether there is anything to show."""
    results, summary = read_results(folder)
    if not summary:
        return False
    figure, axes = new_figure(2, width=10.0, height=4.2)
    chosen = [x for x in results.values() if "looks 0.25" in x["results"]]
    for label, (wanted, style, colour) in SERIES.items():
        # What all of them have, so that like is set beside like.
        points = [point for point in wanted if all(point in x["results"] for x in chosen)]
        if not points:
            continue
        times, agreements, accuracies = [], [], []
        for point in points:
            times.append(np.mean([time_of(x, point) for x in chosen]))
            agreements.append(100 * np.mean([x["means"][point]["agreement"] for x in chosen]))
            lost = [x["means"][point]["accuracy"] - x["means"]["full"]["accuracy"] for x in chosen]
            accuracies.append(100 * np.mean(lost))
        for axis, values in zip(axes, (agreements, accuracies), strict=True):
            axis.plot(times, values, style, color=colour, label=label)
    axes[0].set(title="Same answer as the full model", ylabel="% of the inputs", xlabel="time / our full model's")
    axes[1].set(title="Accuracy", ylabel="points beside the full model", xlabel="time / our full model's")
    for axis, level in zip(axes, (100.0, 0.0), strict=True):
        axis.axhline(level, color="black", linewidth=0.8)
        axis.set_xlim(0.0, None)
    axes[1].legend(loc="center left", fontsize=8)
    save_figure(figure, path)
    return True


def time_of(result: dict[str, Any], point: str) -> float:
    """Of one input, as a share of the full model's time, packed; work where it was not measured."""
    times = Times((result.get("measured_time") or {}).get("ratios"))
    kind, _, amount = point.partition(" ")
    if kind in ("constant", "static"):
        top, _, bottom = amount.partition("/")
        return times.constant(float(top) / float(bottom))
    if kind == "looks":
        runs = result["results"][point].values()
        return float(np.mean([times.looks(x["first"], x["cost"] - x["first"]) for x in runs]))
    if kind == "exits":
        return times.exits(float(amount))
    cost: float = result["means"][point]["cost"]
    return cost
