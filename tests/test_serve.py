# ruff: noqa: E402 - what is tested are scripts, found by their folders, and an extra

import asyncio
import importlib.util
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from transformers import set_seed

from conftest import LONGEST, budgetformer, stock_folder


pytest.importorskip("litserve")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from fastapi.testclient import TestClient
from litserve.callbacks import CallbackRunner

import promises
import serve
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.looking import plan_deferred
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import calibrate_margins, tune


TEXTS = ["w1 w2 w3", "w20 w21", "w5 " * 20, "w30 w31 w2 w7 w9 w11"]


def calibrated(texts, tokenizer, **fields):
    """A tiny BudgetFormer that doubts about half of its first looks."""
    model = budgetformer("bert", **fields)
    calibrate_margins(model, [tokenizer(texts["text"][:], padding=True, return_tensors="pt")], budget=0.125)
    model.config.looks, model.config.confidence = [0.125, 1.0], [model.config.margins["quantiles"][50]]
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts, tokenizer):
    """A tiny BudgetFormer and its tokenizer."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("serve")
    calibrated(texts, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start(folder):
    """A classifier set up in this process."""

    def classifier(levels=(), max_batch=4, max_wait=0.0):
        api = serve.Classifier(str(folder), levels, max_batch, max_wait, loosen_at=8)
        api.pre_setup()  # as the server does
        api.setup("cpu")
        return api

    return classifier


def answer(api, *questions):
    return api.predict(api.batch([api.decode_request(serve.Question(**question)) for question in questions]))


@pytest.mark.parametrize("router", ["look", "layer"])
def test_budgets_mix_in_one_batch_and_each_is_answered_as_if_alone(start, texts, tokenizer, tmp_path, router):
    api = start(max_batch=16)
    if router == "layer":
        budgetformer("bert", router="layer").save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        api.checkpoint = str(tmp_path)
        api.setup("cpu")
    budgets = [1.0, None, 0.125, None, 0.6, 0.25, None, 0.6]
    questions = [{"text": text, "budget": b} for text, b in zip(texts["text"][:8], budgets, strict=True)]
    questions.append({"text": "w1", "text_pair": "w2 w3"})
    got = answer(api, *questions)
    spent = set()
    for question, reply in zip(questions, got, strict=True):
        inputs = tokenizer(question["text"], question.get("text_pair"), truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = api.model(**inputs, budget=question.get("budget"))
        score, label = expected.logits[0].softmax(-1).max(-1)
        assert reply["label"] == f"LABEL_{label}"
        assert reply["score"] == pytest.approx(score.item(), abs=1e-5)
        assert reply["budget"] == pytest.approx(expected.budget.item())
        spent.add(round(reply["budget"], 3))
    assert len(spent) > 2


def calls_of(api, monkeypatch, fails=()):
    """Budgets and numbers of rows of the model's calls from now on; those whose numbers are in `fails` fail."""
    calls, forward = [], api.model.forward

    def call(**inputs):
        calls.append((inputs.get("budget"), len(inputs["input_ids"])))
        if len(calls) - 1 in fails:
            raise RuntimeError("the model fails")
        return forward(**inputs)

    monkeypatch.setattr(api.model, "forward", call)
    return calls


def test_a_batch_is_read_at_most_once_by_each_way_to_ask(start, monkeypatch):
    api = start()
    api.model.config.confidence = [1.0]
    calls = calls_of(api, monkeypatch)
    answer(api, *({"text": text, "budget": budget} for text in TEXTS for budget in (None, 0.25, 1.0)))
    first, second, (budgets, _) = calls
    assert first == (api.model.narrow.order.look(0.125).cost, 4)
    assert second == (1.0, 4)
    assert budgets.tolist() == [0.25, 1.0] * 4


def test_a_plain_call_that_looks_once_is_the_models_own(start, monkeypatch):
    api = start()
    api.model.config.confidence, api.model.config.looks = None, [0.25]
    calls = calls_of(api, monkeypatch)
    answer(api, *({"text": text} for text in TEXTS))
    assert calls == [(None, 4)]


def test_what_the_model_cannot_read_is_cut(start):
    question = start().decode_request(serve.Question(text="w1 " * 1000, text_pair="w2 " * 1000))
    assert len(question.tokens["input_ids"]) == LONGEST


def own_levels(api, *shares):
    """The model's own threshold, and those that doubt so many times as many of its first looks."""
    [threshold] = api.model.config.confidence
    return [
        promises.Level(0.01, threshold),
        *(promises.Level(0.01 + share, threshold * (1 - share)) for share in shares),
    ]


def test_fewer_questions_go_on_while_requests_wait_and_each_answer_tells_its_promise(start, texts):
    api = start(max_batch=16)
    api.levels = own_levels(api, 0.3, 1.0)
    questions = [{"text": text} for text in texts["text"][:16]]
    doubted, promised = [], []
    for waiting in (0, 7, 8, 15, 16, 1000, 0):
        api.waiting = waiting
        answers = answer(api, *questions)
        doubted.append(sum(isinstance(x, serve.Pending) or x["looks"] > 1 for x in answers))
        [promise] = {x["promise"] for x in answers if isinstance(x, dict)}
        promised.append(promise)
    assert promised == [0.01, 0.01, 0.31, 0.31, 1.01, 1.01, 0.01]
    assert doubted[0] == doubted[1] > doubted[2] == doubted[3] > doubted[4] == doubted[5] == 0
    assert doubted[6] == doubted[0]
    api.waiting = 1000
    [reply] = answer(api, {"text": "w1", "budget": 1.0})
    assert (reply["budget"], reply["promise"], reply["looks"]) == (1.0, None, None), "who asks for a budget gets it"


def test_a_question_keeps_the_promise_of_its_first_look(start):
    api = start(max_wait=60.0)
    api.levels = [promises.Level(0.01, 1.0), promises.Level(0.1, 0.0)]
    api.waiting = 1
    [doubted] = answer(api, {"text": "w1 w2"})
    assert (doubted.look, doubted.promise) == (1, 0.01)
    api.waiting = 8
    [held, sure] = api.predict(api.batch([doubted, api.decode_request(serve.Question(text="w1 w2"))]))
    assert held == doubted
    assert (sure["looks"], sure["promise"]) == (1, 0.1)
    api.waiting = 0
    [reply] = api.predict(api.batch([held]))
    assert (reply["looks"], reply["promise"]) == (2, 0.01)


@pytest.mark.parametrize(("risk", "promised"), [("disagreement", 0.2), ("mean_budget", None)])
def test_without_load_it_is_the_checkpoints_own_promise_while_its_looks_are_those(start, risk, promised):
    api = start()
    config = api.model.config
    kept = {"looks": list(config.looks), "thresholds": list(config.confidence), "level": 0.2, "risk": risk}
    config.promise = {**kept, "confidence": 0.95, "rows": 64, "bound": 0.1, "lost": 0.0, "doubted": 32}
    [reply] = answer(api, {"text": "w1 w2"})
    assert reply["promise"] == promised
    config.confidence = [0.5 * config.confidence[0]]
    [reply] = answer(api, {"text": "w1 w2"})
    assert reply["promise"] is None


@pytest.fixture(scope="module")
def promising(folder, texts, tokenizer, tmp_path_factory):
    """A checkpoint that promises a disagreement, and a file of the rows that it was tuned on."""
    target = tmp_path_factory.mktemp("promising")
    model, _ = serve.load_classifier(str(folder), device="cpu")
    rows = concatenate_datasets([texts] * 8)  # so few and so unsure allow no promise
    tune(model, rows, tokenizer, disagreement=0.2, budgets=[0.125])
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    rows.to_parquet(target / "rows.parquet")
    return target


def test_looser_promises_are_calibrated_on_rows_and_kept_beside_the_checkpoint(promising, texts, tokenizer, capsys):
    promises.main([str(promising), str(promising / "rows.parquet"), "--levels", "0.6", "0.3"])
    assert capsys.readouterr().out.count("rows are doubted") == 3
    model, _ = serve.load_classifier(str(promising), device="cpu")
    levels = promises.read_promises(promising / "promises.json", model.config)
    assert [level.promise for level in levels] == [0.2, 0.3, 0.6]
    assert levels[0].threshold == model.config.confidence[0] > levels[1].threshold > levels[2].threshold
    with torch.no_grad():
        batch = tokenizer(texts["text"][:], padding=True, return_tensors="pt")
        first, full = model(**batch, budget=0.125).logits, model(**batch, budget=1.0).logits
    for level in levels:
        stands = confidence(first, None) >= level.threshold
        assert (stands & (first.argmax(-1) != full.argmax(-1))).float().mean() <= level.promise


def test_promises_that_do_not_fit_are_refused(promising, folder, tmp_path, capsys):
    config = serve.check(str(promising))
    promise = config.promise

    def unread(content):
        (tmp_path / "promises.json").write_text(content)
        with pytest.raises(ValueError, match=r"examples/promises\.py CHECKPOINT DATA") as error:
            promises.read_promises(tmp_path / "promises.json", config)
        return str(error.value)

    looser = {**promise, "level": 0.5, "thresholds": [0.5 * promise["thresholds"][0]]}
    for broken in ("{", "[]", "{}", '{"promises": [1]}', '{"promises": [{"level": "x", "thresholds": []}]}'):
        assert "must hold promises" in unread(broken)
    assert "must be of the checkpoint's own promise" in unread(json.dumps({"promises": [promise]}))
    changed = {**promise, "doubted": promise["doubted"] + 1}
    assert "must be of the checkpoint's own promise" in unread(json.dumps({"promises": [changed, looser]}))
    stricter = {**looser, "thresholds": [1.0]}
    assert "falling thresholds" in unread(json.dumps({"promises": [promise, stricter]}))

    def refused(*arguments):
        with pytest.raises(SystemExit):
            promises.main([str(x) for x in arguments])
        return capsys.readouterr().err

    rows = promising / "rows.parquet"
    assert "must be a folder" in refused("nothing", rows, "--levels", 0.2)
    assert "levels must be in (0.2, 1), above the own promise, got 0.05" in refused(promising, rows, "--levels", 0.05)
    assert "must promise a disagreement" in refused(folder, rows, "--levels", 0.5)
    assert "nothing.parquet" in refused(promising, tmp_path / "nothing.parquet", "--levels", 0.5)


class EndingQueue(queue.Queue):
    """Empty, it is gone, as the server's is when the server ends."""

    def get(self, block=True, timeout=None):
        if timeout is None and self.empty():
            raise EOFError
        return super().get(block, timeout)


class Answers:
    def __init__(self):
        self.sent = []

    def send(self, item, consumer_id):
        self.sent.append((consumer_id, item))


def test_the_loop_takes_full_batches_and_tells_what_waits(start, monkeypatch):
    api, waiting, answers = start(), EndingQueue(), Answers()
    sizes = []
    noticed = []

    def batch(inputs):
        sizes.append(len(inputs))
        noticed.append(api.waiting)
        return inputs

    monkeypatch.setattr(api, "batch", batch)
    for number in range(10):
        question = serve.Question(text=TEXTS[number % 4], budget=(None, 0.5)[number % 2])
        waiting.put((number % 2, f"id {number}", time.monotonic(), question))
    with pytest.raises(SystemExit):
        serve.QueueLoop().run_batched_loop(api, waiting, answers, CallbackRunner())
    assert sizes == [4, 4, 2]
    assert noticed == [6, 2, 0]
    assert [(consumer, uid) for consumer, (uid, _) in answers.sent] == [(n % 2, f"id {n}") for n in range(10)]
    for _, (_, (reply, status, *_)) in answers.sent:
        assert reply.keys() == {"label", "score", "budget", "looks", "promise"}
        assert status == "OK"


def test_a_question_that_waited_too_long_is_given_up_and_others_are_not(start):
    api, waiting, answers = start(), EndingQueue(), Answers()
    api.request_timeout = 5.0
    for number, age in enumerate([0.0, 6.0, 1.0]):
        waiting.put((0, number, time.monotonic() - age, serve.Question(text="w1")))
    with pytest.raises(SystemExit):
        serve.QueueLoop().run_batched_loop(api, waiting, answers, CallbackRunner())
    statuses = {uid: status for _, (uid, (_, status, *_)) in answers.sent}
    assert statuses == {0: "OK", 1: "ERROR", 2: "OK"}
    [late] = [reply for _, (uid, (reply, *_)) in answers.sent if uid == 1]
    assert pickle.loads(pickle.dumps(late)).status_code == 504, "it goes to another process"


def run_loop(api, questions):
    """Runs the loop until the server ends; status and answer of each question, and the order they were told in."""
    waiting, answers = EndingQueue(), Answers()
    for number, question in enumerate(questions):
        waiting.put((0, number, time.monotonic(), serve.Question(**question)))
    loop = serve.QueueLoop()
    with pytest.raises(SystemExit):
        loop.run_batched_loop(api, waiting, answers, CallbackRunner())
    assert loop.carried == []
    return {uid: (status, reply) for _, (uid, (reply, status, *_)) in answers.sent}, [x[1][0] for x in answers.sent]


@pytest.mark.parametrize("looks", [2, 3])
def test_doubted_questions_of_many_batches_share_full_batches_and_each_is_answered_once(
    start, texts, tokenizer, monkeypatch, looks
):
    api = start(max_wait=60.0)
    if looks == 3:
        with torch.no_grad():
            out = api.model(**tokenizer(texts["text"][:], padding=True, return_tensors="pt"), budget=0.25)
        api.model.config.confidence = None
        api.model.config.looks = [0.125, 0.25, 1.0]
        api.model.config.confidence = [1.0, confidence(out.logits, None).quantile(0.5).item()]
    questions = [{"text": text, "budget": 0.25 if place % 5 == 0 else None} for place, text in enumerate(texts["text"])]
    expected = []
    for question in questions:
        with torch.no_grad():
            expected.append(api.model(**tokenizer(question["text"], return_tensors="pt"), budget=question["budget"]))
    calls = calls_of(api, monkeypatch)
    replies, order = run_loop(api, questions)
    assert sorted(order) == list(range(64))
    assert order != sorted(order), "sure answers do not wait for doubted ones"
    for number, out in enumerate(expected):
        score, label = out.logits[0].softmax(-1).max(-1)
        status, answer = replies[number]
        assert (status, answer["label"]) == ("OK", f"LABEL_{label}")
        assert answer["score"] == pytest.approx(score.item(), abs=1e-5)
        assert answer["budget"] == pytest.approx(out.budget.item())
    for look in plan_deferred(api.model).looks[1:]:
        sizes = [size for budget, size in calls if not isinstance(budget, torch.Tensor) and budget == look.cost]
        assert len(sizes) > 3
        assert set(sizes[:-1]) == {4}


def test_without_time_to_wait_every_batch_is_answered_as_it_comes(start, texts):
    api = start(max_wait=0.0)
    _, order = run_loop(api, [{"text": text} for text in texts["text"]])
    assert order == list(range(64))


def test_a_doubted_question_waits_only_while_others_do_and_not_for_long(start, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])
    api = start(max_wait=0.5)
    api.model.config.confidence = [1.0]
    [alone] = answer(api, {"text": "w1 w2"})
    assert alone["budget"] > 1.0
    api.waiting = 1
    [waits] = answer(api, {"text": "w1 w2"})
    assert (waits.look, waits.since) == (1, 100.0)
    now[0] = 100.4
    assert api.predict(api.batch([api.decode_request(waits)])) == [waits]
    now[0] = 100.6
    [reply] = api.predict(api.batch([waits]))
    assert reply == {**alone, "score": pytest.approx(alone["score"]), "budget": pytest.approx(alone["budget"])}


def test_the_loop_takes_what_it_carried_over_when_nothing_else_comes(start):
    api, loop = start(max_wait=0.02), serve.QueueLoop()
    question = serve.Pending(api.tokenizer("w1"), None, look=1, since=time.monotonic())
    loop.put_response(Answers(), 0, "id", question, "OK", None)
    batch, _ = loop.get_batch_requests(api, EndingQueue(), None)
    assert batch == [(0, "id", question)]
    assert api.is_due(question)
    assert loop.carried == []


@pytest.mark.parametrize("failing", range(12))
def test_a_call_that_fails_is_told_to_those_it_was_for_and_to_nobody_twice(start, texts, monkeypatch, failing):
    api = start(max_wait=60.0)
    calls = calls_of(api, monkeypatch, fails=[failing])
    replies, order = run_loop(api, [{"text": text} for text in texts["text"]])
    assert len(calls) > 12
    assert sorted(order) == list(range(64))
    failed = [number for number, (status, _) in replies.items() if status == "ERROR"]
    assert 4 <= len(failed) <= 7  # a batch, and those that it was to take along
    assert all(status == "OK" for number, (status, _) in replies.items() if number not in failed)


GOOD = '{"text": "w1"}'
MALFORMED = {
    "not JSON": (b"w1", "body.0: JSON decode error"),
    "nothing": (b"", "body: Field required"),
    "a list": (b"[]", "body: Input should be a valid dictionary"),
    "no text": (b"{}", "body.text: Field required"),
    "a number": (b'{"text": 1}', "body.text: Input should be a valid string"),
    "null": (b'{"text": null}', "body.text: Input should be a valid string"),
    "too long": (json.dumps({"text": "w" * 20_001}).encode(), "body.text: String should have at most 20000"),
    "far too long": (b"w" * (2**20 + 1), "Payload too large"),
    "half a character": (b'{"text": "\\ud800"}', "body.text: Input should be a valid string"),
    "bytes": (b'{"text": "\xff"}', "error parsing the body"),
    "deep": (b"[" * 100_000, "error parsing the body"),
    "unknown": (b'{"text": "w1", "head_budget": 0.5}', "body.head_budget: Extra inputs are not permitted"),
    "unknown and strange": (b'{"text": "w1", "\\ud800": 0.5}', "body"),
    "nothing to spend": (b'{"text": "w1", "budget": 0}', "body.budget: Input should be greater than 0"),
    "too many": (b'{"text": "w1", "budget": 1.5}', "body.budget: Input should be less than or equal to 1"),
    "not a number": (b'{"text": "w1", "budget": NaN}', "body.budget: Input should be"),
    "endless": (b'{"text": "w1", "budget": Infinity}', "body.budget: Input should be"),
    "digits": (b'{"text": "w1", "budget": "0.5"}', "body.budget: Input should be a valid number"),
    "true": (b'{"text": "w1", "budget": true}', "body.budget: Input should be a valid number"),
}


@pytest.fixture(scope="module")
def client(folder):
    """Of a server without a worker: what reaches its queue fails."""
    return TestClient(serve.build_server(serve.Classifier(str(folder))).app, raise_server_exceptions=False)


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_with_the_reason(client, name):
    content, reason = MALFORMED[name]
    response = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 413, 422)
    assert reason in response.json()["detail"]
    assert len(response.content) < 600


def test_what_is_not_sent_as_json_is_refused(client):
    assert client.post("/predict", data={"text": "w1"}).status_code == 422
    assert client.get("/predict").status_code == 405
    assert client.post("/predict", content=GOOD, headers={"Content-Type": "application/json"}).status_code == 500


class Application:
    """Answers when it is released, as a plain call is answered that took two looks."""

    def __init__(self):
        self.release = asyncio.Event()
        self.metrics = serve.Metrics()
        self.gate = serve.Gate(self, "/predict", 2, 0.05, self.metrics)

    async def __call__(self, scope, receive, send):
        if scope.get("reads"):
            await receive()
        await self.release.wait()
        if scope.get("fails"):
            raise RuntimeError
        await serve.Response('{"looks": 2, "promise": 0.01}')(scope, receive, send)

    async def ask(self, path="/predict", **more):
        """Messages of the answer."""
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            await asyncio.sleep(60)

        await self.gate({"type": "http", "path": path, **more}, receive, send)
        return sent


def read_metrics(text):
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_one_request_too_many_is_refused_until_another_is_answered():
    async def scenario():
        app = Application()
        kinds = ({}, {"fails": True}, {"path": "/health"})
        waiting = [asyncio.create_task(app.ask(**more)) for more in kinds]
        await asyncio.sleep(0)
        assert read_metrics(app.metrics.show().body.decode())["budgetformer_waiting"] == 2
        start, body = await app.ask()
        assert start["status"] == 503
        assert (b"retry-after", b"1") in start["headers"]
        assert json.loads(body["body"]) == {"detail": "2 requests are waiting already."}
        app.release.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(x, RuntimeError) or x[0]["status"] for x in done] == [200, True, 200]
        assert (await app.ask())[0]["status"] == 200
        assert app.gate.waiting == 0
        return read_metrics(app.metrics.show().body.decode())

    values = asyncio.run(scenario())
    statuses = {name[-5:-2]: value for name, value in values.items() if name.startswith("budgetformer_requests_total")}
    assert statuses == {"200": 2, "500": 1, "503": 1}
    assert values['budgetformer_answers_total{looks="2",promise="0.01"}'] == 2
    assert values["budgetformer_latency_seconds_count"] == 2
    assert values["budgetformer_doubted_share"] == 1.0
    assert values["budgetformer_waiting"] == 0


def test_a_request_that_does_not_arrive_makes_room():
    async def scenario():
        app = Application()
        with pytest.raises(serve.HTTPException, match=r"did not arrive within 0\.05 seconds") as error:
            await app.ask(reads=True)
        assert error.value.status_code == 408
        assert app.gate.waiting == 0

    asyncio.run(scenario())


def test_the_share_of_the_doubted_is_of_recent_plain_calls():
    metrics = serve.Metrics()
    for looks in [1, None, 2, 1, None, 1]:
        metrics.count(200, json.dumps({"looks": looks, "promise": None}).encode(), 0.01)
    values = read_metrics(metrics.show().body.decode())
    assert values["budgetformer_doubted_share"] == 0.25
    assert values['budgetformer_answers_total{looks="None",promise="None"}'] == 2
    for _ in range(serve.RECENT):
        metrics.count(200, b'{"looks": 1, "promise": null}', 0.01)
    assert read_metrics(metrics.show().body.decode())["budgetformer_doubted_share"] == 0.0


def test_metrics_are_told_and_refusals_are_among_them(folder):
    client = TestClient(serve.build_server(serve.Classifier(str(folder))).app, raise_server_exceptions=False)
    client.post("/predict", content=b"w1", headers={"Content-Type": "application/json"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert read_metrics(response.text)['budgetformer_requests_total{status="422"}'] == 1


def test_only_a_checkpoint_that_can_be_served_is(texts, tmp_path, tokenizer, capsys):
    def refusal(name):
        with pytest.raises(SystemExit) as error:
            serve.check(str(tmp_path / name))
        return str(error.value)

    stock_folder("bert", tmp_path / "stock")
    assert "no model with its tokenizer is there" in refusal("nothing")
    models = {
        "cut": cut(budgetformer("bert"), 0.25),
        "number": budgetformer("bert", num_labels=1),
        "several": budgetformer("bert", problem_type="multi_label_classification"),
        "unsure": budgetformer("bert"),
        "routed": budgetformer("bert", router="layer"),
        "once": calibrated(texts, tokenizer),
    }
    models["once"].config.confidence, models["once"].config.looks = None, [0.25]
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    assert "no model with its tokenizer is there" in refusal("unsure")
    for name in ("stock", *models):
        tokenizer.save_pretrained(tmp_path / name)
    assert "must be a BudgetFormer with its full model, got bert" in refusal("stock")
    assert "must be a BudgetFormer with its full model, got one that was cut" in refusal("cut")
    assert "must tell one of several labels" in refusal("number")
    assert "must tell one of several labels" in refusal("several")
    assert "budgetformer tune" in refusal("unsure")
    for name in ("routed", "once"):
        serve.check(str(tmp_path / name))
        with pytest.raises(SystemExit, match="2"):
            serve.main([str(tmp_path / name), "--load-aware"])
        assert "checkpoint must promise a disagreement" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeout", "0"], "--timeout must be in [1.0, 3600.0], got 0.0"),
        (["--timeout", "nan"], "--timeout must be in [1.0, 3600.0], got nan"),
        (["--loosen-at", "257"], "--loosen-at must be in [1, 256], got 257"),
        (["--max-batch", "0"], "--max-batch must be in [1, 1024], got 0"),
        (["--max-wait-ms", "-1"], "--max-wait-ms must be in [0.0, 1000.0], got -1.0"),
        (["--port", "80"], "--port must be in [1024, 65535], got 80"),
        (["--host", "example.org"], "invalid choice: 'example.org'"),
    ],
)
def test_bad_options_are_named(folder, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        serve.main([str(folder), *options])
    assert message in capsys.readouterr().err


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "litserve", None)
    spec = importlib.util.spec_from_file_location("serve_without_litserve", serve.__file__)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[serve\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def is_healthy(port):
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


@contextmanager
def running_server(checkpoint, *options):
    """Port of a server that answers on loopback; none of its processes outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), checkpoint, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + 120
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


def living(group):
    """Command lines of processes of a group, those that only wait to be buried left out."""
    table = subprocess.run(["ps", "-wweo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return [args for number, state, args in rows if int(number) == group and not state.startswith("Z")]


def group_of(port):
    table = subprocess.run(["ps", "-wweo", "pgid=,args="], capture_output=True, text=True, check=True).stdout
    [number] = {line.split()[0] for line in table.splitlines() if "serve.py" in line and f"--port {port} " in line}
    return int(number)


def post(port, content):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def metrics_of(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    return read_metrics(connection.getresponse().read().decode())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "tell"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_what_was_asked_before_the_server_is_stopped_is_answered(folder, number, tell):
    with running_server(str(folder), "--max-wait-ms", "1000") as port, ThreadPoolExecutor(1) as clients:
        group = group_of(port)
        future = clients.submit(post, port, GOOD)  # waits a second for others
        while not metrics_of(port)["budgetformer_waiting"]:
            assert not future.done()
        tell(group, number)
        assert future.result()[0] == 200
        end = time.monotonic() + 30
        while living(group) and time.monotonic() < end:
            time.sleep(0.1)
        assert living(group) == []


@pytest.mark.slow
def test_under_load_answers_tell_looser_promises(promising, texts):
    promises.main([str(promising), str(promising / "rows.parquet"), "--levels", "0.3", "0.6"])
    options = ("--load-aware", "--max-batch", "2", "--loosen-at", "2")
    with running_server(str(promising), *options) as port, ThreadPoolExecutor(12) as clients:
        assert post(port, GOOD)[1]["promise"] == 0.2
        replies = list(clients.map(partial(post, port), [json.dumps({"text": text}) for text in texts["text"][:] * 2]))
        tally = Counter(answer["promise"] for status, answer in replies if status == 200)
        counted = metrics_of(port)
    assert set(tally) >= {0.3, 0.6}
    for promise, count in tally.items():
        names = [x for x in counted if x.startswith("budgetformer_answers_total") and f'promise="{promise}"' in x]
        assert sum(counted[name] for name in names) == count + (promise == 0.2)


@pytest.mark.slow
def test_a_server_answers_refuses_withstands_and_ends(folder):
    def serve_and_fail():
        with running_server(str(folder), "--max-batch", "1") as port:
            yield group_of(port)
            status, reply = post(port, '{"text": "w1 w2 w3", "budget": 1}')
            assert (status, reply["budget"]) == (200, 1.0)
            for name, (content, reason) in MALFORMED.items():
                status, reply = post(port, content)
                assert status in (400, 413, 422), name
                assert reason in reply["detail"], name

            # As many requests as may be, held open by bodies that do not end.
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(GOOD)}"
            held = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(serve.MOST_BATCHES)]
            for connection in held:
                connection.sendall(f"{head}\r\n\r\n{GOOD[:3]}".encode())
            end = time.monotonic() + 60
            while (refused := post(port, GOOD))[0] == 200 and time.monotonic() < end:
                time.sleep(0.05)
            assert refused == (503, {"detail": "8 requests are waiting already."})
            assert is_healthy(port)
            held.pop().close()  # one gives up, the others go on
            for connection in held:
                connection.sendall(GOOD[3:].encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
                connection.close()

            with ThreadPoolExecutor(64) as clients:
                questions = [json.dumps({"text": text}) for text in TEXTS * 64]
                statuses = Counter(status for status, _ in clients.map(partial(post, port), questions))
            assert set(statuses) <= {200, 503}
            assert sum(statuses.values()) == 256
            counted = metrics_of(port)
            assert counted["budgetformer_waiting"] == 0
            assert counted['budgetformer_requests_total{status="200"}'] == counted["budgetformer_latency_seconds_count"]
            assert counted['budgetformer_requests_total{status="503"}'] > statuses[503]
            assert post(port, GOOD)[0] == 200
            raise RuntimeError("the test fails")

    run = serve_and_fail()
    group = next(run)
    assert len(living(group)) > 2
    with pytest.raises(RuntimeError, match="the test fails"):
        next(run)
    end = time.monotonic() + 30
    while living(group) and time.monotonic() < end:  # what was killed takes a moment
        time.sleep(0.1)
    assert living(group) == []


@pytest.mark.slow
def test_each_of_many_requests_at_once_gets_its_own_answer(folder, texts, tokenizer):
    with running_server(str(folder), "--max-batch", "8", "--max-wait-ms", "300") as port:
        questions = [json.dumps({"text": text}) for text in texts["text"][:] * 4]
        with ThreadPoolExecutor(60) as clients:
            replies = list(clients.map(partial(post, port), questions))
    model, _ = serve.load_classifier(str(folder), device="cpu")
    for text, (status, answer) in zip(texts["text"][:] * 4, replies, strict=True):
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"))
        assert (status, answer["label"]) == (200, f"LABEL_{out.logits.argmax()}")
        assert answer["budget"] == pytest.approx(out.budget.item())


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no model with its tokenizer is there"), running_server(str(tmp_path)):
        pass
