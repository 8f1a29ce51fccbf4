"""The promise: on simulated calibrations whose true risks are known, and on models; how sure first looks are."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from conftest import batch_of, budgetformer, stock_classifier
from hf_budgetformer import BudgetFormerConfig, BudgetFormerModel
from hf_budgetformer.budgets import confidence
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.tuning import (
    THRESHOLDS,
    Calibration,
    FirstLook,
    Tuning,
    apply_tuning,
    calibrate_margins,
    choose_looks,
    describe_promise,
    find_looks,
    kept_promise,
    log_capital,
    look_budgets,
    rows_needed,
    share_error,
    tune,
    warn_of_shift,
)


CALIBRATIONS = 1000
# What a binomial of 1,000 trials at 5% exceeds once in about a thousand times.
MOST_BY_CHANCE = 0.05 * CALIBRATIONS + 3 * math.sqrt(CALIBRATIONS * 0.05 * 0.95)


@dataclass
class World:
    """Inputs of a few kinds, and what one first look makes of each: all that is random is known.

    Args:
        confidence: (kinds,).
        shares: (kinds,), of the inputs.
        wrong: (kinds,), probability that an answer turns wrong.
        right: (kinds,), that one turns right.
        work: Of the look.
    """

    confidence: np.ndarray
    shares: np.ndarray
    wrong: np.ndarray
    right: np.ndarray
    work: float

    def true_risk(self, risk, threshold):
        stands = self.confidence >= threshold
        if risk == "mean_budget":
            return self.work + self.shares[~stands].sum()
        return (self.shares * (self.wrong - self.right))[stands].sum()

    def look(self, kinds, changes):
        """A first look at inputs by two uniform draws each, (N,)."""
        kind = np.searchsorted(self.shares.cumsum()[:-1], kinds, side="right")
        losses = (changes < self.wrong[kind]).astype(int) - (changes > 1.0 - self.right[kind]).astype(int)
        return FirstLook(self.work, self.work, self.work, self.confidence[kind], losses)


def world(confidence, shares, wrong, right=0.0, work=0.1):
    confidence = np.array(confidence)
    return World(confidence, np.array(shares), np.array(wrong), np.full(len(confidence), right), work)


def smooth(scale, work):
    doubt = np.linspace(0.005, 0.995, 100)
    return world(1.0 - doubt, [0.01] * 100, scale * doubt**2, 0.01, work)


SMOOTH = [smooth(0.3, 0.05), smooth(0.2, 0.1)]
# True risk 0 at the thresholds above a half, and just above the level of 2% at all others.
STEP = [world([0.99, 0.5, 0.05], [0.5, 0.25, 0.25], [0.0, 0.0202 / 0.25, 0.0])] * 2
# Spends 0.1 at the thresholds up to a half, and just above the level of 0.3 at those above.
SPENDING_STEP = [world([0.9, 0.5], [0.7985, 0.2015], [0.0, 0.1])] * 2
CASES = {
    "disagreement, smooth, correlated looks": (SMOOTH, "disagreement", 0.02, True),
    "disagreement, just above at the next threshold": (STEP, "disagreement", 0.02, False),
    "disagreement, just above, correlated looks": (STEP, "disagreement", 0.02, True),
    "tolerance, smooth, correlated looks": (SMOOTH, "tolerance", 0.02, True),
    "tolerance, just above at the next threshold": (STEP, "tolerance", 0.02, False),
    "mean budget, smooth": (SMOOTH, "mean_budget", 0.3, False),
    "mean budget, just above at the next threshold": (SPENDING_STEP, "mean_budget", 0.3, False),
}


def count_broken(looks, risk, level, correlated, confidence=0.95, rows=600):
    """Calibrations after which any look that was kept breaks the promise, or any exceeds its bound."""
    generator = np.random.default_rng(0)
    broken = exceeded = 0
    for _ in range(CALIBRATIONS):
        draws = generator.random((2, len(looks), rows))
        if correlated:  # the looks doubt, and err on, the same inputs
            draws[:] = draws[:, :1]
        first_looks = [look.look(*draws[:, number]) for number, look in enumerate(looks)]
        tested = find_looks(first_looks, risk, level, confidence)
        kept = [(look, test) for look, test in zip(looks, tested, strict=True) if test.threshold is not None]
        risks = [(look.true_risk(risk, test.threshold), test.bound) for look, test in kept]
        broken += any(true > level + 1e-9 for true, _ in risks)
        exceeded += any(true > bound + 1e-9 for true, bound in risks)
    return broken, exceeded


@pytest.mark.parametrize("case", CASES)
def test_at_most_5_of_100_promises_are_broken(case):
    broken, exceeded = count_broken(*CASES[case])
    print(f"{case}: {broken} of {CALIBRATIONS} promises are broken, {exceeded} bounds exceeded")
    assert broken <= 0.05 * CALIBRATIONS
    assert exceeded <= MOST_BY_CHANCE


def test_a_promise_of_less_confidence_is_broken_more_often():
    broken, _ = count_broken(STEP, "disagreement", 0.02, correlated=False, confidence=0.5)
    assert broken > 0.2 * CALIBRATIONS


def test_the_capital_is_the_mean_of_products_and_a_fair_bet():
    differences, mean = [0, 1, 0, -1, 0, 0, 1], 0.1
    bets = np.linspace(0.05, 0.95, 10) / (1 - mean)
    naive = np.mean([math.prod(1 + bet * (mean - d) for d in differences) for bet in bets])
    assert log_capital([1, 4, 2], mean) == pytest.approx(math.log(naive))
    expected = sum(p * math.exp(log_capital(seen, mean)) for p, seen in zip([0.2, 0.5, 0.3], np.eye(3), strict=True))
    assert expected == pytest.approx(1.0)


def first_look(confidence, losses, work=0.1):
    return FirstLook(work, work, work, np.array(confidence), np.array(losses))


@pytest.mark.parametrize(("risk", "level"), [("disagreement", 0.02), ("tolerance", 0.02), ("mean_budget", 0.3)])
def test_a_perfect_look_is_kept_and_doubts_none(risk, level):
    sure = np.random.default_rng(0).random(1000)
    [test] = find_looks([first_look(sure, [0] * 1000)], risk, level)
    assert test.risk == 0.0
    assert test.bound <= level
    if risk == "mean_budget":  # spends what it may: sure answers are looked at again too
        assert 0.25 < test.work < 0.3
    else:
        assert (test.threshold, test.doubted, test.work, test.seconds) == (0.0, 0.0, 0.1, 0.1)


@pytest.mark.parametrize("risk", ["disagreement", "tolerance"])
def test_a_useless_look_is_left_to_the_sure_few_it_errs_on_by_chance(risk):
    sure, errs = np.random.default_rng(0).random((2, 1000))
    [test] = find_looks([first_look(sure, (errs < 0.3).astype(int))], risk, 0.02)
    assert test.doubted > 0.9
    assert test.work > 1.0  # more than the full model alone


def test_a_better_threshold_is_not_reached_across_one_that_fails():
    sure = np.repeat([0.99, 0.5, 0.05], 1000)
    losses = np.repeat([0, 1, 0], 1000)
    losses[1500:] = 0
    losses[2000:2600] = -1  # in all, nothing is lost
    [test] = find_looks([first_look(sure, losses)], "tolerance", 0.02)
    assert 0.5 < test.threshold <= 0.99
    assert test.risk == 0.0


def test_answers_of_full_confidence_can_be_doubted_by_no_threshold_and_are_tested_first():
    right = first_look([1.0] * 500 + [0.3] * 500, [0] * 500 + [1] * 500)
    wrong = first_look([1.0] * 1000, [1] * 500 + [0] * 500)
    tests = find_looks([right, wrong], "disagreement", 0.02)
    assert 0.3 < tests[0].threshold <= 1.0
    assert tests[0].doubted == 0.5
    assert (tests[1].threshold, tests[1].work) == (None, 1.0)


def test_the_binomial_law_is_that_of_the_textbook():
    rows, level = 120, 0.07
    for lost in (1, 2, 4, 9, 12):
        sure = np.full(rows, 0.5)
        chance = sum(math.comb(rows, n) * level**n * (1 - level) ** (rows - n) for n in range(lost + 1))
        for error, kept in ((chance * 1.00001, True), (chance * 0.99999, False)):
            look = first_look(sure, [1] * lost + [0] * (rows - lost))
            [test] = find_looks([look], "disagreement", level, confidence=1.0 - error)
            assert (test.threshold == 0.0) == kept


@pytest.mark.parametrize("level", [0.005, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("risk", ["disagreement", "tolerance"])
def test_the_rows_said_to_be_needed_are_enough_and_one_fewer_is_not(risk, level):
    unchanged = lambda rows: [first_look([0.5] * rows, [0] * rows)] * 3  # noqa: E731
    with pytest.raises(ValueError, match=f"{risk} must be larger for 5 rows, got {level}: .* it would take") as error:
        find_looks(unchanged(5), risk, level)
    needed = int(str(error.value).split("take ")[1].split()[0])
    assert needed == rows_needed(risk, level, 0.8 * 0.05)
    assert [test.threshold for test in find_looks(unchanged(needed), risk, level)] == [0.0, None, None]
    with pytest.raises(ValueError, match=f"for {needed - 1} rows"):
        find_looks(unchanged(needed - 1), risk, level)


@pytest.mark.parametrize(("works", "expected"), [([0.1], [0.05]), ([0.2, 0.1], [0.01, 0.04])])
def test_four_fifths_of_the_error_go_to_the_first_look_that_costs_least_all_of_it_to_one_alone(works, expected):
    assert share_error(0.05, works) == pytest.approx(expected)
    assert sum(share_error(0.05, [0.25, 0.125, 0.0625, 0.5])) == pytest.approx(0.05)
    sure = np.random.default_rng(0).random(100)
    looks = [first_look(sure, [0] * 99 + [1], work) for work in works]
    for look, error, test in zip(looks, expected, find_looks(looks, "disagreement", 0.05), strict=True):
        [alone] = find_looks([look], "disagreement", 0.05, confidence=1.0 - error)
        assert (test.threshold, test.bound) == (alone.threshold, pytest.approx(alone.bound))


def test_a_mean_budget_that_pays_for_the_first_look_alone_is_kept_by_it_and_a_smaller_one_by_none():
    look = first_look([0.5] * 10, [0] * 10, work=0.25 + 1e-9)
    assert find_looks([look], "mean_budget", 0.25)[0].threshold == 0.0
    tests = find_looks([first_look([0.5] * 10, [0] * 10), look], "mean_budget", 0.2)
    assert [test.threshold for test in tests] == [0.0, None]
    with pytest.raises(ValueError, match=r"mean_budget must pay for a first look at least, 0\.25, got 0\.2"):
        find_looks([look], "mean_budget", 0.2)


# Shifts


def warnings_of(caplog, config, doubted, rows):
    caplog.clear()
    warn_of_shift(config, doubted, rows)
    return [record.message for record in caplog.records]


def promising(doubted, rows, looks=(0.1, 1.0), confidence=(0.5,)):
    promise = {"looks": [0.1, 1.0], "thresholds": [0.5], "doubted": doubted, "rows": rows}
    return SimpleNamespace(promise=promise, looks=list(looks), confidence=list(confidence))


@pytest.mark.parametrize(("share", "rows", "calibrated"), [(0.1, 500, 1000), (0.004, 50, 1000), (0.5, 3000, 700)])
def test_inputs_like_those_of_the_calibration_are_warned_of_in_1_of_100(caplog, share, rows, calibrated):
    generator = np.random.default_rng(0)
    warned = 0
    for _ in range(CALIBRATIONS):
        config = promising(int(generator.binomial(calibrated, share)), calibrated)
        warned += len(warnings_of(caplog, config, int(generator.binomial(rows, share)), rows))
    assert warned <= 0.01 * CALIBRATIONS + 3 * math.sqrt(CALIBRATIONS * 0.01 * 0.99)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_inputs_that_are_doubted_half_or_twice_as_often_are_warned_of(caplog, share):
    generator = np.random.default_rng(0)
    warned = 0
    for _ in range(100):
        config = promising(int(generator.binomial(1000, 0.1)), 1000)
        warned += len(warnings_of(caplog, config, int(generator.binomial(1000, share)), 1000))
    assert warned >= 90


def test_the_warning_says_what_was_seen_and_what_was_calibrated(caplog):
    [message] = warnings_of(caplog, promising(100, 1000), 300, 1000)
    assert "30.0% of these 1,000 inputs were doubted, but 10.0% of those" in message
    assert "Tune again" in message


def test_without_a_promise_of_these_looks_there_is_nothing_to_warn_of(caplog):
    assert warnings_of(caplog, promising(100, 1000), 1000, 1000)
    assert not warnings_of(caplog, promising(100, 1000, confidence=[0.6]), 1000, 1000)
    assert not warnings_of(caplog, promising(100, 1000, looks=[0.2, 1.0]), 1000, 1000)
    assert not warnings_of(caplog, promising(100, 1000), 0, 0)
    assert not warnings_of(caplog, promising(0, 1000), 0, 1000)
    assert not warnings_of(caplog, SimpleNamespace(promise=None, looks=[0.1, 1.0], confidence=None), 9, 9)


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
    first = model.narrow.order.look(1 / 12).cost
    assert spent.unique().tolist() == pytest.approx([first, first + 1.0])


def test_labels_and_teachers_are_ignored_and_the_default_first_look_is_a_twelfth():
    model, [batch] = budgetformer("bert"), batches([0])
    calibrate_margins(model, [{**batch, "labels": torch.full((32,), 7), "teacher_logits": torch.zeros(1)}])
    before = model.config.margins
    assert before["budget"] == 1 / 12
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


# Models


# With these the cheapest promise of each backbone is one of two looks, of one label and of several.
SEEDS = {"bert": 11, "roberta": 7}
KINDS = [None, "multi_label_classification"]


@pytest.fixture(scope="module")
def many():
    """240 texts, and labels that have nothing to do with them."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 30, generator.integers(3, 16)) for _ in range(240)]
    labels = generator.integers(0, 3, 240).tolist()
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in text) for text in texts], "label": labels})


def looking_twice(backbone_type, problem_type=None):
    torch.manual_seed(SEEDS[backbone_type])
    model = budgetformer(backbone_type)
    model.config.problem_type = problem_type
    return model


@torch.no_grad()
def ask(model, rows, tokenizer, **options):
    return model(**tokenizer(rows["text"][:], padding=True, return_tensors="pt"), **options)


def decide(logits, problem_type):
    """What is answered, (N, 1) or (N, num_labels)."""
    return logits > 0 if problem_type else logits.argmax(-1, keepdim=True)


def naive_threshold(sure, differs, level, error):
    """The threshold before the first one whose few disagreements could be chance."""
    previous, rows = None, len(sure)
    for threshold in THRESHOLDS:
        lost = int(differs[sure >= threshold].sum())
        if sum(math.comb(rows, n) * level**n * (1 - level) ** (rows - n) for n in range(lost + 1)) > error:
            break
        previous = threshold
    return previous


@pytest.mark.parametrize("problem_type", KINDS)
def test_tuning_finds_what_naive_computation_from_logits_finds(backbone_type, problem_type, many, tokenizer):
    model = looking_twice(backbone_type, problem_type)
    tuning = tune(model, many, tokenizer, disagreement=0.2, batch_size=8)
    full = decide(ask(model, many, tokenizer, budget=1.0).logits, problem_type)
    assert [test.budget for test in tuning.tested] == look_budgets(model.config)
    errors = dict(zip(look_budgets(model.config), [0.04, 0.005, 0.005], strict=True))  # four fifths for the cheapest
    for test in tuning.tested:
        out = ask(model, many, tokenizer, budget=test.budget)
        sure = confidence(out.logits, problem_type).numpy()
        differs = (decide(out.logits, problem_type) != full).any(-1).numpy()
        assert test.threshold == naive_threshold(sure, differs, 0.2, errors[test.budget])
        stands = sure >= test.threshold
        assert test.doubted == pytest.approx(1 - stands.mean())
        assert test.work == pytest.approx(out.budget[0].item() + test.doubted)
        assert test.risk == pytest.approx((stands & differs).mean())
    best = min((test for test in tuning.tested if test.work < 1.0), key=lambda test: test.work)
    assert (tuning.looks, tuning.confidence) == ([best.budget, 1.0], [best.threshold])


@pytest.mark.parametrize("problem_type", KINDS)
def test_plain_calls_do_what_was_promised_once_saved_and_loaded_too(
    backbone_type, problem_type, many, tokenizer, tmp_path
):
    model = looking_twice(backbone_type, problem_type)
    tuning = tune(model, many, tokenizer, disagreement=0.2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for tuned in (model, again):
        assert (tuned.config.looks, tuned.config.confidence) == (tuning.looks, tuning.confidence)
        assert kept_promise(tuned.config) == tuning.promise
        assert tuned.config.margins["budget"] == tuning.looks[0]
        out, full = (ask(tuned, many, tokenizer, **options) for options in ({}, {"budget": 1.0}))
        same = (decide(out.logits, problem_type) == decide(full.logits, problem_type)).all(-1)
        assert same.float().mean().item() == pytest.approx(1.0 - tuning.promise["lost"])
        assert int((out.budget > 1.0).sum()) == tuning.promise["doubted"]
        assert 0 < tuning.promise["lost"] < tuning.promise["bound"] <= 0.2
    test = next(test for test in tuning.tested if test.budget == tuning.looks[0])
    assert out.budget.mean().item() == pytest.approx(test.work)


@pytest.mark.parametrize("batch_size", [4, 240])
def test_accuracy_is_compared_row_by_row_with_its_own_label(backbone_type, many, tokenizer, batch_size):
    model, labels = looking_twice(backbone_type), torch.tensor(many["label"][:])
    tuning = tune(model, many, tokenizer, tolerance=0.2, batch_size=batch_size, budgets=[0.125, 0.25])
    right = ask(model, many, tokenizer, budget=1.0).logits.argmax(-1) == labels
    assert [test.budget for test in tuning.tested] == [0.125, 0.25]
    for test in tuning.tested:
        logits = ask(model, many, tokenizer, budget=test.budget).logits
        stands = confidence(logits, None) >= test.threshold
        lost = right.float() - torch.where(stands, logits.argmax(-1) == labels, right).float()
        assert test.risk == pytest.approx(lost.mean().item())
    assert any(test.risk for test in tuning.tested)


def test_of_a_mean_budget_the_looks_that_differ_least_are_chosen(backbone_type, many, tokenizer):
    model = looking_twice(backbone_type)
    tuning = tune(model, many, tokenizer, mean_budget=0.5)
    assert tuning.promise["lost"] == min(round(test.risk, 6) for test in tuning.tested)
    assert tuning.promise["lost"] > tune(model, many, tokenizer, mean_budget=0.9, write=False).promise["lost"]
    spent = ask(model, many, tokenizer).budget.mean().item()
    [test] = [test for test in tuning.tested if test.budget == tuning.looks[0]]
    assert spent == pytest.approx(test.work)
    assert spent < tuning.promise["bound"] + 1e-6 <= 0.5 + 1e-6


def test_rows_in_any_form_and_order_give_the_same_looks_and_leave_the_model_as_it_was(many, tokenizer):
    model = looking_twice("bert").train()
    tuning = tune(model, many, tokenizer, disagreement=0.2, write=False)
    assert model.training
    assert model.config.looks is model.config.confidence is model.config.promise is model.config.margins is None
    tokens = many.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    unlabelled = many.remove_columns("label")
    for rows in (tokens, tokens.with_format("torch"), unlabelled, unlabelled.select(range(239, -1, -1))):
        other = tune(model, rows, tokenizer, disagreement=0.2, batch_size=7, write=False)
        assert other.promise == tuning.promise


def test_answers_that_never_change_need_no_second_look(many, tokenizer):
    model = budgetformer("bert")
    for head in (model.classifier, model.narrow.head.classifier_copy):
        head.weight.data.zero_()
        head.bias.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    tuning = tune(model, many, tokenizer, disagreement=0.05)
    assert (model.config.looks, model.config.confidence) == ([look_budgets(model.config)[0]], None)
    assert "A plain call looks once, at a budget of 0.0833. Its answers differ" in str(tuning)
    assert "on at most 5% of texts like the 240 of the calibration, with 95% confidence" in str(tuning)


def test_where_no_look_keeps_the_promise_the_full_model_answers_alone(many, tokenizer):
    model = budgetformer("bert", looks=[0.25, 1.0], confidence=[0.5])
    for head, favourite in ((model.classifier, 0), (model.narrow.head.classifier_copy, 1)):
        head.weight.data.zero_()
        head.bias.data.zero_()
        head.bias.data[favourite] = 50.0  # as sure as can be
    tuning = tune(model, many, tokenizer, disagreement=0.05)
    assert (tuning.looks, tuning.confidence) == (model.config.looks, model.config.confidence) == ([1.0], None)
    assert (tuning.promise["doubted"], tuning.promise["lost"], tuning.promise["bound"]) == (240, 0.0, 0.0)
    assert all(test.threshold is None for test in tuning.tested)
    assert ask(model, many, tokenizer).budget.eq(1.0).all()
    assert str(tuning).count("none keeps the promise") == 3
    assert "A plain call runs the full model. No first look that saves work was shown to" in str(tuning)


def test_the_answer_becomes_json_and_comes_back(many, tokenizer):
    tuning = tune(looking_twice("bert"), many, tokenizer, disagreement=0.2)
    assert tuning.settings == {"risk": "disagreement", "level": 0.2, "confidence": 0.95, "rows": 240}
    again = Tuning.from_dict(json.loads(json.dumps(tuning.to_dict())))
    assert again == tuning
    assert str(again) == str(tuning)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"risk": "disagreement", "level": 0.01},
            "Its answers differ from the full model's on at most 1% of texts like",
        ),
        ({"risk": "tolerance", "level": 0.005}, "Its answers lose at most 0.5 points of accuracy on the full model's"),
        (
            {"risk": "mean_budget", "level": 0.3},
            "It spends at most 0.3 of the full model's work in the mean over texts",
        ),
        ({"risk": "mean_budget", "level": 0.3}, "0.40% of those were answered otherwise than by the full model"),
    ],
)
def test_a_promise_in_words(fields, words):
    rest = {"rows": 2000, "confidence": 0.95, "looks": [0.1, 1.0], "thresholds": [0.5], "lost": 0.004, "doubted": 9}
    text = describe_promise({**fields, **rest, "bound": 0.009})
    assert words in text
    assert "the 2,000 of the calibration, with 95% confidence" in text


def test_other_looks_or_thresholds_keep_no_promise(many, tokenizer):
    config = BudgetFormerConfig()
    assert kept_promise(config) is None
    model = looking_twice("bert")
    tune(model, many, tokenizer, disagreement=0.2)
    assert kept_promise(model.config)
    model.config.confidence = [0.99]
    assert kept_promise(model.config) is None


def test_the_mode_comes_back_after_an_error(many, tokenizer, monkeypatch):
    model = budgetformer("bert").train()

    def stop(*arguments, **named):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError("stopped")

    monkeypatch.setattr(model, "forward", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        tune(model, many, tokenizer, disagreement=0.2)
    assert model.training
    assert model.config.looks is model.config.margins is None


def test_bad_arguments_are_named_before_the_model_is_asked(texts, tokenizer, monkeypatch):
    model, good = budgetformer("bert"), texts.to_dict()
    several, regression = budgetformer("bert"), budgetformer("bert")
    several.config.problem_type = "multi_label_classification"
    regression.config.problem_type = "regression"
    monkeypatch.setattr(model, "forward", lambda **inputs: pytest.fail("asked"))
    rows = {name: Dataset.from_dict(columns) for name, columns in {
        "no label": {"text": good["text"]}, "no text": {"label": good["label"]}, "none": {"text": [], "label": []},
        "unlabelled": {**good, "label": [-1] * 64}, "names": {**good, "label": ["good"] * 64},
    }.items()}  # fmt: skip
    for message, arguments in {
        r"model must be a BudgetFormer classifier, got BertForSequenceC.*from_pretrained": (stock_classifier("bert"),),
        r"model must be a BudgetFormer classifier, got BudgetFormerModel": (BudgetFormerModel(model.config),),
        r"model must look twice: with a narrow encoder beside a full one": (cut(budgetformer("bert"), 0.25),),
        r"model must look twice: .* and labels to choose from": (regression,),
        r"model must choose one label of several, got problem_type='multi_label": (several,),
        r"dataset must be .* at least one row, .*, got Dataset with \['text', 'label'\]": (model, rows["none"]),
        r"dataset must be .*, got DatasetDict": (model, DatasetDict({"test": texts})),
        r"dataset must be .*, got list with None": (model, ["w1"]),
        r"'label' or 'labels', got the columns \['text'\]": (model, rows["no label"]),
        r"'input_ids' or 'text', got Dataset with \['label'\]": (model, rows["no text"]),
        r"integers in \[0, 3\) as 'label', got .*-1": (model, rows["unlabelled"]),
        r"integers in \[0, 3\) as 'label', got .*'good'": (model, rows["names"]),
    }.items():
        with pytest.raises(ValueError, match=message):
            tune(*(*arguments, texts)[:2], tokenizer, tolerance=0.3)
    for message, named in {
        r"one of .* must be given, got \{'disagreement': 0.3, 'mean_budget': 0.3\}": {
            "disagreement": 0.3,
            "mean_budget": 0.3,
        },
        r"disagreement must be a float in \(0, 1\), got 1": {"disagreement": 1},
        r"tolerance must be a float in \(0, 1\), got 0\.0": {"tolerance": 0.0},
        r"mean_budget must be a float in \(0, 1\), got '0\.3'": {"mean_budget": "0.3"},
        r"mean_budget must pay for a first look at least, 0\.0\d+, got 0\.05": {"mean_budget": 0.05},
        r"confidence must be a float in \(0, 1\), got 95": {"confidence": 95},
        r"budgets must hold at least one, .* got none": {"budgets": []},
        r"budget must be at most narrow_budget=0\.25, that of a first look, got 0\.5": {"budgets": [0.1, 0.5]},
        r"budget must be at most narrow_budget=0\.25, .* got None": {"budgets": [None]},
        r"disagreement must be larger for 64 rows, got 0.01: .* it would take 321 rows": {},
        r"batch_size must be an integer >= 1, got 0": {"batch_size": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            tune(model, texts, tokenizer, **named)
    assert model.config.looks is model.config.promise is None


def test_bad_arguments_of_the_parts_are_named(many, tokenizer):
    model = budgetformer("bert")
    batches = [tokenizer(many["text"][:], padding=True, return_tensors="pt")]
    calibration = Calibration(model, batches, [0.25])
    with pytest.raises(ValueError, match="labels must be given for a tolerance, got None"):
        choose_looks(calibration, "tolerance", 0.2)
    with pytest.raises(ValueError, match=r"risk must be one of \['disagreement', .*, got 'accuracy'"):
        choose_looks(calibration, "accuracy", 0.2)
    with pytest.raises(ValueError, match="at least one first look and one row, got 0 and 0"):
        find_looks([], "disagreement", 0.2)


def test_what_is_applied_is_what_was_found(many, tokenizer):
    model = looking_twice("bert")
    batches = [tokenizer(many["text"][:], padding=True, return_tensors="pt")]
    calibration = Calibration(model, batches, look_budgets(model.config))
    tuning = choose_looks(calibration, "disagreement", 0.2)
    model.config.looks, model.config.confidence = [0.05, 0.2, 1.0], [0.3, 0.4]
    apply_tuning(model.config, tuning, calibration)

    assert (model.config.looks, model.config.confidence) == (tuning.looks, tuning.confidence)
    model.config.validate()
