"""Budgets, scores and gates: what a router promises, and that its gradient is the documented one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from conftest import budgetformer, stock_config
from hf_budgetformer import BudgetFormerConfig
from hf_budgetformer.losses import attach_loss, budget_distance, budget_hinge, score_entropy
from hf_budgetformer.routing import (
    ExplorationSchedule,
    GateLinear,
    HeadRouter,
    OwnBudget,
    count_open,
    count_open_ceil,
    count_open_stochastic,
    gate_surrogate,
    pool_tokens,
    rank_heads,
    score_threshold,
)


def config_of(**fields):
    return BudgetFormerConfig.from_backbone_config(stock_config("bert"), **fields)


def router_of(**fields):
    """A router in training mode whose weights are far from their start."""
    router = HeadRouter(config_of(**fields))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return router


@given(budget=st.floats(0.0, 1.0, exclude_min=True), heads=st.integers(1, 16))
def test_open_heads_are_at_least_one_and_at_most_all(budget, heads):
    for count in (count_open, count_open_ceil, count_open_stochastic):
        k = count(torch.tensor([budget]), heads)
        assert k.dtype == torch.int64
        assert 1 <= k.item() <= heads
    assert abs(count_open(torch.tensor([budget]), heads).item() - max(budget * heads, 1)) <= 0.5 + 1e-3


@given(one=st.floats(1e-6, 1.0), other=st.floats(1e-6, 1.0), heads=st.integers(1, 16))
def test_open_heads_grow_with_the_budget(one, other, heads):
    low, high = count_open(torch.tensor(sorted([one, other])), heads).tolist()
    assert low <= high


@pytest.mark.parametrize(("heads", "opened"), [(4, 3), (12, 8), (8, 5)])
def test_a_budget_between_two_counts_is_rounded_half_up(heads, opened):
    assert count_open(torch.tensor([(opened - 0.5) / heads]), heads).item() == opened
    assert count_open_ceil(torch.tensor([(opened - 0.5) / heads]), heads).item() == opened
    assert count_open_ceil(torch.tensor([opened / heads]), heads).item() == opened  # not one more through rounding


def test_stochastic_rounding_opens_the_marginal_head_as_often_as_its_share_says():
    counts = count_open_stochastic(torch.full((20_000,), 2.3 / 4), 4)
    assert set(counts.tolist()) == {2, 3}
    assert counts.float().mean().item() == pytest.approx(2.3, abs=0.02)


def test_ranks_break_ties_by_the_lower_index():
    assert rank_heads(torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [
        [3, 0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_threshold_lies_between_the_last_open_and_the_first_closed_head():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]]).expand(4, 4)
    assert score_threshold(scores, torch.tensor([1, 2, 3, 4]))[:, 0].tolist() == [3.5, 2.5, 1.5, -math.inf]


@given(data=st.data(), heads=st.integers(2, 12), inputs=st.integers(1, 5))
@settings(deadline=None)
def test_gates_open_exactly_the_best_scores(data, heads, inputs):
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    config = config_of(hidden_size=16 * heads, num_attention_heads=heads)
    router = HeadRouter(config).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    pooled = torch.randn(inputs, 16 * heads, generator=generator)
    logit = torch.randn(inputs, generator=generator)
    gates, budget, scores = router(pooled, logit)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert gates.sum(-1).tolist() == count_open(budget, heads).tolist()
    lowest_open = scores.masked_fill(gates == 0, math.inf).min(-1).values
    highest_closed = scores.masked_fill(gates == 1, -math.inf).max(-1).values
    assert (lowest_open >= highest_closed).all()


@pytest.mark.parametrize("gate_type", ["hard", "soft"])
def test_an_infinite_logit_opens_all_heads(gate_type):
    router = router_of(gate_type=gate_type).eval()
    gates, budget, _ = router(torch.randn(3, 16), torch.full((3,), math.inf))
    assert gates.tolist() == [[1.0] * 4] * 3
    assert budget.tolist() == [1.0] * 3


def test_a_fresh_router_spends_what_is_asked_and_scores_near_zero():
    config = config_of()
    model = budgetformer("bert", stir=False)
    router = model.bert.encoder.layer[0].router
    asked = torch.tensor([0.1, 0.4, 0.9])
    _, budget, _ = router(torch.randn(3, 16), torch.logit(asked))
    torch.testing.assert_close(budget, asked)
    own = model.bert.own_budget
    assert torch.sigmoid(own()).item() == pytest.approx(config.target_head_budget)


def test_soft_gates_weigh_all_heads_in_training_and_choose_the_ceiling_at_inference():
    router = router_of(gate_type="soft")
    pooled, logit = torch.randn(6, 16), torch.zeros(6)
    gates, budget, _ = router(pooled, logit, temperature=2.3, noise=1.5)
    assert ((gates > 0) & (gates <= 1)).all()
    assert not ((gates == 0) | (gates == 1)).all()
    chosen, budget, _ = router.eval()(pooled, logit)
    assert chosen.sum(-1).tolist() == torch.ceil(budget * 4 - 1e-4).clamp(min=1).tolist()


# The straight-through gradient, checked rather than believed


def surrogate_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    budget = (torch.rand(5, generator=generator, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ranks = rank_heads(scores.detach())
    threshold = score_threshold(scores, count_open(budget.detach(), 4))
    return budget, scores, ranks, threshold


@pytest.mark.parametrize("seed", range(5))
def test_surrogate_gradients_equal_finite_differences(seed):
    budget, scores, ranks, threshold = surrogate_inputs(seed)
    assert torch.autograd.gradcheck(lambda s, z: gate_surrogate(s, z, ranks, threshold, 0.7), (budget, scores))


@pytest.mark.parametrize("seed", range(3))
def test_hard_gates_take_the_surrogates_gradient(seed):
    router = router_of(score_noise=0.0).double()
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    logit = torch.randn(5, generator=generator, dtype=torch.float64)
    direction = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    torch.manual_seed(seed)
    gates, budget, scores = router(pooled, logit, temperature=0.7, noise=0.0)
    assert set(gates.detach().unique().tolist()) <= {0.0, 1.0}
    got = torch.autograd.grad((gates * direction).sum(), [budget, scores], retain_graph=True)

    count = gates.detach().sum(-1).long()
    smooth = gate_surrogate(budget, scores, rank_heads(scores.detach()), score_threshold(scores, count), 0.7)
    expected = torch.autograd.grad((smooth * direction).sum(), [budget, scores])
    torch.testing.assert_close(got, expected)
    assert all(gradient.abs().max() > 0 for gradient in got)


# One learning rate for all


@pytest.mark.parametrize("multiplier", [1.0, 40.0])
def test_one_adam_step_moves_the_router_multiplier_times_further(multiplier):
    config = config_of(router_lr_multiplier=multiplier)
    router, plain = GateLinear(16, 4, config), torch.nn.Linear(16, 4)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(router, name).copy_(getattr(plain, name) / multiplier)
    inputs, before = torch.randn(8, 16), plain.weight.detach().clone()
    torch.testing.assert_close(router(inputs), plain(inputs))
    for layer in (router, plain):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0)
        layer(inputs).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(router.weight.grad, plain.weight.grad)  # clipping by norm sees an ordinary gradient
    moved, reference = router.weight.detach() * multiplier - before, plain.weight.detach() - before
    torch.testing.assert_close(moved, reference * multiplier, rtol=1e-3, atol=1e-6)


def test_weight_decay_does_not_touch_the_own_budget(tmp_path):
    model = budgetformer("bert")
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1))
    decayed = trainer.get_decay_parameter_names(model)
    assert "bert.own_budget.bias" not in decayed
    assert "bert.encoder.layer.0.router.scorer.weight" in decayed


def test_the_own_budget_keeps_a_finite_logit_at_its_extremes():
    own = OwnBudget(config_of(target_head_budget=1.0, budget_max=1.0))
    assert math.isfinite(own.initial)


# Exploration


def test_exploration_anneals_from_start_to_end_and_stays_there():
    schedule = ExplorationSchedule(config_of(exploration_steps=10))
    seen = []
    for steps in (0, 5, 10, 15):
        schedule.steps.fill_(steps)
        seen.append([value.item() for value in schedule()])
    assert seen[0] == pytest.approx([2.3, 1.5])
    assert seen[1] == pytest.approx([math.sqrt(2.3 * 0.3), 0.75])
    assert seen[2] == seen[3] == pytest.approx([0.3, 0.0])


def test_no_exploration_steps_means_exploitation_from_the_start():
    temperature, noise = ExplorationSchedule(config_of(exploration_steps=0))()
    assert (temperature.item(), noise.item()) == pytest.approx((0.3, 0.0))


def test_pooling_ignores_padding_and_passes_no_gradient():
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    pooled = pool_tokens(hidden, mask)
    expected = torch.nn.functional.layer_norm(torch.stack([hidden[0, :3].mean(0), hidden[1, 1:].mean(0)]), (16,))
    torch.testing.assert_close(pooled, expected.detach())
    assert not pooled.requires_grad


# Terms of the loss


def test_budget_terms():
    assert budget_hinge(torch.tensor(0.5), 0.1, 0.9).item() == 0.0
    assert budget_hinge(torch.tensor(0.05), 0.1, 0.9).item() == pytest.approx(0.05)
    assert budget_hinge(torch.tensor(1.0), 0.1, 0.9).item() == pytest.approx(0.1)
    assert budget_distance(torch.tensor(0.5), torch.tensor(0.2)).item() == pytest.approx(0.09)


def test_entropy_is_one_for_uniform_and_zero_for_certain_relevance():
    assert score_entropy(torch.zeros(3, 7)).item() == pytest.approx(1.0)
    assert score_entropy(torch.tensor([[0.0, 100.0, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)
    assert score_entropy(torch.zeros(3, 1)).item() == 0.0


def test_an_attached_loss_is_trained_by_whatever_is_computed_from_the_tensor():
    weight, other = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    tensor = attach_loss(weight * torch.ones(4), other.square())
    assert tensor.tolist() == [2.0] * 4
    (5.0 * tensor.sum()).backward()
    assert (weight.grad.item(), other.grad.item()) == (20.0, 6.0)
