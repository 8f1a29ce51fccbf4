"""The command line on tiny models: what it prints, writes and refuses; and the functions under it."""

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import hf_budgetformer.tools
from conftest import budgetformer, stock_folder
from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools import cli, prediction
from hf_budgetformer.tools.data import load_classifier
from hf_budgetformer.tools.evaluation import Evaluation, evaluate_budgets
from hf_budgetformer.tools.prediction import predict, predict_file
from hf_budgetformer.tools.recipe import label_names
from hf_budgetformer.tools.tuning import tune_budget


COMMANDS = ["train", "evaluate", "tune", "profile", "bake", "export", "card", "predict", "page"]
NAMES = ["low", "middle", "high"]


@pytest.fixture
def model(tmp_path, tokenizer):
    """Folder of a BudgetFormer whose labels have names."""
    model = budgetformer("bert", num_labels=3)
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


def good(found):
    code, out, err = found
    assert code == 0, err
    return out


def left_by(folder, name):
    return json.loads((Path(folder) / "budgetformer" / f"{name}.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_the_command_understands(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "500"})
    assert result.exit_code == 0
    [example] = re.findall(rf"Example: budgetformer {command} (.*\S)", result.output)
    for option in re.findall(r"(--[a-z-]+) ", example):
        assert option in result.output.split("Example")[0]


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import importlib.util, sys; from typer.testing import CliRunner\n"
        "spec = importlib.util.spec_from_file_location('cli', sys.argv[1])\n"
        "cli = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cli); print(CliRunner().invoke(cli.app, ['train', '--help']).output)\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, cli.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--one-stage" in done.stdout


def test_evaluate_prints_and_keeps_what_the_function_finds(model, data, texts, run):
    lines = good(run("evaluate", model, data, "--budgets", "1,0.5,own")).splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "1.000", "0.500", "own", "64"]
    kept = Evaluation.from_dict(left_by(model, "evaluation"))
    loaded, tokenizer = load_classifier(model)
    assert kept.results == evaluate_budgets(loaded, texts, tokenizer, (1.0, 0.5, None)).results
    assert (kept.settings["checkpoint"], kept.settings["data"]) == (model, data)
    printed = good(run("evaluate", model, data, "--budgets", "1,0.5,own", "--json"))
    assert Evaluation.from_dict(json.loads(printed)) == kept


def test_evaluate_takes_a_stock_model_too(tmp_path, data, tokenizer, run):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {x: i for i, x in enumerate(NAMES)}}
    folder = stock_folder("bert", tmp_path / "stock", **labels)
    tokenizer.save_pretrained(folder)
    [result] = json.loads(good(run("evaluate", folder, data, "--json")))["results"]
    assert (result["asked"], result["heads"]) == (None, 1.0)


def test_tune_keeps_the_answer_and_writes_it_into_the_configuration_if_asked(model, data, texts, run):
    before = json.loads((Path(model) / "config.json").read_text())
    asked = [model, data, "--tolerance", "0.3", "--budgets", "0.25,0.5", "--json"]
    found = json.loads(good(run("tune", *asked)))
    assert json.loads((Path(model) / "config.json").read_text()) == before
    assert found == left_by(model, "tuning")
    loaded, tokenizer = load_classifier(model)
    direct = tune_budget(loaded, texts, tokenizer, [0.25, 0.5], tolerance=0.3)
    assert found["budget"] == direct.budget
    good(run("tune", *asked, "--write"))
    assert json.loads((Path(model) / "config.json").read_text()) == {**before, "head_budget": direct.budget}
    assert BudgetFormerForSequenceClassification.from_pretrained(model).config.head_budget == direct.budget


def test_profile_keeps_the_cost_card(model, data, run):
    (Path(model) / "budgetformer").mkdir()
    (Path(model) / "budgetformer" / "training.json").write_text('{"seconds": 60.0}')
    found = json.loads(good(run("profile", model, data, "--budgets", "0.5,own", "--rows", 8, "--repeats", 1, "--json")))
    assert found == left_by(model, "costs")
    assert [result["asked"] for result in found["results"]] == [0.5, None]
    assert found["settings"]["training_seconds"] == 60.0


def test_bake_saves_a_static_model_and_what_it_costs_in_accuracy(model, data, tmp_path, run):
    out = good(run("bake", model, data, "--output", tmp_path / "baked", "--head-budget", 0.5, "--test", data))
    baked, _ = load_classifier(str(tmp_path / "baked"))
    kept = [len(heads) for heads in baked.config.static_heads]
    assert f"{sum(kept)} heads are left, by layer {', '.join(map(str, kept))}." in out
    static = left_by(model, "static")
    assert static == left_by(tmp_path / "baked", "evaluation")
    assert static["settings"]["budget"] == 0.5
    again = json.loads(good(run("evaluate", tmp_path / "baked", data, "--json")))
    assert again["results"] == static["results"]


def test_export_and_card_pass_on_what_they_are_given(model, data, tmp_path, run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        hf_budgetformer.tools.export, "export_onnx", lambda model, *rest: (print("noise"), asked.append(rest), "x")[2]
    )
    assert good(run("export", model, "x.onnx", "--head-budget", 0.5, "--quantize")) == "Saved as x.\n"
    assert asked == [("x.onnx", 0.5, True)]
    good(run("evaluate", model, data))
    path = json.loads(good(run("card", model, "--license", "mit", "--json")))["output"]
    assert "license: mit" in Path(path).read_text()


def test_predict_answers_in_order_whatever_it_is_batched_with(backbone_type, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(prediction, "_WINDOW", 3)
    ours = budgetformer(backbone_type)
    rows = (({"text": text}, None) for text in texts["text"])
    for number, answer in enumerate(predict(ours, tokenizer, rows, batch_size=4, budgets=True, gates=True)):
        with torch.no_grad():
            out = ours(**tokenizer([texts["text"][number]], return_tensors="pt"), output_head_gates=True)
        score, label = out.logits.softmax(-1)[0].max(-1)
        assert (answer["row"], answer["label"]) == (number, f"LABEL_{label}")
        assert answer["score"] == pytest.approx(score.item(), abs=1e-5)
        assert answer["head_budget"] == pytest.approx(out.head_budget.item(), abs=1e-6)
        assert answer["head_gates"] == out.head_gates[0].tolist()
    assert number == 63


def test_predict_reads_no_more_than_a_window_ahead(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(prediction, "_WINDOW", 3)
    taken = itertools.count()
    rows = (({"text": f"w{next(taken)}"}, None) for _ in range(1000))
    answers = predict(budgetformer("bert"), tokenizer, rows, batch_size=4)
    for _ in range(13):
        next(answers)
    assert next(taken) == 24


def test_predict_takes_arguments_standard_input_and_files(model, tmp_path, run, monkeypatch):
    lines = ["w1 w2", "", "w3 w4 w5"]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    answers = good(run("predict", model, *lines, "--budgets", "--head-budget", 1.0))
    for answer in map(json.loads, answers.splitlines()):
        assert answer.keys() == {"row", "label", "score", "head_budget"}
        assert answer["label"] in NAMES
        assert answer["head_budget"] == 1.0
    options = ["--budgets", "--head-budget", 1.0]
    assert good(run("predict", model, "--file", tmp_path / "texts.txt", *options)) == answers
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert good(run("predict", model, *options)) == answers
    good(run("predict", model, "--file", tmp_path / "texts.txt", "--output", tmp_path / "answers.jsonl", *options))
    assert (tmp_path / "answers.jsonl").read_text() == answers


@pytest.fixture
def resumable(tmp_path, texts, tokenizer, monkeypatch):
    """Predicts the texts into a file, by a model that is interrupted after so many batches."""
    monkeypatch.setattr(prediction, "_WINDOW", 2)
    ours = budgetformer("bert")
    forward = ours.forward
    texts.to_parquet(tmp_path / "texts.parquet")

    def start(output, batches=1000, **options):
        def stop(*arguments, left=[batches], **named):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return forward(*arguments, **named)

        ours.forward = stop
        options = {"batch_size": 4, "gates": True, **options}
        return predict_file(ours, tokenizer, str(tmp_path / "texts.parquet"), tmp_path / output, **options)

    return start


@pytest.mark.parametrize("cut", [0, 1, 30, 5000])
def test_a_run_cut_off_anywhere_ends_as_if_it_had_not_been(resumable, tmp_path, cut):
    assert resumable("whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["row"] for line in whole.splitlines()] == list(range(64))
    with pytest.raises(KeyboardInterrupt):
        resumable("part.jsonl", batches=13)
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
        resumable("part.jsonl", batches=5)
    kept = (tmp_path / "part.jsonl.partial").read_bytes()
    for options, changed in (
        (({"gates": False}), "gates"),
        ({"batch_size": 8, "head_budget": 0.5}, "batch_size, head_b"),
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
    monkeypatch.setattr(prediction, "_WINDOW", 1)
    source, output = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    source.write_text(
        '{"text": "w1"}\n{"text": "w2"}\n{"text": "w3"}\n{"text": "w4"\nnull\n{"text": "w5"}\n{"text": "w'
    )
    asked = ["predict", model, "--file", source, "--output", output, "--batch-size", 2]
    code, out, err = run(*asked)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"budgetformer: row 3 is not json .*--skip-bad\)\.\n", err)
    assert len((tmp_path / "answers.jsonl.partial").read_text().splitlines()) == 2
    assert "2 rows were there already" in run(*asked, "--skip-bad")[2]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(7))
    assert ["error" in answer for answer in answers] == [False, False, False, True, True, False, True]
    assert ["label" in answer for answer in answers] == [True, True, True, False, False, True, False]


def test_training_takes_two_stages_and_every_option_of_trainer(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    out = tmp_path / "out"
    options = ["--max_steps", 2, "--learning-rate", "1e-3", "--use_cpu", "--logging_steps", 1, "--seed", 5]
    told = good(
        run(
            "train",
            plain,
            data,
            "--output",
            out,
            "--validation",
            data,
            "--config",
            "head_budget=0.5",
            *options,
            "--card",
            "--json",
        )
    )
    assert json.loads(told)["rows"] == 64
    assert "budgetformer:begin" in (out / "README.md").read_text("utf-8")
    kept = left_by(out, "training")
    assert (kept["base_model"], kept["dataset"], kept["rows"]) == (str(plain), data, 64)
    assert (kept["arguments"]["learning_rate"], kept["arguments"]["seed"]) == (1e-3, 5)
    assert {"distillation_loss", "budget"} <= kept["log_history"][0].keys()
    assert kept["validation"]["eval_accuracy"] == json.loads(told)["validation"]["eval_accuracy"]
    teacher = AutoModelForSequenceClassification.from_pretrained(out / "teacher")
    model, _ = load_classifier(str(out), budgeted=True)
    assert teacher.config.model_type == "bert"
    assert teacher.config.id2label == model.config.id2label == dict(enumerate(sorted(NAMES)))
    assert model.config.head_budget == 0.5
    found = json.loads(good(run("evaluate", out, data, "--budgets", "own", "--json")))
    assert found["results"][0]["accuracy"] == kept["validation"]["eval_accuracy"]
    assert found["settings"]["seed"] == 5

    good(run("train", plain, data, "--output", tmp_path / "taught", "--teacher", out / "teacher", *options))
    assert not (tmp_path / "taught" / "teacher").exists()
    assert "distillation_loss" in left_by(tmp_path / "taught", "training")["log_history"][0]
    good(run("train", plain, data, "--output", tmp_path / "alone", "--one-stage", *options))
    assert "distillation_loss" not in left_by(tmp_path / "alone", "training")["log_history"][0]


def test_training_goes_on_from_a_checkpoint_without_its_first_stage(tmp_path, data, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    options = ["--output", tmp_path / "out", "--save_steps", 2, "--logging_steps", 1, "--use_cpu", "--max_steps", 4]
    good(run("train", plain, data, *options))
    whole = left_by(tmp_path / "out", "training")["log_history"]
    taught = (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns
    good(run("train", plain, data, *options, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"))
    again = left_by(tmp_path / "out", "training")["log_history"]
    assert (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns == taught
    assert [entry.get("loss") for entry in again[:4]] == [entry.get("loss") for entry in whole[:4]]


def test_labels_of_a_training_set_get_names():
    rows = lambda labels: Dataset.from_dict({"label": labels})  # noqa: E731
    assert label_names(rows(["b", "a", "b"])) == ["a", "b"]
    assert label_names(rows([1, 0, 1])) == ["LABEL_0", "LABEL_1"]
    assert label_names(rows([1, 0]).cast_column("label", ClassLabel(names=["x", "y", "z"]))) == ["x", "y", "z"]
    for labels in (["a", "a"], [1, 2], [-1, 0], [0.5, 1.5]):
        with pytest.raises(ValueError, match="at least two different strings, or integers from 0 on"):
            label_names(rows(labels))


def test_errors_are_one_line_and_leave_nothing_behind(model, data, tmp_path, tokenizer, run):
    plain = stock_folder("bert", tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    for code, message, arguments in [
        (1, "none.csv: there is no such file", ["evaluate", model, tmp_path / "none.csv"]),
        (
            1,
            r"must have a column 'b', got the columns \['text', 'label'\]",
            ["tune", model, data, "--column", "text=b"],
        ),
        (1, "without a config.json", ["evaluate", tmp_path, data]),
        (1, "must be a BudgetFormer, got the bert model .* train .* DATA", ["tune", plain, data]),
        (1, r"budgets must be floats in \(0, 1\].*1\.5", ["evaluate", model, data, "--budgets", "1.5"]),
        (1, r"tolerance must be larger for 64 rows.* it would take \d+ rows", ["tune", model, data]),
        (1, "output must not be the checkpoint's own folder", ["bake", model, data, "--output", model]),
        (1, "Not a directory: .*file", ["train", plain, data, "--output", tmp_path / "file" / "x"]),
        (1, "plain model for stage one, got the BudgetFormer", ["train", model, data, "--output", out]),
        (1, "teacher must be None", ["train", plain, data, "--output", out, "--teacher", "x", "--one-stage"]),
        (1, r"BudgetFormerConfig, got \['nope'\]", ["train", plain, data, "--output", out, "--config", "nope=1"]),
        (1, "head_budget.*got 5", ["train", plain, data, "--output", out, "--config", "head_budget=5"]),
        (1, "need a BudgetFormer, got a bert model", ["predict", plain, "w1", "--budgets"]),
        (2, "numbers in .0, 1., or own, with commas", ["evaluate", model, data, "--budgets", "all"]),
        (2, "--column must be NAME=VALUE, got 'text'", ["evaluate", model, data, "--column", "text"]),
        (2, "TrainingArguments knows --lerning_rate 1", ["train", plain, data, "--output", out, "--lerning_rate", 1]),
        (2, "invalid float value: 'x'", ["train", plain, data, "--output", out, "--learning_rate", "x"]),
        (2, "CHECKPOINT and DATA come first, got --seed", ["train", "--seed", "1", plain, data, "--output", out]),
        (2, "--write needs a folder", ["tune", "me/model", data, "--write"]),
        (2, "not both", ["predict", model, "w1", "--file", data]),
        (2, "No such option", ["evaluate", model, data, "--nope"]),
        (2, "Missing argument", ["evaluate"]),
    ]:
        found, printed, err = run(*arguments)
        assert (found, printed, err.count("\n")) == (code, "", 1), err
        assert re.search(message, err.strip()), err
    assert not list(out.iterdir()) if out.exists() else True
    assert not (Path(model) / "budgetformer").exists()


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="checkpoint must be a model's folder or Hub id, got nowhere"):
        cli.main(["--debug", "evaluate", "nowhere", "none.csv"])


def test_a_missing_extra_names_the_command_that_installs_it(texts, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[cli\]"'):
        evaluate_budgets(budgetformer("bert"), texts, tokenizer)
