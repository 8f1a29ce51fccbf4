"""Fills docs/long_documents.md with what was measured, and draws its plot: report.py [RESULTS [PAGE]]."""

import argparse
import json
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
from long.needles import TASKS
from measure import fill, table

from hf_budgetformer.tools.plots import new_figure, save_figure


HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "long_documents.md"
TITLES = {
    "movie_reviews_polarity2": "movie reviews",
    "20newsgroups_stripped": "20 Newsgroups",
    "novels_authorship": "novels",
    "contract_nli": "ContractNLI",
}
OTHERS = {*TASKS, "lengths"}
WAYS = (
    "chunks", "chunks, max", "chunks, vote", "first", "ends", "chunks at 1/4", "chunks at 1/12", "chunks, looks",
    "first, looks", "ends, looks", "width: all chunks at 1/12, then open", "width: all chunks at 1/4, then open",
    "length: a chunk open, then all", "both: a chunk at 1/12, then all open",
    "both: a chunk at 1/12, all at 1/12, all open", "both: a chunk at 1/4, all at 1/4, all open",
    "looks, 0.15 of the work", "looks, 0.25 of the work", "looks, 0.33 of the work", "looks, 0.5 of the work",
)  # fmt: skip


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of all seeds, by data set."""
    results = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        results[result["data"]].append(result)
    return dict(results)


def mean(runs: list[dict[str, Any]], *path: str) -> float | None:
    """Of a figure over seeds; None where one lacks it."""
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
        values.append(value)
    return float(np.mean(values))


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def documents_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One table for each data set."""
    text = ""
    for name, runs in results.items():
        if name in OTHERS:
            continue
        size = runs[0]["documents"]
        text += (
            f"\n### {TITLES.get(name, name)}\n\n{size['rows']['test']} test documents of "
            f"{size['tokens']['median']:.0f} tokens (median; quartiles {size['tokens']['q1']:.0f} and "
            f"{size['tokens']['q3']:.0f}), "
            f"{size['chunks']:.1f} chunks each; trained on {size['rows']['train']}; seeds: {len(runs)}.\n\n"
        )
        rows = [["TF-IDF and a linear SVM", _show(mean(runs, "svm", "accuracy"), ".1%"), *["-"] * 5]]
        for way in WAYS:
            if way not in runs[0]["ways"]:
                continue
            figures = [mean(runs, "ways", way, x) for x in ("accuracy", "agreement", "cost")]
            share, seconds = (mean(runs, "timing", way, x, "median") for x in ("of_chunks", "seconds"))
            rate, held = None if seconds is None else 1.0 / seconds, mean(runs, "timing", way, "mib")
            cells = [*(_show(x, ".1%") for x in figures[:2]), *(_show(x, ".2f") for x in (figures[2], share, rate))]
            rows.append([way, *cells, _show(held, ".0f")])
        whole = ("untrained", "chunks", "chunks at 1/4", "chunks, looks")
        for positions, way in product(("tiled", "interpolated"), whole):
            path = (f"{positions}, untrained",) if way == "untrained" else (positions, way)
            if (accuracy := mean(runs, "long", *path, "accuracy")) is not None:
                label = way.replace("chunks", "whole documents").replace("untrained", "whole documents, untrained")
                rows.append([f"{label}, positions {positions}", _show(accuracy, ".1%"), *["-"] * 5])
        head = ["way", "accuracy", "agreement", "work", "time", "documents a second", "MiB"]
        text += table(head, rows)
    return text


def width_or_length(results: dict[str, list[dict[str, Any]]]) -> str:
    """What more chunks and what more width are worth at equal work."""
    rows = []
    for name, runs in results.items():
        if name in OTHERS:
            continue
        for cost, cascades in runs[0]["ways"]["at_cost"].items():
            best: dict[str, tuple[float, float]] = {}
            for cascade in cascades:
                kind = cascade.split(":")[0]
                figures = [mean(runs, "ways", "at_cost", cost, cascade, x) for x in ("agreement", "accuracy")]
                if None not in figures:
                    best[kind] = max(best.get(kind, (0.0, 0.0)), (figures[0], figures[1]))  # type: ignore[arg-type]
            shown = [f"{best[x][1]:.1%} / {best[x][0]:.1%}" if x in best else "-" for x in ("width", "length", "both")]
            rows.append([TITLES.get(name, name), cost, *shown])
    return table(["documents", "work", "width", "length", "both"], rows) if rows else "Not measured yet.\n"


def needles_table(runs: list[dict[str, Any]]) -> str:
    """What was spent by hops."""
    hops = runs[0]["by_hops"]
    rows = [
        [number, *(_show(mean(runs, "by_hops", number, x), ".1%") for x in ("open", "1/4", "1/12", "looks")),
         _show(mean(runs, "by_hops", number, "spent"), ".2f")]
        for number in hops
    ]  # fmt: skip
    correlations = {x: mean(runs, "spearman", x) for x in ("hops", "depth", "wrong", "doubt")}
    looks = {x: mean(runs, "looks", x) for x in ("accuracy", "agreement", "cost")}
    return (
        table(["hops", "all open", "1/4", "1/12", "looks", "spent"], rows)
        + f"\nAll open {_show(mean(runs, 'open', 'accuracy'), '.1%')}; looks {_show(looks['accuracy'], '.1%')} at "
        f"{_show(looks['cost'], '.2f')} of the work, agreement {_show(looks['agreement'], '.1%')}. Rank correlation of "
        f"what was spent with hops {_show(correlations['hops'], '.2f')}, with depth "
        f"{_show(correlations['depth'], '.2f')}, with whether the full model is wrong "
        f"{_show(correlations['wrong'], '.2f')}, and with how little sure that is of its answer "
        f"{_show(correlations['doubt'], '.2f')}; seeds: {len(runs)}.\n"
    )


def lengths_table(run: dict[str, Any]) -> str:
    """Time and memory by length."""
    figures: dict[Any, dict[str, str]] = defaultdict(dict)
    for cell in run["cells"]:
        window = "all" if cell["window"] is None else str(cell["window"])
        key = f"{cell['budget']:.3g}"
        figures[cell["length"], window][key] = f"{cell['of_stock_512']['median']:.2f} / {cell['mib']:.0f} MiB"
    budgets = list(dict.fromkeys(f"{cell['budget']:.3g}" for cell in run["cells"]))
    rows = [
        [str(length), f"{run['attention_share'][str(length)]:.0%}", window, *(cells[x] for x in budgets)]
        for (length, window), cells in figures.items()
    ]
    return table(["tokens", "attention's share", "sees", *(f"budget {x}" for x in budgets)], rows)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Agreement with all open on all chunks against work, a panel for each data set."""
    shown = {name: runs for name, runs in results.items() if name not in OTHERS}
    figure, axes = new_figure(len(shown), width=5.0 * len(shown), height=4.0)
    styles = {"width": ("o-", "#0072B2"), "length": ("s--", "#E69F00"), "both": ("^-.", "#009E73")}
    for (name, runs), axis in zip(shown.items(), axes, strict=True):
        for kind, (style, colour) in styles.items():
            points = []
            for cost in runs[0]["ways"]["at_cost"]:
                pairs = [
                    (
                        mean(runs, "ways", "at_cost", cost, x, "agreement"),
                        mean(runs, "ways", "at_cost", cost, x, "cost"),
                    )
                    for x in runs[0]["ways"]["at_cost"][cost]
                    if x.startswith(kind)
                ]
                if pairs := [x for x in pairs if None not in x]:
                    points.append(max(pairs))
            if not points:  # too dear for all of these
                continue
            axis.plot([x[1] for x in points], [100 * x[0] for x in points], style, color=colour, label=f"looks, {kind}")
        for way, mark in (("first", "x"), ("ends", "+"), ("chunks at 1/4", "D"), ("chunks at 1/12", "d")):
            x, y = mean(runs, "ways", way, "cost"), mean(runs, "ways", way, "agreement")
            axis.scatter([x], [100 * y], marker=mark, color="#555555", label=way, zorder=3)
        axis.set(xlabel="work, share of all chunks at full width", title=TITLES.get(name, name))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("same answer as all chunks at full width, %")
    kinds = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(kinds.values(), kinds.keys(), fontsize=8)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Fills the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=HERE / "results")
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = read(options.results)
    text = options.page.read_text()
    text = fill(text, "ways", documents_table(results))
    text = fill(text, "worth", width_or_length(results))
    for name in TASKS:
        if name in results:
            text = fill(text, name, needles_table(results[name]))
    if "lengths" in results:
        text = fill(text, "lengths", lengths_table(results["lengths"][0]))
    options.page.write_text(text)
    if results.keys() - OTHERS:
        plot(results, options.page.parent / "images" / "long_documents.png")


if __name__ == "__main__":
    main()
