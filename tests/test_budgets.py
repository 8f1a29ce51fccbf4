"""Deciding: what a budget opens, what that costs, in which looks it is spent, and which answers are doubted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import budgetformer, equal_shares, stock_config
from hf_budgetformer import BudgetFormerConfig
from hf_budgetformer.budgets import FULL_LOOK, OpeningOrder, confidence, plan_budget, plan_looks


MARGINS = {"budget": 0.25, "quantiles": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}


def config_of(**fields):
    return BudgetFormerConfig.from_backbone_config(stock_config("bert"), **fields)


@pytest.mark.parametrize(("heads", "blocks"), [(12, None), (12, 48), (16, 20), (3, 64)])
def test_by_default_heads_open_at_three_times_the_pace_of_neurons_in_all_layers_alike(heads, blocks):
    size = {"hidden_size": 48 * heads, "num_attention_heads": heads, "intermediate_size": 192 * heads}
    config = BudgetFormerConfig.from_backbone_config(
        stock_config("bert", num_hidden_layers=6, **size), feed_forward_blocks=blocks
    )
    order, blocks = OpeningOrder(config), blocks or heads
    assert order.looks[-1].counts == ((heads,) * 6, (192 * heads,) * 6)
    assert all(lower < higher for lower, higher in zip(order.costs, order.costs[1:], strict=False))
    for look in order.looks:
        opened = [round(neurons * blocks / (192 * heads)) for neurons in look.counts.neurons]
        assert max(look.counts.heads) - min(look.counts.heads) <= 1
        assert max(opened) - min(opened) <= 1
        open_heads, open_neurons = sum(look.counts.heads) / (6 * heads), sum(opened) / (6 * blocks)
        if open_heads < 1.0:
            assert open_heads == pytest.approx(3 * open_neurons, abs=1 / heads + 3 / blocks)
        else:
            assert open_neurons >= 1 / 3 - 1 / blocks


def test_equal_shares_open_at_the_same_pace():
    order = OpeningOrder(config_of(opening_order=equal_shares()))
    for share in (0.25, 0.5, 0.75, 1.0):
        look = order.look(share)
        assert look.counts.heads == (round(4 * share),) * 3
        assert look.counts.neurons == (round(24 * share),) * 3
        assert look.cost == pytest.approx(share)


@pytest.mark.parametrize(
    "fields", [{}, {"feed_forward_blocks": 5}, {"opening_order": [5, 4, 5, 4, 3, 2, 1, 0, 0, 0, 0]}]
)
def test_counts_only_grow_and_never_cost_more_than_asked(fields):
    order = OpeningOrder(config_of(**fields))
    before = order.look(1e-9)
    assert before.cost == 0.0
    for budget in torch.linspace(0.01, 1.0, 100).tolist():
        look = order.look(budget)
        assert look.cost <= budget + 1e-6
        assert all(a >= b for a, b in zip(sum(look.counts, ()), sum(before.counts, ()), strict=True))
        before = look
    asked_next = next(cost for cost in order.costs if cost > 0.3)
    assert order.look(0.3).cost < asked_next  # one unit more would have been too much


def test_an_order_of_ones_own_can_close_layers_whole():
    order = OpeningOrder(config_of(opening_order=[4, 4, 5, 5, 4, 4, 5, 5]))
    assert order.look(1.0).counts.heads == (0, 0, 4)
    assert order.look(1.0).counts.neurons == (0, 0, 24)


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_flops_are_what_the_counter_of_torch_counts(backbone_type, budget, training):
    """Contract 5: of the layers, for inputs of the reference length; forward and backward."""
    model = budgetformer(backbone_type, narrow_budget=0.75, reference_length=12)
    hidden = torch.randn(6, 12, 16, requires_grad=True)
    ones = torch.ones(6, 12, dtype=torch.long)
    embedded = model.embed({"inputs_embeds": hidden, "attention_mask": ones}, executor="masked")

    def run(look):
        with FlopCounterMode(display=False) as counter:
            if look is None:
                output = model.encode_full(embedded)
            else:
                output = model.narrow(embedded.hidden, embedded.batch, look.counts)
            if training:
                output.sum().backward(retain_graph=True)
        return counter.get_total_flops()

    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the products of other kernels are not all counted
        full = run(None)
        look = None if budget == 1.0 else model.narrow.order.look(budget)
        share = 1.0 if look is None else look.cost
        assert run(look) / full == pytest.approx(share, rel=0.01)
    if not training:
        assert full == pytest.approx(6 * 12 * model.narrow.order.total_flops, rel=0.01)


def test_a_budget_becomes_looks():
    config = config_of(margins=MARGINS, opening_order=equal_shares())
    order = OpeningOrder(config)
    assert plan_budget(config, order, 1.0).looks == (FULL_LOOK,)
    assert plan_budget(config, order, 0.25).looks == (order.look(0.25),)
    assert plan_budget(config, order, 0.1).looks == (order.look(0.1),)
    plan = plan_budget(config, order, 0.55)  # a quarter for all, the full encoder for three tenths
    assert plan.looks == (order.look(0.25), FULL_LOOK)
    assert plan.thresholds == pytest.approx((0.3,))
    thresholds = [plan_budget(config, order, b).thresholds[0] for b in (0.3, 0.5, 0.7, 0.9, 0.999)]
    assert thresholds == sorted(thresholds)


def test_plain_calls_take_the_looks_of_the_configuration():
    config = config_of(looks=[0.1, 0.25, 1.0], confidence=[0.5, 0.9])
    order = OpeningOrder(config)
    plan = plan_looks(config, order)
    assert plan.looks == (order.look(0.1), order.look(0.25), FULL_LOOK)
    assert plan.thresholds == (0.5, 0.9)
    default = plan_looks(config_of(), order)
    assert default.looks == (order.look(1 / 12), FULL_LOOK)
    assert default.thresholds == (0.8,)


def test_what_cannot_be_spent_in_the_mean_is_an_error_that_says_what_to_call():
    config = config_of()
    with pytest.raises(ValueError, match=r"budget=0.4.*calibrate_margins\(model, batches\).*BudgetCallback"):
        plan_budget(config, OpeningOrder(config), 0.4)
    regression = config_of(num_labels=1)
    with pytest.raises(ValueError, match=r"cannot be doubted, got 0\.4"):
        plan_budget(regression, OpeningOrder(regression), 0.4)


def test_confidence_is_the_margin_of_the_two_best_or_the_least_of_all_labels():
    logits = torch.tensor([[2.0, 1.0, -3.0], [0.0, 0.0, 0.0], [9.0, -9.0, -9.0]])
    first, second = logits.softmax(-1).sort(-1, descending=True).values[:, :2].unbind(-1)
    torch.testing.assert_close(confidence(logits, None), first - second)
    expected = (2 * logits.sigmoid() - 1).abs().min(-1).values
    torch.testing.assert_close(confidence(logits, "multi_label_classification"), expected)
    assert confidence(logits.bfloat16(), None).dtype == torch.float32
