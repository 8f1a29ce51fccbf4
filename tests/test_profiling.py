"""FLOPs against an analytic count, the stock model, memory, and the cost card."""

import json
import math
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch

from conftest import STOCK, batch_of, budgetformer, stock_classifier
from hf_budgetformer.tools import profiling, rivals
from hf_budgetformer.tools.batching import batches_by_length
from hf_budgetformer.tools.export import export_onnx
from hf_budgetformer.tools.narrowing import cut, stock_model
from hf_budgetformer.tools.profiling import (
    CostCard,
    HeldMemory,
    cost_card,
    count_flops,
    inputs_to_break_even,
)


def test_flops_are_two_for_each_multiply_add_of_every_matrix_product():
    stock, batch = stock_classifier("bert"), batch_of([12, 7, 3])
    tokens, width = 3 * 12, 16
    layer = 8 * width * width * tokens + 4 * width * tokens * 12 + 4 * width * 24 * tokens
    assert count_flops(partial(stock, **batch)) == 3 * layer + 2 * 3 * (width * width + 3 * width)


def test_the_stock_model_answers_as_the_full_model_whose_weights_it_has(backbone_type):
    for router in ("look", "layer"):
        model, batch = budgetformer(backbone_type, router=router), batch_of([9, 4, 6], backbone_type)
        stock = stock_model(model)
        assert type(stock) is STOCK[backbone_type][2]
        with torch.no_grad():
            assert torch.equal(stock(**batch).logits, model(**batch, budget=1.0, executor="masked").logits)
    with pytest.raises(ValueError, match="model must have its full encoder, got one that was cut"):
        stock_model(cut(budgetformer(backbone_type), 0.25))


def test_a_cost_card_counts_what_each_budget_runs_on_the_same_batches(texts, tokenizer):
    model = budgetformer("bert", narrow_budget=0.5, looks=[0.25, 1.0], confidence=[0.5]).train()
    card = cost_card(
        model, texts, tokenizer, (1.0, 0.25, None), batch_size=4, rows=10, repeats=1, training_seconds=60.0
    )
    assert model.training
    model.eval()
    chosen = texts[np.linspace(0, len(texts) - 1, 10).astype(int).tolist()]
    batches = [batch for _, batch in batches_by_length(chosen, tokenizer, 4)]
    assert [x.asked for x in card.results] == [1.0, 0.25, None]
    for x in card.results:
        assert x.flops == sum(count_flops(partial(model, **batch, budget=x.asked)) for batch in batches) / 10
        with torch.no_grad():
            assert x.spent == pytest.approx(sum(model(**b, budget=x.asked).budget.sum().item() for b in batches) / 10)
            answers = torch.cat([model(**b, budget=x.asked).logits.argmax(-1) for b in batches]).tolist()
        labels = [chosen["label"][place] for places, _ in batches_by_length(chosen, tokenizer, 4) for place in places]
        assert x.accuracy == np.mean(np.array(answers) == np.array(labels))
        assert x.interval[0] <= x.accuracy <= x.interval[1]
        assert x.break_even == inputs_to_break_even(60.0, card.stock.throughput, x.throughput)
        assert 0 < x.latency_p50 <= x.latency_p95
        assert x.energy is x.co2e is None
    stock = stock_model(model)
    assert card.stock.flops == sum(count_flops(partial(stock, **batch)) for batch in batches) / 10
    assert card.stock.flops >= card.results[0].flops > 2 * card.results[1].flops
    assert card.stock.spent == card.results[0].spent == 1.0
    assert (card.parameters, card.stock_parameters) == (model.num_parameters(), stock.num_parameters())
    assert card.settings["tokens"]["real"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert CostCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_a_cost_card_prints_as_a_table(texts, tokenizer):
    card = cost_card(budgetformer("bert"), texts, tokenizer, (0.25, None), rows=3, repeats=1)
    lines = str(card).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["budget", "stock", "0.250", "plain"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "pays after" not in lines[0]
    assert f"{card.parameters:,} parameters, stock {card.stock_parameters:,}" in str(card)
    assert f"torch {torch.__version__}" in str(card)
    assert lines[0].split()[-3:] == ["accuracy", "95%", "interval"]


def test_without_labels_of_the_model_there_is_no_accuracy(texts, tokenizer):
    model = budgetformer("bert")
    for rows in (texts.remove_columns("label"), texts.map(lambda row: {"label": row["label"] + 7})):
        card = cost_card(model, rows, tokenizer, (0.25,), rows=3, repeats=1)
        assert card.results[0].accuracy is None
        assert "accuracy" not in str(card)


def test_a_cut_model_is_measured_once_beside_nothing(texts, tokenizer):
    small = cut(budgetformer("roberta"), 0.25)
    card = cost_card(small, texts, tokenizer, rows=5, repeats=1, training_seconds=60.0)
    [row] = card.results
    assert (row.asked, row.spent, row.break_even) == (None, pytest.approx(small.narrow.widest.cost), None)
    assert card.stock is card.stock_parameters is None
    assert "no stock model to compare with" in str(card)
    assert CostCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_the_papers_routers_have_a_cost_card(texts, tokenizer):
    card = cost_card(budgetformer("bert", router="layer"), texts, tokenizer, (1.0, 0.25), rows=5, repeats=1)
    assert card.results[0].spent == 1.0 > card.results[1].spent
    assert card.stock_parameters < card.parameters


@pytest.mark.parametrize(("training_seconds", "rate", "inputs"), [
    (100.0, 200.0, 20_000),  # half of 10 ms saved
    (100.0, 110.0, 110_000),
    (0.0, 200.0, 0),
    (100.0, 100.0, None),
    (100.0, 50.0, None),
    (None, 200.0, None),
])  # fmt: skip
def test_training_has_paid_for_itself_when_it_has_saved_as_long_as_it_took(training_seconds, rate, inputs):
    count = inputs_to_break_even(training_seconds, 100.0, rate)
    assert count is inputs or count == pytest.approx(inputs, abs=1)


def test_a_card_breaks_even_where_it_does_so_first(texts, tokenizer):
    card = cost_card(budgetformer("bert"), texts, tokenizer, (1.0, 0.25, 0.125, None), rows=2, repeats=1)
    values = card.to_dict()
    for row, inputs in zip(values["results"], (None, 500, 300, None), strict=True):
        row["break_even"] = inputs
    assert card.break_even is None
    assert CostCard.from_dict(values).break_even == 300


def test_what_does_not_answer_as_the_stock_model_is_not_timed(texts, tokenizer, monkeypatch):
    model = budgetformer("bert")
    stock = stock_model(model)
    stock.classifier.bias.data[0] += 0.1
    monkeypatch.setattr(profiling, "stock_model", lambda given: stock)
    with pytest.raises(RuntimeError, match=r"differs by .* is not timed"):
        cost_card(model, texts, tokenizer, rows=4, repeats=1)


def test_memory_is_that_of_weights_and_of_results_while_they_live():
    weight = torch.ones(1000)
    with HeldMemory([weight]) as held, torch.no_grad():
        first = weight + 1
        view = first[10:].view(-1)
        first.mul_(2)
        assert held.bytes == 2 * weight.nbytes
        second = first + 1
        del first
        assert held.bytes == 3 * weight.nbytes
        del view
        assert held.bytes == 2 * weight.nbytes
        del second
    assert (held.bytes, held.peak) == (weight.nbytes, 3 * weight.nbytes)


def test_a_larger_batch_takes_more_memory_and_cut_weights_less(texts, tokenizer):
    model = budgetformer("bert")
    one, many, small = (
        cost_card(x, texts, tokenizer, (None,), batch_size=size, rows=6, repeats=1).results[0].peak_memory
        for x, size in ((model, 1), (model, 6), (cut(model, 0.25), 6))
    )
    assert one < many
    assert small < many


def test_energy_is_measured_without_leaving_files_and_says_what_is_estimated(
    texts, tokenizer, monkeypatch, tmp_path, capfd
):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "FRA")
    monkeypatch.setattr(profiling, "ENERGY_SECONDS", 0.1)
    card = cost_card(budgetformer("bert"), texts, tokenizer, (1.0,), rows=8, repeats=1, energy=True)
    assert not os.listdir(tmp_path)
    assert "codecarbon" not in "".join(capfd.readouterr())
    assert card.energy["carbon"] == "FRA"
    assert card.energy["estimated"] == (card.energy["cpu"] in ("cpu_load", "constant"))
    for row in (card.stock, *card.results):
        assert 0 < row.co2e < row.energy < math.inf  # France: well below a kg for a kWh
    assert ("energy estimated" in str(card)) == card.energy["estimated"]
    assert CostCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_bad_arguments_of_a_cost_card_are_named(texts, tokenizer, monkeypatch):
    model = budgetformer("bert")
    with pytest.raises(ValueError, match="model must be a BudgetFormer classifier, got BertForSequence"):
        cost_card(stock_classifier("bert"), texts, tokenizer)
    with pytest.raises(ValueError, match=r"budgets must be floats in \(0, 1\].*got \[0.0\]"):
        cost_card(model, texts, tokenizer, (0.0,))
    for name in ("batch_size", "rows", "repeats"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            cost_card(model, texts, tokenizer, **{name: 0})
    with pytest.raises(ValueError, match="column 'text' or 'input_ids', got 64 rows of \\['label'\\]"):
        cost_card(model, texts.remove_columns("text"), tokenizer)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match=r"pip install \"hf-budgetformer\[energy\]\""):
        cost_card(model, texts, tokenizer, energy=True)


def test_a_cost_card_tells_what_is_gained_on_what_a_user_would_pick_instead(texts, tokenizer, monkeypatch):
    model = budgetformer("bert", looks=[0.25, 1.0], confidence=[0.5])
    made = []

    def make_rivals(names, given, batches, threads):
        assert names == ["onnx-int8"]
        assert given is model
        stock = stock_model(given)
        made.append(stock)
        return {"onnx-int8": rivals.Rival(lambda batch: stock(**batch).logits, 0.75)}

    monkeypatch.setattr(profiling, "make_rivals", make_rivals)
    options = {"batch_size": 4, "rows": 10, "repeats": 1, "against": ["onnx-int8", "sorted", "sorted"]}
    card = cost_card(model, texts, tokenizer, (0.25, None), **options)
    assert len(made) == 1
    assert card.settings["against"] == ["onnx-int8", "sorted"]
    come, rival, by_length = card.rivals
    assert [x.name for x in card.rivals] == ["as they come", "onnx-int8", "sorted"]
    assert [x.agreement for x in card.rivals] == [None, 0.75, None]
    assert by_length.throughput == card.stock.throughput != come.throughput
    assert by_length.latency_p50 == come.latency_p50 == card.stock.latency_p50 != rival.latency_p50
    values = card.to_dict()
    assert CostCard.from_dict(json.loads(json.dumps(values))) == card
    del values["rivals"]  # as cards of before are
    assert CostCard.from_dict(values).rivals == []


@pytest.fixture
def compared(texts, tokenizer):
    """A function from inputs a second of the rivals, ours by budget, and a promise, to the last line printed."""
    card = cost_card(budgetformer("bert"), texts, tokenizer, (1.0, 0.25, None), rows=2, repeats=1, against=["sorted"])

    def last_line(others, ours, promise=None):
        values = card.to_dict()
        rival = values["rivals"][0]
        values["rivals"] = [{**rival, "name": name, "throughput": rate} for name, rate in others.items()]
        result = values["results"][0]
        values["results"] = [{**result, "asked": budget, "throughput": rate} for budget, rate in ours.items()]
        values["settings"]["promise"] = promise
        lines = str(CostCard.from_dict(values)).splitlines()
        assert "stock, sorted" in lines[1]
        return lines[-1]

    return last_line


def test_the_last_line_is_the_answer_to_what_is_gained(compared):
    others = {"as they come": 50.0, "sorted": 80.0, "openvino-int8": 100.0}
    line = compared(others, {1.0: 90.0, 0.25: 500.0, None: 250.0}, "Its answers differ seldom.")
    assert line == (
        "On these texts a plain call answers 2.50 times as many inputs a second as the best of the others, "
        "openvino-int8, sorted. Its answers differ seldom."
    )
    assert "Nothing is promised of its answers" in compared(others, {None: 250.0})
    slow = compared(others, {1.0: 90.0, 0.25: 500.0, None: 80.0})
    assert "the budget 1.000 answers 0.90 times" in slow
    assert slow.endswith("Its answers are the stock model's.")
    fixed = compared({"as they come": 50.0}, {0.25: 500.0, 0.125: 700.0})
    assert "the budget 0.125 answers 14.00 times" in fixed
    assert "stock, as they come. Nothing is promised at a fixed budget." in fixed


@pytest.mark.slow
def test_other_runtimes_answer_as_the_stock_model():
    for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(package)
    model, batches = budgetformer("bert"), [batch_of([9, 4, 6]), batch_of([12])]
    environment = dict(os.environ)
    runtimes = rivals.make_rivals(rivals.RIVALS, model, batches, 1)
    assert dict(os.environ) == environment
    assert tuple(runtimes) == rivals.RIVALS
    stock = stock_model(model)
    for name, rival in runtimes.items():
        assert 0.0 <= rival.agreement <= 1.0
        for batch in batches:
            with torch.no_grad():
                difference = (rival.answer(batch) - stock(**batch).logits).abs().max()
            if name.endswith("int8"):
                assert 1e-5 < difference < 0.5
            else:
                assert difference < 1e-4
                assert rival.agreement == 1.0


@pytest.mark.slow
def test_a_runtime_that_answers_otherwise_is_not_timed(monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(rivals, "export_onnx", lambda model, path, budget: export_onnx(cut(model, 0.25), path))
    with pytest.raises(RuntimeError, match=r"onnx differs by .* from the stock model, more than 0.0001"):
        rivals.make_rivals(["onnx"], budgetformer("bert"), [batch_of([9, 4])], 1)


def test_what_cannot_be_compared_is_refused(texts, tokenizer, monkeypatch):
    model = budgetformer("bert")
    with pytest.raises(ValueError, match=r"against must be of \['sorted', 'onnx', .*\], got \['tvm'\]"):
        cost_card(model, texts, tokenizer, against=["sorted", "tvm"])
    with pytest.raises(ValueError, match=r"against must be empty for a model that was cut, got \['sorted'\]"):
        cost_card(cut(model, 0.25), texts, tokenizer, against=["sorted"])
    with pytest.raises(ValueError, match=r"against must be of \['sorted'\] for a model on meta, got \['onnx'\]"):
        cost_card(budgetformer("bert").to("meta"), texts, tokenizer, against=["onnx"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install \"hf-budgetformer\[rivals\]\""):
        cost_card(model, texts, tokenizer, rows=4, repeats=1, against=["openvino"])
