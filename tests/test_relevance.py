"""The paper's routers: budgets, scores and gates, the gradient of the gates, and closed heads that are not computed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from conftest import LONGEST, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetFormerConfig
from hf_budgetformer.losses import (
    attach_loss,
    budget_distance,
    budget_hinge,
    need_loss,
    score_entropy,
    task_cost,
    teacher_divergence,
)
from hf_budgetformer.packing import PaddedBatch, find_packing
from hf_budgetformer.relevance import (
    ExplorationSchedule,
    GatedSelfAttention,
    GateLinear,
    HeadRouter,
    OwnBudget,
    attend_gated,
    attend_open_heads,
    budget_to_logit,
    count_open,
    count_open_ceil,
    gate_surrogate,
    gathering_pays,
    least_budget,
    places_by_score,
    pool_tokens,
    score_threshold,
)


def config_of(**fields):
    return BudgetFormerConfig.from_backbone_config(stock_config("bert"), router="layer", **fields)


def router_of(**fields):
    """A router in training mode whose weights are far from their start."""
    router = HeadRouter(config_of(**fields))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return router


def counts_of(budgets, heads, carry=0.5):
    """Open heads of each layer of one input whose layers have these budgets."""
    carry, counts = torch.tensor([carry]), []
    for budget in budgets:
        count, carry = count_open(torch.tensor([budget]), carry, heads)
        assert count.dtype == torch.int64
        assert 0.0 <= carry.item() <= 1.0
        counts.append(count.item())
    return counts


@given(budgets=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), heads=st.integers(1, 16))
def test_open_heads_are_at_least_one_and_at_most_all(budgets, heads):
    assert all(1 <= count <= heads for count in counts_of(budgets, heads))
    assert all(1 <= count_open_ceil(torch.tensor([budget]), heads).item() <= heads for budget in budgets)


@given(data=st.data(), heads=st.integers(2, 16), carry=st.floats(0.0, 0.99))
def test_the_heads_of_all_layers_are_what_their_budgets_say_together(data, heads, carry):
    budgets = data.draw(st.lists(st.floats(1.0 / heads, 1.0), min_size=1, max_size=12))
    total, opened = sum(budgets) * heads, counts_of(budgets, heads, carry)
    assert abs(sum(opened) - total - carry + 0.5) <= 0.5 + 2e-3
    assert all(abs(count - budget * heads) < 1.0 + 2e-3 for count, budget in zip(opened, budgets, strict=True))


def test_all_heads_stay_open_however_many_layers_there_are():
    assert counts_of([1.0] * 100, 12) == [12] * 100
    assert counts_of([1.0] * 100, 12, carry=0.0) == [12] * 100


@given(one=st.floats(1e-6, 1.0), other=st.floats(1e-6, 1.0), heads=st.integers(1, 16))
def test_open_heads_grow_with_the_budget(one, other, heads):
    [low], [high] = counts_of([min(one, other)], heads), counts_of([max(one, other)], heads)
    assert low <= high


@pytest.mark.parametrize(("heads", "opened"), [(4, 3), (12, 8), (8, 5)])
def test_a_budget_between_two_counts_is_rounded_half_up_in_the_first_layer_and_down_in_the_next(heads, opened):
    half = (opened - 0.5) / heads
    assert counts_of([half, half, half, half], heads) == [opened, opened - 1, opened, opened - 1]
    assert count_open_ceil(torch.tensor([half]), heads).item() == opened
    assert count_open_ceil(torch.tensor([opened / heads]), heads).item() == opened  # not one more through rounding


def test_a_random_first_carry_opens_the_marginal_head_as_often_as_its_share_says():
    carry, budget = torch.rand(20_000), torch.full((20_000,), 2.3 / 4)
    for _ in range(3):
        counts, carry = count_open(budget, carry, 4)
        assert set(counts.tolist()) == {2, 3}
        assert counts.float().mean().item() == pytest.approx(2.3, abs=0.02)


def test_what_is_asked_lies_between_one_head_and_all():
    least = least_budget(config_of())
    assert least == 1 / 4
    logits = budget_to_logit(torch.tensor([0.1, 0.25, 0.625, 1.0]), least)
    assert logits.tolist() == pytest.approx([-math.inf, -math.inf, 0.0, math.inf])
    assert least_budget(config_of(gate_type="soft")) == 0.0
    assert least_budget(config_of(num_attention_heads=1)) == 0.0


def test_ranks_break_ties_by_the_lower_index():
    assert places_by_score(torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [
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
    logit, carry = torch.randn(inputs, generator=generator), torch.rand(inputs, generator=generator)
    gates, budget, scores, _, carried = router(pooled, logit, carry)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert [gates.sum(-1).tolist(), carried.tolist()] == [x.tolist() for x in count_open(budget, carry, heads)]
    lowest_open = scores.masked_fill(gates == 0, math.inf).min(-1).values
    highest_closed = scores.masked_fill(gates == 1, -math.inf).max(-1).values
    assert (lowest_open >= highest_closed).all()


@pytest.mark.parametrize("gate_type", ["hard", "soft"])
def test_an_infinite_logit_opens_all_heads(gate_type):
    router = router_of(gate_type=gate_type).eval()
    gates, budget, *_ = router(torch.randn(3, 16), torch.full((3,), math.inf), torch.rand(3))
    assert gates.tolist() == [[1.0] * 4] * 3
    assert budget.tolist() == [1.0] * 3


def test_a_fresh_router_spends_what_is_asked_and_scores_near_zero():
    config = config_of(need_scale=0.0)
    router = HeadRouter(config)
    initialise = budgetformer("bert", router="layer").base_model.encoder._init_weights
    own_budget = OwnBudget(config)
    for module in [*router.modules(), own_budget]:
        initialise(module)
    budgets = torch.tensor([0.3, 0.4, 0.9])
    budget = router(torch.randn(3, 16), budget_to_logit(budgets, 1 / 4), torch.rand(3)).budget
    torch.testing.assert_close(budget, budgets)
    torch.testing.assert_close(own_budget(), budget_to_logit(torch.tensor([config.target_budget]), 1 / 4))


def test_inputs_that_need_more_are_given_more_and_none_can_run_away():
    router = router_of(need_scale=2.0).eval()
    torch.nn.init.zeros_(router.controller.output.weight)
    with torch.no_grad():
        router.controller.need.weight.mul_(50.0)
    routing = router(torch.randn(64, 16), torch.zeros(64), torch.rand(64))
    order = routing.need.argsort()
    assert (routing.budget[order].diff() >= 0).all()
    assert routing.need.abs().max() > 2.0
    least, most = (1 / 4 + 3 / 4 * torch.sigmoid(torch.tensor(x)).item() for x in (-4.0, 4.0))
    assert routing.budget.min().item() == pytest.approx(least)
    assert routing.budget.max().item() == pytest.approx(most)


def test_what_an_input_needs_is_learned_from_its_cost_alone():
    """The gradient of the gates moves the deviation, not the estimate of the need."""
    router = router_of()
    routing = router(torch.randn(5, 16), torch.zeros(5), torch.rand(5))
    need = router.controller.need
    assert torch.autograd.grad(routing.gates.sum(), need.weight, retain_graph=True, allow_unused=True) == (None,)
    [gradient] = torch.autograd.grad(need_loss(routing.need[:, None], torch.rand(5)), need.weight)
    assert gradient.abs().max() > 0


def test_soft_gates_weigh_all_heads_in_training_and_choose_the_ceiling_at_inference():
    router = router_of(gate_type="soft")
    pooled, logit = torch.randn(6, 16), torch.zeros(6)
    gates = router(pooled, logit, torch.rand(6), temperature=2.3, noise=1.5).gates
    assert ((gates > 0) & (gates <= 1)).all()
    assert not ((gates == 0) | (gates == 1)).all()
    chosen, budget, *_ = router.eval()(pooled, logit, torch.rand(6))
    assert chosen.sum(-1).tolist() == torch.ceil(budget * 4 - 1e-4).clamp(min=1).tolist()


# The straight-through gradient, checked rather than believed


def surrogate_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    budget = (torch.rand(5, generator=generator, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ranks = places_by_score(scores.detach())
    threshold = score_threshold(scores, count_open(budget.detach(), torch.full_like(budget, 0.5), 4)[0])
    return budget, scores, ranks, threshold


@pytest.mark.parametrize("seed", range(5))
def test_surrogate_gradients_equal_finite_differences(seed):
    budget, scores, ranks, threshold = surrogate_inputs(seed)
    assert torch.autograd.gradcheck(lambda s, z: gate_surrogate(s, z, ranks, threshold, 0.7), (budget, scores))


@pytest.mark.parametrize("seed", range(3))
def test_hard_gates_take_the_surrogates_gradient(seed):
    router = router_of().double()
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    logit = torch.randn(5, generator=generator, dtype=torch.float64)
    direction = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    torch.manual_seed(seed)
    gates, budget, scores, *_ = router(pooled, logit, torch.rand(5), temperature=0.7, noise=0.0)
    assert set(gates.detach().unique().tolist()) <= {0.0, 1.0}
    got = torch.autograd.grad((gates * direction).sum(), [budget, scores], retain_graph=True)

    count = gates.detach().sum(-1).long()
    smooth = gate_surrogate(budget, scores, places_by_score(scores.detach()), score_threshold(scores, count), 0.7)
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
    model = budgetformer("bert", router="layer")
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1))
    decayed = trainer.get_decay_parameter_names(model)
    assert "bert.encoder.own_budget.bias" not in decayed
    assert "bert.encoder.layer.0.router.scorer.weight" in decayed


def test_the_own_budget_keeps_a_finite_logit_at_its_extremes():
    own_budget = OwnBudget(config_of(target_budget=1.0))
    assert math.isfinite(own_budget.initial)


# Exploration


def test_exploration_anneals_from_start_to_end_and_stays_there():
    schedule = ExplorationSchedule(config_of(exploration_steps=10))
    seen = []
    for steps in (0, 5, 10, 15):
        schedule.steps.fill_(steps)
        seen.append([value.item() for value in schedule()])
    assert seen[0] == pytest.approx([2.3, 0.5])
    assert seen[1] == pytest.approx([math.sqrt(2.3 * 0.3), 0.25])
    assert seen[2] == seen[3] == pytest.approx([0.3, 0.0])


def test_no_exploration_steps_means_exploitation_from_the_start():
    temperature, noise = ExplorationSchedule(config_of(exploration_steps=0))()
    assert (temperature.item(), noise.item()) == pytest.approx((0.3, 0.0))


def test_pooling_ignores_padding_and_passes_no_gradient():
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    pooled = pool_tokens(hidden, PaddedBatch(mask))
    packing = find_packing(mask, (2, 5), hidden.device)
    packed = packing.unsort(pool_tokens(packing.pack(hidden), packing))
    torch.testing.assert_close(packed, pooled)
    expected = torch.nn.functional.layer_norm(torch.stack([hidden[0, :3].mean(0), hidden[1, 1:].mean(0)]), (16,))
    torch.testing.assert_close(pooled, expected.detach())
    assert not pooled.requires_grad


# Terms of the loss


def test_budget_terms():
    assert budget_hinge(torch.tensor(0.5)).item() == 0.0
    assert budget_hinge(torch.tensor(0.05)).item() == pytest.approx(0.05)
    assert budget_hinge(torch.tensor(1.0)).item() == pytest.approx(0.1)
    assert budget_distance(torch.tensor(0.4), torch.tensor(0.2)).item() == pytest.approx(math.log(2) ** 2)
    assert budget_distance(torch.tensor(0.1), torch.tensor(0.2)).item() == pytest.approx(math.log(2) ** 2)


def test_divergence_from_a_teacher_is_that_of_torch():
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3)
    distribution = torch.distributions
    expected = distribution.kl_divergence(
        distribution.Categorical(logits=teacher), distribution.Categorical(logits=logits)
    )
    torch.testing.assert_close(teacher_divergence(logits, teacher, "single_label_classification"), expected)
    several = distribution.kl_divergence(
        distribution.Bernoulli(logits=teacher), distribution.Bernoulli(logits=logits)
    ).sum(-1)
    divergence = teacher_divergence(logits, teacher, "multi_label_classification")
    torch.testing.assert_close(divergence, several, rtol=1e-4, atol=1e-6)
    squares = (logits - teacher).square().mean(-1)
    torch.testing.assert_close(teacher_divergence(logits, teacher, "regression"), squares)
    assert teacher_divergence(teacher, teacher, "").abs().max() == 0.0


def test_the_cost_of_each_input_is_its_share_of_the_task_loss():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, -100, 1])
    cost = task_cost(logits, labels, "")
    assert cost[3] == 0.0
    torch.testing.assert_close(cost.sum() / 4, torch.nn.functional.cross_entropy(logits, labels))
    several = torch.randint(0, 2, (5, 3))
    mean = torch.nn.functional.binary_cross_entropy_with_logits(logits, several.float())
    torch.testing.assert_close(task_cost(logits, several, "multi_label_classification").mean() / 3, mean)
    torch.testing.assert_close(task_cost(logits[:, :1], torch.zeros(5), "regression"), logits[:, 0].square())


def test_need_is_compared_within_the_batch():
    cost = torch.tensor([0.01, 0.1, 1.0])
    target = (cost + 1e-3).log()
    target = (target - target.mean()) / target.std()
    assert need_loss(target[:, None].expand(3, 4), cost).item() == pytest.approx(0.0, abs=1e-9)
    assert need_loss(target[:, None], cost * 2).item() == pytest.approx(0.0, abs=1e-4)  # its scale is nothing
    assert need_loss(torch.zeros(1, 4), torch.tensor([3.0])).item() == 0.0  # one input: nothing to compare
    assert need_loss(torch.zeros(3, 4), torch.full((3,), 0.5)).item() == 0.0


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


# Heads that are closed


HEADS = 6


@pytest.fixture(scope="module")
def layer():
    """Self-attention and output projection of 6 heads of 4, in eval mode."""
    torch.manual_seed(0)
    config = BudgetFormerConfig(hidden_size=24, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    return GatedSelfAttention(config).eval(), torch.nn.Linear(24, 24)


def random_gates(rows, generator, heads=HEADS):
    counts = torch.randint(1, heads + 1, (rows, 1), generator=generator)
    return (torch.rand(rows, heads, generator=generator).argsort(-1) < counts).float()


@torch.no_grad()
def test_open_heads_alone_give_what_all_heads_and_gates_give(layer):
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        rows, length = 1 + case % 7, 1 + case % 11
        mask = (torch.rand(rows, length, generator=generator) < 0.7).long()
        mask[:, -1] = 1
        gates = random_gates(rows, generator)
        if case % 3 == 0:  # some inputs agree
            gates = gates[torch.randint(rows, (rows,), generator=generator)]
        packing = find_packing(mask, (rows, length), mask.device)
        hidden = packing.pack(torch.randn(rows, length, 24, generator=generator))
        expected = attend_gated(*layer, hidden, packing, packing.sort(gates))
        got = attend_open_heads(*layer, hidden, packing, packing.sort(gates))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_closed_heads_cost_nothing(layer):
    """Work falls with the sum over inputs of open heads times tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [16, 12, 12, 5, 1]
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    packing, hidden = find_packing(mask, (5, 16), mask.device), torch.randn(sum(lengths), 24)
    for _ in range(10):
        gates = random_gates(5, generator)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attend_open_heads(*layer, hidden, packing, gates)
        pairs = sum(k * n for k, n in zip(gates.sum(-1).tolist(), lengths, strict=True))
        squares = sum(k * n * n for k, n in zip(gates.sum(-1).tolist(), lengths, strict=True))
        assert counter.get_total_flops() == pytest.approx(2 * 4 * 4 * 24 * pairs + 4 * 4 * squares, rel=1e-6)


def test_weights_are_gathered_only_where_that_pays():
    long, short = (find_packing(None, (4, length), torch.device("cpu")) for length in (512, 8))
    agree, differ = torch.eye(12)[:1].expand(4, 12), torch.rand(4, 12).lt(0.5).float()
    assert gathering_pays(agree, long)
    assert not gathering_pays(torch.ones(4, 12), long)
    assert not gathering_pays(differ, short)


@pytest.mark.parametrize("gate_type", ["hard", "soft"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("budget", [None, 0.25, 0.5, 1.0, "own"])
@torch.no_grad()
def test_the_packed_model_equals_the_masked_one(backbone_type, side, budget, gate_type):
    model = budgetformer(backbone_type, router="layer", gate_type=gate_type)
    batch = batch_of([9, LONGEST, 12, 1, 9], backbone_type, side)
    budget = torch.tensor([0.3, 0.9, 1.0, 0.25, 0.6]) if budget == "own" else budget
    inputs = {**batch, "budget": budget, "output_head_gates": True}
    expected, got = model(**inputs, executor="masked"), model(**inputs)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.head_gates, expected.head_gates)
    torch.testing.assert_close(got.budget, got.head_gates.mean((1, 2)))


def test_all_heads_open_is_the_stock_model(backbone_type):
    model = budgetformer(backbone_type, router="layer")
    plain = budgetformer(backbone_type)
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = batch_of([7, 12, 1, 4], backbone_type)
    expected = plain(**batch, budget=1.0, executor="masked").logits
    assert torch.equal(model(**batch, budget=1.0, executor="masked").logits, expected)


def test_gradients_of_a_packed_training_step_equal_the_padded_ones(backbone_type):
    original, batch = budgetformer(backbone_type, router="layer"), batch_of([9, 4, 12, 1, 9], backbone_type)
    gradients = {}
    for executor in ("masked", "auto"):
        original.zero_grad()
        original.train()
        torch.manual_seed(5)
        original(**batch, labels=torch.tensor([0, 1, 2, 0, 1]), budget=1.0, executor=executor).loss.backward()
        gradients[executor] = {name: parameter.grad.clone() for name, parameter in original.named_parameters()}
    for name, gradient in gradients["masked"].items():
        torch.testing.assert_close(gradients["auto"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_every_parameter_gets_a_gradient_whether_a_budget_was_requested_or_not(backbone_type):
    """Distributed training waits for each."""
    for budget in (None, 0.5, 1.0):
        model = budgetformer(backbone_type, router="layer").train()
        batch = batch_of([7, 12, 1, 4], backbone_type)
        model(**batch, labels=torch.tensor([0, 1, 2, 0]), budget=budget).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("outside", [False, True])
def test_the_routers_terms_are_trained_once_whoever_computes_the_loss(backbone_type, outside):
    model = budgetformer(backbone_type, router="layer", need_scale=0.0).train()
    batch, labels = batch_of([7, 12, 1, 4], backbone_type), torch.tensor([0, 1, 2, 0])
    gradients = []
    for reference in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(**batch, labels=labels)
        if reference or not outside:
            outputs.loss.backward()
        else:
            torch.nn.functional.cross_entropy(outputs.logits, labels).backward()
        gradients.append(model.base_model.encoder.own_budget.bias.grad.clone())
    assert gradients[0].abs() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_plain_call_asks_for_what_the_configuration_says(backbone_type):
    model, batch = budgetformer(backbone_type, router="layer"), batch_of([7, 12, 1, 4], backbone_type)
    outputs = model(**batch, budget=0.5)
    model.config.looks = [0.5]
    assert torch.equal(model(**batch).logits, outputs.logits)
    assert model(**batch).head_gates is None
