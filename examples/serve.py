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
from multiprocessing import active_children, parent_process
from queue import Empty
from typing import Annotated, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_budgetformer.budgets import plan_looks
from hf_budgetformer.tools.checkpoints import load_classifier


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
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_TEXT)]


class Question(BaseModel):
    """What a request may hold; FastAPI refuses others before they reach a batch, whose neighbours they would spoil."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: Text
    text_pair: Text | None = None
    budget: float | None = Field(None, gt=0, le=1)


class QueueLoop(BatchedLoop):
    """LitServe's batches, but it sleeps until a request comes, and tells the API how many a batch left waiting."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """The requests of the next batch; none is ever too old, since a limited number waits."""
        try:
            taken = [request_queue.get()]
            end = time.monotonic() + lit_api.batch_timeout
            while len(taken) < lit_api.max_batch_size:
                taken.append(request_queue.get(timeout=max(0.0, end - time.monotonic())))
        except Empty:
            pass
        except (KeyboardInterrupt, EOFError, OSError):  # the server ends, and its queue with it
            sys.exit()
        lit_api.notice(request_queue.qsize(), time.monotonic())
        return [(answers, uid, question) for answers, uid, _, question in taken], []


class Classifier(LitAPI):
    """Answers a batch of questions, each at its budget.

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
        self.noticed = now

    def relax(self) -> None:
        """Asks less confidence of a plain call's looks while questions wait."""
        if self.confidence and self.floor is not None:
            spare = [max(0.0, own - self.floor) for own in self.confidence]
            relaxed = [own - self.pressure * less for own, less in zip(self.confidence, spare, strict=True)]
            self.model.config.confidence = relaxed

    def decode_request(self, request: Question, **kwargs: Any) -> tuple[Any, float | None]:
        """Token ids, and the budget asked for."""
        tokens = self.tokenizer(request.text, request.text_pair, truncation=True)
        return tokens, request.budget

    def batch(self, inputs: list[tuple[Any, float | None]]) -> Any:
        """Plain calls and those with a budget, as (places, the model's arguments)."""
        groups = []
        for plain in (True, False):
            places = [place for place, (_, budget) in enumerate(inputs) if (budget is None) == plain]
            if not places:
                continue
            padded = self.tokenizer.pad([inputs[place][0] for place in places], return_tensors="pt")
            arguments = dict(padded.to(self.model.device))
            if not plain:
                arguments["budget"] = torch.tensor([inputs[place][1] for place in places])
            groups.append((places, arguments))
        return groups

    @torch.no_grad()
    def predict(self, x: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """An answer for each question of the batch."""
        self.relax()
        answers: dict[int, dict[str, Any]] = {}
        for places, arguments in x:
            outputs = self.model(**arguments)
            scores, labels = outputs.logits.softmax(-1).max(-1)
            found = zip(places, labels.tolist(), scores.tolist(), outputs.budget.tolist(), strict=True)
            for place, label, score, spent in found:
                answers[place] = {"label": self.model.config.id2label[label], "score": score, "budget": spent}
        return [answers[place] for place in range(len(answers))]


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
