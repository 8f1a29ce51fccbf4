"""Accuracy and heads by budget, against what the model says batch by batch."""

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset

from conftest import budgetformer, stock_classifier
from hf_budgetformer.tools import evaluation
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.evaluation import Evaluation, evaluate_budgets


@pytest.fixture
def answers(texts, tokenizer):
    def ask(model, budget=None):
        batch = tokenizer(texts["text"][:], padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model(**batch, head_budget=budget, output_head_gates=True)
        return out, (out.logits.argmax(-1) == torch.tensor(texts["label"][:])).sum().item()

    return ask


def test_results_are_what_the_model_says_of_all_rows_in_one_batch(backbone_type, texts, tokenizer, answers):
    model = budgetformer(backbone_type).train()
    found = evaluate_budgets(model, texts, tokenizer, budgets=(1.0, None, 0.25), batch_size=5)
    assert model.training
    model.eval()
    assert [result.asked for result in found.results] == [1.0, None, 0.25]
    for result in found.results:
        out, right = answers(model, result.asked)
        assert (result.correct, result.accuracy) == (right, right / 64)
        assert result.heads == pytest.approx(out.head_budget.mean().item())
        assert result.heads_by_layer == pytest.approx(out.head_gates.mean((0, 2)).tolist())
    full, _ = answers(model, 1.0)
    probability = full.logits.softmax(-1)
    assert found.inputs["entropy"] == pytest.approx((-(probability * probability.log()).sum(-1)).tolist(), abs=1e-5)
    assert found.inputs["heads"] == pytest.approx(answers(model)[0].head_budget.tolist())
    assert found.inputs["length"] == [len(ids) for ids in tokenizer(texts["text"][:])["input_ids"]]


def test_windows_and_batches_change_nothing(texts, tokenized, tokenizer, monkeypatch):
    model = budgetformer("bert")
    found = evaluate_budgets(model, texts, tokenizer)
    monkeypatch.setattr(evaluation, "_WINDOW", 3)
    small = evaluate_budgets(model, tokenized.rename_column("label", "labels"), tokenizer, batch_size=7)
    for one, other in zip(found.results, small.results, strict=True):
        assert one.heads_by_layer == pytest.approx(other.heads_by_layer)
        assert one == replace(other, heads_by_layer=one.heads_by_layer, heads=one.heads)
    for name, values in found.inputs.items():
        assert small.inputs[name] == pytest.approx(values, abs=1e-5)


def test_models_without_budgets_are_tried_once(texts, tokenizer, answers):
    static = prune(budgetformer("bert"), [[0], [1, 2], [0, 1, 2, 3]])
    [result] = evaluate_budgets(static, texts, tokenizer).results
    assert result.asked is None
    assert result.correct == answers(static)[1]
    assert result.heads_by_layer == pytest.approx([0.25, 0.5, 1.0])
    found = evaluate_budgets(stock_classifier("bert"), texts, tokenizer)
    assert [(result.heads, result.heads_by_layer) for result in found.results] == [(1.0, [1.0, 1.0, 1.0])]
    assert set(found.inputs) == {"length", "entropy", "heads"}


def test_inputs_are_only_those_that_were_asked_for_and_not_too_many(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "_MOST_INPUTS", 10)
    found = evaluate_budgets(budgetformer("bert"), texts, tokenizer, budgets=[0.5])
    lengths = [len(ids) for ids in tokenizer(texts["text"][:])["input_ids"]]
    assert found.inputs == {"length": [lengths[row * 7] for row in range(10)]}


def test_the_interval_is_wilsons(texts, tokenizer):
    [result] = evaluate_budgets(stock_classifier("bert"), texts, tokenizer).results
    n, p, z = 64, result.accuracy, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert result.interval == pytest.approx([(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)], abs=1e-6)


def test_the_result_survives_json_and_prints_a_table(texts, tokenizer):
    found = evaluate_budgets(budgetformer("bert"), texts, tokenizer, budgets=[0.5, None])
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "0.500", "own", "64"]
    assert f"{found.results[1].accuracy:.1%}" in lines[2]


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
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate_budgets(model, texts, tokenizer, **named)
