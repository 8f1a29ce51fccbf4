"""Batch inference: parts that can be done again, and (slow) a real Ray on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import LONGEST, budgetformer
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.prediction import predict


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # scripts import what lies beside them
ray_batch_inference = import_module("ray_batch_inference")

REASONS = ["missing", "empty", "empty", "not UTF-8", *["not a string but int64"] * 2]
REJECTED = [{"row": row, "reason": reason} for row, reason in enumerate(REASONS, 64)]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    budgetformer("bert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """64 good rows and four bad ones, and a second file whose texts are numbers."""
    folder = tmp_path_factory.mktemp("input")
    rows = pa.chunked_array([pa.array([*texts["text"], None, "", " \n"]), pa.array([b"w1 \xff w2"]).view(pa.string())])
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet", row_group_size=30)
    pq.write_table(pa.table({"text": [1, 2]}), folder / "b.parquet")
    return folder


def predicted(output):
    return sorted(pq.read_table(output / "predictions").to_pylist(), key=lambda row: row["row"])


def assert_answers_of_each_text_alone(answers, checkpoint, texts):
    model, tokenizer = load_classifier(str(checkpoint), device="cpu")
    assert [row["row"] for row in answers] == list(range(len(texts)))
    for row, text in zip(answers, texts, strict=True):
        [alone] = predict(model, tokenizer, [({"text": text}, None)], spent=True)
        assert row["label"] == alone["label"]
        assert [row["score"], row["budget"]] == pytest.approx([alone["score"], alone["budget"]], abs=1e-4)


def test_parts_hold_every_row_once_and_lie_in_one_row_group(source):
    parts = ray_batch_inference.find_parts(source, "text", 20)
    entries = [(Path(part["path"]).stem, part["group"], part["start"], part["rows"], part["first"]) for part in parts]
    assert entries == [
        ("a", 0, 0, 20, 0), ("a", 0, 20, 10, 20), ("a", 1, 0, 20, 30), ("a", 1, 20, 10, 50), ("a", 2, 0, 8, 60),
        ("b", 0, 0, 2, 68),
    ]  # fmt: skip


def test_a_part_is_whole_or_not_there_and_done_again_it_is_the_same(checkpoint, source, texts, tmp_path, monkeypatch):
    (tmp_path / "predictions").mkdir()
    options = Namespace(model=str(checkpoint), output=tmp_path, column="text", budget=None, max_length=LONGEST)
    worker = ray_batch_inference.Classifier(options)
    parts = ray_batch_inference.find_parts(source, "text", 20)
    with monkeypatch.context() as patch:
        patch.delattr(os, "replace")  # as if the worker died there
        with pytest.raises(AttributeError):
            worker(parts[0])
    assert not list((tmp_path / "predictions").glob("part-*"))
    assert [row for part in parts for row in worker(part)] == REJECTED
    answers = predicted(tmp_path)
    assert_answers_of_each_text_alone(answers, checkpoint, texts["text"])
    assert [row for part in parts for row in worker(part)] == REJECTED  # as if it had died before it said so
    assert predicted(tmp_path) == answers


def test_doubted_rows_of_a_part_share_full_batches(checkpoint, texts, tmp_path, monkeypatch):
    (tmp_path / "predictions").mkdir()
    pq.write_table(pa.table({"text": [*texts["text"]] * 4}), tmp_path / "rows.parquet")
    options = Namespace(model=str(checkpoint), output=tmp_path, column="text", budget=None, max_length=LONGEST)
    worker = ray_batch_inference.Classifier(options)
    worker.model.config.looks, worker.model.config.confidence = [0.125, 1.0], [0.1]
    calls, forward = [], worker.model.forward

    def call(**inputs):
        calls.append((inputs.get("budget"), len(inputs["input_ids"])))
        return forward(**inputs)

    monkeypatch.setattr(worker.model, "forward", call)
    [part] = ray_batch_inference.find_parts(tmp_path / "rows.parquet", "text", 2048)
    worker(part)
    doubted = sum(row["budget"] > 1.0 for row in predicted(tmp_path))
    sizes = [size for budget, size in calls if budget == 1.0]
    assert 64 < doubted < 256
    assert sizes == [32] * (doubted // 32) + [doubted % 32] * (doubted % 32 > 0)
    assert len(calls) == 256 / 32 + len(sizes)


def test_a_run_goes_on_in_its_own_folder_and_in_no_other(tmp_path):
    run = {"column": "text", "budget": None, "input": [["a.parquet", 10, 1]]}
    ray_batch_inference.begin(tmp_path / "new", run)
    ray_batch_inference.begin(tmp_path / "new", run)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["predictions", "run.json"]
    with pytest.raises(ValueError, match="of one with another budget, input"):
        ray_batch_inference.begin(tmp_path / "new", {**run, "budget": 0.5, "input": [["a.parquet", 11, 1]]})


def test_what_cannot_be_started_says_why(checkpoint, source, tmp_path, capsys, monkeypatch):
    def message(*arguments):
        with pytest.raises(SystemExit):
            ray_batch_inference.main([str(argument) for argument in arguments])
        return capsys.readouterr().err

    new = tmp_path / "new"
    assert "must be a new or empty folder, or that of this run" in message(checkpoint, source, source)
    assert "needs a column 'review', it has text" in message(checkpoint, source, new, "--column", "review")
    assert "a.csv" in message(checkpoint, tmp_path / "a.csv", new)
    assert "--actors and --part-rows must be >= 1, got 0 and 2048" in message(checkpoint, source, new, "--actors", 0)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "must hold at least one row, got none" in message(checkpoint, tmp_path / "none.parquet", new)
    assert "checkpoint must be" in message(tmp_path, source, new)
    assert not new.exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[ray\]"'):
        ray_batch_inference.run([{}], Namespace(address=None, actors=1))


@pytest.fixture
def home():
    """An empty folder in place of the temporary and the home folder; its path is short, for it is that of sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def started(home, *arguments):
    environment = {**os.environ, "TMPDIR": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "ray_batch_inference.py"), *(str(argument) for argument in arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            yield run
        finally:
            run.kill()  # all of Ray ends with it


def finish(process, home):
    children = psutil.Process(process.pid).children(recursive=True)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []  # ended, but nobody asked
    assert list(home.iterdir()) == []
    return printed.splitlines()[-1]


def wait_for(condition, process):
    while process.poll() is None:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"ended before that:\n{process.communicate()[0][-3000:]}")


@pytest.mark.slow
def test_every_row_is_classified_or_rejected_and_ray_leaves_nothing_behind(checkpoint, source, texts, tmp_path, home):
    with started(home, checkpoint, source, tmp_path, "--part-rows", 20, "--max-length", LONGEST) as process:
        wait_for(lambda: list(tmp_path.glob("predictions/part-*")), process)  # by now Ray has all its processes
        said = finish(process, home)
    assert said.startswith("70 rows in ")
    assert said.endswith(": 64 classified, 6 rejected.")
    assert pq.read_table(tmp_path / "rejected.parquet").to_pylist() == REJECTED
    assert_answers_of_each_text_alone(predicted(tmp_path), checkpoint, texts["text"])


def workers(process):
    processes = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # some have just ended
            processes += [child] if "FlatMap(Classifier)" in " ".join(child.cmdline()) else []
    return processes


@pytest.mark.slow
def test_a_worker_killed_in_mid_run_loses_and_repeats_no_row(checkpoint, texts, tmp_path, home):
    many = [*texts["text"]] * 100
    many[5] = None
    pq.write_table(pa.table({"text": many}), tmp_path / "many.parquet")
    output = tmp_path / "out"
    arguments = (tmp_path / "many.parquet", output, "--part-rows", 100, "--max-length", LONGEST)
    with started(home, checkpoint, *arguments) as process:
        [victim, *_] = wait_for(lambda: workers(process), process)
        wait_for(lambda: list(output.glob("predictions/part-*")), process)
        os.kill(victim.pid, signal.SIGKILL)
        assert len(list(output.glob("predictions/part-*"))) < len(many) / 100
        assert finish(process, home).endswith(f": {len(many) - 1} classified, 1 rejected.")
    assert pq.read_table(output / "rejected.parquet").to_pylist() == [{"row": 5, "reason": "missing"}]
    labels = {row["row"]: row["label"] for row in predicted(output)}
    assert sorted(labels) == [row for row in range(len(many)) if row != 5]
    assert len(predicted(output)) == len(labels)
    assert all(labels[row] == labels[row % 64] for row in labels if row % 64 != 5)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_when_it_is_started_again_and_loses_nothing(checkpoint, texts, tmp_path, home):
    many = [*texts["text"]] * 30
    many[5] = None
    pq.write_table(pa.table({"text": many}), tmp_path / "many.parquet")
    output = tmp_path / "out"
    arguments = (tmp_path / "many.parquet", output, "--part-rows", 20, "--max-length", LONGEST)
    with started(home, checkpoint, *arguments) as process:
        wait_for(lambda: list(output.glob("predictions/part-*")), process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        psutil.wait_procs(children, timeout=60)
    before = {path: path.stat().st_mtime_ns for path in output.glob("predictions/part-*")}
    assert 0 < len(before) < len(many) / 20
    assert not (output / "rejected.parquet").exists()
    with tempfile.TemporaryDirectory(dir="/tmp") as anew, started(Path(anew), checkpoint, *arguments) as process:
        assert finish(process, Path(anew)).endswith(f": {len(many) - 1} classified, 1 rejected.")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert pq.read_table(output / "rejected.parquet").to_pylist() == [{"row": 5, "reason": "missing"}]
    numbers = [row["row"] for row in predicted(output)]
    assert numbers == [row for row in range(len(many)) if row != 5]
