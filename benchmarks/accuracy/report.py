"""Tables and plots of the accuracy experiments, made from their results and from nothing else."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hf_budgetformer.tools.plots import COLORS, new_figure, save_figure


RESAMPLES = 2000
SHARES = (0.5, 0.25, 0.125)
# What was aimed for, in points, by budget: the figure, the other method, whether its answers are to be correct or to
# agree with the dense model.
AIMS: list[tuple[str, str, str, dict[float, float]]] = [
    ("accuracy against static pruning", "static {}", "correct", {0.5: 0.0, 0.25: 0.3, 0.125: 1.0}),
    ("accuracy against dense", "dense", "correct", {1.0: -0.3, 0.5: -0.3, 0.25: -1.0}),
    ("agreement with dense, against equal budgets", "equal budgets", "agrees", {0.25: 1.0, 0.125: 1.5}),
]
CORRELATED = {"entropy": "the dense model's entropy", "cost": "its cost at the lowest budget"}
Run = dict[str, Any]
LOOKS = {
    "ours": (COLORS["ours"], "o", "ours, one checkpoint"),
    "three times the steps": (COLORS["own"], "D", "ours, three times the steps"),
    "equal budgets": (COLORS["equal"], "s", "equal budgets, one checkpoint"),
    "static": (COLORS["static"], "^", "static, retrained for each"),
    "dense": (COLORS["stock"], "*", "dense"),
}


def read_runs(folder: Path) -> dict[tuple[str, int, str], Run]:
    """Every run of an experiment, by data set, seed and method."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(run["data"], run["seed"], run["method"]): run for run in found}


def evaluation(run: Run, asked: float | None) -> Run:
    """The figures of a run at the budget asked for."""
    for figures in run["evaluations"]:
        if figures["asked"] == asked or (asked and figures["asked"] and abs(figures["asked"] - asked) < 1e-6):
            return dict(figures)
    raise KeyError(asked)


def bits(text: str) -> np.ndarray:
    """Of a row of zeros and ones."""
    return np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")


def difference(pairs: list[tuple[str, str]]) -> tuple[float, float, float]:
    """Mean difference in points, and its 95% interval by paired bootstrap over the rows of each run.

    Args:
        pairs: For each run, of ours and of the other, right or wrong for each test row.
    """
    generator = np.random.default_rng(0)
    means, resampled = [], np.zeros(RESAMPLES)
    for ours, other in pairs:
        delta = bits(ours).astype(float) - bits(other)
        means.append(delta.mean())
        resampled += delta[generator.integers(0, len(delta), (RESAMPLES, len(delta)))].mean(1)
    low, high = np.quantile(resampled / len(pairs), [0.025, 0.975])
    return 100 * float(np.mean(means)), 100 * float(low), 100 * float(high)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds; a dash where there are none."""
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def accuracy_table(runs: dict[tuple[str, int, str], Run]) -> str:
    """Accuracy by method and budget, a column for each data set; heads and FLOPs over all."""
    names = sorted({data for data, _, _ in runs})
    rows = []
    for method in sorted({method for _, _, method in runs}, key=lambda x: (x != "dense", x != "ours", x)):
        mine = [run for run in runs.values() if run["method"] == method]
        budgets = [x["asked"] for x in mine[0]["evaluations"]]
        for budget in budgets:
            found = {
                name: [evaluation(run, budget) for run in mine if run["data"] == name and has(run, budget)]
                for name in names
            }
            every = [x for figures in found.values() for x in figures]
            asked = "" if len(budgets) == 1 else ", own" if budget is None else f", {budget:.3g}"
            cells = [mean_and_spread([x["accuracy"] for x in found[name]]) for name in names]
            heads, flops = (float(np.mean([x[key] for x in every])) for key in ("heads", "flops_ratio"))
            rows.append([method + asked, *cells, f"{heads:.1%}", f"{flops:.2f}"])
    return table(["method, budget asked for", *names, "heads used", "FLOPs of all heads"], rows)


def has(run: Run, budget: float | None) -> bool:
    """Whether a run was evaluated at a budget."""
    return any(x["asked"] == budget for x in run["evaluations"])


def compare(
    runs: dict[tuple[str, int, str], Run], ours: str, share: float, other: str, other_budget: float | None, what: str
) -> tuple[float, float, float, int] | None:
    """How much better a method is at a budget than another, over the data sets and seeds that have both.

    Returns:
        Mean difference in points and its 95% interval, see `difference`, and the number of runs; None without any.
    """
    pairs = [
        (evaluation(runs[(*cell, ours)], share)[what], evaluation(runs[(*cell, other)], other_budget)[what])
        for cell in sorted({(data, seed) for data, seed, _ in runs})
        if (*cell, ours) in runs and (*cell, other) in runs
    ]
    return (*difference(pairs), len(pairs)) if pairs else None


def show(found: tuple[float, float, float, int] | None) -> str:
    """Of what `compare` found; a dash where that is nothing."""
    return "{:+.1f} [{:+.1f}, {:+.1f}] ({})".format(*found) if found else "-"


def comparisons(runs: dict[tuple[str, int, str], Run]) -> str:
    """Ours against the others, run by run, with intervals."""

    def against(share: float, other: str, other_budget: float | None, what: str = "correct", ours: str = "ours") -> str:
        return show(compare(runs, ours, share, other, other_budget, what))

    rows = []
    for share in (1.0, *SHARES):
        rows.append(
            [
                f"{share:.3g}",
                against(share, "dense", None),
                against(share, f"static {share}", None),
                against(share, "dense", None, ours="three times the steps"),
                against(share, f"static {share}", None, ours="three times the steps"),
                against(share, "equal budgets", share),
                against(share, "equal budgets", share, "agrees"),
                against(share, "fixed heads", share),
                against(share, "heads not ranked", share),
                against(share, "without teacher", share),
                against(share, "one stage", share),
            ]
        )
    head = ["budget", "dense", "static pruning, retrained", "three times the steps: dense",
            "three times the steps: static", "equal budgets", "equal budgets, agreement with dense",
            "the same heads for all inputs", "heads not ranked", "without teacher", "in one stage"]  # fmt: skip
    used = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    return table([head[i] for i in used], [[row[i] for i in used] for row in rows])


def targets(runs: dict[tuple[str, int, str], Run]) -> str:
    """What was aimed for beside what was measured, means over runs."""
    rows = []
    for text, other, what, aims in AIMS:
        any_budget = other == "equal budgets"  # trained as long as ours, and no longer
        for (share, aim), ours in product(aims.items(), ["ours"] if any_budget else ["ours", "three times the steps"]):
            if found := compare(runs, ours, share, other.format(share), share if any_budget else None, what):
                met = "yes" if round(found[0], 1) >= aim else "no"
                rows.append([f"{ours}: points of {text}, at {share:.3g}", show(found), f">= {aim:+.1f}", met])
    for name, aim in (("entropy", 0.6), ("cost", 0.4)):
        value = np.mean([run["spearman"][name] for run in runs.values() if run["method"] == "ours"])
        figure = f"ours: Spearman of an input's heads at 0.25 with {CORRELATED[name]}"
        rows.append([figure, f"{value:.2f}", f">= {aim}", "yes" if round(value, 2) >= aim else "no"])
    return table(["figure", "measured", "target", "met"], rows)


def other_figures(runs: dict[tuple[str, int, str], Run]) -> str:
    """What was asked for and spent, the largest fall between neighbours, and whether budgets follow the input."""
    by_method = {name: [run for run in runs.values() if run["method"] == name] for name in ("ours", "equal budgets")}
    ours = by_method["ours"]
    asked = [x["asked"] for x in ours[0]["evaluations"] if x["asked"] is not None]
    errors = [np.mean([evaluation(run, budget)["heads"] / budget - 1 for run in ours]) for budget in asked]
    spent = ", ".join(f"{error:+.1%} at {budget:.3g}" for error, budget in zip(errors, asked, strict=True))
    accuracy = np.mean([[evaluation(run, budget)["accuracy"] for budget in asked] for run in ours], 0)
    falls = 100 * (accuracy[:-1] - accuracy[1:])
    worst = int(falls.argmax())
    own = [evaluation(run, None) for run in ours]
    rows = [
        ["heads spent, relative to those asked for", spent],
        [
            "largest fall in accuracy from one budget to the next, mean over runs",
            f"{falls[worst]:.1f} points, {asked[worst]:.3g} to {asked[worst + 1]:.3g}",
        ],
        [
            "own budget: mean, standard deviation over inputs",
            f"{np.mean([x['heads'] for x in own]):.3f}, {np.mean([x['heads_std'] for x in own]):.3f}",
        ],
    ]
    for name, text in CORRELATED.items():
        cells = [  # where all inputs get alike there is no correlation
            f"{method} {np.mean(np.nan_to_num([run['spearman'][name] for run in found])):.2f}"
            for method, found in by_method.items()
            if found
        ]
        rows.append([f"Spearman of an input's heads at 0.25 with {text}, mean over runs", ", ".join(cells)])
    return table(["figure", "value"], rows)


def curve(runs: list[Run]) -> list[tuple[float, float, float]]:
    """Share of heads, accuracy and its spread over seeds, for each method and budget of some runs, by heads."""
    points: dict[Any, list[tuple[float, float]]] = {}
    for run in runs:
        for x in run["evaluations"]:
            if len(run["evaluations"]) == 1 or x["asked"] is not None:
                points.setdefault((run["method"], x["asked"]), []).append((x["heads"], x["accuracy"]))
    return sorted((*np.mean(x, 0).tolist(), float(np.std(x, 0)[1])) for x in points.values())


def plot(runs: dict[tuple[str, int, str], Run], path: Path, title: str) -> None:
    """Accuracy against the mean share of heads, mean over seeds, a panel for each data set."""
    names = sorted({data for data, _, _ in runs})
    figure, axes = new_figure(len(names), max(5.0, 3.4 * len(names)))
    for axis, name in zip(axes, names, strict=True):
        mine = [run for run in runs.values() if run["data"] == name]
        for kind, (color, marker, label) in LOOKS.items():
            points = curve([run for run in mine if run["method"].split(" 0.")[0] == kind])
            if points:
                line = "none" if kind == "dense" else "-"
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(x, y, spread, color=color, marker=marker, linestyle=line, capsize=2, label=label)
        seeds, rows = len({run["seed"] for run in mine}), mine[0]["rows"]
        text = f"{rows[0]} training and {rows[1]} test rows, {seeds} seed" + "s" * (seeds > 1)
        axis.set_title(f"{name}\n{text}", fontsize=8)
        axis.set_xlabel("mean share of heads used")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(handles.values(), handles, fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def time_section(runs: dict[tuple[str, int, str], Run], timed: dict[str, Any], path: Path) -> str:
    """Accuracy against measured time: a plot, and the fastest budget that is as good as dense within half a point.

    Args:
        runs: Of an accuracy experiment.
        timed: Result of a model benchmark with a trained checkpoint's own choices.
        path: Of the plot.

    Returns:
        Markdown; nothing unless the checkpoint that was timed is that of one of the runs.
    """
    by_weights = {run["weights"]: run for run in runs.values() if "weights" in run}
    own = by_weights.get(timed.get("checkpoint"))
    if own is None:
        return ""
    figures = timed["figures"][str(max(timed["settings"]["threads"]))]["variants"]
    budgets = {f"{budget:g}": budget for budget in timed["settings"]["budgets"]}  # as variants are called
    same_seed = {
        method: run for (data, seed, method), run in runs.items() if (data, seed) == (own["data"], own["seed"])
    }
    dense, heads = evaluation(same_seed["dense"], None)["accuracy"], 12  # of the model that both measured
    points: dict[str, list[tuple[float, float, str]]] = {"dense": [(1.0, dense, "")]}
    for variant, found in figures.items():
        kind, _, number = variant.partition(" ")
        if kind == "stock" and number == "sorted":
            points["dense"].append((found["ratio"]["median"], dense, "sorted"))
        elif kind == "learned":
            y = evaluation(own, budgets[number])["accuracy"]
            points.setdefault(own["method"], []).append((found["ratio"]["median"], y, number))
        elif kind == "static" and (cut := same_seed.get(f"static {int(number) / heads:g}")):
            y = evaluation(cut, None)["accuracy"]
            points.setdefault("static", []).append((found["ratio"]["median"], y, f"{int(number) / heads:g}"))
    figure, [axis] = new_figure()
    for kind, found in points.items():
        color, marker, label = LOOKS[kind]
        x, y, notes = zip(*sorted(found), strict=True)
        label = "stock" if kind == "dense" else label
        axis.plot(x, y, color=color, marker=marker, linestyle="none" if kind == "dense" else "-", label=label)
        for left, low, note in zip(x, y, notes, strict=True):
            axis.annotate(note, (left, low), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="times faster than the stock model", ylabel="accuracy")
    axis.set_title(timed["settings"]["title"], fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
    good = [(x, note) for x, y, note in points[own["method"]] if y >= dense - 0.005]
    fastest = f"{max(good)[0]:.2f}x at {max(good)[1]}" if good else "none"
    cuts = [own["source"]["max_length"], timed["settings"]["max_length"]]
    return (
        f"![accuracy against time]({path.name})\n\nOne and the same checkpoint ({own['method']}, seed {own['seed']}), "
        f"its accuracy on {own['rows'][1]} test rows cut at {cuts[0]} tokens, and its time on batches as they come, "
        f"cut at {cuts[1]} (section {timed['settings']['title']}); numbers at the points are budgets. Fastest of our "
        f"budgets within half a point of the dense model it started from: {fastest}."
    )


def precision(runs: list[Run]) -> str:
    """What is to be said of the runs' number type: nothing where all trained in float32."""
    full = sorted({f"{run['data']} with seed {run['seed']}" for run in runs if not run["settings"].get("bf16")})
    if len({run["settings"].get("bf16", False) for run in runs}) == 1:
        return "" if full else ", bf16 autocast"
    return f", bf16 autocast but for {', '.join(full)}"


def section(folder: Path, output: Path, timed: list[dict[str, Any]]) -> str:
    """Markdown of all experiments under `folder`; writes their plots into `output`; `timed` are model benchmarks."""
    parts = []
    for experiment in sorted(path for path in folder.glob("*") if path.is_dir()):
        runs = read_runs(experiment)
        if not runs:
            continue
        about = json.loads((folder.parent / "experiments" / f"{experiment.name}.json").read_text())
        picture = output / f"accuracy_{experiment.name}.png"
        plot(runs, picture, about["title"])
        first = next(iter(runs.values()))
        against_time = [
            time_section(runs, x, output / f"accuracy_{experiment.name}_{x['experiment']}_time.png") for x in timed
        ]
        commits = sorted({(run["environment"]["commit"] or "unknown")[:12] for run in runs.values()})
        compared = any(method == "ours" for _, _, method in runs)
        several = len({seed for _, seed, _ in runs}) > 1  # one seed tells too little to be held against a target
        parts += [
            f"### {about['title']}",
            f"![accuracy against heads]({picture.name})",
            accuracy_table(runs),
            "Ours against others: points of accuracy unless said, 95% interval by paired bootstrap, runs compared:\n\n"
            f"{comparisons(runs)}\n{other_figures(runs)}" if compared else "",
            targets(runs) if compared and several else "",
            f"Dense: {first['settings']['dense']}; from there every method: {first['settings']['budget_stage']}; "
            f"batches of {first['settings']['batch_size']}"
            f"{precision(list(runs.values()))}. ± is the standard deviation over seeds. "
            f"Commits: {', '.join(commits)}.",
            *against_time,
        ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"
