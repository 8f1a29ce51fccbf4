"""A baked model answers as the one it comes from does with the same heads open."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import STOCK, batch_of, budgetformer, stock_config
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.export import bake, count_open_heads


def batches(backbone_type):
    return [batch_of([9, 4, 6], backbone_type, seed=seed) for seed in range(4)]


def test_the_count_is_the_mean_of_the_gates(backbone_type):
    model = budgetformer(backbone_type).train()
    found = count_open_heads(model, batches(backbone_type), 0.5)
    assert model.training
    model.eval()
    gates = [model(**batch, head_budget=0.5, output_head_gates=True).head_gates for batch in batches(backbone_type)]
    torch.testing.assert_close(found, torch.cat(gates).mean(0))


@pytest.mark.parametrize("head_budget", [0.3, 0.6, 1.0, None])
def test_a_baked_model_keeps_what_is_opened_most_often(backbone_type, head_budget):
    model = budgetformer(backbone_type)
    opened = count_open_heads(model, batches(backbone_type), head_budget)
    baked = bake(model, batches(backbone_type), head_budget)
    heads = baked.config.static_heads
    assert abs(sum(map(len, heads)) - opened.sum().item()) <= 1.0
    for shares, kept in zip(opened, heads, strict=True):
        closed = [share for head, share in enumerate(shares.tolist()) if head not in kept]
        assert min(shares[kept].tolist()) >= max(closed, default=0.0)


def test_a_baked_model_answers_as_the_dynamic_one_with_these_gates_forced(backbone_type, tmp_path):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    bake(model, batches(backbone_type), 0.5).save_pretrained(tmp_path)
    baked = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for layer, kept in zip(model.base_model.encoder.layer, baked.config.static_heads, strict=True):
        forced = torch.zeros(4).index_fill(0, torch.tensor(kept), 1.0)
        layer.router._choose = lambda count, scores, forced=forced: forced.expand_as(scores)
    with torch.no_grad():
        expected = model(**batch, executor="masked").logits
        torch.testing.assert_close(baked(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_baked_model_compiles_into_one_graph():
    baked, batch = bake(budgetformer("bert"), batches("bert"), 0.5), batch_of([9, 4, 6])
    with torch.no_grad():
        compiled = torch.compile(baked, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch).logits, baked(**batch).logits, rtol=1e-5, atol=1e-5)


def test_what_has_no_routers_cannot_be_baked():
    with pytest.raises(ValueError, match="with routers, got BertForSequenceClassification"):
        bake(STOCK["bert"][2](stock_config("bert")), batches("bert"))
    with pytest.raises(ValueError, match="with routers"):
        bake(prune(budgetformer("bert"), [[0], [1], [2]]), batches("bert"))
    with pytest.raises(ValueError, match="at least one batch"):
        bake(budgetformer("bert"), [])
