# ruff: noqa: E402 - what is tested are scripts, found by their folders, and an extra

import asyncio
import importlib.util
import json
import queue
import socket
import subprocess
import sys
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import set_seed

from conftest import LONGEST, budgetformer, stock_folder


pytest.importorskip("litserve")
ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import serving
from fastapi.testclient import TestClient
from litserve.callbacks import CallbackRunner

import serve


TEXTS = ["w1 w2 w3", "w20 w21", "w5 " * 20, "w30 w31 w2 w7 w9 w11"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny BudgetFormer and its tokenizer."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("serve")
    budgetformer("bert").save_pretrained(folder)
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


@pytest.mark.parametrize("configured", [None, 0.75])
def test_budgets_mix_in_one_batch_and_each_is_answered_as_if_alone(start, folder, tokenizer, monkeypatch, configured):
    api = start()
    if configured is not None:
        api.model.config.head_budget = configured
        api.model.save_pretrained(folder / "configured")
        tokenizer.save_pretrained(folder / "configured")
        api.checkpoint = str(folder / "configured")
        api.setup("cpu")
    calls, forward = [], api.model.forward
    monkeypatch.setattr(api.model, "forward", lambda **inputs: (calls.append(inputs), forward(**inputs))[1])
    budgets = [1.0, None, 0.25, None, 0.5]
    questions = [{"text": text, "head_budget": b} for text, b in zip([*TEXTS, TEXTS[0]], budgets, strict=True)]
    questions.append({"text": "w1", "text_pair": "w2 w3"})
    got = answer(api, *questions)
    assert len(calls) == 1
    spent = set()
    for question, found in zip(questions, got, strict=True):
        inputs = tokenizer(question["text"], question.get("text_pair"), truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = forward(**inputs, head_budget=question.get("head_budget"))
        score, label = expected.logits[0].softmax(-1).max(-1)
        assert found["label"] == f"LABEL_{label}"
        assert found["score"] == pytest.approx(score.item(), abs=1e-5)
        assert found["head_budget"] == pytest.approx(expected.head_budget.item())
        spent.add(round(found["head_budget"], 3))
    assert len(spent) > 2


def test_what_the_model_cannot_read_is_cut(start):
    tokens, _ = start().decode_request(serve.Question(text="w1 " * 1000, text_pair="w2 " * 1000))
    assert len(tokens["input_ids"]) == LONGEST


def asked_of_the_model(api, *budgets):
    inputs = api.batch([api.decode_request(serve.Question(text="w1", head_budget=budget)) for budget in budgets])
    return inputs["head_budget"].tolist()


def test_budgets_fall_to_the_floor_while_requests_wait_and_come_back(start):
    api = start(floor=0.25, max_batch=4)
    own = api.own_budget
    assert own > 0.3
    assert asked_of_the_model(api, None) == pytest.approx([own])
    seen, now = [own], 0.0
    for waiting in (0, 2, 40, 40, 40, 40, 40, 40, 40, 40):
        now += 0.2
        api.notice(waiting, now)
        seen.append(asked_of_the_model(api, None)[0])
    assert seen[1] == pytest.approx(own)
    assert sorted(seen, reverse=True) == seen
    assert seen[2] > seen[-1] > 0.25
    assert seen[-1] == pytest.approx(0.25, abs=0.02)
    assert asked_of_the_model(api, 1.0, 0.1, None) == pytest.approx([1.0, 0.1, seen[-1]])
    api.notice(0, now + 0.1)
    partly = asked_of_the_model(api, None)[0]
    assert seen[-1] < partly < own
    api.notice(0, now + 10.0)
    assert asked_of_the_model(api, None) == pytest.approx([own])


@pytest.mark.parametrize("floor", [None, 0.9])
def test_load_changes_nothing_without_a_floor_or_below_it(start, floor):
    api = start(floor=floor)
    api.notice(1000, 1.0)
    assert api.pressure == 1.0
    assert asked_of_the_model(api, None) == pytest.approx([api.own_budget])


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
        question = serve.Question(text=TEXTS[number % 4], head_budget=(None, 0.5)[number % 2])
        waiting.put((number % 2, f"id {number}", time.monotonic(), question))
    with pytest.raises(SystemExit):
        serve.QueueLoop().run_batched_loop(api, waiting, answers, CallbackRunner())
    assert sizes == [4, 4, 2]
    assert noticed == [6, 2, 0]
    assert [(consumer, uid) for consumer, (uid, _) in answers.sent] == [(n % 2, f"id {n}") for n in range(10)]
    for _, (_, (found, status, *_)) in answers.sent:
        assert found.keys() == {"label", "score", "head_budget"}
        assert status == "OK"


GOOD = '{"text": "w1"}'
MALFORMED = {
    "not JSON": (b"w1", "body.0: JSON decode error"),
    "nothing": (b"", "body: Field required"),
    "a list": (b"[]", "body: Input should be a valid dictionary"),
    "no text": (b"{}", "body.text: Field required"),
    "a number": (b'{"text": 1}', "body.text: Input should be a valid string"),
    "null": (b'{"text": null}', "body.text: Input should be a valid string"),
    "empty": (b'{"text": ""}', "body.text: String should have at least 1 character"),
    "blank": (b'{"text": " \\n"}', "body.text: String should have at least 1 character"),
    "empty pair": (b'{"text": "w1", "text_pair": ""}', "body.text_pair: String should have at least 1"),
    "too long": (json.dumps({"text": "w" * 20_001}).encode(), "body.text: String should have at most 20000"),
    "far too long": (b"w" * (2**20 + 1), "Payload too large"),
    "half a character": (b'{"text": "\\ud800"}', "body.text: Input should be a valid string"),
    "bytes": (b'{"text": "\xff"}', "error parsing the body"),
    "deep": (b"[" * 100_000, "error parsing the body"),
    "unknown": (b'{"text": "w1", "budget": 0.5}', "body.budget: Extra inputs are not permitted"),
    "unknown and strange": (b'{"text": "w1", "\\ud800": 0.5}', "body"),
    "no heads": (b'{"text": "w1", "head_budget": 0}', "body.head_budget: Input should be greater than 0"),
    "too many": (b'{"text": "w1", "head_budget": 1.5}', "body.head_budget: Input should be less than or equal to 1"),
    "not a number": (b'{"text": "w1", "head_budget": NaN}', "body.head_budget: Input should be"),
    "endless": (b'{"text": "w1", "head_budget": Infinity}', "body.head_budget: Input should be"),
    "digits": (b'{"text": "w1", "head_budget": "0.5"}', "body.head_budget: Input should be a valid number"),
    "true": (b'{"text": "w1", "head_budget": true}', "body.head_budget: Input should be a valid number"),
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


def test_only_a_checkpoint_that_can_be_served_is(folder, tmp_path, tokenizer):
    def refusal(name):
        with pytest.raises(SystemExit) as error:
            serve.check(str(tmp_path / name))
        return str(error.value)

    stock_folder("bert", tmp_path / "stock")
    budgetformer("bert", stir=False, static_heads=[[0], [1, 2], [3]]).save_pretrained(tmp_path / "static")
    budgetformer("bert", num_labels=1).save_pretrained(tmp_path / "number")
    budgetformer("bert", problem_type="multi_label_classification").save_pretrained(tmp_path / "several")
    assert "no model with its tokenizer is there" in refusal("nothing")
    assert "no model with its tokenizer is there" in refusal("static")
    for name in ("stock", "static", "number", "several"):
        tokenizer.save_pretrained(tmp_path / name)
    assert "must be a BudgetFormer with routers, got bert" in refusal("stock")
    assert "must be a BudgetFormer with routers" in refusal("static")
    assert "must tell one of several labels" in refusal("number")
    assert "must tell one of several labels" in refusal("several")
    serve.check(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--floor", "0"], "--floor must be in [0.01, 1.0], got 0.0"),
        (["--floor", "nan"], "--floor must be in [0.01, 1.0], got nan"),
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


def test_a_load_asks_everything_once_and_counts_what_comes_back():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(question["text"])
            body = json.dumps({"head_budget": 0.5}).encode()
            self.send_response(429 if question["text"] == "3" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    questions = [{"text": str(number)} for number in range(20)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        found = serving.load(server.server_port, questions, clients=4, seconds=60)
        cut_short = serving.load(server.server_port, questions, clients=2, seconds=-1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
    assert sorted(asked[:20]) == sorted(question["text"] for question in questions)
    assert found["statuses"] == {"200": 19, "429": 1}
    assert cut_short["statuses"] == {"200": 2}
    assert len(found["latencies"]) == 19
    assert serving.summary([found, cut_short])["heads"] == 0.5
    assert serving.summary([found, cut_short])["statuses"] == {"200": 21, "429": 1}
    gone = serving.load(server.server_port, questions, clients=2, seconds=60)
    assert gone["statuses"] == {"error": 20}
    with pytest.raises(SystemExit, match="No request was answered"):
        serving.summary([gone])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client": [1]}, r"unknown settings \['client'\]"),
        ({"clients": 3}, r"clients must be a list, got 3"),
        ({"clients": [0]}, r"clients must be numbers >= 1"),
        ({"repeats": 0}, r"repeats must be >= 1"),
    ],
)
def test_bad_settings_of_the_benchmark_are_named(tmp_path, settings, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=message):
        serving.main([str(path), "--checkpoint", "none"])


def test_experiments_have_valid_settings():
    paths = list((ROOT / "benchmarks" / "experiments" / "serving").glob("*.json"))
    assert paths
    assert all(serving.read_settings(path)["repeats"] >= 5 for path in paths)


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
        with serving.running_server(str(folder), "--max-batch", "1", "--load-aware", "--floor", "0.3") as port:
            yield group_of(port)
            status, found = post(port, '{"text": "w1 w2 w3", "head_budget": 1}')
            assert (status, found["head_budget"]) == (200, 1.0)
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
            assert serving.is_healthy(port)
            held.pop().close()  # one gives up, the others go on
            for connection in held:
                connection.sendall(GOOD[3:].encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
                connection.close()

            statuses = Counter()
            for _ in range(2):
                questions = [{"text": text} for text in TEXTS * 32]
                statuses += serving.load(port, questions, clients=64, seconds=60)["statuses"]
            assert set(statuses) <= {"200", "429"}
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
def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no model with its tokenizer is there"), serving.running_server(str(tmp_path)):
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)  # it starts two servers
def test_the_benchmark_measures_every_way_at_every_load(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"w{number} {'w3 ' * (number % 7)}" for number in range(30)))
    settings = {"clients": [1, 6], "requests": 24, "repeats": 2, "max_batch": 2, "threads": 1}
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    arguments = ["--checkpoint", str(folder), "--data", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out")]
    serving.main([str(tmp_path / "tiny.json"), *arguments])
    result = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert result["settings"] == {**serving.SETTINGS, **settings, "checkpoint": folder.name}
    assert result["environment"]["packages"]["litserve"]
    assert result["agreement"]["checks"] == 6
    assert len(result["figures"]) == 6
    for name, figures in result["figures"].items():
        assert figures["statuses"] == {"200": 48}, name
        assert figures["latency_ms"]["p95"] >= figures["latency_ms"]["p50"] > 0
        assert (figures["heads"] == 1.0) == name.endswith("all heads")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.json"]
