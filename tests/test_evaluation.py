"""Accuracy, agreement and work spent by budget, against what the model says batch by batch."""

import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset

from conftest import budgetformer, stock_classifier
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools import evaluation
from hf_budgetformer.tools.evaluation import Evaluation, evaluate_budgets
from hf_budgetformer.tools.narrowing import cut


@pytest.fixture
def looking(texts, tokenizer):
    """Makes a classifier whose first look doubts half of its answers."""

    def make(backbone_type="bert"):
        model = budgetformer(backbone_type, narrow_budget=0.5, looks=[0.25, 1.0])
        batch = tokenizer(texts["text"][:], padding=True, return_tensors="pt")
        with torch.no_grad():
            margins = confidence(model(**batch, budget=0.25).logits, None).sort().values
        model.config.confidence = [(margins[31] + margins[32]).item() / 2]
        return model

    return make


@pytest.fixture
def answers(texts, tokenizer):
    def ask(model, budget=None):
        batch = tokenizer(texts["text"][:], padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**batch, budget=budget)

    return ask


@pytest.mark.parametrize(("doubted", "warned"), [(500, False), (100, True), (900, True)])
def test_data_that_are_doubted_otherwise_than_those_of_the_promise_are_warned_of(
    texts, tokenizer, looking, caplog, doubted, warned
):
    model = looking()  # doubts 32 of 64
    promise = {"risk": "disagreement", "level": 0.01, "confidence": 0.95, "rows": 1000, "doubted": doubted}
    promise |= {"looks": model.config.looks, "thresholds": model.config.confidence, "bound": 0.01, "lost": 0.0}
    model.config.promise = promise
    evaluate_budgets(model, texts, tokenizer, budgets=(1.0, None))
    lines = [record.message for record in caplog.records]
    assert [f"50.0% of these 64 inputs were doubted, but {doubted / 1000:.1%}" in x for x in lines] == [True] * warned
    caplog.clear()
    evaluate_budgets(model, texts, tokenizer, budgets=(1.0, 0.25))  # no plain call
    assert not caplog.records


def right(out, texts):
    return (out.logits.argmax(-1) == torch.tensor(texts["label"][:])).sum().item()


def test_results_are_what_the_model_says_of_all_rows_in_one_batch(backbone_type, texts, tokenizer, answers, looking):
    model = looking(backbone_type).train()
    report = evaluate_budgets(model, texts, tokenizer, budgets=(0.25, None, 1.0), batch_size=5)
    assert model.training
    model.eval()
    full, plain = answers(model, 1.0), answers(model)
    assert [result.asked for result in report.results] == [0.25, None, 1.0]
    for result in report.results:
        out = answers(model, result.asked)
        same = (out.logits.argmax(-1) == full.logits.argmax(-1)).float().mean().item()
        assert (result.correct, result.accuracy) == (right(out, texts), right(out, texts) / 64)
        assert result.agreement == pytest.approx(same)
        assert result.spent == pytest.approx(out.budget.mean().item())
        assert result.doubtful == (out.budget > 1.0).float().mean().item()
    assert [result.doubtful for result in report.results] == [0.0, 0.5, 0.0]
    assert report.results[2].agreement == 1.0
    probability = full.logits.softmax(-1)
    assert report.inputs["entropy"] == pytest.approx((-(probability * probability.log()).sum(-1)).tolist(), abs=1e-4)
    assert report.inputs["spent"] == pytest.approx(plain.budget.tolist())
    assert sorted(report.inputs["spent"])[31:33] == pytest.approx([0.25, 1.25], abs=0.05)
    assert report.inputs["length"] == [len(ids) for ids in tokenizer(texts["text"][:])["input_ids"]]


def test_windows_and_batches_change_nothing(texts, tokenized, tokenizer, looking, monkeypatch):
    model = looking()
    report = evaluate_budgets(model, texts, tokenizer, budgets=(1.0, 0.25, None))
    monkeypatch.setattr(evaluation, "WINDOW", 3)
    small = evaluate_budgets(
        model, tokenized.rename_column("label", "labels"), tokenizer, budgets=(1.0, 0.25, None), batch_size=7
    )
    assert small.results == report.results
    for name, values in report.inputs.items():
        assert small.inputs[name] == pytest.approx(values, abs=1e-4)


def test_the_papers_routers_are_tried_at_shares_of_the_heads(texts, tokenizer, answers):
    model = budgetformer("bert", router="layer")
    report = evaluate_budgets(model, texts, tokenizer, budgets=(1.0, 0.5, None))
    assert [result.spent for result in report.results] == pytest.approx(
        [answers(model, budget).budget.mean().item() for budget in (1.0, 0.5, None)]
    )
    assert report.results[0].agreement == 1.0


def test_models_without_budgets_are_tried_once(texts, tokenizer, answers):
    small = cut(budgetformer("bert", narrow_budget=0.5), 0.25)
    [result] = evaluate_budgets(small, texts, tokenizer).results
    assert (result.asked, result.agreement) == (None, None)
    assert result.correct == right(answers(small), texts)
    assert result.spent == pytest.approx(small.narrow.widest.cost)
    at_eighth = evaluate_budgets(small, texts, tokenizer, budgets=[1 / 8]).results[0]
    assert at_eighth.correct == right(answers(small, 1 / 8), texts)
    for model, message in ((small, "at most 0.25 for a model that was cut"), (stock_classifier("bert"), "for a bert")):
        with pytest.raises(ValueError, match=message):
            evaluate_budgets(model, texts, tokenizer, budgets=[1.0])
    report = evaluate_budgets(stock_classifier("bert"), texts, tokenizer)
    assert [(result.asked, result.spent) for result in report.results] == [(None, 1.0)]
    assert set(report.inputs) == {"length", "entropy", "spent"}


def test_several_labels_are_right_where_all_are(texts, tokenizer, answers):
    model = budgetformer("bert", problem_type="multi_label_classification", looks=[0.25, 1.0], confidence=[0.02])
    rows = texts.map(lambda row: {"label": [row["label"], (row["label"] + 1) % 3]})
    report = evaluate_budgets(model, rows, tokenizer, budgets=(1.0, 0.25, None))
    labels = torch.zeros(64, 3)
    for row, both in enumerate(rows["label"]):
        labels[row, both] = 1.0
    full = answers(model, 1.0).logits > 0
    for result in report.results:
        out = answers(model, result.asked)
        assert result.correct == ((out.logits > 0) == labels.bool()).all(-1).sum()
        assert result.agreement == pytest.approx(((out.logits > 0) == full).all(-1).float().mean().item())
    probability = answers(model, 1.0).logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    entropy = -(probability * probability.log() + (1 - probability) * (1 - probability).log()).sum(-1)
    assert report.inputs["entropy"] == pytest.approx(entropy.tolist(), abs=1e-4)


def test_a_regression_has_an_error_in_place_of_an_accuracy(texts, tokenizer, answers):
    model = budgetformer("bert", num_labels=1)
    rows = texts.map(lambda row: {"label": row["label"] + 0.5})
    report = evaluate_budgets(model, rows, tokenizer, budgets=(1.0, 0.25, None))
    labels = torch.tensor(rows["label"][:])
    for result in report.results:
        error = (answers(model, result.asked).logits[:, 0] - labels).square().mean().sqrt().item()
        assert result.error == pytest.approx(error, rel=1e-4)
        assert (result.accuracy, result.agreement) == (None, None)
    assert set(report.inputs) == {"length", "spent"}
    assert Evaluation.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert f"{report.results[1].error:.4f}" in str(report).splitlines()[2]


def test_inputs_are_only_those_that_were_asked_for_and_not_too_many(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_INPUTS", 10)
    report = evaluate_budgets(budgetformer("bert"), texts, tokenizer, budgets=[0.25])
    lengths = [len(ids) for ids in tokenizer(texts["text"][:])["input_ids"]]
    assert report.inputs == {"length": [lengths[row * 7] for row in range(10)]}
    assert report.results[0].agreement is None


def test_the_interval_is_wilsons(texts, tokenizer):
    [result] = evaluate_budgets(stock_classifier("bert"), texts, tokenizer).results
    n, p, z = 64, result.accuracy, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert result.interval == pytest.approx([(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)], abs=1e-6)


def test_the_result_survives_json_and_prints_a_table(texts, tokenizer):
    report = evaluate_budgets(budgetformer("bert"), texts, tokenizer, budgets=[0.25, None])
    assert Evaluation.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "0.250", "plain", "64"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert f"{report.results[1].accuracy:.1%}" in lines[2]


def test_labels_may_be_names(texts, tokenizer):
    model = budgetformer("bert")
    model.config.id2label = {0: "low", 1: "middle", 2: "high"}
    model.config.label2id = {"low": 0, "middle": 1, "high": 2}
    expected = evaluate_budgets(model, texts, tokenizer, budgets=[None])
    named = texts.map(lambda row: {"label": ["low", "middle", "high"][row["label"]]})
    assert evaluate_budgets(model, named, tokenizer, budgets=[None]) == expected
    # Numbers of another order count by their names.
    order = ["high", "low", "middle"]
    numbered = named.map(lambda row: {"label": order.index(row["label"])}).cast_column("label", ClassLabel(names=order))
    assert evaluate_budgets(model, numbered, tokenizer, budgets=[None]) == expected
    with pytest.raises(ValueError, match=r"got 'High' in 1 of 2 rows; names that the model knows are \['low', 'midd"):
        evaluate_budgets(model, Dataset.from_dict({"text": ["w1", "w2"], "label": ["High", "low"]}), tokenizer)


def test_bad_arguments_are_named(texts, tokenizer):
    model = budgetformer("bert")
    for message, named in {
        r"budgets must be floats in \(0, 1\], or None .* got \[1.5\]": {"budgets": [1.5]},
        r"budgets must be floats in \(0, 1\], or None .* got \[\]": {"budgets": []},
        r"batch_size must be an integer >= 1, got 0": {"batch_size": 0},
        r"max_length must be None or an integer >= 1, got 0": {"max_length": 0},
        r"calibrate_margins\(model, batches\)": {"budgets": [0.5]},
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate_budgets(model, texts, tokenizer, **named)
