"""Processes killed at any moment, and checkpoints damaged at any place: nothing written is lost, nothing crashes."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import time
import traceback

import pytest
from datasets import concatenate_datasets, disable_progress_bars
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments, set_seed

import hf_budgetformer_cli as cli
from conftest import budgetformer, stock_folder
from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.runtime import ExportError, OnnxClassifier
from hf_budgetformer.tools import prediction
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.export import TracedModel
from hf_budgetformer.tools.looks_export import export_looks
from hf_budgetformer.tools.model_card import write_model_card
from hf_budgetformer.tools.prediction import predict_file
from hf_budgetformer.tools.recipe import last_checkpoint, train_classifier
from hf_budgetformer.tools.results import read_results, save_result


# A fork beside threads that others started is what Python warns of; the child computes with one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    set_seed(2)
    folder = tmp_path_factory.mktemp("reliability") / "model"
    model = budgetformer("bert", num_labels=3, looks=[0.25, 1.0], confidence=[0.5])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Killed processes


def run_and_kill(work, seconds=None):
    """Does some work in a copy of this process, which is killed after so many seconds; whether it came to its end.

    A fork spares the import of everything. The parent has one thread of its own, which is all that a fork keeps.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def time_whole(work):
    start = time.perf_counter()
    assert run_and_kill(work)
    return time.perf_counter() - start


def files_of(folder):
    """Content of every file in a folder, without what is left of a write that was cut off."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".part")
    }


def kill_until_done(work, seconds, draw, check):
    """Kills and begins again until the work is done, or six times at most; the number of kills."""
    for kills in range(6):
        if run_and_kill(work, seconds * draw.random()):
            return kills
        check()
    assert run_and_kill(work)
    return 6


@pytest.fixture
def predicting(checkpoint, tmp_path, texts, monkeypatch):
    """Work that predicts 128 texts into a file."""
    monkeypatch.setattr(prediction, "WINDOW", 1)
    concatenate_datasets([texts] * 2).to_parquet(tmp_path / "texts.parquet")
    model, tokenizer = load_classifier(str(checkpoint))

    def predict_into(path):
        if not path.exists():  # or a kill came after the end
            predict_file(model, tokenizer, str(tmp_path / "texts.parquet"), path, batch_size=4, spent=True)

    return predict_into


def check_predictions(predict_into, folder, kills):
    seconds = time_whole(lambda: predict_into(folder / "whole.jsonl"))
    whole, draw, killed, number = (folder / "whole.jsonl").read_bytes(), random.Random(0), 0, 0
    assert whole.count(b"\n") == 128
    while killed < kills:
        path, kept = folder / f"{number}.jsonl", [b""]
        partial = path.with_name(path.name + ".partial")

        def check(path=path, partial=partial, kept=kept):
            written = partial.read_bytes() if partial.exists() else path.read_bytes() if path.exists() else b""
            assert whole.startswith(written)
            windows = b"".join(written.splitlines(keepends=True)[: written.count(b"\n") // 4 * 4])
            assert windows.startswith(kept[0]), "what was written once is lost"
            kept[0] = windows

        killed += kill_until_done(lambda path=path: predict_into(path), seconds, draw, check)
        assert path.read_bytes() == whole
        assert not partial.exists()
        number += 1


def test_a_prediction_that_is_killed_goes_on_to_the_same_file(predicting, tmp_path):
    check_predictions(predicting, tmp_path, kills=3)


@pytest.mark.slow
def test_a_prediction_that_is_killed_forty_times_goes_on_to_the_same_files(predicting, tmp_path):
    check_predictions(predicting, tmp_path, kills=40)


def without_times(content):
    """JSON without what a clock measured."""
    values = json.loads(content)
    for test in values.get("result", {}).get("tested", []):
        test["seconds"] = None
    return values


@pytest.mark.slow
def test_a_tuning_that_is_killed_leaves_a_configuration_of_before_or_after(checkpoint, tmp_path, texts):
    texts.to_csv(tmp_path / "data.csv")
    arguments = ["tune", "MODEL", str(tmp_path / "data.csv"), "--disagreement", "0.3", "--json"]

    def work(folder):
        arguments[1] = str(folder)
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert not ended.value.code

    shutil.copytree(checkpoint, tmp_path / "whole")
    seconds = time_whole(lambda: work(tmp_path / "whole"))
    before, after = files_of(checkpoint), files_of(tmp_path / "whole")
    [result] = after.keys() - before.keys()
    assert before["config.json"] != after["config.json"]
    draw = random.Random(1)
    for number in range(15):
        folder = tmp_path / str(number)
        shutil.copytree(checkpoint, folder)
        if not run_and_kill(lambda folder=folder: work(folder), seconds * draw.random()):
            left = files_of(folder)
            assert left["config.json"] in (before["config.json"], after["config.json"])
            assert without_times(left.get(result, after[result])) == without_times(after[result])
            assert run_and_kill(lambda folder=folder: work(folder))
        files = files_of(folder)
        assert without_times(files.pop(result)) == without_times(after[result])
        assert files == {name: content for name, content in after.items() if name != result}
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_training_that_is_killed_goes_on_to_the_same_weights(tmp_path, tokenizer, texts):
    stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")

    def work(folder):
        disable_progress_bars()
        arguments = TrainingArguments(
            str(folder), max_steps=12, save_steps=3, logging_steps=3, learning_rate=1e-3, use_cpu=True,
            report_to="none", disable_tqdm=True, resume_from_checkpoint="last",
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            train_classifier(str(tmp_path / "plain"), texts, arguments, validation=texts)

    seconds = time_whole(lambda: work(tmp_path / "whole"))
    names = [f"{folder}{name}" for folder in ("", "teacher/") for name in ("model.safetensors", "config.json")]
    whole, draw, resumed = files_of(tmp_path / "whole"), random.Random(2), 0
    for number in range(15):
        folder = tmp_path / str(number)
        for _ in range(2):
            if run_and_kill(lambda folder=folder: work(folder), 0.1 + seconds * draw.random()):
                break
            resumed += last_checkpoint(folder) is not None or last_checkpoint(folder / "teacher") is not None
        assert run_and_kill(lambda folder=folder: work(folder))
        files = files_of(folder)
        for name in names:
            assert files[name] == whole[name].replace(str(tmp_path / "whole").encode(), str(folder).encode()), name
        shutil.rmtree(folder)
    assert resumed > 5


@pytest.mark.slow
def test_a_card_that_is_killed_leaves_the_readme_of_before_or_after(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    results = [BudgetResult(1.0, 54, 0.9, (0.8, 0.95), 1.0, 1.0), BudgetResult(0.25, 48, 0.8, (0.7, 0.9), 0.9, 0.24)]
    start = tmp_path / "start"
    shutil.copytree(checkpoint, start)
    save_result(start, "evaluation", Evaluation(60, results, {}, {}).to_dict(), "me/data", "test", 60)
    (start / "README.md").write_text("---\ntags: []\n---\n\n# Mine\n\nWhat I wrote myself.\n")
    # One folder after the other under the same name, which the card tells.
    model = tmp_path / "model"

    def begin():
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(start, model)

    begin()
    seconds = time_whole(lambda: write_model_card(model))
    after, draw = files_of(model), random.Random(3)
    for _ in range(20):
        begin()
        if not run_and_kill(lambda: write_model_card(model), seconds * draw.random()):
            left = files_of(model)
            assert left["README.md"] in (files_of(start)["README.md"], after["README.md"])
            assert {name: after[name] for name in left if name != "README.md"} == {
                name: content for name, content in left.items() if name != "README.md"
            }
            assert run_and_kill(lambda: write_model_card(model))
        assert files_of(model) == after


@pytest.mark.slow
def test_an_export_that_is_killed_does_not_load_and_the_next_one_is_whole(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, tokenizer = load_classifier(str(checkpoint), budgeted=True)
    traced, place = tmp_path / "traced", tmp_path / "place"
    export_looks(model, tokenizer, traced)
    expected = OnnxClassifier(traced)(["w1 w2", "w3"]).logits
    # Tracing takes nearly all of the time, and writes nothing that stays.
    monkeypatch.setattr(TracedModel, "write", lambda self, path: shutil.copyfile(traced / "onnx" / path.name, path))

    def work():
        export_looks(model, tokenizer, place / "served")

    seconds = time_whole(work)
    whole, draw, cut_off = files_of(place), random.Random(5), 0
    for _ in range(30):
        shutil.rmtree(place)
        if not run_and_kill(work, seconds * draw.random()):
            if not (place / "served" / "onnx" / "looks.json").exists():
                cut_off += 1
                with pytest.raises(ExportError):
                    OnnxClassifier(place / "served")
            assert run_and_kill(work)
        assert files_of(place) == whole  # and nothing is left of what was cut off
        assert (OnnxClassifier(place / "served")(["w1 w2", "w3"]).logits == expected).all()
    assert cut_off > 5


def check_results(checkpoint, folder, kills):
    """Results of which many are written one after the other, as commands do."""
    shutil.copytree(checkpoint, folder)

    def work():
        for number in range(40):
            save_result(folder, "evaluation", {"figures": [number] * 20_000}, f"me/data-{number}", None, number)

    seconds = time_whole(work)
    whole, draw = files_of(folder), random.Random(4)
    for _ in range(kills):
        shutil.rmtree(folder / "budgetformer")
        run_and_kill(work, seconds * draw.random())
        for record in read_results(folder, "evaluation"):
            assert record.result == {"figures": [record.rows] * 20_000}
        assert run_and_kill(work)
        assert files_of(folder) == whole


def test_results_that_are_killed_are_whole_or_not_there(checkpoint, tmp_path):
    check_results(checkpoint, tmp_path / "model", kills=2)


@pytest.mark.slow
def test_results_that_are_killed_ten_times_are_whole_or_not_there(checkpoint, tmp_path):
    check_results(checkpoint, tmp_path / "model", kills=10)


# Damaged checkpoints


def places(values, path=()):
    """Every place in nested JSON, as the path of keys and positions that leads there."""
    steps = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for step, value in steps:
        yield (*path, step)
        yield from places(value, (*path, step))


STRANGE = [
    None, True, -1, 0, 3, 10**9, 10**12, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "bert", "\ud800",
    "../../evil", "evil.Evil", [], [1], [[]], ["x"] * 1000, {}, {"a": 1}, {"0": "x"}, [None], {"evil": {"evil": []}},
]  # fmt: skip
NEW_FIELDS = [
    ("num_labels", 10**9), ("problem_type", "nonsense"), ("problem_type", "regression"), ("torch_dtype", "evil"),
    ("dtype", 7), ("quantization_config", {"quant_method": "evil"}), ("attn_implementation", "evil"),
    ("auto_map", {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}),
    ("auto_map", {"AutoConfig": "somebody/else--evil.Evil"}), ("architectures", ["Evil"]), ("is_decoder", True),
    ("base_model_tp_plan", {"*": "evil"}), ("tokenizer_class", "Evil"), ("custom_pipelines", {"x": {"impl": "evil.E"}}),
    ("head_budget", 0.5), ("model_type", "evil"), ("model_type", "gpt2"), ("_name_or_path", "../.."),
]  # fmt: skip


def mutate_bytes(draw, content):
    """Bytes flipped, a stretch cut out, doubled or made zero, or the end cut off."""
    content = bytearray(content)
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice([1, 8, 200]))
    kind = draw.choice(["flip", "end", "cut", "double", "zero"])
    if kind == "flip":
        for _ in range(draw.choice([1, 3, 30])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "end":
        del content[start:]
    elif kind == "cut":
        del content[start:end]
    elif kind == "double":
        content[start:start] = content[start:end]
    else:
        content[start:end] = bytes(end - start)
    return bytes(content)


def mutate_config(draw, content):
    kind = draw.choice(["value", "value", "value", "field", "missing", "deep", "bytes"])
    values = json.loads(content)
    if kind == "bytes":
        return mutate_bytes(draw, content)
    if kind == "deep":
        depth = draw.choice([100, 10_000, 100_000])
        return b'{"looks": ' + b"[" * depth + b"]" * depth + b"}"
    if kind == "field":
        name, value = draw.choice(NEW_FIELDS)
        return json.dumps({**values, name: value}).encode()
    *path, last = draw.choice(list(places(values)))
    inner = values
    for step in path:
        inner = inner[step]
    if kind == "missing":
        del inner[last]
    else:
        inner[last] = draw.choice(STRANGE)
    return json.dumps(values).encode()


def mutate_weights(draw, content):
    """Damages the whole file, or its header alone: names, shapes, types and places of the tensors."""
    if draw.random() < 0.4:
        return mutate_bytes(draw, content)
    [size] = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw.random() < 0.1:
        return struct.pack("<Q", draw.choice([0, 1, size + 1, 2**31, 2**63, 2**64 - 1])) + content[8:]
    *path, last = draw.choice(list(places(header)))
    inner = header
    for step in path:
        inner = inner[step]
    if draw.random() < 0.2:
        del inner[last]
    else:
        inner[last] = draw.choice([*STRANGE, "F16", "I64", "BOOL", [2**62, 4], [0, 2**63]])
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + rest


MUTATIONS = {"config.json": mutate_config, "model.safetensors": mutate_weights}


def damage(checkpoint, folder, seed):
    """A copy of a checkpoint with one mutation, beside code that must not run; the name of the file that differs."""
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w').close()\nclass Evil: ...\n")
    name = draw.choice(list(MUTATIONS))
    path = folder / name
    path.write_bytes(MUTATIONS[name](draw, path.read_bytes()))
    return name


# The last is upstream's, for weights of other shapes than the configuration's.
CLEAR = (OSError, ValueError, TypeError, StrictDataclassError, RuntimeError)


def load_and_catch(load, folder, clear):
    """What was raised, None where it loads; any other error than these, or one that says nothing, fails."""
    start = time.perf_counter()
    try:
        load(str(folder))
    except clear as error:
        assert str(error).strip()  # noqa: PT017 - which of them it may be differs
        return error
    finally:
        assert time.perf_counter() - start < 60
        assert not (folder.parent / "executed").exists()
    return None


def damage_and_load(checkpoint, folder, seeds):
    """Loads a checkpoint that each seed damages otherwise, by both doors."""
    refused = 0
    for seed in seeds:
        name = damage(checkpoint, folder, seed)
        try:
            load_and_catch(BudgetFormerForSequenceClassification.from_pretrained, folder, CLEAR)
            error = load_and_catch(load_classifier, folder, ValueError)
        except BaseException as strange:
            raise AssertionError(f"seed {seed}, {name}: {strange!r}") from strange
        if error is not None:
            refused += 1
            assert str(folder) in str(error), (seed, name, error)
    assert refused > len(seeds) / 2


def test_a_damaged_checkpoint_loads_or_is_refused_by_one_clear_error(checkpoint, tmp_path):
    damage_and_load(checkpoint, tmp_path / "damaged", range(40))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_checkpoints_load_or_are_refused_by_one_clear_error(checkpoint, tmp_path):
    damage_and_load(checkpoint, tmp_path / "damaged", range(1000))
