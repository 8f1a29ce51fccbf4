"""The command line on tiny models: what it prints, writes and refuses; and the functions under it."""

import io
import itertools
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel
from transformers import AutoModelForSequenceClassification, TextClassificationPipeline, pipeline, set_seed
from transformers.utils import logging
from typer.testing import CliRunner

import hf_budgetformer.tools.export
import hf_budgetformer.tools.looks_export
import hf_budgetformer_cli as cli
from conftest import budgetformer, stock_classifier, stock_folder
from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools import prediction
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.evaluation import Evaluation, evaluate_budgets
from hf_budgetformer.tools.prediction import predict, predict_file
from hf_budgetformer.tools.results import read_results
from hf_budgetformer.tools.tuning import tune


COMMANDS = ["train", "evaluate", "tune", "profile", "cut", "export", "card", "predict", "page"]
NAMES = ["low", "middle", "high"]


@pytest.fixture
def model(tmp_path, tokenizer):
    """Folder of a BudgetFormer whose labels have names."""
    set_seed(2)  # with it some texts are doubted, and some are not
    model = budgetformer("bert", num_labels=3, looks=[0.25, 1.0], confidence=[0.5])
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {x: i for i, x in enumerate(NAMES)}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path, texts):
    """A csv file of the texts, with names for labels."""
    texts.map(lambda row: {"label": NAMES[row["label"]]}).to_csv(tmp_path / "data.csv")
    return str(tmp_path / "data.csv")


@pytest.fixture
def run(capsys):
    """Runs the command line; gives exit code, and what was printed to stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return call


def good(outcome):
    code, out, err = outcome
    assert code == 0, err
    return out


def training_of(folder):
    return json.loads((Path(folder) / "budgetformer" / "training.json").read_text())


def only_result(folder, kind):
    [record] = read_results(folder, kind)
    return record


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_the_command_understands(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "500"})
    assert result.exit_code == 0
    [example] = re.findall(rf"Example: budgetformer {command} (.*\S)", result.output)
    for option in re.findall(r"(--[a-z-]+) ", example):
        assert option in result.output.split("Example")[0]


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import sys; from hf_budgetformer_cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fine-tuned" in done.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "tune", "profile", "cut", "predict", "page"])
def test_every_command_that_runs_a_model_can_be_told_where(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "500"})
    assert "--device" in result.output


def test_evaluate_prints_and_keeps_what_the_function_finds(model, data, texts, run):
    lines = good(run("evaluate", model, data, "--budgets", "1,1/6,0.25,plain", "--device", "cpu")).splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "1.000", "0.167", "0.250", "plain", "64"]
    record = only_result(model, "evaluation")
    kept = Evaluation.from_dict(record.result)
    loaded, tokenizer = load_classifier(model)
    assert kept.results == evaluate_budgets(loaded, texts, tokenizer, (1.0, 1 / 6, 0.25, None)).results
    assert (kept.settings["checkpoint"], kept.settings["data"]) == (model, data)
    assert (record.rows, record.looks, record.stale) == (64, [0.25, 1.0], False)
    printed = good(run("evaluate", model, data, "--budgets", "1,1/6,0.25,plain", "--json"))
    assert Evaluation.from_dict(json.loads(printed)) == kept


def test_an_evaluation_on_other_data_replaces_none(model, data, texts, tmp_path, run):
    texts.select(range(20)).to_csv(tmp_path / "few.csv")
    good(run("evaluate", model, data))
    good(run("evaluate", model, tmp_path / "few.csv"))
    assert [record.rows for record in read_results(model, "evaluation")] == [64, 20]


def test_evaluate_takes_a_stock_model_too(tmp_path, data, tokenizer, run):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {x: i for i, x in enumerate(NAMES)}}
    folder = stock_folder("bert", tmp_path / "stock", **labels)
    tokenizer.save_pretrained(folder)
    [result] = json.loads(good(run("evaluate", folder, data, "--json")))["results"]
    assert (result["asked"], result["spent"]) == (None, 1.0)


@pytest.mark.parametrize("promise", ["--disagreement 0.3", "--tolerance 0.3", "--mean-budget 0.4"])
def test_tune_makes_what_it_finds_the_looks_of_a_plain_call_and_keeps_it(model, data, texts, run, promise):
    before = json.loads((Path(model) / "config.json").read_text())
    option, level = promise.split()
    arguments = [model, data, option, level, "--budgets", "1/8,0.25", "--confidence", "0.9", "--json"]
    dry = json.loads(good(run("tune", *arguments, "--dry-run")))
    assert json.loads((Path(model) / "config.json").read_text()) == before
    loaded, tokenizer = load_classifier(model)
    named = {option.strip("-").replace("-", "_"): float(level)}
    direct = tune(loaded, texts, tokenizer, **named, budgets=[0.125, 0.25], confidence=0.9)
    result = json.loads(good(run("tune", *arguments)))
    record = only_result(model, "tuning")
    assert record.result == result
    assert untimed(result) == untimed(dry) == untimed(json.loads(json.dumps(direct.to_dict())))
    assert not record.stale
    written = BudgetFormerForSequenceClassification.from_pretrained(model).config
    for name in ("looks", "confidence", "margins", "promise"):
        assert getattr(written, name) == getattr(loaded.config, name)
    changed = json.loads((Path(model) / "config.json").read_text())
    changes = {name for name, value in changed.items() if before.get(name) != value}
    assert changes <= {"looks", "confidence", "margins", "promise"}


def untimed(result):
    for test in result["tested"]:
        test["seconds"] = None
    return result


def test_tune_needs_labels_for_a_tolerance_only(model, texts, tmp_path, run):
    texts.remove_columns("label").to_csv(tmp_path / "unlabelled.csv")
    printed = good(run("tune", model, tmp_path / "unlabelled.csv", "--disagreement", "0.3"))
    assert "differ from the full model's on at most 30% of texts like the 64 of the calibration" in printed
    code, _, err = run("tune", model, tmp_path / "unlabelled.csv", "--tolerance", "0.3")
    assert (code, "must have a column 'label'" in err) == (1, True)


@pytest.mark.parametrize("command", ["evaluate DATA", "predict --file DATA"])
def test_data_unlike_those_of_the_promise_are_warned_of(model, data, run, caplog, command):
    arguments = [data if word == "DATA" else word for word in command.split()]
    arguments.insert(1, model)
    promise = {"risk": "disagreement", "level": 0.01, "confidence": 0.95, "rows": 1000, "bound": 0.01, "lost": 0.0}
    promise |= {"looks": [0.25, 1.0], "thresholds": [0.5]}
    for doubted, warned in ((0, 1), (1000, 1)):
        path = Path(model) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "promise": {**promise, "doubted": doubted}}))
        caplog.clear()
        good(run(*arguments))
        messages = [record.message for record in caplog.records if "of these 64 inputs were doubted" in record.message]
        assert len(messages) == warned
    caplog.clear()
    if command.startswith("predict"):
        good(run(*arguments, "--budget", "0.25"))
        assert not [record.message for record in caplog.records if "doubted" in record.message]


def test_profile_keeps_the_cost_card(model, data, run):
    (Path(model) / "budgetformer").mkdir()
    (Path(model) / "budgetformer" / "training.json").write_text('{"seconds": 60.0}')
    options = ["--budgets", "0.25,plain", "--rows", 8, "--repeats", 1, "--json"]
    card = json.loads(good(run("profile", model, data, *options)))
    assert card == only_result(model, "costs").result
    assert [result["asked"] for result in card["results"]] == [0.25, None]
    assert card["settings"]["training_seconds"] == 60.0


def test_profile_says_what_is_gained_on_what_else_there_is(model, data, run):
    options = ["--budgets", "0.25,plain", "--rows", 8, "--repeats", 1, "--against", "sorted"]
    out = good(run("profile", model, data, *options))
    assert "stock, as they come" in out
    assert "On these texts a plain call answers" in out.splitlines()[-1]
    assert [rival["name"] for rival in only_result(model, "costs").result["rivals"]] == ["as they come", "sorted"]
    code, out, err = run("profile", model, data, "--against", "onnx,tvm")
    assert (code, out) == (2, "")
    assert "--against must be of ['sorted', 'onnx', 'onnx-int8', 'openvino', 'openvino-int8'], got ['tvm']" in err


def test_cut_saves_a_static_model_and_tries_it(model, data, tmp_path, run):
    out = good(run("cut", model, "--output", tmp_path / "small", "--budget", 0.25, "--test", data))
    small, _ = load_classifier(str(tmp_path / "small"))
    assert not small.config.full_encoder
    assert f"{small.num_parameters():,} parameters are left" in out
    [result] = only_result(tmp_path / "small", "evaluation").result["results"]
    narrow = json.loads(good(run("evaluate", model, data, "--budgets", "0.25", "--json")))["results"][0]
    assert result["correct"] == narrow["correct"]
    printed = json.loads(good(run("cut", model, "--output", tmp_path / "less", "--budget", 0.1, "--json")))
    assert printed["parameters"] < small.num_parameters()


def test_export_and_card_pass_on_what_they_are_given(model, data, tmp_path, run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        hf_budgetformer.tools.export, "export_onnx", lambda model, *rest: (print("noise"), calls.append(rest), "x")[2]
    )
    assert good(run("export", model, "x.onnx", "--budget", 0.25, "--dtype", "int8")) == "Saved as x.\n"
    assert calls == [("x.onnx", 0.25, "int8")]
    looks = SimpleNamespace(to_dict=lambda: {"graphs": ["a"]})

    def export_looks(model, tokenizer, *rest):
        calls.append((*rest[:3], rest[3] and len(rest[3]), rest[4]))
        return SimpleNamespace(looks=looks, taken=False)

    monkeypatch.setattr(hf_budgetformer.tools.looks_export, "export_looks", export_looks)
    stdout = good(run("export", model, "served", "--calibration", data, "--runtime", "openvino", "--json"))
    assert json.loads(stdout) == {"output": "served", "taken": False, "looks": {"graphs": ["a"]}}
    good(run("export", model, "served", "--max-length", 16))
    assert calls[1:] == [("served", "openvino", "fp32", 64, None), ("served", "onnx", "fp32", None, 16)]
    for output, option, value in (("served", "--budget", 0.25), ("x.onnx", "--runtime", "onnx")):
        code, _, message = run("export", model, output, option, value)
        assert code == 2
        assert f"{option} is for" in message
    good(run("evaluate", model, data))
    path = json.loads(good(run("card", model, "--license", "mit", "--json")))["output"]
    assert "license: mit" in Path(path).read_text()


def test_predict_answers_in_order_whatever_it_is_batched_with(backbone_type, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(prediction, "WINDOW", 3)
    ours = budgetformer(backbone_type, looks=[0.25, 1.0], confidence=[0.5])
    rows = (({"text": text}, None) for text in texts["text"])
    answers = list(predict(ours, tokenizer, rows, batch_size=4, spent=True))
    assert len(answers) == 64
    for number, answer in enumerate(answers):
        with torch.no_grad():
            out = ours(**tokenizer([texts["text"][number]], return_tensors="pt"))
        score, label = out.logits.softmax(-1)[0].max(-1)
        assert (answer["row"], answer["label"]) == (number, f"LABEL_{label}")
        assert answer["score"] == pytest.approx(score.item(), abs=1e-5)
        assert answer["budget"] == pytest.approx(out.budget.item(), abs=1e-6)


def test_predict_reads_no_more_than_a_window_ahead(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(prediction, "WINDOW", 3)
    taken = itertools.count()
    rows = (({"text": f"w{next(taken)}"}, None) for _ in range(1000))
    answers = predict(budgetformer("bert"), tokenizer, rows, batch_size=4)
    for _ in range(13):
        next(answers)
    assert next(taken) == 24


def test_predict_takes_arguments_standard_input_and_files(model, tmp_path, run, monkeypatch):
    lines = ["w1 w2", "", "w3 w4 w5"]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    answers = good(run("predict", model, *lines, "--spent", "--budget", 1.0))
    for answer in map(json.loads, answers.splitlines()):
        assert answer.keys() == {"row", "label", "score", "budget"}
        assert answer["label"] in NAMES
        assert answer["budget"] == 1.0
    options = ["--spent", "--budget", 1.0]
    assert good(run("predict", model, "--file", tmp_path / "texts.txt", *options)) == answers
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert good(run("predict", model, *options)) == answers
    good(run("predict", model, "--file", tmp_path / "texts.txt", "--output", tmp_path / "answers.jsonl", *options))
    assert (tmp_path / "answers.jsonl").read_text() == answers


@pytest.fixture
def resumable(tmp_path, texts, tokenizer, monkeypatch):
    """Predicts the texts into a file, by a model that is interrupted after so many of its calls."""
    monkeypatch.setattr(prediction, "WINDOW", 2)
    ours = budgetformer("bert")
    forward = ours.forward
    texts.to_parquet(tmp_path / "texts.parquet")

    def start(output, calls=1000, **options):
        def stop(*arguments, left=[calls], **named):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return forward(*arguments, **named)

        ours.forward = stop
        options = {"batch_size": 4, "spent": True, **options}
        return predict_file(ours, tokenizer, str(tmp_path / "texts.parquet"), tmp_path / output, **options)

    return start


@pytest.mark.parametrize("cut", [0, 1, 30, 5000])
def test_a_run_cut_off_anywhere_ends_as_if_it_had_not_been(resumable, tmp_path, cut):
    assert resumable("whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["row"] for line in whole.splitlines()] == list(range(64))
    with pytest.raises(KeyboardInterrupt):
        resumable("part.jsonl", calls=27)  # a window takes four, two for each look: in the midst of a second look
    partial = tmp_path / "part.jsonl.partial"
    written = partial.read_bytes()
    assert whole.startswith(written)
    assert written.count(b"\n") == 48  # six windows of eight rows
    partial.write_bytes(written[: len(written) - cut])  # as a crash might leave it, in the middle of a line
    done = written[: len(written) - cut].count(b"\n") // 8 * 8
    assert resumable("part.jsonl") == done
    assert (tmp_path / "part.jsonl").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"texts.parquet", "whole.jsonl", "part.jsonl"}


def test_only_the_same_run_is_taken_up(resumable, tmp_path, texts):
    with pytest.raises(KeyboardInterrupt):
        resumable("part.jsonl", calls=5)
    kept = (tmp_path / "part.jsonl.partial").read_bytes()
    for options, changed in (
        ({"spent": False}, "spent"),
        ({"batch_size": 8, "budget": 0.25}, "batch_size, budget"),
    ):
        with pytest.raises(
            ValueError, match=rf"is of a run with another {changed}.*remove it and .*json to start anew"
        ):
            resumable("part.jsonl", **options)
    texts.select(range(60)).to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="a run with another file: remove"):
        resumable("part.jsonl")
    assert (tmp_path / "part.jsonl.partial").read_bytes() == kept
    for left in ("part.jsonl.partial", "part.jsonl.partial.json"):
        (tmp_path / left).unlink()
    resumable("part.jsonl")
    with pytest.raises(FileExistsError, match=r"part\.jsonl is there already: remove it"):
        resumable("part.jsonl")


def test_broken_rows_end_a_prediction_or_get_an_error_for_an_answer(model, tmp_path, run, monkeypatch):
    monkeypatch.setattr(prediction, "WINDOW", 1)
    source, output = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    source.write_text(
        '{"text": "w1"}\n{"text": "w2"}\n{"text": "w3"}\n{"text": "w4"\nnull\n{"text": "w5"}\n{"text": "w'
    )
    arguments = ["predict", model, "--file", source, "--output", output, "--batch-size", 2]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"budgetformer: row 3 is not json .*--skip-bad\)\.\n", err)
    assert len((tmp_path / "answers.jsonl.partial").read_text().splitlines()) == 2
    assert "2 rows were there already" in run(*arguments, "--skip-bad")[2]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(7))
    assert ["error" in answer for answer in answers] == [False, False, False, True, True, False, True]
    assert ["label" in answer for answer in answers] == [True, True, True, False, False, True, False]


def test_budget_reaches_the_model_through_a_pipeline(model, texts):
    ask = pipeline("text-classification", model=model)
    loaded, tokenizer = load_classifier(model)
    for budget in (0.09, 0.25, 1.0, None):
        for options in ({}, {"batch_size": 4}):
            answers = ask(texts["text"][:8], budget=budget, **options)
            for answer, text in zip(answers, texts["text"][:8], strict=True):
                with torch.no_grad():
                    scores = loaded(**tokenizer(text, return_tensors="pt"), budget=budget).logits.softmax(-1)[0]
                assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert len({tuple(x["score"] for x in ask(texts["text"][:8], budget=b)) for b in (0.09, 1.0)}) == 2
    fixed = pipeline("text-classification", model=model, budget=0.09)
    assert fixed("w1 w2") == ask("w1 w2", budget=0.09)
    with pytest.raises(ValueError, match=r"budget must be a float in \(0, 1\]"):
        ask("w1", budget=3)


def test_a_pipeline_of_another_model_is_the_stock_one_and_refuses_a_budget(tokenizer, texts, tmp_path, caplog):
    stock = stock_classifier("bert")
    ours = pipeline("text-classification", model=stock, tokenizer=tokenizer)
    plain = TextClassificationPipeline(model=stock, tokenizer=tokenizer)
    assert ours(texts["text"][:8], top_k=None) == plain(texts["text"][:8], top_k=None)
    with pytest.raises(ValueError, match="need a BudgetFormer, got a bert model"):
        ours("w1", budget=0.5)
    for name, saved in (("ours", ours), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("ours", "plain")]
    assert files[0] == files[1]
    assert "custom_pipelines" not in (tmp_path / "ours" / "config.json").read_text()


def test_training_takes_two_stages_and_every_option_of_trainer(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    out = tmp_path / "out"
    options = ["--max_steps", 2, "--device", "cpu", "--logging_steps", 1, "--seed", 5]
    rates = ["--learning-rate", "1e-3", "--narrow-learning-rate", "2e-3", "--lr_scheduler_type", "constant"]
    extra = ["--validation", data, "--config", "narrow_budget=0.3", "--card", "--json"]
    summary = json.loads(good(run("train", plain, data, "--output", out, *extra, *options, *rates)))
    assert summary["rows"] == 64
    assert "budgetformer:begin" in (out / "README.md").read_text("utf-8")
    kept = training_of(out)
    assert (kept["base_model"], kept["dataset"], kept["rows"]) == (str(plain), data, 64)
    assert (kept["arguments"]["learning_rate"], kept["arguments"]["seed"]) == (1e-3, 5)
    assert {"divergence", "budget"} <= kept["log_history"][0].keys()
    assert kept["log_history"][0]["learning_rate"] == kept["narrow"]["learning_rate"] == 2e-3
    assert "narrow encoder, learning_rate: 0.002" in (out / "README.md").read_text("utf-8")
    assert kept["validation"]["eval_accuracy"] == summary["validation"]["eval_accuracy"]
    teacher = AutoModelForSequenceClassification.from_pretrained(out / "teacher")
    model, _ = load_classifier(str(out), budgeted=True)
    assert teacher.config.model_type == "bert"
    assert teacher.config.id2label == model.config.id2label == dict(enumerate(sorted(NAMES)))
    assert model.config.narrow_budget == 0.3
    evaluation = json.loads(good(run("evaluate", out, data, "--budgets", "plain,0.5", "--json")))
    assert evaluation["results"][0]["accuracy"] == kept["validation"]["eval_accuracy"]
    assert evaluation["settings"]["seed"] == 5

    texts = tmp_path / "unlabelled.csv"
    texts.write_text("text\nw1 w2\nw3 w4 w5\n")
    beside = ["--output", tmp_path / "beside", "--fine-tuned", "--unlabelled", texts, *options]
    good(run("train", out / "teacher", data, *beside))
    assert training_of(tmp_path / "beside")["narrow"]["unlabelled"] == 2
    assert not (tmp_path / "beside" / "teacher").exists()
    good(run("train", plain, data, "--output", tmp_path / "both", "--together", *options))
    assert {"task_loss", "divergence"} <= training_of(tmp_path / "both")["log_history"][0].keys()


def test_training_goes_on_from_a_checkpoint_without_its_first_stage(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    options = ["--output", tmp_path / "out", "--save_steps", 2, "--logging_steps", 1, "--use_cpu", "--max_steps", 4]
    good(run("train", plain, data, *options))
    whole = training_of(tmp_path / "out")["log_history"]
    taught = (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns
    good(run("train", plain, data, *options, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"))
    again = training_of(tmp_path / "out")["log_history"]
    assert (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns == taught
    assert [entry.get("loss") for entry in again[:4]] == [entry.get("loss") for entry in whole[:4]]


def test_errors_are_one_line_and_leave_nothing_behind(model, data, tmp_path, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    texts = tmp_path / "two.csv"
    texts.write_text("text,label\nw1,0\nw2,1\n")
    train = ["train", plain, data, "--output", out]
    for code, message, arguments in [
        (1, "none.csv: there is no such file", ["evaluate", model, tmp_path / "none.csv"]),
        (1, r"must have a column 'b', got the columns", ["tune", model, data, "--column", "text=b"]),
        (1, "without a config.json", ["evaluate", tmp_path, data]),
        (1, "must be a BudgetFormer, got the bert model .* train .* DATA", ["tune", plain, data]),
        (1, r"budget=0.5 lies between .*calibrate_margins", ["evaluate", model, data, "--budgets", "0.5"]),
        (1, r"disagreement must be larger for 64 rows.* it would take 321 rows", ["tune", model, data]),
        (
            1,
            r"tolerance must be larger for 64 rows.* it would take \d+ ro",
            ["tune", model, data, "--tolerance", "0.01"],
        ),
        (1, r"mean_budget must pay for a first look at least", ["tune", model, data, "--mean-budget", "0.01"]),
        (1, r"budget must be a float in \(0, 0.25\]", ["cut", model, "--budget", "0.5", "--output", out]),
        (1, "Not a directory: .*file", ["train", plain, data, "--output", tmp_path / "file" / "x"]),
        (1, "plain model, or fine_tuned already, got the Bud", ["train", model, data, "--output", out]),
        (2, "--learning_rate is of the full model, .*--narrow-", [*train, "--fine-tuned", "--learning-rate", "1e-4"]),
        (1, r"has the labels \['LABEL_0', .* the data have others.*--fine-tuned", [*train, "--fine-tuned"]),
        (1, r"has 3 labels, .* the data have 2, .*--new-head", ["train", plain, texts, "--output", out]),
        (1, r"labels must be two different names or more, got \['a', 'a'\]", [*train, "--labels", "a,a"]),
        (1, "need a BudgetFormer, got a bert model", ["predict", plain, "w1", "--spent"]),
        (2, "numbers in .0, 1., or plain, with commas", ["evaluate", model, data, "--budgets", "1.5"]),
        (2, "one of --disagreement, .*may be given", ["tune", model, data, "--tolerance", "0.1", "--mean-budget", 0.3]),
        (2, "of first looks, got 'plain'", ["tune", model, data, "--budgets", "plain"]),
        (2, r"'--disagreement': must be a number in \(0, 1\), got 2", ["tune", model, data, "--disagreement", 2]),
        (2, r"'--confidence': must be a number in \(0, 1\), got 95", ["tune", model, data, "--confidence", 95]),
        (2, r"'--budget': must be a number in \(0, 1\], got 0", ["predict", model, "w1", "--budget", 0]),
        (2, "'--batch-size': .*1", ["predict", model, "w1", "--batch-size", 0]),
        (2, "'--rows': .*1", ["profile", model, data, "--rows", 0]),
        (2, "--output must not be the checkpoint's own", ["cut", model, "--budget", "0.25", "--output", model]),
        (2, "--fine-tuned and --together exclude each other", [*train, "--fine-tuned", "--together"]),
        (2, "--unlabelled teaches a narrow encoder alone", [*train, "--together", "--unlabelled", data]),
        (2, "'--narrow-learning-rate': must be a number above 0", [*train, "--narrow-learning-rate", "0"]),
        (2, r"--config must name fields of BudgetFormerConfig, got \['nope'\]", [*train, "--config", "nope=1"]),
        (2, "narrow_budget.*got 5", [*train, "--config", "narrow_budget=5"]),
        (1, "head_budget is a field of hf_budgetformer 0.1", [*train, "--config", "head_budget=0.5"]),
        (2, "--device must be cpu, cuda, .* got 'nope'", ["predict", model, "w1", "--device", "nope"]),
        (2, "numbers in .0, 1., or plain, with commas", ["evaluate", model, data, "--budgets", "all"]),
        (2, "numbers in .0, 1., or plain, with commas", ["evaluate", model, data, "--budgets", "1/0"]),
        (2, "Invalid value for '--max-length': .*1", ["evaluate", model, data, "--max-length", "0"]),
        (2, "Invalid value for '--max-length': .*1", ["predict", model, "w1", "--max-length", "-3"]),
        (2, "--column must be NAME=VALUE, got 'text'", ["evaluate", model, data, "--column", "text"]),
        (2, "No such option: --max_length .*--max-length", ["evaluate", model, data, "--max_length", "8"]),
        (2, "knows --max_length 8: did you mean --max-length.", [*train, "--max_length", "8"]),
        (2, "knows --lerning_rate 1: did you mean --learning-rate.", [*train, "--lerning_rate", 1]),
        (2, "knows --wholly-other 1[.]$", [*train, "--wholly-other", 1]),
        (2, "invalid float value: 'x'", [*train, "--learning_rate", "x"]),
        (2, "CHECKPOINT and DATA come first, got --seed", ["train", "--seed", "1", plain, data, "--output", out]),
        (2, "must be a folder, or --dry-run be given, got me/model", ["tune", "me/model", data]),
        (2, "not both", ["predict", model, "w1", "--file", data]),
        (2, "No such option", ["evaluate", model, data, "--nope"]),
        (2, "Missing argument", ["evaluate"]),
    ]:
        status, printed, err = run(*arguments)
        assert (status, printed, err.count("\n")) == (code, "", 1), err
        assert re.search(message, err.strip()), err
    assert not out.exists()
    assert not (Path(model) / "budgetformer").exists()


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="checkpoint must be a model's folder or Hub id, got nowhere"):
        cli.main(["--debug", "evaluate", "nowhere", "none.csv"])


def test_the_version_is_shown(run):
    assert good(run("--version")) == f"hf-budgetformer {version('hf-budgetformer')}\n"


def test_training_ends_with_what_plain_calls_answer_and_spend_beside_the_plain_model(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    out = tmp_path / "out"
    options = ["--validation", data, "--max_steps", 2, "--use_cpu", "--max-length", 6, "--logging_steps", 1, "--card"]
    text = good(run("train", plain, data, "--output", out, *options))
    plain_call, full = json.loads(good(run("evaluate", out, data, "--budgets", "plain,1", "--json")))["results"]
    kept, spent = f"{plain_call['accuracy']:.1%}", f"{plain_call['spent']:.2f}"
    assert text.endswith(f"accuracy {kept} at a mean budget of {spent}; the plain model's is {full['accuracy']:.1%}.\n")
    teacher = json.loads(good(run("evaluate", out / "teacher", data, "--json")))["results"]
    assert teacher[0]["accuracy"] == full["accuracy"]

    training = training_of(out)
    assert [entry["loss"] for entry in training["stage_one_log_history"] if "loss" in entry]
    assert training["stage_one_seconds"] > 0.0
    card = (out / "README.md").read_text("utf-8")
    minutes = (training["stage_one_seconds"] + training["seconds"]) / 60
    assert f"in {minutes:.1f} minutes, {training['stage_one_seconds'] / 60:.1f} of them for the plain model." in card
    assert f"(accuracy on the validation rows {full['accuracy']:.1%})" in card


def test_the_length_that_texts_are_cut_to_is_remembered(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    out, options = tmp_path / "out", ["--max_steps", 1, "--use_cpu"]
    good(run("train", plain, data, "--output", out, "--max-length", 6, *options))
    long, short = " ".join(["w1"] * 4 + ["w25"] * 12), "w1 w1 w1 w1"
    assert good(run("predict", out, long)) == good(run("predict", out, short))
    assert good(run("predict", out, long, "--max-length", 16)) != good(run("predict", out, short))
    for folder in (out, out / "teacher"):
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 6
    [profiled] = [json.loads(good(run("profile", out, data, "--rows", 8, "--repeats", 1, "--budgets", "1", "--json")))]
    assert profiled["settings"]["tokens"]["real"] <= 8 * 6


def test_labels_are_named_by_the_option_or_the_files_class_label(tmp_path, texts, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    texts.to_csv(tmp_path / "numbers.csv")
    texts.cast_column("label", ClassLabel(names=NAMES)).to_parquet(tmp_path / "named.parquet")
    options = ["--max_steps", 1, "--use_cpu"]
    good(run("train", plain, tmp_path / "numbers.csv", "--output", tmp_path / "a", "--labels", "x, y,z", *options))
    good(run("train", plain, tmp_path / "named.parquet", "--output", tmp_path / "b", *options))
    again = ["--fine-tuned", "--labels", ",".join(NAMES)]
    good(run("train", tmp_path / "a", tmp_path / "named.parquet", "--output", tmp_path / "c", *again, *options))
    for folder, names in (("a", ["x", "y", "z"]), ("b", NAMES), ("c", NAMES)):
        assert load_classifier(str(tmp_path / folder))[0].config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("kind", ["several", "number", "bool"])
def test_labels_of_every_kind_go_through_the_command_line(kind, tmp_path, texts, tokenizer, run):
    def label(number):
        several = [NAMES[number]] * (number > 0) + ["odd"] * (number % 2)
        return {"several": several, "number": number + 0.5, "bool": number == 1}[kind]

    rows = [{"text": row["text"], "label": label(row["label"])} for row in texts]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    stock_classifier("bert").bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    out, options = (
        tmp_path / "out",
        ["--validation", data, "--max_steps", 2, "--use_cpu", "--logging_steps", 1, "--card"],
    )
    stdout = good(run("train", tmp_path / "base", data, "--output", out, *options))
    evaluated = json.loads(good(run("evaluate", out, data, "--json")))["results"]
    answers = [json.loads(line) for line in good(run("predict", out, texts["text"][0], texts["text"][1])).splitlines()]
    model, _ = load_classifier(str(out))
    with torch.no_grad():
        logits = model(**tokenizer(texts["text"][0], return_tensors="pt")).logits[0]
    if kind == "number":
        assert evaluated[0]["error"] > 0.0
        assert f"error {evaluated[-1]['error']:.4f}" in stdout
        assert answers[0] == {"row": 0, "score": pytest.approx(logits.item(), abs=1e-5)}
        assert "labels to choose from" in run("tune", out, data)[2]
        return
    assert f"accuracy {evaluated[-1]['accuracy']:.1%}" in stdout
    good(run("tune", out, data, "--disagreement", "0.3"))
    if kind == "bool":
        assert answers[0]["label"] in ("False", "True")
        return
    assert model.config.id2label == dict(enumerate(["high", "middle", "odd"]))
    expected = [model.config.id2label[number] for number in (logits > 0).nonzero()[:, 0].tolist()]
    assert answers[0]["labels"] == expected
    assert answers[0]["scores"] == pytest.approx(logits.sigmoid()[logits > 0].tolist(), abs=1e-5)


def test_a_cut_or_a_stock_model_refuses_budgets_that_it_cannot_spend(model, data, tmp_path, tokenizer, run):
    good(run("cut", model, "--output", tmp_path / "small", "--budget", 0.25))
    code, out, err = run("evaluate", tmp_path / "small", data, "--budgets", "1,1/8")
    assert (code, out) == (1, "")
    assert "at most 0.25 for a model that was cut to it, got 1" in err
    evaluation = json.loads(good(run("evaluate", tmp_path / "small", data, "--budgets", "1/8", "--json")))
    assert evaluation["results"][0]["spent"] <= 1 / 8
    stock = stock_folder("bert", tmp_path / "stock", id2label=dict(enumerate(NAMES)))
    tokenizer.save_pretrained(stock)
    assert (
        "budgets must be None for a bert model, which takes none" in run("evaluate", stock, data, "--budgets", "1")[2]
    )
    code, _, err = run("profile", tmp_path / "small", data, "--budgets", "1")
    assert (code, "at most 0.25" in err) == (1, True)


def test_tune_says_what_it_wrote(model, data, run):
    promise = ["--disagreement", "0.3"]
    config = Path(model) / "config.json"
    assert "Written to" not in good(run("tune", model, data, *promise, "--dry-run"))
    assert good(run("tune", model, data, *promise)).splitlines()[-1].startswith(f"Written to {config}: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_what_is_missing_or_damaged_of_a_checkpoint_is_named(model, name, damage, run):
    path = Path(model) / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    code, out, err = run("predict", model, "w1")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert model in err
    assert name in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_have_totals_and_are_drawn_on_a_terminal_alone(model, data, tmp_path, tokenizer, run, monkeypatch):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    command = ["predict", model, "--file", data, "--output"]
    assert "%" not in run(*command, tmp_path / "quiet.jsonl")[2]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logging.enable_progress_bar()  # conftest turns them off
    for arguments in (
        [*command, tmp_path / "loud.jsonl"],
        ["profile", model, data, "--rows", 4, "--repeats", 1],
        ["train", plain, data, "--output", tmp_path / "out", "--max_steps", 2, "--use_cpu", "--save_strategy", "no"],
    ):
        with pytest.raises(SystemExit):
            cli.main([str(argument) for argument in arguments])
    logging.disable_progress_bar()
    assert re.search(r"Predicting: +100%\|.*64/64", terminal.getvalue())
    for name in ("Stage 1 of 2, the plain model", "Stage 2 of 2, the narrow encoder"):
        assert re.search(rf"{name}: +100%\|.*2/2", terminal.getvalue())
    assert re.search(r"Timing batches: .*\d+/12 ", terminal.getvalue())
