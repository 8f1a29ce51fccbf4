"""Doubted rows: each batch split on its own beside rows of many batches that share full batches of the second look."""

import argparse
import copy
import queue
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from inputs import build_models, load_tokenizer, read_texts, tokenize
from measure import ROOT, Agreement, interleave, ratio, show_ratio, spread, stopwatch, table

from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.batching import batches_by_length
from hf_budgetformer.tools.looking import answer_rows


SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "data": "docstrings",
    "device": "cpu",
    "max_length": 128,
    "batch_size": 32,
    "batches": 32,
    "narrow_budget": 0.25,
    "first_look": 1 / 12,
    "doubted": 0.1,
    "served": True,  # the queue of examples/serve.py as well, without HTTP; rows come as they are drawn
    "max_wait": 0.5,  # seconds that a doubted request waits at most
}
Rows = dict[str, list[list[int]]]
SPLIT = {"looks, shared": "looks, split", "served, shared": "served, split"}


class EndingQueue(queue.Queue):
    """Empty, it is gone, as that of a server is when the server ends."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As upstream."""
        if timeout is None and self.empty():
            raise EOFError
        return super().get(block, timeout)


class Answers:
    """Takes what the loop of a server sends: scores by number of the request."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}

    def send(self, item: Any, consumer_id: int) -> None:
        """Raises unless it is the first answer to its request, and no error."""
        number, (answer, status, *_) = item
        if status != "OK" or number in self.scores:
            raise SystemExit(f"request {number} was answered twice, or with {status}.")
        self.scores[number] = answer["score"]


def make_server(model: Any, settings: dict[str, Any], texts: list[str], max_wait: float) -> Callable[[], list[float]]:
    """The loop of examples/serve.py with all requests in its queue; gives their scores in the order of the rows."""
    sys.path.append(str(ROOT / "examples"))
    from litserve.callbacks import CallbackRunner

    import serve

    api = serve.Classifier("", (), settings["batch_size"], max_wait)
    api.pre_setup()
    api.model, api.tokenizer = model, copy.deepcopy(load_tokenizer())
    api.tokenizer.model_max_length = settings["max_length"]
    questions = [serve.Question(text=text) for text in texts]

    def run() -> list[float]:
        requests, answers = EndingQueue(), Answers()
        for number, question in enumerate(questions):
            requests.put((0, number, time.monotonic(), question))
        with suppress(SystemExit):
            serve.QueueLoop().run_batched_loop(api, requests, answers, CallbackRunner())
        return [answers.scores[number] for number in range(len(questions))]

    return run


def look_twice(model: Any, rows: Rows, settings: dict[str, Any]) -> None:
    """Makes a plain call look twice, and doubt the share that the settings say."""
    first_look = settings["first_look"]
    logits = answer_split(model, rows, settings["batch_size"], budget=first_look)[0]
    model.config.looks = [first_look, 1.0]
    model.config.confidence = [confidence(logits, None).quantile(settings["doubted"]).item()]


def answer_split(model: Any, rows: Rows, batch_size: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and budgets, 1 of a stock model, of a call for each batch, sorted by length."""
    count = len(rows["input_ids"])
    logits, spent = torch.empty(count, model.num_labels), torch.ones(count)
    for places, batch in batches_by_length(rows, load_tokenizer(), batch_size):
        out = model(**batch.to(model.device), **options)
        logits[places] = out.logits.float().cpu()
        if "budget" in out:
            spent[places] = out.budget.cpu()
    return logits, spent


def answer_shared(model: Any, rows: Rows, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, each look at all rows before the next begins."""
    count = len(rows["input_ids"])
    logits, spent = torch.empty(count, model.num_labels), torch.empty(count)
    for answers in answer_rows(model, rows, load_tokenizer(), batch_size):
        logits[answers.places], spent[answers.places] = answers.logits, answers.spent
    return logits, spent


@torch.inference_mode()
def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times each way to answer all rows, in turn; forming batches is included, tokenizing only where served."""
    size, device = settings["batch_size"], torch.device(settings["device"])
    texts, data = read_texts(settings["data"], options.data, size * settings["batches"], settings["seed"])
    rows = {"input_ids": tokenize(texts, settings["max_length"])}
    stock, ours = (model.to(device) for model in build_models(settings))
    look_twice(ours, rows, settings)
    logits, spent = answer_split(ours, rows, size)
    agreement = Agreement(settings["dtype"])
    full = answer_split(ours, rows, size, budget=1.0)[0]
    agreement.check("ours 1", full, answer_split(stock, rows, size)[0])
    masked = answer_split(ours, rows, size, budget=settings["first_look"], executor="masked")[0]
    agreement.check("first look", answer_split(ours, rows, size, budget=settings["first_look"])[0], masked)
    shared, shared_spent = answer_shared(ours, rows, size)
    agreement.check("looks, shared", shared, logits)
    agreement.check("looks, shared: budgets", shared_spent, spent)
    ways: dict[str, Callable[[], Any]] = {
        "stock sorted": lambda: answer_split(stock, rows, size),
        "looks, split": lambda: answer_split(ours, rows, size),
        "looks, shared": lambda: answer_shared(ours, rows, size),
    }
    if settings["served"]:
        scores = logits.softmax(-1).amax(-1)
        for name, max_wait in (("served, split", 0.0), ("served, shared", settings["max_wait"])):
            ways[name] = make_server(ours, settings, texts, max_wait)
            agreement.check(name, torch.tensor(ways[name]()), scores)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "doubted": (spent > 1.0).float().mean().item(),
    }
    for threads in settings["threads"]:
        torch.set_num_threads(threads)
        times = interleave({name: stopwatch(way) for name, way in ways.items()}, settings["repeats"])
        figures[str(threads)] = {
            name: {
                "rows_per_second": spread([len(texts) / seconds for seconds in times[name]]),
                "ratio": ratio(times, name, "stock sorted"),
                "ratio_to_split": ratio(times, name, SPLIT[name]) if name in SPLIT else None,
            }
            for name in ways
        }
    return {"agreement": agreement.to_dict(), "data": data, "figures": figures}


def section(result: dict[str, Any]) -> str:
    """For the report: a table for each number of threads."""
    settings, figures = result["settings"], result["figures"]
    text = (
        f"\n{settings['batches']} batches of {settings['batch_size']}, cut at {settings['max_length']} tokens, on "
        f"{figures['device']}; of the rows {figures['doubted']:.0%} are doubted by a first look at "
        f'{settings["first_look"]:.3g}. "Split": each batch asks the full model about its own doubted rows; '
        '"shared": those of many batches wait for each other. "Served": the queue of `examples/serve.py`, full, rows '
        "as they come.\n"
    )
    head = ["", "rows per second", "stock sorted /", "split /"]
    for threads in settings["threads"]:
        rows = []
        for name, x in figures[str(threads)].items():
            ratios = [show_ratio(x["ratio"]), show_ratio(x["ratio_to_split"])]
            rows.append([name, f"{x['rows_per_second']['median']:.0f}", *ratios])
        text += f"\n{threads} threads\n\n" + table(head, rows)
    return text
