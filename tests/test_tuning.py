"""How sure first looks are; the race over budgets on simulated answers, whose true losses are known, and on models."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from conftest import batch_of, budgetformer, stock_classifier
from hf_budgetformer import BudgetFormerModel
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import (
    calibrate_margins,
    candidate_budgets,
    log_capital,
    race,
    set_budget,
    tune_budget,
)


TRIALS = 1000
# What a binomial of 1,000 trials at 5% exceeds once in about a thousand times.
MOST_FAILURES = 0.05 * TRIALS + 3 * math.sqrt(TRIALS * 0.05 * 0.95)
BUDGETS = [n / 12 for n in range(1, 13)]
# True accuracy lost, and share of the rows whose answer turns right or wrong, by budget.
CURVES = {
    "just above the tolerance": (lambda b: 0.0201 * (b < 0.6), lambda b: 0.04),
    "all above": (lambda b: 0.0201, lambda b: 0.03),
    "smooth": (lambda b: 0.1 * (1 - b) ** 2, lambda b: 0.02 + 0.1 * (1 - b) ** 2),
    "up and down": (lambda b: 0.0201 if round(12 * b) in (3, 6, 8) else 0.0, lambda b: 0.022),
}


def simulated(generator, rows, loss, changed):
    """Answers that change for the same rows first at every budget, as those of one model do."""
    draws = generator.random(rows)

    def losses(budget, asked):
        wrong, right = (changed(budget) + loss(budget)) / 2, (changed(budget) - loss(budget)) / 2
        chosen = draws[asked.start : asked.stop]
        return (chosen < wrong).astype(int) - (chosen > 1 - right).astype(int)

    return losses


@pytest.mark.parametrize("curve", CURVES)
def test_promises_hold_in_95_of_100_trials(curve):
    loss, changed = CURVES[curve]
    generator = np.random.default_rng(0)
    violated = above = below = 0
    for _ in range(TRIALS):
        losses = simulated(generator, 2000, loss, changed)
        # To the end, which gives every test the most chances to go wrong.
        budget, tests = race(losses, BUDGETS, 2000, tolerance=0.02, chunk=250, futility=False)
        violated += budget < 1.0 and loss(budget) > 0.02
        above += any(test.interval[1] < loss(test.budget) for test in tests)
        below += any(test.interval[0] > loss(test.budget) for test in tests)
    assert max(violated, above, below) <= MOST_FAILURES


def test_large_losses_are_told_from_small_ones_on_a_fraction_of_the_grid():
    generator = np.random.default_rng(0)
    found, shares = [], []
    for _ in range(100):
        losses = simulated(generator, 5000, lambda b: 0.08 * (b < 0.3), lambda b: 0.1 if b < 0.3 else 0.001)
        budget, tests = race(losses, BUDGETS, 5000)
        found.append(budget)
        shares.append((sum(test.rows for test in tests) + max(test.rows for test in tests)) / (5000 * len(BUDGETS)))
    assert np.mean(np.isclose(found, 4 / 12)) > 0.9
    assert np.mean(shares) < 0.15


def test_a_test_is_given_up_only_with_futility_and_costs_little_power():
    rows, found = {True: 0, False: 0}, {True: [], False: []}
    for futility in rows:
        generator = np.random.default_rng(0)
        for _ in range(100):
            losses = simulated(generator, 5000, lambda b: 0.04 * math.exp(-8 * b), lambda b: 0.06 * math.exp(-5 * b))
            budget, tests = race(losses, BUDGETS, 5000, futility=futility)
            rows[futility] += sum(test.rows for test in tests)
            found[futility].append(budget)
            undecided = [test for test in tests if test.decision == "undecided"]
            assert futility or all(test.rows == 5000 for test in undecided)
    assert rows[True] < 0.7 * rows[False]
    assert np.mean(found[True]) < np.mean(found[False]) + 0.05


def test_the_capital_is_the_mean_of_products_and_a_fair_bet():
    differences, mean = [0, 1, 0, -1, 0, 0, 1], 0.1
    bets = np.linspace(0.05, 0.95, 10) / (1 - mean)
    naive = np.mean([math.prod(1 + bet * (mean - d) for d in differences) for bet in bets])
    assert log_capital([1, 4, 2], mean) == pytest.approx(math.log(naive))
    expected = sum(p * math.exp(log_capital(seen, mean)) for p, seen in zip([0.2, 0.5, 0.3], np.eye(3), strict=True))
    assert expected == pytest.approx(1.0)


@pytest.mark.parametrize(("value", "decision"), [(0, "within"), (-1, "within"), (1, "exceeds")])
def test_bounds_agree_with_the_decision(value, decision):
    _, tests = race(lambda budget, rows: np.full(len(rows), value), [0.5, 1.0], 2000)
    [(low, high, found)] = [(*test.interval, test.decision) for test in tests]
    assert found == decision
    assert low <= value <= high
    assert (high <= 0.005, low > 0.005) == (decision == "within", decision == "exceeds")


def test_what_all_rows_leave_undecided_is_not_kept():
    budget, tests = race(lambda budget, rows: np.resize([1, -1], len(rows)), [0.25, 0.5], 1300, futility=False)
    assert budget == 1.0
    assert [(test.budget, test.rows, test.difference, test.decision) for test in tests] == [(0.5, 1300, 0, "undecided")]


def test_bisection_needs_no_more_tests_than_the_threshold_allows():
    for count in (1, 2, 3, 7, 8, 11):
        for good in range(count + 1):
            losses = lambda budget, rows, good=good: np.full(len(rows), int(budget < good / 100))  # noqa: E731
            budget, tests = race(losses, [(n + 0.5) / 100 for n in range(count)], 2000)
            assert budget == ((good + 0.5) / 100 if good < count else 1.0)
            assert len(tests) <= count.bit_length()


# Margins


def batches(seeds, backbone_type="bert"):
    return [batch_of([9, 4, 12, 7] * 8, backbone_type, seed=seed) for seed in seeds]


def test_margins_are_the_quantiles_of_the_first_looks_confidence(backbone_type):
    model = budgetformer(backbone_type, narrow_budget=0.5).train()
    calibrate_margins(model, batches(range(4), backbone_type), budget=0.25)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = [model(**batch, budget=0.25).logits for batch in batches(range(4), backbone_type)]
    expected = confidence(torch.cat(logits), None)
    assert model.config.margins["budget"] == 0.25
    quantiles = torch.tensor(model.config.margins["quantiles"])
    torch.testing.assert_close(quantiles, expected.quantile(torch.linspace(0, 1, 101)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.5, 0.75, 0.9])
def test_a_budget_in_between_is_spent_in_the_mean(backbone_type, budget):
    model, rows = budgetformer(backbone_type, narrow_budget=0.25), batches(range(16), backbone_type)
    calibrate_margins(model, rows)
    with torch.no_grad():
        spent = torch.cat([model(**batch, budget=budget).budget for batch in rows])
        fresh = torch.cat([model(**batch, budget=budget).budget for batch in batches(range(100, 116), backbone_type)])
    assert spent.mean().item() == pytest.approx(budget, rel=0.05)
    assert fresh.mean().item() == pytest.approx(budget, rel=0.25)
    first = model.narrow.order.look(1 / 6).cost
    assert spent.unique().tolist() == pytest.approx([first, first + 1.0])


def test_labels_and_teachers_are_ignored_and_the_default_first_look_is_a_sixth():
    model, [batch] = budgetformer("bert"), batches([0])
    calibrate_margins(model, [{**batch, "labels": torch.full((32,), 7), "teacher_logits": torch.zeros(1)}])
    before = model.config.margins
    assert before["budget"] == 1 / 6
    calibrate_margins(model, [batch])
    assert model.config.margins == before
    looking = budgetformer("bert", looks=[0.2, 1.0])
    calibrate_margins(looking, [batch])
    assert looking.config.margins["budget"] == 0.2


def test_margins_need_two_looks_and_inputs():
    model = budgetformer("bert")
    regression = budgetformer("bert")
    regression.config.problem_type = "regression"
    for wrong in (cut(model, 0.25), regression, budgetformer("bert", router="layer")):
        with pytest.raises(ValueError, match="model must look twice"):
            calibrate_margins(wrong, batches([0]))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        calibrate_margins(model, [])
    with pytest.raises(ValueError, match=r"budget must be at most narrow_budget=0\.25, that of a first look, got 0\.5"):
        calibrate_margins(model, batches([0]), budget=0.5)
    assert model.config.margins is None


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
def test_a_budget_that_is_set_is_what_a_plain_call_spends(budget, tmp_path):
    model, rows = budgetformer("bert", looks=[0.2, 1.0], confidence=[0.9]), batches(range(4))
    calibrate_margins(model, rows)
    set_budget(model.config, model.narrow.order, budget)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for batch in rows:
        with torch.no_grad():
            expected = model(**batch, budget=budget)
            for found in (model(**batch), again(**batch)):
                assert torch.equal(found.budget, expected.budget)
                torch.testing.assert_close(found.logits, expected.logits)


# Models


def test_a_model_is_tuned_from_texts_as_from_tokens_and_comes_back_as_it_was(
    backbone_type, texts, tokenized, tokenizer
):
    model = budgetformer(backbone_type).train()
    ask = {"budgets": [0.125, 0.25, 0.5, 1.0], "tolerance": 0.3, "batch_size": 4, "confidence": 0.9}
    found = tune_budget(model, texts, tokenizer, **ask)
    assert model.training
    assert model.config.looks is model.config.margins is None
    assert tune_budget(model, tokenized.rename_column("label", "labels"), tokenizer, **ask) == found
    assert tune_budget(model, tokenized.with_format("torch"), tokenizer, **ask) == found
    assert tune_budget(model, texts, tokenizer, **ask, seed=1).settings["seed"] == 1


def test_the_curve_is_what_the_model_says_on_all_rows(texts, tokenizer):
    model = budgetformer("bert")
    batch = tokenizer(texts["text"][:], padding=True, return_tensors="pt")
    calibrate_margins(model, [batch])
    ask = {"budgets": [0.25, 0.5], "tolerance": 0.15, "futility": False}
    found = tune_budget(model, texts, tokenizer, **ask)
    with torch.no_grad():
        right = model(**batch, budget=1.0).logits.argmax(-1) == torch.tensor(texts["label"][:])
    assert found.accuracy == pytest.approx(right.float().mean().item())
    assert found.curve
    for test in found.curve:
        with torch.no_grad():
            out = model(**batch, budget=test.budget)
        lost = right.float() - (out.logits.argmax(-1) == torch.tensor(texts["label"][:])).float()
        if test.rows == 64:
            assert test.difference == pytest.approx(lost.mean().item())
            assert test.spent == pytest.approx(out.budget.mean().item())
    assert found.grid_evaluations == 3 * 64
    assert found.evaluations == max(test.rows for test in found.curve) + sum(test.rows for test in found.curve)


def test_the_answer_is_written_printed_and_becomes_json(tokenized, tokenizer):
    model = budgetformer("bert")
    for head in (model.classifier, model.narrow.head):
        head.weight.data.zero_()  # no budget changes an answer
    found = tune_budget(model, tokenized, tokenizer, tolerance=0.2, batch_size=4, write=True)
    assert found.budget == candidate_budgets(model.config)[0] == 0.25 / 3
    assert (model.config.looks, model.config.confidence) == ([found.budget], None)
    assert all(test.decision == "within" for test in found.curve)
    assert json.loads(json.dumps(found.to_dict()))["settings"]["budgets"] == candidate_budgets(model.config)
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "smallest budget within 20 points of the full model" in str(found)
    grid = 64 * (len(candidate_budgets(model.config)) + 1)
    assert f"{found.evaluations} evaluations, {found.evaluations / grid:.1%} of the full grid" in str(found)


def test_the_mode_comes_back_after_an_error(texts, tokenizer, monkeypatch):
    model = budgetformer("bert").train()

    def stop(*arguments, **named):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError("stopped")

    monkeypatch.setattr(model, "forward", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        tune_budget(model, texts, tokenizer, tolerance=0.3)
    assert model.training


def test_bad_arguments_are_named(texts, tokenizer):
    model, good = budgetformer("bert"), texts.to_dict()
    several = budgetformer("bert")
    several.config.problem_type = "multi_label_classification"
    rows = {name: Dataset.from_dict(columns) for name, columns in {
        "no label": {"text": good["text"]}, "no text": {"label": good["label"]}, "none": {"text": [], "label": []},
        "unlabelled": {**good, "label": [-1] * 64}, "names": {**good, "label": ["good"] * 64},
    }.items()}  # fmt: skip
    for message, arguments in {
        r"model must be a BudgetFormer classifier, got BertForSequenceC.*from_pretrained": (stock_classifier("bert"),),
        r"model must be a BudgetFormer classifier, got BudgetFormerModel": (BudgetFormerModel(model.config),),
        r"must have a narrow encoder beside a full one \(router='look', not cut\)": (cut(model, 0.25),),
        r"model must choose one label of several, got problem_type='multi_label": (several,),
        r"dataset must be .* one row, got one without rows": (model, rows["none"]),
        r"dataset must be .* one row, got DatasetDict": (model, DatasetDict({"test": texts})),
        r"'label' or 'labels', got the columns \['text'\]": (model, rows["no label"]),
        r"'input_ids' or 'text', got the columns \['label'\]": (model, rows["no text"]),
        r"integers in \[0, 3\) as 'label', got .*-1": (model, rows["unlabelled"]),
        r"integers in \[0, 3\) as 'label', got .*'good'": (model, rows["names"]),
    }.items():
        with pytest.raises(ValueError, match=message):
            tune_budget(*(*arguments, texts)[:2], tokenizer)
    for message, named in {
        r"budgets must be floats in \(0, 1\], .* got \[0.5, 1.5\]": {"budgets": [0.5, 1.5]},
        r"budgets must be floats in \(0, 1\], .* got \[3\]": {"budgets": [3]},
        r"at least one of them below 1, got \[1.0\]": {"budgets": [1.0]},
        r"tolerance must be in \(0, 1\), got 0": {"tolerance": 0},
        r"confidence must be in \(0, 1\), got 95": {"confidence": 95},
        r"tolerance must be larger for 64 rows, got 0.005: .* it would take \d+ rows": {},
        r"batch_size must be an integer >= 1, got 0": {"batch_size": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            tune_budget(model, texts, tokenizer, **named)


def test_the_rows_said_to_be_needed_are_enough():
    unchanged = lambda budget, rows: np.zeros(len(rows), int)  # noqa: E731
    with pytest.raises(ValueError, match="it would take") as error:
        race(unchanged, BUDGETS, 100)
    needed = int(str(error.value).split("take ")[1].split()[0])
    assert race(unchanged, BUDGETS, needed)[0] == BUDGETS[0]
    with pytest.raises(ValueError, match=f"for {needed - 1} rows"):
        race(unchanged, BUDGETS, needed - 1)
