"""Serves a BudgetFormer checkpoint over HTTP: requests that wait together are answered together, each at its budget.

    python examples/serve.py CHECKPOINT --load-aware --floor 0.2
    curl 127.0.0.1:8000/predict --json '{"text": "a gripping film", "budget": 0.25}'

CHECKPOINT is a folder or Hub id, tokenizer included. A request may hold a `text_pair`, and leave out `budget`, a share
of the full model's work in (0, 1]: then it is answered like a plain call. The answer holds label, score, and the budget
really spent. A bad request gets 400, 413 or 422 and the reason, one too many 429.
"""

import argparse
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import active_children, parent_process
from queue import Empty
from typing import Annotated, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_budgetformer.budgets import Plan, plan_looks
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.looking import plan_deferred, take_look


try:
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from litserve import LitAPI, LitServer  # type: ignore[import-untyped]
    from litserve.loops import BatchedLoop  # type: ignore[import-untyped]
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints
except ImportError as error:
    raise ImportError(f'Serving needs LitServe: pip install "hf-budgetformer[serve]" ({error}).') from None

LONGEST_TEXT = 20_000  # characters; the model reads no more tokens than it has positions for
LARGEST_REQUEST = 2**20  # bytes
MOST_BATCHES = 8  # so many full batches of requests may wait for their answers
SMOOTHING_SECONDS = 0.5
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
    """

    tokens: Any
    budget: float | None
    look: int = 0
    spent: float = 0.0
    since: float = math.inf


class QueueLoop(BatchedLoop):
    """LitServe's batches, but it sleeps until a request comes, and tells the API how many a batch left waiting.

    A request whose answer is still `Pending` is not answered, but comes back with the next batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.carried: list[Any] = []

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """The requests of the next batch; none is ever too old, since a limited number waits."""
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
        lit_api.notice(request_queue.qsize(), time.monotonic())
        return [*carried, *((answers, uid, question) for answers, uid, _, question in taken)], []

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
        floor: Confidence of a look that load may bring the model's own down to, so that fewer questions go on to the
            next look; None: load changes nothing.
        max_batch: Most questions answered together.
        max_wait: Seconds that the first question of a batch waits for others.
    """

    def __init__(self, checkpoint: str, floor: float | None, max_batch: int, max_wait: float) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=max_wait, loop=QueueLoop())
        self.checkpoint, self.floor, self.pressure, self.noticed = checkpoint, floor, 0.0, -math.inf
        self.waiting = 0

    def setup(self, device: str) -> None:
        """Loads model and tokenizer, in the process that will use them."""
        self.model, self.tokenizer = load_classifier(self.checkpoint, budgeted=True, device=device)
        config = self.model.config
        self.confidence: tuple[float, ...] = ()  # of a plain call's looks, where load may change it
        if self.floor is not None and (config.looks is not None or self.model.is_trained()):
            self.confidence = plan_looks(config, self.model.narrow.order).thresholds

    def notice(self, waiting: int, now: float) -> None:
        """Turns questions left waiting into pressure: 1 is another full batch of them; smoothed over seconds `now`."""
        weight = 1.0 - math.exp((self.noticed - now) / SMOOTHING_SECONDS)
        self.pressure += weight * (min(1.0, waiting / self.max_batch_size) - self.pressure)
        self.noticed, self.waiting = now, waiting

    def relax(self) -> None:
        """Asks less confidence of a plain call's looks while questions wait."""
        if self.confidence and self.floor is not None:
            spare = [max(0.0, own - self.floor) for own in self.confidence]
            relaxed = [own - self.pressure * less for own, less in zip(self.confidence, spare, strict=True)]
            self.model.config.confidence = relaxed

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
        self.relax()
        answers: list[Any] = list(x)
        plain = [place for place, question in enumerate(x) if question.budget is None]
        budgeted = [place for place, question in enumerate(x) if question.budget is not None]
        plan = plan_deferred(self.model)
        if plan is not None:
            self.look(answers, plain, plan)
        elif plain:
            self.call(answers, plain)
        if budgeted:
            self.call(answers, budgeted, budget=torch.tensor([x[place].budget for place in budgeted]))
        return answers

    def call(self, answers: list[Any], places: list[int], **asked: Any) -> None:
        """Answers the questions in these places by one call of the model."""
        batch = self.pad([answers[place] for place in places])
        outputs = self.model(**batch.to(self.model.device), **asked)
        self.tell(answers, places, outputs.logits, outputs.budget.tolist())

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
                self.tell(answers, taken, seen.logits, spent)
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

    def tell(self, answers: list[Any], places: list[int], logits: torch.Tensor, spent: list[float]) -> None:
        """Puts answers in these places."""
        scores, labels = logits.softmax(-1).max(-1)
        for place, label, score, share in zip(places, labels.tolist(), scores.tolist(), spent, strict=True):
            answers[place] = {"label": self.model.config.id2label[label], "score": score, "budget": share}


class LimitWaiting:
    """Middleware that refuses requests while as many as may be wait for their answers."""

    def __init__(self, app: Any, path: str, most: int) -> None:
        self.app, self.path, self.most, self.waiting = app, path, most, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Counts a request in and out, or answers 429."""
        if scope["type"] != "http" or scope["path"] != self.path:
            return await self.app(scope, receive, send)
        if self.waiting >= self.most:
            refused = refusal(429, f"{self.most} requests are waiting already.", {"Retry-After": "1"})
            return await refused(scope, receive, send)
        self.waiting += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.waiting -= 1


def refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """An error as JSON, in ASCII: a field's name that is not valid Unicode can be told back."""
    return Response(json.dumps({"detail": reason[:500]}), status, headers, "application/json")


async def explain(request: Request, error: Any) -> Response:
    """What is wrong with which fields, without their values: FastAPI's own answer fails on a NaN."""
    return refusal(422, "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in error.errors()))


def build_server(checkpoint: str, floor: float | None = None, max_batch: int = 32, max_wait: float = 0.01) -> LitServer:
    """A server that does not run yet; arguments as of `Classifier`."""
    api = Classifier(checkpoint, floor, max_batch, max_wait)
    limit = {"path": api.api_path, "most": MOST_BATCHES * max_batch}
    server = LitServer(
        api, devices=1, timeout=False, max_payload_size=LARGEST_REQUEST, middlewares=[(LimitWaiting, limit)]
    )
    server.app.add_exception_handler(RequestValidationError, explain)
    return server


def check(checkpoint: str, load_aware: bool = False) -> None:
    """Ends the script unless there is something to serve, at any budget."""
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
    if load_aware and (config.router != "look" or len(config.looks or (0, 1)) < 2):
        raise SystemExit(f"CHECKPOINT {checkpoint} must look twice for --load-aware, got looks {config.looks}.")


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
        "--load-aware", action="store_true", help="fewer second looks while requests wait behind a full batch"
    )
    parser.add_argument("--floor", type=float, default=0.2, help="with --load-aware: least confidence of a look")
    parser.add_argument("--max-batch", type=int, default=32, help="most requests answered together")
    parser.add_argument("--max-wait-ms", type=float, default=10.0, help="how long the first of a batch waits for more")
    options = parser.parse_args(arguments)
    for name, value, low, high in [
        ("floor", options.floor, 0.0, 1.0), ("max-batch", options.max_batch, 1, 1024),
        ("max-wait-ms", options.max_wait_ms, 0.0, 1000.0), ("port", options.port, 1024, 65535)]:  # fmt: skip
        if not low <= value <= high:
            parser.error(f"--{name} must be in [{low}, {high}], got {value}")
    check(options.checkpoint, options.load_aware)
    floor = options.floor if options.load_aware else None
    server = build_server(options.checkpoint, floor, options.max_batch, options.max_wait_ms / 1000)
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
