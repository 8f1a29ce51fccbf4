# ruff: noqa: E402 - what is tested are scripts, found by their folders, and an extra

import asyncio
import importlib.util
import json
import os
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
from transformers import set_seed

from conftest import LONGEST, budgetformer, stock_folder


pytest.importorskip("litserve")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from fastapi.testclient import TestClient
from litserve.callbacks import CallbackRunner

import serve
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.looking import plan_deferred
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import calibrate_margins


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

    def classifier(floor=None, max_batch=4, max_wait=0.0):
        api = serve.Classifier(str(folder), floor, max_batch, max_wait)
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
    for question, found in zip(questions, got, strict=True):
        inputs = tokenizer(question["text"], question.get("text_pair"), truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = api.model(**inputs, budget=question.get("budget"))
        score, label = expected.logits[0].softmax(-1).max(-1)
        assert found["label"] == f"LABEL_{label}"
        assert found["score"] == pytest.approx(score.item(), abs=1e-5)
        assert found["budget"] == pytest.approx(expected.budget.item())
        spent.add(round(found["budget"], 3))
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
    first, second, (asked, _) = calls
    assert first == (api.model.narrow.order.look(0.125).cost, 4)
    assert second == (1.0, 4)
    assert asked.tolist() == [0.25, 1.0] * 4


def test_a_plain_call_that_looks_once_is_the_models_own(start, monkeypatch):
    api = start()
    api.model.config.confidence, api.model.config.looks = None, [0.25]
    calls = calls_of(api, monkeypatch)
    answer(api, *({"text": text} for text in TEXTS))
    assert calls == [(None, 4)]


def test_what_the_model_cannot_read_is_cut(start):
    question = start().decode_request(serve.Question(text="w1 " * 1000, text_pair="w2 " * 1000))
    assert len(question.tokens["input_ids"]) == LONGEST


def mean_spent(api, texts, **question):
    found = answer(api, *({"text": text, **question} for text in texts["text"]))
    return sum(x["budget"] for x in found) / len(found)


def test_fewer_questions_go_on_while_requests_wait_and_all_is_as_before_afterwards(start, texts):
    api = start(floor=0.0, max_batch=4)
    [own] = api.confidence
    before = mean_spent(api, texts)
    first = api.model.narrow.order.look(0.125).cost
    assert before > first + 0.2
    seen, spent, now = [own], [before], 0.0
    for waiting in (0, 2, 40, 40, 40, 40, 40, 40, 40, 40):
        now += 0.2
        api.notice(waiting, now)
        spent.append(mean_spent(api, texts))
        seen.append(api.model.config.confidence[0])
    assert seen[1] == pytest.approx(own)
    assert sorted(seen, reverse=True) == seen
    assert sorted(spent, reverse=True) == spent
    assert 0.0 < seen[-1] < 0.1 * own
    assert spent[-1] < first + 0.1
    assert mean_spent(api, texts, budget=1.0) == 1.0, "who asks for a budget gets it"
    api.notice(0, now + 0.1)
    assert spent[-1] <= mean_spent(api, texts) <= before
    api.notice(0, now + 10.0)
    assert mean_spent(api, texts) == pytest.approx(before)


def test_load_brings_confidence_to_the_floor_and_no_further(start, texts):
    api = start(floor=0.05)
    api.notice(1000, 1.0)
    mean_spent(api, texts)
    assert api.model.config.confidence == pytest.approx([0.05])


@pytest.mark.parametrize("floor", [None, 1.0])
def test_load_changes_nothing_without_a_floor_or_below_it(start, texts, floor):
    api = start(floor=floor)
    before = mean_spent(api, texts)
    api.notice(1000, 1.0)
    assert api.pressure == 1.0
    assert mean_spent(api, texts) == before


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
    sizes, batch = [], api.batch
    noticed, notice = [], api.notice
    monkeypatch.setattr(api, "batch", lambda inputs: (sizes.append(len(inputs)), batch(inputs))[1])
    monkeypatch.setattr(api, "notice", lambda count, now: (noticed.append(count), notice(count, now)))
    for number in range(10):
        question = serve.Question(text=TEXTS[number % 4], budget=(None, 0.5)[number % 2])
        waiting.put((number % 2, f"id {number}", time.monotonic(), question))
    with pytest.raises(SystemExit):
        serve.QueueLoop().run_batched_loop(api, waiting, answers, CallbackRunner())
    assert sizes == [4, 4, 2]
    assert noticed == [6, 2, 0]
    assert [(consumer, uid) for consumer, (uid, _) in answers.sent] == [(n % 2, f"id {n}") for n in range(10)]
    for _, (_, (found, status, *_)) in answers.sent:
        assert found.keys() == {"label", "score", "budget"}
        assert status == "OK"


def run_loop(api, questions):
    """Runs the loop until the server ends; status and answer of each question, and the order they were told in."""
    waiting, answers = EndingQueue(), Answers()
    for number, question in enumerate(questions):
        waiting.put((0, number, time.monotonic(), serve.Question(**question)))
    loop = serve.QueueLoop()
    with pytest.raises(SystemExit):
        loop.run_batched_loop(api, waiting, answers, CallbackRunner())
    assert loop.carried == []
    return {uid: (status, found) for _, (uid, (found, status, *_)) in answers.sent}, [x[1][0] for x in answers.sent]


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
    found, order = run_loop(api, questions)
    assert sorted(order) == list(range(64))
    assert order != sorted(order), "sure answers do not wait for doubted ones"
    for number, out in enumerate(expected):
        score, label = out.logits[0].softmax(-1).max(-1)
        status, answer = found[number]
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
    api.notice(1, now[0])
    [waits] = answer(api, {"text": "w1 w2"})
    assert (waits.look, waits.since) == (1, 100.0)
    now[0] = 100.4
    assert api.predict(api.batch([api.decode_request(waits)])) == [waits]
    now[0] = 100.6
    [found] = api.predict(api.batch([waits]))
    assert found == {**alone, "score": pytest.approx(alone["score"]), "budget": pytest.approx(alone["budget"])}


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
    found, order = run_loop(api, [{"text": text} for text in texts["text"]])
    assert len(calls) > 12
    assert sorted(order) == list(range(64))
    failed = [number for number, (status, _) in found.items() if status == "ERROR"]
    assert 4 <= len(failed) <= 7  # a batch, and those that it was to take along
    assert all(status == "OK" for number, (status, _) in found.items() if number not in failed)


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
    return TestClient(serve.build_server(str(folder)).app, raise_server_exceptions=False)


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


def test_one_request_too_many_is_refused_until_another_is_answered():
    async def scenario():
        release = asyncio.Event()

        async def app(scope, receive, send):
            await release.wait()
            if scope.get("fails"):
                raise RuntimeError
            await serve.Response("answered")(scope, receive, send)

        limit = serve.LimitWaiting(app, "/predict", 2)

        async def request(path="/predict", **more):
            sent = []

            async def send(message):
                sent.append(message)

            await limit({"type": "http", "path": path, **more}, None, send)
            return sent

        waiting = [asyncio.create_task(request(**more)) for more in ({}, {"fails": True}, {"path": "/health"})]
        await asyncio.sleep(0)
        start, body = await request()
        assert start["status"] == 429
        assert (b"retry-after", b"1") in start["headers"]
        assert json.loads(body["body"]) == {"detail": "2 requests are waiting already."}
        release.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(x, RuntimeError) or x[0]["status"] for x in done] == [200, True, 200]
        assert (await request())[0]["status"] == 200
        assert limit.waiting == 0

    asyncio.run(scenario())


def test_only_a_checkpoint_that_can_be_served_is(folder, texts, tmp_path, tokenizer):
    def refusal(name, **options):
        with pytest.raises(SystemExit) as error:
            serve.check(str(tmp_path / name), **options)
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
        assert "must look twice for --load-aware" in refusal(name, load_aware=True)
    serve.check(str(folder), load_aware=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--floor", "-1"], "--floor must be in [0.0, 1.0], got -1.0"),
        (["--floor", "nan"], "--floor must be in [0.0, 1.0], got nan"),
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


@pytest.mark.slow
def test_a_server_answers_refuses_withstands_and_ends(folder):
    def serve_and_fail():
        with running_server(str(folder), "--max-batch", "1", "--load-aware", "--floor", "0.05") as port:
            yield group_of(port)
            status, found = post(port, '{"text": "w1 w2 w3", "budget": 1}')
            assert (status, found["budget"]) == (200, 1.0)
            for name, (content, reason) in MALFORMED.items():
                status, found = post(port, content)
                assert status in (400, 413, 422), name
                assert reason in found["detail"], name

            # As many requests as may be, held open by bodies that do not end.
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(GOOD)}"
            held = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(serve.MOST_BATCHES)]
            for connection in held:
                connection.sendall(f"{head}\r\n\r\n{GOOD[:3]}".encode())
            end = time.monotonic() + 60
            while (refused := post(port, GOOD))[0] == 200 and time.monotonic() < end:
                time.sleep(0.05)
            assert refused == (429, {"detail": "8 requests are waiting already."})
            assert is_healthy(port)
            held.pop().close()  # one gives up, the others go on
            for connection in held:
                connection.sendall(GOOD[3:].encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
                connection.close()

            with ThreadPoolExecutor(64) as clients:
                questions = [json.dumps({"text": text}) for text in TEXTS * 64]
                statuses = Counter(status for status, _ in clients.map(partial(post, port), questions))
            assert set(statuses) <= {200, 429}
            assert sum(statuses.values()) == 256
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
            found = list(clients.map(partial(post, port), questions))
    model, _ = serve.load_classifier(str(folder), device="cpu")
    for text, (status, answer) in zip(texts["text"][:] * 4, found, strict=True):
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"))
        assert (status, answer["label"]) == (200, f"LABEL_{out.logits.argmax()}")
        assert answer["budget"] == pytest.approx(out.budget.item())


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no model with its tokenizer is there"), running_server(str(tmp_path)):
        pass
