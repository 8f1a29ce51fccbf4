"""Looks taken one by one, against the model's own call."""

import pytest
import torch

from conftest import budgetformer, stock_classifier
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.batching import batches_by_length, tokenized
from hf_budgetformer.tools.looking import answer_rows, plan_deferred, take_look
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import calibrate_margins


@pytest.fixture
def rows(texts, tokenizer):
    """`texts` as token ids."""
    return tokenized(texts[:], tokenizer)


@pytest.fixture
def doubting(rows, tokenizer):
    """Makes a classifier each of whose looks but the last doubts half of what it sees."""

    def make(looks, backbone_type="bert", **fields):
        model = budgetformer(backbone_type, narrow_budget=0.5, looks=looks, **fields)
        batch = tokenizer.pad(rows, return_tensors="pt")
        left, thresholds = torch.arange(64), []
        for look in looks[:-1]:
            with torch.no_grad():
                margins = confidence(model(**batch, budget=look).logits, None)[left]
            thresholds.append(margins.sort().values[len(left) // 2 - 1 :][:2].mean().item())
            left = left[margins < thresholds[-1]]
        model.config.confidence = thresholds
        return model

    return make


def assert_as_its_own_call(model, rows, tokenizer, budget=None, batch_size=5):
    """Returns what was spent on each row."""
    seen, spent = [], torch.zeros(64)
    for answer in answer_rows(model, rows, tokenizer, batch_size, budget):
        batch = tokenizer.pad({name: [values[x] for x in answer.places] for name, values in rows.items()})
        with torch.no_grad():
            expected = model(**batch.convert_to_tensors("pt"), budget=budget)
        torch.testing.assert_close(answer.logits, expected.logits, rtol=0.0, atol=1e-5)
        assert answer.spent.tolist() == expected.budget.tolist()
        seen += answer.places.tolist()
        spent[answer.places] = answer.spent
    assert sorted(seen) == list(range(64))
    return spent


@pytest.fixture
def calls(monkeypatch):
    """Budgets and batch sizes of a model's calls, from now on."""

    def record(model):
        log, forward = [], model.forward
        monkeypatch.setattr(
            model,
            "forward",
            lambda **given: (log.append((given.get("budget"), len(given["input_ids"]))), forward(**given))[1],
        )
        return log

    return record


@pytest.mark.parametrize("looks", [[0.25, 1.0], [0.125, 0.5, 1.0], [0.125, 0.5]])
def test_answers_and_what_is_spent_are_those_of_the_models_own_call(doubting, rows, tokenizer, backbone_type, looks):
    model = doubting(looks, backbone_type)
    spent = assert_as_its_own_call(model, rows, tokenizer)
    assert spent.unique(return_counts=True)[1].tolist() == ([32, 16, 16] if len(looks) == 3 else [32, 32])


def test_a_mean_budget_is_spent_as_in_the_models_own_call(rows, tokenizer):
    model = budgetformer("bert")
    calibrate_margins(model, [tokenizer.pad(rows, return_tensors="pt")], budget=0.125)
    spent = assert_as_its_own_call(model, rows, tokenizer, budget=0.425)
    assert spent.mean().item() == pytest.approx(0.425, abs=0.02)


def test_a_first_look_that_opens_nothing_is_a_look(doubting, rows, tokenizer):
    model = doubting([0.001, 1.0])
    assert plan_deferred(model).looks[0].cost == 0.0
    model.config.confidence = [1.0]  # it says the same of all inputs
    assert set(assert_as_its_own_call(model, rows, tokenizer).tolist()) == {1.0}


def test_doubted_rows_of_many_batches_share_full_batches_of_the_next_look(doubting, rows, tokenizer, calls):
    model = doubting([0.125, 0.5, 1.0])
    first, second, _ = (look.cost for look in plan_deferred(model).looks)
    log = calls(model)
    list(answer_rows(model, rows, tokenizer, 7))
    assert log == [*[(first, 7)] * 9, (first, 1), *[(second, 7)] * 4, (second, 4), (1.0, 7), (1.0, 7), (1.0, 2)]


def test_nothing_is_asked_of_a_look_when_no_row_is_left(doubting, rows, tokenizer, calls):
    model = doubting([0.125, 0.5, 1.0])
    model.config.confidence = [0.0, 1.0]
    log = calls(model)
    list(answer_rows(model, rows, tokenizer, 32))
    assert log == [(plan_deferred(model).looks[0].cost, 32)] * 2


def test_what_looks_once_is_called_as_it_is(rows, tokenizer, calls):
    recorded = budgetformer("bert")
    recorded.config.output_hidden_states = True
    for model, budget in (
        (stock_classifier("bert"), None),
        (cut(budgetformer("bert"), 0.25), None),
        (budgetformer("bert", trained=False), None),
        (budgetformer("bert", router="layer"), 0.5),
        (budgetformer("bert", looks=[0.25]), None),
        (budgetformer("bert"), 0.25),
        (budgetformer("bert"), 1.0),
        (budgetformer("bert", num_labels=1), None),
        (recorded, None),
    ):
        log = calls(model)
        answers = list(answer_rows(model, rows, tokenizer, 32, budget))
        assert log == [(budget, 32)] * 2
        for (places, batch), answer in zip(batches_by_length(rows, tokenizer, 32), answers, strict=True):
            with torch.no_grad():
                out = model(**batch, **({} if budget is None else {"budget": budget}))
            assert answer.places.tolist() == places.tolist()
            assert torch.equal(answer.logits, out.logits)
            assert torch.equal(answer.spent, out.get("budget", torch.ones(32)))


def test_a_budget_that_cannot_be_spent_is_refused(rows, tokenizer):
    with pytest.raises(ValueError, match=r"calibrate_margins\(model, batches\)"):
        list(answer_rows(budgetformer("bert"), rows, tokenizer, 32, 0.5))


def test_one_look_doubts_by_its_own_threshold_and_the_last_one_nothing(doubting, rows, tokenizer):
    model = doubting([0.125, 0.5, 1.0])
    plan, batch = plan_deferred(model), tokenizer.pad(rows, return_tensors="pt")
    for number, (look, threshold) in enumerate(zip(plan.looks, [*plan.thresholds, 0.0], strict=True)):
        seen = take_look(model, plan, number, batch)
        assert torch.equal(seen.doubted, confidence(seen.logits, None) < threshold)
        assert seen.cost.tolist() == pytest.approx([look.cost] * 64)
        assert not seen.logits.requires_grad
