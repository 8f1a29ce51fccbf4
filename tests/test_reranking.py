"""Rerankers: two stages beside a ranking made by hand, and the bound on what they lose."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Value

from conftest import budgetformer
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.reranking import (
    RankingTuning,
    choose_keep,
    merge_rankings,
    ndcg,
    rank,
    ranking_losses,
    tune_ranking,
)
from test_trainer import trainer_for


QUERY = "w1 w2 w3"
PASSAGES = ["w4 w5", "w1 w2 w3 w9", "w30", "w3 w1", "w22 w21 w20 w19 w18", "w7", "w2 w2 w2", "w11 w3 w12 w1"]
BUDGETS = (1 / 6, 1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return budgetformer("bert", num_labels=1)


@torch.no_grad()
def score_one(model, tokenizer, passage, budget, query=QUERY):
    return model(**tokenizer(query, passage, return_tensors="pt"), budget=budget).logits.item()


def rank_by_hand(model, tokenizer, passages, keep, budgets=BUDGETS):
    """(number, score) of each passage, every pair asked alone, at both budgets."""
    first = [score_one(model, tokenizer, passage, budgets[0]) for passage in passages]
    last = [score_one(model, tokenizer, passage, budgets[1]) for passage in passages]
    order = sorted(range(len(passages)), key=lambda number: -first[number])
    kept = sorted(order[:keep], key=lambda number: -last[number])
    return [(number, last[number]) for number in kept] + [(number, first[number]) for number in order[keep:]]


@pytest.mark.parametrize("keep", [0, 1, 3, len(PASSAGES), 100])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_ranks_as_by_hand(keep, batch_size, model, tokenizer):
    hits = rank(model, tokenizer, QUERY, PASSAGES, budgets=BUDGETS, keep=keep, batch_size=batch_size)
    expected = rank_by_hand(model, tokenizer, PASSAGES, keep)
    assert [hit["corpus_id"] for hit in hits] == [number for number, _ in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits], [score for _, score in expected], atol=1e-5)
    first = 0.0 if keep >= len(PASSAGES) else model.narrow.order.look(1 / 6).cost
    spent = [first + (place < keep) for place in range(len(PASSAGES))]
    assert [hit["spent"] for hit in hits] == pytest.approx(spent)


def test_budgets_of_the_narrow_encoder_alone(model, tokenizer):
    hits = rank(model, tokenizer, QUERY, PASSAGES, budgets=(1 / 12, 1 / 4), keep=2)
    assert [hit["corpus_id"] for hit in hits] == [
        x for x, _ in rank_by_hand(model, tokenizer, PASSAGES, 2, (1 / 12, 1 / 4))
    ]
    cost = model.narrow.order.look
    assert hits[0]["spent"] == pytest.approx(cost(1 / 12).cost + cost(1 / 4).cost)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.3, 3), (1.0, 8)])
def test_a_share_is_rounded_up(share, count, model, tokenizer):
    assert rank(model, tokenizer, QUERY, PASSAGES, keep=share) == rank(model, tokenizer, QUERY, PASSAGES, keep=count)


def test_a_share_of_hundreds_is_what_it_says(model, tokenizer):
    hits = rank(model, tokenizer, QUERY, ["w1"] * 100, keep=0.07)
    assert sum(hit["spent"] > 1 for hit in hits) == 7


def test_equal_scores_stay_in_order(model, tokenizer):
    """Equal to the last bit, which those of equal passages in other places of a batch need not be."""
    model = copy.deepcopy(model)
    torch.nn.init.zeros_(model.classifier.weight)
    model.copy_head()
    for keep in (0, 2, 5):
        hits = rank(model, tokenizer, QUERY, ["w4 w5", "w30", "w4 w5", "w4 w5", "w30"], keep=keep, batch_size=5)
        assert [hit["corpus_id"] for hit in hits] == [0, 1, 2, 3, 4]


def test_top_k_is_the_start_of_all(model, tokenizer):
    everything = rank(model, tokenizer, QUERY, PASSAGES, keep=3)
    assert rank(model, tokenizer, QUERY, PASSAGES, keep=3, top_k=4) == everything[:4]
    assert rank(model, tokenizer, QUERY, PASSAGES, keep=3, top_k=99) == everything


def test_texts_are_cut(model, tokenizer):
    long = ["w4 w5 w6 w7 w8 w9 w10", "w1 w2"]
    cut = ["w4 w5", "w1 w2"]
    [one, other] = (rank(model, tokenizer, "w1", passages, keep=1, max_length=6) for passages in (long, cut))
    assert one == other


def test_the_mode_comes_back(model, tokenizer):
    model.train()
    try:
        rank(model, tokenizer, QUERY, PASSAGES, keep=1)
        assert model.training
        assert model.narrow.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": []}, "passages must be a list of at least one text"),
        ({"passages": "w1"}, "passages must be a list"),
        ({"keep": None}, "keep must be a number of passages"),
        ({"keep": -1}, "keep must be"),
        ({"keep": 1.5}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"top_k": 0}, "top_k must be None or an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"budgets": (0.5, 1.0)}, r"budgets must be two rising floats, each at most narrow_budget=0\.25"),
        ({"budgets": (1.0, 0.25)}, "budgets must be two rising"),
        ({"budgets": (0.25,)}, "budgets must be two rising"),
    ],
)
def test_bad_arguments_are_refused(options, message, model, tokenizer):
    given = {"passages": PASSAGES, "keep": 2, **options}
    with pytest.raises(ValueError, match=message):
        rank(model, tokenizer, QUERY, **given)


@pytest.mark.parametrize(
    "fields", [{"num_labels": 3}, {"num_labels": 2, "problem_type": "regression"}, {"router": "layer"}]
)
def test_a_model_that_cannot_rank_is_refused(fields, tokenizer):
    other = budgetformer("bert", **{"num_labels": 1, **fields})
    with pytest.raises(ValueError, match="model must have one label, and a narrow encoder beside a full one"):
        rank(other, tokenizer, QUERY, PASSAGES, keep=1)


def test_gain_is_that_of_the_textbook():
    order = np.array([4, 2, 0, 1, 3])
    assert ndcg(order, {4}) == 1.0
    assert ndcg(order, {2}) == pytest.approx(1 / math.log2(3))
    assert ndcg(order, {4, 0}) == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))
    assert ndcg(order, {1}, top_k=3) == 0.0
    assert ndcg(order, set()) == 0.0


def test_losses_are_those_of_each_merged_ranking():
    first, last = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([1.0, 2.0, 5.0, 4.0, 3.0])
    full = [2, 3, 4, 1, 0]
    assert merge_rankings(first, last, 5).tolist() == full
    assert merge_rankings(first, last, 0).tolist() == [0, 1, 2, 3, 4]
    assert merge_rankings(first, last, 3).tolist() == [2, 1, 0, 3, 4]
    assert ranking_losses(first, last, top_k=1).tolist() == [1, 1, 1, 0, 0, 0]
    assert ranking_losses(first, last, top_k=2).tolist() == [1, 1, 1, 1, 0, 0]
    best = 1 / math.log2(3)  # candidate 3 is the second of the full ranking
    expected = [best - 1 / math.log2(5)] * 4 + [0, 0]
    np.testing.assert_allclose(ranking_losses(first, last, {3}), expected)


def simulate(risk, generator, queries=2000, candidates=12, noise=0.7):
    """Losses (queries, candidates + 1) of a population whose first scores are the last ones and noise."""
    last = generator.normal(size=(queries, candidates))
    first = last + noise * generator.normal(size=last.shape)
    # What is relevant is near the last score, so that the first look is right now and then where that is wrong.
    answers = (last + 0.7 * generator.normal(size=last.shape)).argmax(-1)
    rows = []
    for number in range(queries):
        relevant = {int(answers[number])} if risk == "lost_ndcg" else None
        rows.append(ranking_losses(first[number], last[number], relevant, top_k=3))
    return np.stack(rows)


@pytest.mark.parametrize(("risk", "level"), [("changed", 0.2), ("lost_ndcg", 0.05)])
def test_the_promise_is_broken_no_more_often_than_it_says(risk, level):
    generator = np.random.default_rng(0)
    population = simulate(risk, generator)
    truth = population.mean(0)
    kept, broken, loose = [], 0, 0
    for _ in range(300):
        rows = generator.choice(len(population), size=200)
        keep, bound = choose_keep(population[rows], risk, level, confidence=0.9)
        kept.append(keep)
        broken += truth[keep] > level
        loose += truth[keep] > bound
        assert bound <= level + 1e-6
    assert broken <= 0.1 * 300 + 3 * math.sqrt(300 * 0.1 * 0.9)
    assert loose <= 0.1 * 300 + 3 * math.sqrt(300 * 0.1 * 0.9)
    assert 0 < np.mean(kept) < population.shape[1] - 1  # and it finds something


def test_nothing_lost_needs_no_second_look():
    assert choose_keep(np.zeros((100, 6)), "changed", 0.05)[0] == 0
    assert choose_keep(np.zeros((400, 6)), "lost_ndcg", 0.05)[0] == 0


@pytest.mark.parametrize(("risk", "level", "needed"), [("changed", 0.05, 59), ("lost_ndcg", 0.05, 80)])
def test_too_few_queries_say_how_many_it_takes(risk, level, needed):
    with pytest.raises(ValueError, match=rf"{risk} must be larger for 10 queries.* it would take \d+ queries"):
        choose_keep(np.zeros((10, 4)), risk, level)
    [said] = [n for n in range(10, 2 * needed) if passes(n, risk, level)][:1]
    assert needed * 0.7 < said < needed * 1.4


def passes(queries, risk, level):
    try:
        choose_keep(np.zeros((queries, 4)), risk, level)
    except ValueError:
        return False
    return True


def test_bad_promises_are_refused():
    for options, message in (
        (("changes", 0.1), "risk must be one of"),
        (("changed", 1.0), "changed must be a float in"),
        (("changed", 0.1, 1.0), "confidence must be a float in"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_keep(np.zeros((100, 4)), *options)


@pytest.fixture(scope="module")
def searches():
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return " ".join(f"w{word}" for word in torch.randint(0, 35, (length,), generator=generator).tolist())

    queries = [draw(2) for _ in range(40)]
    passages = [[draw(2 + number % 3) for number in range(5 + place % 3)] for place in range(40)]
    return queries, passages


def test_tunes_to_what_choosing_from_scores_asked_by_hand_gives(model, tokenizer, searches):
    queries, passages = searches
    losses = np.zeros((len(queries), 8))
    for number, (query, given) in enumerate(zip(queries, passages, strict=True)):
        first, last = (
            np.array([score_one(model, tokenizer, passage, budget, query) for passage in given]) for budget in BUDGETS
        )
        losses[number, : len(given) + 1] = ranking_losses(first, last, top_k=1)
    keep, bound = choose_keep(losses, "changed", 0.5)
    tuning = tune_ranking(model, tokenizer, queries, passages, changed=0.5, top_k=1)
    assert (tuning.keep, tuning.bound) == (keep, pytest.approx(bound))
    assert 0 < keep < 5
    assert tuning.lost == pytest.approx(losses[:, keep].mean())
    assert f"again at the best {keep} at 1" in str(tuning)
    assert "changes the full model's best 1 for at most 50% of queries like the 40" in str(tuning)


def test_what_was_tuned_is_stored_and_used(tokenizer, searches, tmp_path):
    queries, passages = searches
    model = budgetformer("bert", num_labels=1)
    tune_ranking(model, tokenizer, queries, passages, changed=0.3, top_k=1, write=False)
    assert model.config.ranking is None
    relevant = [{0}] * len(queries)
    budgets = (1 / 12, 1.0)
    tuning = tune_ranking(model, tokenizer, queries, passages, relevant, lost_ndcg=0.4, budgets=budgets)
    assert isinstance(tuning, RankingTuning)
    assert model.config.ranking["keep"] == tuning.keep
    model.save_pretrained(tmp_path)
    loaded = BudgetFormerForSequenceClassification.from_pretrained(tmp_path)
    expected = rank(model, tokenizer, QUERY, PASSAGES, budgets=budgets, keep=tuning.keep)
    assert rank(loaded, tokenizer, QUERY, PASSAGES) == expected


def test_where_two_stages_save_nothing_the_full_model_looks_at_all(tokenizer, searches):
    queries, passages = searches
    model = budgetformer("bert", num_labels=1)
    tuning = tune_ranking(model, tokenizer, queries, passages, changed=0.08, top_k=10)
    assert (tuning.keep, tuning.work, tuning.lost) == (1.0, 1.0, 0.0)
    assert "No ranking in two stages" in str(tuning)
    hits = rank(model, tokenizer, QUERY, PASSAGES)
    assert all(hit["spent"] == 1.0 for hit in hits)


def test_tuning_refuses_what_it_cannot_do(model, tokenizer, searches):
    queries, passages = searches
    for options, message in (
        ({"lost_ndcg": 0.1}, "relevant must be given for lost_ndcg"),
        ({"lost_ndcg": 0.1, "changed": 0.1}, "one of lost_ndcg and changed must be given"),
        ({"changed": 0.01}, "changed must be larger for 40 queries"),
        ({"relevant": [{0}], "lost_ndcg": 0.4}, "queries, passages and relevant must be as many"),
        ({"top_k": 0}, "top_k must be an integer >= 1"),
        ({"changed": 0.3, "budgets": (0.5, 1.0)}, "budgets must be two rising"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_ranking(model, tokenizer, queries, passages, **options)
    with pytest.raises(ValueError, match=r"passages\[1\] must be a list of at least one text"):
        tune_ranking(model, tokenizer, ["w1", "w2"] * 40, [["w1"], []] * 40, changed=0.3)


def test_training_and_cutting_void_what_was_tuned(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", num_labels=1)
    model.config.ranking = {"budgets": [1 / 6, 1.0], "keep": 3}
    assert cut(model, 0.25).config.ranking is None
    rows = tokenized.map(lambda row: {"label": float(row["label"])}).cast_column("label", Value("float32"))
    trainer_for(model, tmp_path, tokenizer, rows, callbacks=[BudgetCallback()], max_steps=1).train()
    assert model.config.ranking is None
