"""Loads examples/serve.py on loopback: serving.py experiments/serving/X.json -> results/serving/X.json.

Three ways in turn, at several numbers of clients that each send a request as soon as their last one is answered: every
request asks for all heads; none asks, so that the model's own budget counts; and the same with a load-aware server.
Nothing is timed before the server's answers agree with those of the model asked directly.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from inputs import keep_quiet, read_texts
from measure import ROOT, Agreement, environment, interleave, ratio, read_filled, spread

from hf_budgetformer.tools.data import load_classifier


SETTINGS: dict[str, Any] = {
    "title": "",
    "data": "ag_news",
    "clients": [1, 8, 32],
    "requests": 400,  # of a round, at most
    "seconds": 30,  # of a round, at most
    "repeats": 5,
    "max_batch": 8,  # of the servers; more clients make a queue
    "max_wait_ms": 5,
    "floor": 0.25,
    "threads": 2,
    "seed": 0,
}
ANSWER_SECONDS = 60.0


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of an experiment, defaults filled in; ends with a message that names what is wrong."""
    settings = read_filled(path, SETTINGS)
    for name, value in settings.items():
        if not isinstance(value, type(SETTINGS[name])):
            raise SystemExit(f"{path}: {name} must be a {type(SETTINGS[name]).__name__}, got {value!r}.")
    counts = ("requests", "seconds", "repeats", "max_batch", "threads")
    if wrong := [name for name in counts if settings[name] < 1]:
        raise SystemExit(f"{path}: {', '.join(wrong)} must be >= 1.")
    if not settings["clients"] or not all(isinstance(x, int) and x >= 1 for x in settings["clients"]):
        raise SystemExit(f"{path}: clients must be numbers >= 1, at least one, got {settings['clients']}.")
    return settings


@contextmanager
def running_server(checkpoint: str, *options: str, threads: int = 1, patience: float = 300.0) -> Iterator[int]:
    """Port of a server that answers on loopback; whatever happens, none of its processes outlives the block.

    Args:
        checkpoint: Folder or Hub id.
        *options: More arguments of `serve.py`.
        threads: Of the model's process.
        patience: Seconds to wait until it answers.

    Raises:
        SystemExit: It ends, or does not answer in time; shows what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), checkpoint, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + patience
            while not is_healthy(port):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command[1:])} does not answer:\n{log.read()[-4000:]}")
                time.sleep(0.2)
            yield port
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(45)
            with suppress(ProcessLookupError):  # its children are in its session, whether it ended them or not
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_healthy(port: int) -> bool:
    """Whether the server says that it is ready."""
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


def ask(connection: HTTPConnection, question: dict[str, Any]) -> tuple[str, Any]:
    """Status of a request, "error" where there is no answer, and what came back."""
    try:
        connection.request("POST", "/predict", json.dumps(question), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return str(response.status), json.loads(response.read())
    except (OSError, HTTPException, ValueError) as error:
        connection.close()  # opens again with the next request
        return "error", repr(error)


def load(port: int, questions: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """Sends questions, each once, until there are no more or time is up.

    Returns:
        seconds of the whole; statuses, how many of each; latencies, seconds, and heads, shares, of what was answered.
    """
    left, end = iter(questions), time.monotonic() + seconds

    def client() -> list[tuple[str, float, float]]:
        connection, found = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS), []
        for question in left:  # of a list, which threads may share
            start = time.perf_counter()
            status, answer = ask(connection, question)
            found.append((status, time.perf_counter() - start, answer["head_budget"] if status == "200" else 0.0))
            if time.monotonic() > end:
                break
        connection.close()
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [x for each in [pool.submit(client) for _ in range(clients)] for x in each.result()]
    return {
        "seconds": time.perf_counter() - start,
        "statuses": Counter(status for status, *_ in answers),
        "latencies": [latency for status, latency, _ in answers if status == "200"],
        "heads": [heads for status, _, heads in answers if status == "200"],
    }


@torch.no_grad()
def check_answers(agreement: Agreement, checkpoint: str, port: int, texts: list[str]) -> None:
    """Asks for all heads, for the own budget and for a quarter, all at once, and compares with the model."""
    model, tokenizer = load_classifier(checkpoint, budgeted=True)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    budgets = [1.0, None, 0.25]
    questions = [{"text": text, "head_budget": budget} for budget in budgets for text in texts]
    with ThreadPoolExecutor(len(questions)) as pool:
        sent = [pool.submit(ask, HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS), x) for x in questions]
        got = [future.result() for future in sent]
    if failed := [answer for answer in got if answer[0] != "200"]:
        raise SystemExit(f"The server answers {failed[0][1]!r}.")
    for budget in budgets:
        answers = [answer for _, answer in got[: len(texts)]]
        got = got[len(texts) :]
        expected = model(**batch, head_budget=budget, executor="masked")
        labels = torch.tensor([model.config.label2id[x["label"]] for x in answers])
        scores = expected.logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
        agreement.check(f"score, budget {budget}", torch.tensor([x["score"] for x in answers]), scores)
        heads = torch.tensor([x["head_budget"] for x in answers])
        agreement.check(f"share of heads, budget {budget}", heads, expected.head_budget)


def measure(settings: dict[str, Any], checkpoint: str, data: Path | None) -> dict[str, Any]:
    """Requests per second, latency and heads of every way at every load."""
    texts, source = read_texts(settings["data"], data, settings["requests"], settings["seed"])
    agreement, rounds = Agreement("float32"), {}
    options = ("--max-batch", str(settings["max_batch"]), "--max-wait-ms", str(settings["max_wait_ms"]))
    aware = ("--load-aware", "--floor", str(settings["floor"]))
    with ExitStack() as servers:
        start = partial(running_server, checkpoint, *options, threads=settings["threads"])
        plain, load_aware = (servers.enter_context(start(*more)) for more in ((), aware))
        check_answers(agreement, checkpoint, plain, texts[: min(8, settings["max_batch"])])
        ways = {"all heads": (plain, 1.0), "own budget": (plain, None), "load-aware": (load_aware, None)}

        def timed(name: str, way: str, clients: int, round_number: int) -> float:
            port, budget = ways[way]
            questions = [{"text": text, "head_budget": budget} for text in texts]
            if round_number == 0:
                questions = questions[: 4 * clients]
            found = load(port, questions, clients, settings["seconds"])
            if round_number:
                rounds.setdefault(name, []).append(found)
            return found["seconds"] / max(1, len(found["latencies"]))

        cells = {f"{clients} clients, {way}": (way, clients) for clients in settings["clients"] for way in ways}
        variants = {name: partial(timed, name, *cell) for name, cell in cells.items()}
        times = interleave(variants, settings["repeats"])
    figures = {
        name: {
            "requests_per_second": spread([1.0 / x for x in times[name]]),
            "ratio": ratio(times, name, f"{clients} clients, all heads"),
            **summary(rounds[name]),
        }
        for name, (_, clients) in cells.items()
    }
    return {"agreement": agreement.to_dict(), "data": source, "figures": figures}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Latency and heads over all requests that were answered, and how many were answered how."""
    latencies, heads = ([x for each in rounds for x in each[name]] for name in ("latencies", "heads"))
    if not latencies:
        raise SystemExit(f"No request was answered: {[dict(x['statuses']) for x in rounds]}.")
    p50, p95 = (1000 * torch.tensor(latencies).quantile(torch.tensor([0.5, 0.95]))).tolist()
    return {
        "latency_ms": {"p50": round(p50, 2), "p95": round(p95, 2)},
        "heads": round(sum(heads) / len(heads), 4),
        "statuses": dict(sum((x["statuses"] for x in rounds), Counter())),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs every experiment named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="JSON files, see benchmarks/experiments/serving")
    parser.add_argument("--checkpoint", required=True, help="a trained BudgetFormer, tokenizer included")
    parser.add_argument("--data", type=Path, help="folder of <name>/test.parquet, or one file of texts for all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "serving")
    options = parser.parse_args(arguments)
    keep_quiet()
    for path, settings in {path: read_settings(path) for path in options.experiments}.items():
        machine, start = environment(), time.perf_counter()
        machine["packages"]["litserve"] = version("litserve")
        found = measure(settings, options.checkpoint, options.data)
        result = {
            "experiment": path.stem,
            "settings": {**settings, "checkpoint": Path(options.checkpoint).name},
            "environment": machine,
            "seconds": round(time.perf_counter() - start),
            **found,
        }
        target = options.output / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, target)
        for name, x in result["figures"].items():
            latency = "p50 {p50:.0f} ms, p95 {p95:.0f} ms".format(**x["latency_ms"])
            print(f"{name}: {x['requests_per_second']['median']:.1f} requests/s, {latency}, {x['heads']:.0%} of heads")
        print(target)


if __name__ == "__main__":
    main()
