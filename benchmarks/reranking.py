"""Reranks the standard library's definitions: `reranking.py train`, then `quality`, then `timing` on a quiet machine.

What BM25 finds for a query is scored by a cross encoder. Quality and speed are those of the stock model, of the same in
other runtimes, and of ours at a constant budget and in two stages: all candidates cheaply, the best of them once more.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy.fits import fit
from datasets import Dataset
from inputs import checkpoint, keep_quiet
from measure import ROOT, environment, interleave, ratio, read_filled, show_ratio, spread, stopwatch, table
from transformers import AutoTokenizer

from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits
from hf_budgetformer.tools.batching import batches_by_length, tokenized
from hf_budgetformer.tools.reranking import merge_rankings, ndcg, rank, ranking_losses
from hf_budgetformer.tools.results import write_json
from hf_budgetformer.tools.rivals import make_rivals


sys.path.append(str(ROOT / "examples"))
from retrieval import Retrieval, Searches, draw_searches, load_retrieval


SETTINGS: dict[str, Any] = {
    "title": "",
    "model": "minilm",
    "seed": 0,
    "max_length": 64,
    "candidates": 100,  # of each query, the best by BM25; the answer takes the last place where BM25 misses it
    "train_queries": 2500,
    "hard_negatives": 2,  # of each query, drawn from so many of the best by BM25
    "drawn_from": 100,
    "batch_size": 16,
    "epochs": 1,
    "learning_rate": 1e-4,
    "narrow_candidates": 4,  # pairs of each query that the narrow encoder learns from: the answer and drawn ones
    "narrow_batch_size": 32,
    "narrow_epochs": 3,
    "narrow_learning_rate": 6e-4,
    "test_queries": 100,
    "first_look": 1 / 6,
    "constant": 1 / 4,
    "keeps": [0, 5, 10, 20, 30],  # for the second look; the least that keeps enough for other queries is timed
    "enough": 0.99,  # of the full model's NDCG
    "validation_queries": 100,
    "rivals": ["onnx-int8", "openvino-int8"],
    "asked_batch_size": 32,
    "timed_queries": 16,
    "repeats": 5,
}
TOP_K = 10


def read_searches(settings: dict[str, Any], split: str, count: int) -> tuple[Retrieval, Searches]:
    """The set, and some queries of a split."""
    retrieval = load_retrieval()
    return retrieval, draw_searches(retrieval, split, count, settings["candidates"], settings["seed"])


def train(settings: dict[str, Any], work: Path) -> None:
    """Makes `work/stock`, a cross encoder as sentence-transformers trains it, and `work/ours` from it."""
    _, searches = read_searches(settings, "train", settings["train_queries"])
    if not (work / "stock").exists():
        train_stock(settings, searches, work / "stock")
    if not (work / "ours").exists():
        train_narrow(settings, searches, work)


def train_stock(settings: dict[str, Any], searches: Searches, folder: Path) -> None:
    """Fine-tunes MiniLM on answers and passages that BM25 wrongly finds, by binary cross entropy."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    draw = random.Random(settings["seed"])
    rows: dict[str, list[Any]] = {"query": [], "passage": [], "label": []}
    for query, candidates, relevant in zip(*searches, strict=True):
        wrong = [number for number in range(min(settings["drawn_from"], len(candidates))) if number not in relevant]
        for number in [*relevant, *draw.sample(wrong, settings["hard_negatives"])]:
            rows["query"].append(query)
            rows["passage"].append(candidates[number])
            rows["label"].append(float(number in relevant))
    model = CrossEncoder(checkpoint(settings["model"]), num_labels=1, max_length=settings["max_length"], device="cpu")
    arguments = CrossEncoderTrainingArguments(
        str(folder.with_name("trainer")),
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=0.1,
        seed=settings["seed"],
        save_strategy="no",
        report_to=[],
        logging_steps=20,
        use_cpu=True,
    )
    data = Dataset.from_dict(rows)
    CrossEncoderTrainer(model, arguments, train_dataset=data, loss=BinaryCrossEntropyLoss(model)).train()
    model.save_pretrained(str(folder))


def train_narrow(settings: dict[str, Any], searches: Searches, work: Path) -> None:
    """Puts a narrow encoder beside the fine-tuned model, which stays as it is; labels only order its units."""
    tokenizer = AutoTokenizer.from_pretrained(work / "stock", model_max_length=settings["max_length"])
    draw = random.Random(settings["seed"])
    rows: dict[str, list[Any]] = {"text": [], "text_pair": [], "labels": []}
    for query, candidates, relevant in zip(*searches, strict=True):
        others = [number for number in range(len(candidates)) if number not in relevant]
        for number in [*relevant, *draw.sample(others, settings["narrow_candidates"] - 1)]:
            rows["text"].append(query)
            rows["text_pair"].append(candidates[number])
            rows["labels"].append(float(number in relevant))
    data = add_teacher_logits(Dataset.from_dict(rows), str(work / "stock"), tokenizer)
    data = data.map(
        lambda row: tokenizer(row["text"], row["text_pair"], truncation=True),
        batched=True,
        remove_columns=["text", "text_pair"],
    )
    model = BudgetFormerForSequenceClassification.from_pretrained(work / "stock", freeze_full=True)
    fit(
        model,
        data,
        settings["narrow_epochs"],
        settings["narrow_learning_rate"],
        settings["seed"],
        settings["narrow_batch_size"],
        callbacks=[BudgetCallback()],
    )
    model.save_pretrained(work / "ours")
    tokenizer.save_pretrained(work / "ours")


class Rankers:
    """Every way to score passages for a query.

    Args:
        settings: Of the benchmark.
        work: Folder in which `train` left both models.
        threads: That each may use.
        sample: Pairs that other runtimes are calibrated and checked on.
    """

    def __init__(self, settings: dict[str, Any], work: Path, threads: int, sample: list[tuple[str, str]]) -> None:
        from sentence_transformers import CrossEncoder

        if not (work / "ours").exists():
            raise SystemExit(f"--work {work}: nothing is trained there yet, run `reranking.py train` first.")
        self.settings = settings
        self.stock = CrossEncoder(str(work / "stock"), max_length=settings["max_length"], device="cpu")
        self.ours: Any = BudgetFormerForSequenceClassification.from_pretrained(work / "ours").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(work / "ours", model_max_length=settings["max_length"])
        batches = [batch for _, batch in self._batches(sample)]
        self.rivals = make_rivals(settings["rivals"], self.ours, batches, threads)

    def _batches(self, pairs: list[tuple[str, str]]) -> Any:
        columns = {"text": [query for query, _ in pairs], "text_pair": [passage for _, passage in pairs]}
        rows = tokenized(columns, self.tokenizer)
        return batches_by_length(rows, self.tokenizer, self.settings["asked_batch_size"])

    def ask_stock(self, query: str, passages: list[str]) -> np.ndarray:
        """Logits (n,), as sentence-transformers predicts them: sorted by length."""
        pairs = [(query, passage) for passage in passages]
        scores: np.ndarray = self.stock.predict(
            pairs, batch_size=self.settings["asked_batch_size"], activation_fn=torch.nn.Identity()
        )
        return scores

    def ask_rival(self, name: str, query: str, passages: list[str]) -> np.ndarray:
        """Logits (n,) of the stock model in another runtime, sorted by length."""
        scores = np.empty(len(passages), np.float32)
        for places, batch in self._batches([(query, passage) for passage in passages]):
            scores[places] = self.rivals[name].answer(batch)[:, 0].numpy()
        return scores

    def rank(self, query: str, passages: list[str], budgets: tuple[float, float], keep: int) -> list[dict[str, Any]]:
        """As a user ranks."""
        size = self.settings["asked_batch_size"]
        return rank(self.ours, self.tokenizer, query, passages, budgets=budgets, keep=keep, batch_size=size)

    def ask_ours(self, budget: float, query: str, passages: list[str]) -> np.ndarray:
        """Logits (n,) of one look at all."""
        scores = np.empty(len(passages), np.float32)
        alone = (budget, 1.0, 0) if budget < 1.0 else (self.settings["first_look"], 1.0, len(passages))
        for hit in self.rank(query, passages, alone[:2], alone[2]):
            scores[hit["corpus_id"]] = hit["score"]
        return scores

    def scorers(self) -> dict[str, Callable[[str, list[str]], np.ndarray]]:
        """Ways that give every passage one score, by name."""
        constant = self.settings["constant"]
        ways: dict[str, Callable[[str, list[str]], np.ndarray]] = {"stock": self.ask_stock}
        for name in self.rivals:
            ways[name] = lambda query, passages, name=name: self.ask_rival(name, query, passages)
        ways["ours, constant"] = lambda query, passages: self.ask_ours(constant, query, passages)
        ways["ours, first look"] = lambda query, passages: self.ask_ours(self.settings["first_look"], query, passages)
        return ways


def reciprocal_rank(order: np.ndarray, relevant: set[int]) -> float:
    """Of the first relevant candidate among the best `TOP_K`; 0 where there is none."""
    places = [place for place, number in enumerate(order[:TOP_K].tolist()) if number in relevant]
    return 1.0 / (places[0] + 1) if places else 0.0


def summary(orders: list[np.ndarray], relevant: list[set[int]]) -> dict[str, float]:
    """Mean NDCG and reciprocal rank of the best `TOP_K`."""
    pairs = list(zip(orders, relevant, strict=True))
    gains = [ndcg(order, answers, TOP_K) for order, answers in pairs]
    ranks = [reciprocal_rank(order, answers) for order, answers in pairs]
    return {"ndcg": round(float(np.mean(gains)), 5), "mrr": round(float(np.mean(ranks)), 5)}


def draw_sample(searches: Searches, seed: int) -> list[tuple[str, str]]:
    """Pairs that other runtimes are calibrated and checked on."""
    pairs = [
        (query, text) for query, given in zip(searches.queries, searches.candidates, strict=True) for text in given
    ]
    return random.Random(seed).sample(pairs, min(512, len(pairs)))


def may_rank(order: list[int], first: np.ndarray, last: np.ndarray, keep: int, near: float = 1e-4) -> bool:
    """Whether two stages may end in that order: scores that lie as near as that may change places.

    Args:
        order: Numbers of the n candidates, best first.
        first: (n,), scores of the first look.
        last: (n,), scores of the last look.
        keep: How many are looked at again.
        near: Last bits depend on which rows share a batch.
    """
    again, rest = order[:keep], order[keep:]
    falls = (np.diff(last[again]) <= near).all() and (np.diff(first[rest]) <= near).all()
    chosen = not again or not rest or first[again].min() >= first[rest].max() - near
    return bool(sorted(order) == [*range(len(first))] and falls and chosen)


def least_keep(settings: dict[str, Any], rankers: Rankers) -> int:
    """The least of "keeps" from which on two stages have enough of the full model's NDCG, on validation queries."""
    _, searches = read_searches(settings, "validation", settings["validation_queries"])
    ways, losses, full = rankers.scorers(), [], []
    for query, given, relevant in zip(*searches, strict=True):
        first, last = (ways[name](query, given) for name in ("ours, first look", "stock"))
        losses.append(ranking_losses(first, last, relevant, TOP_K))
        full.append(ndcg(np.argsort(-last, kind="stable"), relevant, TOP_K))
    lost, chosen = np.mean(losses, 0), settings["candidates"]
    for keep in sorted(settings["keeps"], reverse=True):
        gain = np.mean(full) - lost[keep]
        print(f"keep {keep}: {gain:.4f} of {np.mean(full):.4f} on validation queries", flush=True)
        if gain < settings["enough"] * np.mean(full):
            break
        chosen = keep
    return int(chosen)


def quality(settings: dict[str, Any], work: Path, threads: int) -> None:
    """Writes `work/quality.json`: NDCG@10 and MRR@10 of every way on test queries."""
    retrieval, searches = read_searches(settings, "test", settings["test_queries"])
    queries, texts, relevant = searches
    _, known = read_searches(settings, "validation", 50)  # the runtimes are calibrated on other queries
    rankers = Rankers(settings, work, threads, draw_sample(known, settings["seed"]))
    scores: dict[str, list[np.ndarray]] = {}
    for name, ask in rankers.scorers().items():
        scores[name] = [ask(query, given) for query, given in zip(queries, texts, strict=True)]
        print(name, summary([np.argsort(-x, kind="stable") for x in scores[name]], relevant), flush=True)
    ways = {"BM25": summary([np.arange(len(given)) for given in texts], relevant)}
    ways |= {name: summary([np.argsort(-x, kind="stable") for x in lists], relevant) for name, lists in scores.items()}
    pairs = list(zip(scores["ours, first look"], scores["stock"], strict=True))
    chosen = least_keep(settings, rankers)
    orders = {keep: [merge_rankings(*pair, keep) for pair in pairs] for keep in {*settings["keeps"], chosen}}
    keeps = {str(keep): summary(orders[keep], relevant) for keep in sorted(orders)}
    ways["ours, two stages"] = keeps[str(chosen)]
    said = rankers.rank(queries[0], texts[0], (settings["first_look"], 1.0), chosen)
    if not may_rank([hit["corpus_id"] for hit in said], *pairs[0], chosen):
        raise SystemExit("rank() and the ranking merged from scores differ: what is not right is not reported.")
    full = [np.argsort(-last, kind="stable")[:TOP_K].tolist() for _, last in pairs]
    same = [order[:TOP_K].tolist() == best for order, best in zip(orders[chosen], full, strict=True)]
    result = {"ways": ways, "keep": chosen, "keeps": keeps, "same_best": float(np.mean(same)), "settings": settings}
    result["data"] = {
        "name": "definitions of the standard library",
        "python": sys.version.split()[0],
        "passages": len(retrieval.passages),
        "sha256": hashlib.sha256("\n".join([*retrieval.passages, *queries]).encode()).hexdigest(),
    }
    result["ndcg_kept"] = ways["ours, two stages"]["ndcg"] / max(ways["stock"]["ndcg"], 1e-9)
    write_json(work / "quality.json", {**result, "environment": environment()})


@torch.inference_mode()
def timing(settings: dict[str, Any], work: Path, threads: int, output: Path) -> None:
    """Passages per second of every way, in turn, a query after the other, tokenizing included; writes the result."""
    if not (work / "quality.json").exists():
        raise SystemExit(f"--work {work}: run `reranking.py quality` first.")
    judged = json.loads((work / "quality.json").read_text())
    machine = environment()
    _, (queries, texts, relevant) = read_searches(settings, "test", settings["timed_queries"])
    sample = draw_sample(Searches(queries, texts, relevant), settings["seed"])
    rankers = Rankers(settings, work, threads, sample)
    worst = 0.0
    for query, given in zip(queries[:4], texts[:4], strict=True):
        worst = max(worst, float(np.abs(rankers.ask_ours(1.0, query, given) - rankers.ask_stock(query, given)).max()))
    if worst > 1e-4:
        raise SystemExit(f"ours at 1 differs by {worst:.2g} from the stock model: what is not right is not timed.")
    looks = (settings["first_look"], 1.0)
    ways: dict[str, Callable[[str, list[str]], Any]] = {
        **rankers.scorers(),
        "ours, all open": lambda query, given: rankers.ask_ours(1.0, query, given),
        "ours, two stages": lambda query, given: rankers.rank(query, given, looks, judged["keep"]),
    }

    def over_all(way: Callable[[str, list[str]], Any]) -> Callable[[], None]:
        def run() -> None:
            for query, given in zip(queries, texts, strict=True):
                way(query, given)

        return run

    times = interleave({name: stopwatch(over_all(way)) for name, way in ways.items()}, settings["repeats"])
    count = sum(len(given) for given in texts)
    figures = {
        name: {
            "passages_per_second": spread([count / seconds for seconds in times[name]]),
            "ratio": ratio(times, name, "stock"),
            "ratio_to_rivals": {rival: ratio(times, name, rival) for rival in rankers.rivals},
        }
        for name in ways
    }
    result = {"settings": settings, "threads": threads, "environment": machine, "max_difference": worst}
    write_json(output, {**result, "quality": judged, "speed": figures})
    print(section(json.loads(output.read_text())))


def section(result: dict[str, Any]) -> str:
    """For the report."""
    settings, judged, speed = result["settings"], result["quality"], result["speed"]
    ways = judged["ways"]
    names = {
        "BM25": "BM25 alone",
        "stock": "stock, `CrossEncoder.predict`",
        "ours, first look": f"ours at {settings['first_look']:.3g}",
        "ours, constant": f"ours at {settings['constant']:.3g}",
        "ours, two stages": f"ours at {settings['first_look']:.3g}, then the best {judged['keep']} at 1",
        "ours, all open": "ours at 1",
    }
    head = [
        "",
        "NDCG@10",
        "of stock",
        "MRR@10",
        "passages per second",
        "stock /",
        *(f"{x} /" for x in settings["rivals"]),
    ]
    rows = []
    for name in dict.fromkeys([*ways, *speed]):
        quality_of = ways.get(name, ways["stock"])
        row = [names.get(name, name), f"{quality_of['ndcg']:.4f}", f"{quality_of['ndcg'] / ways['stock']['ndcg']:.1%}"]
        row.append(f"{quality_of['mrr']:.4f}")
        if name in speed:
            figures = speed[name]
            ratios = [figures["ratio"], *figures["ratio_to_rivals"].values()]
            row.append(f"{figures['passages_per_second']['median']:.0f}")
            row += map(show_ratio, ratios)
        else:
            row += ["-"] * (2 + len(settings["rivals"]))
        rows.append(row)
    return (
        f"\n## {settings['title']}\n\n`reranking.json`: {settings['candidates']} candidates of BM25 for each of "
        f"{settings['test_queries']} test queries, among {judged['data']['passages']:,} passages (sha256 "
        f"{judged['data']['sha256'][:12]}); {result['threads']} threads, tokenizing included. How many are looked at "
        f"again was chosen on {settings['validation_queries']} other queries. The best ten are the full model's, in "
        f"its order, for {judged['same_best']:.0%} of the queries.\n\n" + table(head, rows)
    )


def main(arguments: list[str] | None = None) -> None:
    """Does one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "quality", "timing"])
    parser.add_argument("--settings", type=Path, default=ROOT / "benchmarks" / "reranking.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reranking", help="what is made once, and kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reranking.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    settings = read_filled(options.settings, SETTINGS)
    keep_quiet()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.do == "train":
        train(settings, options.work)
    elif options.do == "quality":
        quality(settings, options.work, options.threads)
    else:
        timing(settings, options.work, options.threads, options.output)


if __name__ == "__main__":
    main()
