"""Serves a BudgetFormer checkpoint over HTTP: requests that wait together are answered together, each at its budget.

    python examples/serve.py CHECKPOINT --load-aware
    curl 127.0.0.1:8000/predict --json '{"text": "a gripping film", "budget": 0.25}'

CHECKPOINT is a folder or Hub id, tokenizer included. A request may hold a `text_pair`, and leave out `budget`, a share
of the full model's work in (0, 1]: then it is answered like a plain call. The answer holds label, score, the budget
really spent, how many looks it took, and which promise it was given under. A bad request gets 400, 413 or 422 and the
reason, one that is not sent in time 408, one too many 503, one that waited too long 504. `/metrics` is for Prometheus.
"""

import argparse
import asyncio
import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import active_children, parent_process
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_budgetformer.budgets import Plan
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.looking import plan_deferred, take_look
from hf_budgetformer.tools.tuning import kept_promise
from promises import PROMISES_FILE, Level, read_promises


try:
    from fastapi import HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from litserve import LitAPI, LitServer  # type: ignore[import-untyped]
    from litserve.loops import BatchedLoop  # type: ignore[import-untyped]
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints
except ImportError as error:
    raise ImportError(
        f'Serving needs LitServe and prometheus-client: pip install "hf-budgetformer[serve]" ({error}).'
    ) from None

LONGEST_TEXT = 20_000  # characters; the model reads no more tokens than it has positions for
LARGEST_REQUEST = 2**20  # bytes
MOST_BATCHES = 8  # so many full batches of requests may wait for their answers
RECENT = 1000  # plain calls that the share of the doubted is of
# Seconds; finer than the client's own where answers of a first look lie.
LATENCIES = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
Text = Annotated[str, StringConstraints(max_length=LONGEST_TEXT)]


class Question(BaseModel):
    """What a request may hold; FastAPI refuses others before they reach a batch, whose neighbours they would spoil."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: Text
    text_pair: Text | None = None
    budget: float | None = Field(None, gt=0, le=1)


@dataclass(frozen=True)
class Pending:
    """A question that is not answered yet.

    Args:
        tokens: What the tokenizer made of it.
        budget: As asked for; None: a plain call.
        look: Number of the look that comes next in a plain call.
        spent: Share of the full model's work so far.
        since: When a look doubted it first, in seconds of the monotonic clock.
        promise: Of the `Level` at which its first look was taken; None: nothing is promised.
    """

    tokens: Any
    budget: float | None
    look: int = 0
    spent: float = 0.0
    since: float = math.inf
    promise: float | None = None


class QueueLoop(BatchedLoop):
    """LitServe's batches, but it sleeps until a request comes, and tells the API how many a batch left waiting.

    A request whose answer is still `Pending` is not answered, but comes back with the next batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.carried: list[Any] = []

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """The requests of the next batch; and those that have waited longer than the server's timeout, for a 504."""
        carried, self.carried = self.carried, []
        taken: list[Any] = []
        end = min((question.since + lit_api.batch_timeout for _, _, question in carried), default=None)
        try:
            while len(taken) < lit_api.max_batch_size:
                taken.append(request_queue.get(timeout=None if end is None else max(0.0, end - time.monotonic())))
                if end is None:
                    end = time.monotonic() + lit_api.batch_timeout
        except Empty:
            pass
        except (KeyboardInterrupt, EOFError, OSError):  # the server ends, and its queue with it
            sys.exit()
        lit_api.waiting = request_queue.qsize()
        oldest = time.monotonic() - (lit_api.request_timeout or math.inf)
        batch, late = carried, []
        for answers, uid, since, question in taken:
            if since < oldest:
                late.append((answers, uid))
            else:
                batch.append((answers, uid, question))
        return batch, late

    def put_response(
        self, transport: Any, response_queue_id: int, uid: str, response_data: Any, status: Any, response_type: Any
    ) -> None:
        """Sends an answer, or keeps the request that has none yet."""
        if isinstance(response_data, Pending):
            self.carried.append((response_queue_id, uid, response_data))
        else:
            super().put_response(transport, response_queue_id, uid, response_data, status, response_type)


class Classifier(LitAPI):
    """Answers a batch of questions, each at its budget.

    Plain calls that a look doubts wait for others, of following batches too, until they fill a batch of the next look:
    at most while requests wait, and `max_wait` seconds.

    Args:
        checkpoint: Folder or Hub id of a model and its tokenizer.
        levels: The checkpoint's own promise and looser ones, as `read_promises` gives them, for plain calls under load;
            empty: load changes nothing.
        max_batch: Most questions answered together.
        max_wait: Seconds that the first question of a batch waits for others.
        loosen_at: Waiting questions at which the first looser level is taken; twice as many for the second, and so on.
    """

    def __init__(
        self,
        checkpoint: str,
        levels: Sequence[Level] = (),
        max_batch: int = 32,
        max_wait: float = 0.01,
        loosen_at: int = 64,
    ) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=max_wait, loop=QueueLoop())
        self.checkpoint, self.levels, self.loosen_at = checkpoint, levels, loosen_at
        self.waiting = 0

    def setup(self, device: str) -> None:
        """Loads model and tokenizer, in the process that will use them."""
        if parent_process() is not None:
            # Ctrl+C reaches all processes of a terminal; this one is to answer what was asked, and is then ended.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.model, self.tokenizer = load_classifier(self.checkpoint, budgeted=True, device=device)

    def take_level(self) -> Level | None:
        """At which level the next first looks are taken: the looser, the more questions wait; None: the model's own."""
        if not self.levels:
            return None
        return self.levels[min(self.waiting // self.loosen_at, len(self.levels) - 1)]

    def own_level(self) -> float | None:
        """The checkpoint's own promise, as in `Level`; None: it promises no disagreement, or not with these looks."""
        promise = kept_promise(self.model.config)
        return promise["level"] if promise is not None and promise["risk"] == "disagreement" else None

    def decode_request(self, request: Question, **kwargs: Any) -> Pending:
        """The question as the model reads it; one that comes back as it is."""
        if isinstance(request, Pending):
            return request
        return Pending(self.tokenizer(request.text, request.text_pair, truncation=True), request.budget)

    def batch(self, inputs: list[Pending]) -> list[Pending]:
        """As they are: which of them share a call of the model is found as it is called."""
        return inputs

    @torch.no_grad()
    def predict(self, x: list[Pending], **kwargs: Any) -> list[Any]:
        """For each question its answer; or the question, if it waits for its next look."""
        answers: list[Any] = list(x)
        plain = [place for place, question in enumerate(x) if question.budget is None]
        budgeted = [place for place, question in enumerate(x) if question.budget is not None]
        plan, level = plan_deferred(self.model), self.take_level()
        promise = self.own_level() if level is None else level.promise
        for place in plain:
            if x[place].look == 0:  # or it was promised something already
                answers[place] = replace(x[place], promise=promise)
        if plan is None:
            if plain:
                self.call(answers, plain, looks=1)
        elif level is None:
            self.look(answers, plain, plan)
        else:
            self.look(answers, plain, plan._replace(thresholds=(level.threshold,)))
        if budgeted:
            budgets = torch.tensor([x[place].budget for place in budgeted])
            self.call(answers, budgeted, looks=None, budget=budgets)
        return answers

    def call(self, answers: list[Any], places: list[int], looks: int | None, **options: Any) -> None:
        """Answers the questions in these places by one call of the model."""
        batch = self.pad([answers[place] for place in places])
        outputs = self.model(**batch.to(self.model.device), **options)
        self.tell(answers, places, outputs.logits, outputs.budget.tolist(), looks)

    def look(self, answers: list[Any], places: list[int], plan: Plan) -> None:
        """Takes what looks are due at the plain calls in these places, and answers those that are not doubted."""
        queues = [[place for place in places if answers[place].look == number] for number in range(len(plan.looks))]
        for number, queue in enumerate(queues):
            while queue and (number == 0 or len(queue) >= self.max_batch_size or self.is_due(answers[queue[0]])):
                taken = queue[: self.max_batch_size]
                del queue[: self.max_batch_size]
                questions = [answers[place] for place in taken]
                seen, now = take_look(self.model, plan, number, self.pad(questions)), time.monotonic()
                spent = [question.spent + cost for question, cost in zip(questions, seen.cost.tolist(), strict=True)]
                self.tell(answers, taken, seen.logits, spent, number + 1)
                for place, question, share, doubted in zip(taken, questions, spent, seen.doubted.tolist(), strict=True):
                    if doubted:
                        since = min(question.since, now)
                        answers[place] = replace(question, look=number + 1, spent=share, since=since)
                        queues[number + 1].append(place)

    def is_due(self, question: Pending) -> bool:
        """Whether a doubted question waits no longer."""
        return self.waiting == 0 or time.monotonic() - question.since >= self.batch_timeout

    def pad(self, questions: list[Pending]) -> Any:
        """The questions as a batch."""
        return self.tokenizer.pad([question.tokens for question in questions], return_tensors="pt")

    def tell(
        self, answers: list[Any], places: list[int], logits: torch.Tensor, spent: list[float], looks: int | None
    ) -> None:
        """Puts answers in the place of the questions in these places."""
        scores, labels = logits.softmax(-1).max(-1)
        for place, label, score, share in zip(places, labels.tolist(), scores.tolist(), spent, strict=True):
            answer = {"label": self.model.config.id2label[label], "score": score, "budget": share}
            answers[place] = {**answer, "looks": looks, "promise": answers[place].promise}


class Metrics:
    """What is counted of a server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "budgetformer_requests",
            "Requests, by the status they were answered with.",
            ["status"],
            registry=self.registry,
        )
        self.answers = Counter(
            "budgetformer_answers",
            "Answers, by the looks they took (None: a budget was asked for) and the promise they were given under.",
            ["looks", "promise"],
            registry=self.registry,
        )
        self.waiting = Gauge("budgetformer_waiting", "Requests that are not answered yet.", registry=self.registry)
        self.seconds = Histogram(
            "budgetformer_latency_seconds",
            "From the head of a request to its answer.",
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.recent: deque[bool] = deque(maxlen=RECENT)
        share = Gauge(
            "budgetformer_doubted_share",
            f"Of the last {RECENT} plain calls, those that a look doubted.",
            registry=self.registry,
        )
        share.set_function(lambda: sum(self.recent) / max(1, len(self.recent)))

    def count(self, status: int, body: bytes, seconds: float) -> None:
        """Counts a request that was answered so, after so long."""
        self.requests.labels(status).inc()
        if status != 200:
            return
        answer = json.loads(body)
        self.seconds.observe(seconds)
        self.answers.labels(answer["looks"], answer["promise"]).inc()
        if answer["looks"] is not None:
            self.recent.append(answer["looks"] > 1)

    def show(self) -> Response:
        """Everything, as Prometheus reads it."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Gate:
    """Middleware that refuses requests while as many as may be wait for their answers, and counts all.

    Args:
        app: What answers.
        path: Of the requests; others pass.
        most: Requests that may wait.
        timeout: Seconds that a request may take to arrive, or it is answered 408: those that stall keep others out.
        metrics: That count.
    """

    def __init__(self, app: Any, path: str, most: int, timeout: float, metrics: Metrics) -> None:
        self.app, self.path, self.most, self.timeout, self.metrics = app, path, most, timeout, metrics
        self.waiting = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Counts a request in and out, or answers 503."""
        if scope["type"] != "http" or scope["path"] != self.path:
            return await self.app(scope, receive, send)
        if self.waiting >= self.most:
            self.metrics.requests.labels(503).inc()
            refused = refusal(503, f"{self.most} requests are waiting already.", {"Retry-After": "1"})
            return await refused(scope, receive, send)
        start, status, body = time.monotonic(), 500, b""

        async def receive_in_time() -> Any:
            try:
                return await asyncio.wait_for(receive(), max(0.0, start + self.timeout - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"The request did not arrive within {self.timeout:g} seconds.") from None

        async def watch(message: Any) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")
            await send(message)

        self.waiting += 1
        self.metrics.waiting.inc()
        try:
            await self.app(scope, receive_in_time, watch)
        finally:
            self.waiting -= 1
            self.metrics.waiting.dec()
            self.metrics.count(status, body, time.monotonic() - start)


def refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """An error as JSON, in ASCII: a field's name that is not valid Unicode can be told back."""
    return Response(json.dumps({"detail": reason[:500]}), status, headers, "application/json")


async def explain(request: Request, error: Any) -> Response:
    """What is wrong with which fields, without their values: FastAPI's own answer fails on a NaN."""
    return refusal(422, "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in error.errors()))


def build_server(api: Classifier, timeout: float = 10.0) -> LitServer:
    """A server that does not run yet.

    Args:
        api: What answers.
        timeout: Seconds that a request may take to arrive, and then wait for its first look.
    """
    metrics = Metrics()
    gate = {"path": api.api_path, "most": MOST_BATCHES * api.max_batch_size, "timeout": timeout, "metrics": metrics}
    server = LitServer(api, devices=1, timeout=timeout, max_payload_size=LARGEST_REQUEST, middlewares=[(Gate, gate)])
    server.app.add_exception_handler(RequestValidationError, explain)
    server.app.add_api_route("/metrics", metrics.show, methods=["GET"], include_in_schema=False)
    return server


def check(checkpoint: str) -> Any:
    """The configuration of what is to be served; ends the script unless it can be, at any budget."""
    try:
        config, _ = AutoConfig.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"CHECKPOINT {checkpoint}: no model with its tokenizer is there. ({error})") from None
    if config.model_type != "budgetformer" or not config.full_encoder:
        got = config.model_type if config.model_type != "budgetformer" else "one that was cut"
        raise SystemExit(f"CHECKPOINT {checkpoint} must be a BudgetFormer with its full model, got {got}.")
    if config.num_labels == 1 or config.problem_type not in (None, "single_label_classification"):
        raise SystemExit(f"CHECKPOINT {checkpoint} must tell one of several labels, got {config.problem_type}.")
    if config.router == "look" and config.margins is None:
        raise SystemExit(
            f"CHECKPOINT {checkpoint} must know how sure its first look is: train it with an evaluation set, or run "
            f"budgetformer tune {checkpoint} DATA."
        )
    return config


def stop(*_: Any) -> None:
    """Ends what a signal reaches. LitServe ends its other processes where it sees Ctrl+C, and at nothing else."""
    raise KeyboardInterrupt if parent_process() is None else SystemExit


def main(arguments: list[str] | None = None) -> None:
    """Serves until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--load-aware", action="store_true", help="give looser promises, of examples/promises.py, while many wait"
    )
    parser.add_argument("--promises", type=Path, help=f"with --load-aware; default: {PROMISES_FILE} in CHECKPOINT")
    parser.add_argument(
        "--loosen-at", type=int, help="waiting requests for each looser promise; default: two batches of them"
    )
    parser.add_argument("--max-batch", type=int, default=32, help="most requests answered together")
    parser.add_argument("--max-wait-ms", type=float, default=10.0, help="how long the first of a batch waits for more")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds until a request that waits is given up")
    options = parser.parse_args(arguments)
    loosen_at = 2 * options.max_batch if options.loosen_at is None else options.loosen_at
    for name, value, low, high in [
        ("max-batch", options.max_batch, 1, 1024), ("max-wait-ms", options.max_wait_ms, 0.0, 1000.0),
        ("loosen-at", loosen_at, 1, MOST_BATCHES * options.max_batch), ("timeout", options.timeout, 1.0, 3600.0),
        ("port", options.port, 1024, 65535)]:  # fmt: skip
        if not low <= value <= high:
            parser.error(f"--{name} must be in [{low}, {high}], got {value}")
    config = check(options.checkpoint)
    levels: list[Level] = []
    if options.load_aware:
        try:
            levels = read_promises(options.promises or Path(options.checkpoint) / PROMISES_FILE, config)
        except ValueError as error:
            parser.error(f"--load-aware: {error}")
    api = Classifier(options.checkpoint, levels, options.max_batch, options.max_wait_ms / 1000, loosen_at)
    server = build_server(api, options.timeout)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"Serving {options.checkpoint} at http://{options.host}:{options.port}/predict", flush=True)
    try:
        server.run(options.host, options.port, log_level="warning", generate_client_file=False)
    finally:
        for process in active_children():  # those that LitServe leaves where it is stopped while they load
            process.terminate()


if __name__ == "__main__":
    main()
