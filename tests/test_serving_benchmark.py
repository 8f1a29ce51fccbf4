"""The benchmark of serving, against servers that only pretend; (slow) with real ones, and with Ray."""

# ruff: noqa: E402 - benchmarks are scripts beside one another, found by their folder

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import budgetformer
from hf_budgetformer.tools.tuning import calibrate_margins


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import report
import serving


SETTINGS = {
    "title": "Tiny serving",
    "clients": [1, 3],
    "requests": [4, 12],
    "repeats": 2,
    "max_batch": 4,
    "max_wait_ms": 1.0,
    "checked": 4,
    "rows": 16,
    "few_rows": 2,
    "file_repeats": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tokenizer, texts, tmp_path_factory):
    """A tiny BudgetFormer that doubts about half of its first looks."""
    folder = tmp_path_factory.mktemp("model")
    model = budgetformer("bert")
    calibrate_margins(model, [tokenizer(texts["text"][:], padding=True, return_tensors="pt")], budget=0.125)
    model.config.looks, model.config.confidence = [0.125, 1.0], [model.config.margins["quantiles"][50]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def measure(checkpoint, texts, tmp_path):
    """Runs one of the commands; returns what it wrote, and the page that is made of it."""
    (tmp_path / "texts.txt").write_text("\n".join(texts["text"]))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))

    def run(command, name):
        (tmp_path / "results").mkdir()
        output = tmp_path / "results" / name
        files = ["--settings", str(tmp_path / "settings.json"), "--output", str(output)]
        serving.main([command, str(checkpoint), "--data", str(tmp_path / "texts.txt"), "--threads", "1", *files])
        return json.loads(output.read_text()), report.write_report(output.parent, tmp_path / "report").read_text()

    return run


class Pretender(BaseHTTPRequestHandler):
    """Doubts every text of an even number of words; answers those that it does not doubt differently if it is ours."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        looks = 1 + question["text"].count(" ") % 2
        full = not self.server.ours or looks == 2 or question.get("budget") == 1.0
        answer = {"label": "full" if full else "first", "score": 0.5 + self.server.error * self.server.ours}
        body = json.dumps({**answer, "budget": 1.0, "looks": looks, "promise": None}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def pretend(monkeypatch):
    """Puts pretenders in the place of both servers, ours with an error of its scores, or a status of its answers."""

    def replace(error=0.0, status=200):
        @contextmanager
        def served(command, threads):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
            server.ours = command[0].endswith("serve.py")
            server.error, server.status = error, status
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield server.server_address[1]
            finally:
                server.shutdown()
                server.server_close()

        monkeypatch.setattr(serving, "served", served)

    return replace


def test_both_are_asked_by_so_many_clients_and_reported(measure, pretend, texts):
    pretend()
    result, page = measure("http", "serving.json")
    assert list(result["figures"]) == ["1", "3"]
    assert result["max_difference"] == 0.0
    for figures in result["figures"].values():
        assert 0.0 < figures["doubted"] < 1.0
        assert figures["same_labels"] == figures["doubted"]
        for way in figures["ways"].values():
            assert way["requests_per_second"]["median"] > 0
            assert 0 < way["p50_ms"] <= way["p95_ms"]
    assert "## Tiny serving" in page
    assert "| 3 | " in page


def test_what_is_not_right_is_not_timed(measure, pretend):
    pretend(error=0.01)
    with pytest.raises(SystemExit, match=r"differs by 0\.01 from the stock model"):
        measure("http", "serving.json")


def test_a_request_that_is_refused_ends_it(measure, pretend):
    pretend(status=503)
    with pytest.raises(SystemExit, match="answered with 503"):
        measure("http", "serving.json")


@pytest.mark.slow
def test_real_servers_agree(measure):
    pytest.importorskip("litserve")
    result, _ = measure("http", "serving.json")
    assert result["max_difference"] < 1e-5
    assert 0.0 < result["figures"]["3"]["doubted"] < 1.0


@pytest.mark.slow
def test_rows_with_ray_agree_with_those_of_a_loop(measure):
    pytest.importorskip("ray")
    result, page = measure("ray", "ray.json")
    assert result["max_difference"] < 1e-5
    assert set(result["figures"]["ways"]) >= {"stock, a loop", "ours, a loop", "ours, Ray"}
    assert "## Tiny serving: files, with Ray" in page
