"""Tables of the paper's experiment: what run.py measured, beside what the paper published."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from measure import table as markdown


# By folder of data: name; accuracy of full attention, of BudgetFormer; FLOPs cut; mean s. All from arXiv 2604.22583.
PUBLISHED: dict[str, tuple[str, float, float, float, float]] = {
    "dbpedia14_subset": ("DBpedia", 0.9830, 0.9859, 0.032, 0.085),
    "ag_news": ("AG News", 0.9099, 0.9022, 0.027, 0.212),
    "imdb": ("IMDB", 0.8354, 0.8356, 0.100, 0.601),
    "snli": ("SNLI", 0.7835, 0.8106, 0.021, 0.364),
    "yelp_stars_10k": ("Yelp Full", 0.5810, 0.6190, 0.201, 0.198),
}
PUBLISHED_ABLATIONS: dict[str, tuple[float, ...]] = {  # of DBpedia, SNLI and Yelp Full
    "0.1": (0.9846, 0.6704, 0.5818),
    "0.25": (0.9478, 0.7598, 0.5813),
    "0.5": (0.6202, 0.5838, 0.2737),
    "1.0": (0.1670, 0.3190, 0.0743),
    "random": (0.7511, 0.3370, 0.3244),
}
NAMES = {"full": "full attention", "literal": "paper-literal", "ours": "ours"}
FIGURES = {"accuracy": ".4f", "mean_budget": ".3f", "head_share": ".1%"}
Results = list[dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, after an empty line."""
    return "\n" + markdown(head, rows)


def values(results: Results, variant: str, *path: str) -> list[Any]:
    """One figure of every seed of a variant; none where it was not measured."""
    entries: list[Any] = [result for result in results if result["settings"]["variant"] == variant]
    for key in path:
        entries = [x[key] for x in entries if key in x]
    return entries


def show(figures: Sequence[float], style: str = ".4f") -> str:
    """Mean over seeds, and their range where they differ."""
    if not figures:
        return "-"
    least, most = f"{min(figures):{style}}", f"{max(figures):{style}}"
    return f"{mean(figures):{style}}" + (f" [{least}, {most}]" if least != most else "")


def describe(results: Results) -> str:
    """What was run, where; refuses results that do not belong together."""
    varied = ("variant", "fields", "seed")
    shared = [({k: v for k, v in x["settings"].items() if k not in varied}, x["data"]) for x in results]
    settings, data = shared[0]
    if any(x != shared[0] for x in shared):
        raise SystemExit(f"{results[0]['experiment']}: results of several settings or data: delete or redo the older.")
    machines = sorted({x["environment"].get("gpu") or x["environment"]["cpu"] for x in results})
    commits = sorted({(x["environment"]["commit"] or "unknown")[:12] for x in results})
    return f"""
## The paper's experiment: {settings["title"] or data["name"]}

{settings["num_hidden_layers"]} layers of {settings["num_attention_heads"]} heads, {settings["hidden_size"]} wide, from
random weights. {data["name"]}: {data["train"]["rows"]:,} training rows, {data["test"]["rows"]:,} test rows, at most
{settings["max_length"]} tokens; {settings["epochs"]:g} epochs, batches of {settings["batch_size"]}, rate
{settings["learning_rate"]:g}. {"; ".join(machines)}; commit {", ".join(commits)}. Means over seeds, ranges in brackets.
Published figures (arXiv 2604.22583) are of a model 768 wide, all training rows and 10 epochs.

"As the paper counts" leaves out the attention core (scores and weighted sum) of closed heads; the last column counts
what skipping every closed head computes, routers included. Both are shares of the whole model's FLOPs, padding aside.
"""


def main_table(results: Results, data: str) -> str:
    """Full attention, the paper's method and ours, each at its own budget; and what was published."""
    rows = []
    for variant, name in NAMES.items():
        evaluations = values(results, variant, "figures", "evaluations", "own")
        figures = [show([x[key] for x in evaluations], style) for key, style in FIGURES.items()]
        cuts = [show([x["flops_cut"][way] for x in evaluations], ".1%") for way in ("core_only", "true")]
        rows.append([name, str(len(evaluations)), *figures, *cuts])
    for key in sorted(PUBLISHED, key=lambda key: key != data):
        name, full, accuracy, cut, budget = PUBLISHED[key]
        name = f"published, {name} (full attention {full:.4f})"
        rows.append([name, "", f"{accuracy:.4f}", f"{budget:.3f}", "-", f"{cut:.1%}", "-"])
    return table(["", "seeds", "accuracy", "mean s", "heads run", "FLOPs cut as the paper counts", "FLOPs cut"], rows)


def ablation_table(results: Results) -> str:
    """Accuracy, and the share of heads run, with s fixed in training, s forced at inference, and random heads."""

    def cell(variant: str, evaluation: str) -> str:
        entries = values(results, variant, "figures", "evaluations", evaluation)
        shares = f" ({mean(x['head_share'] for x in entries):.0%} of heads)" if entries else ""
        return show([x["accuracy"] for x in entries]) + shares

    rows = []
    for s, published in PUBLISHED_ABLATIONS.items():
        cells = [cell(f"literal-{s}", "own"), cell("literal", s), cell("ours", s)]
        name = "heads at random, own budget" if s == "random" else f"s = {s}"
        rows.append([name, *cells, *(f"{x:.4f}" for x in published)])
    head = ["", "paper-literal, trained at s", "paper-literal, forced to s", "ours, forced to s"]
    return table([*head, *(f"published, {name}" for name in ("DBpedia", "SNLI", "Yelp Full"))], rows)


def explanation_table(results: Results) -> str:
    """Norm of what hard gates let through over what soft ones did, layer by layer; and accuracy either way."""
    explanations = values(results, "literal", "explanation")
    if not explanations:
        return ""
    rows = []
    for s in explanations[0]["norm_ratio"]:
        layers = [show(x, ".2f") for x in zip(*(x["norm_ratio"][s] for x in explanations), strict=True)]
        hard = show(values(results, "literal", "figures", "evaluations", s, "accuracy"))
        soft = show([x["soft_accuracy"][s] for x in explanations if s in x["soft_accuracy"]])
        rows.append(["own budget" if s == "own" else f"s = {s}", *layers, hard, soft])
    names = [f"norm ratio, layer {index + 1}" for index in range(len(rows[0]) - 3)]
    text = """
Paper-literal trains with soft weights at its own budget and infers with hard gates; how far that lies apart: the norm
ratio is the norm of the gated attention output with the hard gates of s over that with the soft weights of the own
budget, its mean over test inputs. The last column runs the soft weights themselves.
"""
    return text + table(["", *names, "accuracy, hard gates", "accuracy, soft weights"], rows)


def tables(results_folder: Path) -> str:
    """Markdown of all experiments that have results in the folder; empty where there are none.

    Raises:
        SystemExit: Results of one experiment have different settings.
    """
    experiments: dict[str, Results] = {}
    for path in sorted(results_folder.glob("*.json")):
        result = json.loads(path.read_text())
        experiments.setdefault(result["experiment"], []).append(result)
    text = ""
    for results in experiments.values():
        text += describe(results) + main_table(results, results[0]["data"]["name"])
        text += ablation_table(results) + explanation_table(results)
    return text
