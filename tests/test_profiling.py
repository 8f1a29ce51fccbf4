"""The analytic count against torch's own counter, on the whole model; the measured ceiling; and the cost card."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import STOCK, batch_of, budgetformer, stock_classifier, stock_config
from hf_budgetformer import BudgetFormerModel, modeling_budgetformer
from hf_budgetformer.tools import profiling
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.data import batches_by_length
from hf_budgetformer.tools.profiling import (
    PARTS,
    CostCard,
    cost_card,
    inputs_to_break_even,
    profile,
    speed_ceiling,
    stock_model,
)


def counted(run):
    """FLOPs by torch's counter, which sees the attention core only where it is made of plain products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def batches(backbone_type):
    holes = batch_of([12, 7, 7, 3], backbone_type)
    holes["attention_mask"][0, 3:6] = 0
    holes["attention_mask"][1, 0] = 0
    return {
        "mixed": batch_of([31, 20, 20, 9, 2, 1], backbone_type),
        "left": batch_of([14, 9, 3], backbone_type, side="left"),
        "holes": holes,
        "equal": batch_of([16, 16, 16], backbone_type),
        "single": batch_of([11], backbone_type),
    }


@pytest.mark.parametrize("kind", ["mixed", "left", "holes", "equal", "single"])
@pytest.mark.parametrize("head_budget", [None, 0.25, 0.6, 1.0])
def test_the_count_is_what_torch_counts_on_the_sparse_path(backbone_type, head_budget, kind):
    """Contract 4: closed heads and padding cost nothing in the whole model."""
    model, batch = budgetformer(backbone_type), batches(backbone_type)[kind]
    found = profile(model, batch, head_budget)
    truth = counted(lambda: model(**batch, head_budget=head_budget, executor="sparse"))
    assert sum(found.sparse.values()) == pytest.approx(truth, rel=0.01)
    with torch.no_grad():
        spent = model(**batch, head_budget=head_budget).head_budget.mean().item()
    assert found.head_share == pytest.approx(spent)


def test_random_routers_choose_differently_and_are_counted_right(backbone_type):
    batch = batches(backbone_type)["mixed"]
    shares = set()
    for seed in range(8):
        model = budgetformer(backbone_type, stir=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".router." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        found = profile(model, batch)
        assert sum(found.sparse.values()) == pytest.approx(counted(lambda: model(**batch, executor="sparse")), rel=0.01)  # noqa: B023
        shares.add(found.head_share)
    assert len(shares) > 4


def test_the_backbone_is_counted_on_the_padded_batch(backbone_type):
    stock = STOCK[backbone_type][2](stock_config(backbone_type)).eval()
    for batch in batches(backbone_type).values():
        found = profile(budgetformer(backbone_type), batch)
        assert sum(found.backbone.values()) == counted(lambda: stock(**batch))  # noqa: B023


def test_an_encoder_alone_is_counted_with_and_without_pooler():
    batch = batch_of([9, 4])
    for add_pooling_layer in (True, False):
        model = BudgetFormerModel(budgetformer("bert").config, add_pooling_layer).eval()
        found = profile(model, batch, 0.5)
        assert found.sparse["head"] == 2 * 2 * 16 * 16 * add_pooling_layer
        truth = counted(lambda: model(**batch, head_budget=0.5, executor="sparse"))  # noqa: B023
        assert sum(found.sparse.values()) == pytest.approx(truth, rel=0.01)


def test_all_heads_of_an_unpadded_batch_cost_what_the_backbone_costs_and_the_routers():
    found = profile(budgetformer("bert"), batch_of([8, 8]), 1.0)
    assert {**found.sparse, "router": 0} == found.backbone
    assert (found.head_share, found.token_share) == (1.0, 1.0)


def test_a_profile_prints_as_a_table_and_becomes_json():
    found = profile(budgetformer("bert"), {**batch_of([8, 4]), "labels": torch.tensor([0, 1])}, 0.5)
    text = str(found)
    assert all(part in text for part in (*PARTS, "total"))
    assert "tokens kept 75.0%" in text
    assert found.to_dict()["ratio"] == pytest.approx(sum(found.sparse.values()) / sum(found.backbone.values()))


def test_the_ceiling_is_measured_and_attention_comes_back(monkeypatch):
    model, batch = budgetformer("bert"), batch_of([9, 4, 9])
    before, original = model(**batch).logits, modeling_budgetformer.gated_attention
    found = speed_ceiling(model, batch, repeats=3)
    assert found.all_heads > 0
    assert found.ratio == found.all_heads / found.unavoidable
    assert modeling_budgetformer.gated_attention is original
    assert torch.equal(model(**batch).logits, before)

    def fail_without_attention(*arguments, **named):
        if modeling_budgetformer.gated_attention is not original:
            raise RuntimeError("stopped")
        return forward(*arguments, **named)

    encoder = model.base_model.encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", fail_without_attention)
    with pytest.raises(RuntimeError, match="stopped"):
        speed_ceiling(model, batch, repeats=1)
    assert modeling_budgetformer.gated_attention is original


def test_bad_arguments_are_named():
    model, batch = budgetformer("bert"), batch_of([4, 2])
    with pytest.raises(ValueError, match=r"model must be a BudgetFormer model, got BertModel"):
        profile(STOCK["bert"][1](stock_config("bert")), batch)
    with pytest.raises(ValueError, match=r"model must be in eval mode"):
        profile(budgetformer("bert").train(), batch)
    with pytest.raises(ValueError, match=r"batch must be a mapping"):
        profile(model, batch["input_ids"])
    with pytest.raises(ValueError, match=r"batch must hold input_ids"):
        profile(model, {"attention_mask": batch["attention_mask"]})
    with pytest.raises(ValueError, match=r"head_budget must be a share"):
        profile(model, batch, 2)
    with pytest.raises(ValueError, match=r"repeats must be an integer >= 1, got 0"):
        speed_ceiling(model, batch, repeats=0)
    eager = budgetformer("bert")
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"model must use the sdpa attention, got 'eager'"):
        speed_ceiling(eager, batch)


def test_a_model_without_routers_has_a_ceiling_too():
    assert speed_ceiling(prune(budgetformer("bert"), [[0], [1, 2], [3]]), batch_of([9, 4]), repeats=1).ratio > 0


def test_the_stock_model_answers_as_the_model_does_whose_weights_it_has(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    stock = stock_model(model)
    assert type(stock) is STOCK[backbone_type][2]
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, model(**batch, head_budget=1.0, executor="masked").logits)
        static = prune(model, [[0, 3], [2], [0, 1, 2]])
        whole = stock_model(static)
        torch.testing.assert_close(whole(**batch).logits, static(**batch).logits, rtol=1e-5, atol=1e-5)
    assert whole.num_parameters() == stock.num_parameters() > static.num_parameters()


def test_a_cost_card_counts_what_profile_counts(texts, tokenizer):
    model = budgetformer("bert").train()
    card = cost_card(model, texts, tokenizer, (1.0, 0.5, None), batch_size=4, rows=10, repeats=1, training_seconds=60.0)
    assert model.training
    model.eval()
    chosen = texts[np.linspace(0, len(texts) - 1, 10).astype(int).tolist()]
    found = [batch for _, batch in batches_by_length(chosen, tokenizer, 4)]
    assert [x.asked for x in card.results] == [1.0, 0.5, None]
    for x in card.results:
        profiles = [profile(model, batch, x.asked) for batch in found]
        assert x.flops == {part: sum(y.sparse[part] for y in profiles) / 10 for part in PARTS}
        assert x.break_even == inputs_to_break_even(60.0, card.stock.throughput, x.throughput)
        assert 0 < x.latency_p50 <= x.latency_p95
        assert x.energy is x.co2e is None
    assert card.stock.flops == {part: sum(y.backbone[part] for y in profiles) / 10 for part in PARTS}
    assert card.stock.heads == card.results[0].heads == 1.0 > card.results[1].heads
    assert (
        card.parameters == model.num_parameters() > card.stock_parameters == stock_classifier("bert").num_parameters()
    )
    assert card.settings["tokens"]["real"] == sum(int(batch["attention_mask"].sum()) for batch in found)
    assert CostCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_a_cost_card_prints_as_tables(texts, tokenizer):
    card = cost_card(budgetformer("bert"), texts, tokenizer, (0.5, None), rows=3, repeats=1)
    lines = str(card).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["budget", "stock", "0.500", "own"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "pays after" not in lines[0]
    assert f"{card.parameters:,} parameters" in str(card)
    assert f"torch {torch.__version__}" in str(card)


def test_a_static_model_has_one_row_on_the_card(texts, tokenizer):
    card = cost_card(prune(budgetformer("roberta"), [[0], [1, 2], [3]]), texts, tokenizer, rows=5, repeats=1)
    [row] = card.results
    assert (row.asked, row.heads) == (None, pytest.approx(4 / 12))
    assert card.parameters < card.stock_parameters
    assert row.flops["projections"] < card.stock.flops["projections"] / 2


@pytest.mark.parametrize(("training_seconds", "rate", "inputs"), [
    (100.0, 200.0, 20_000),  # half of 10 ms saved
    (100.0, 110.0, 110_000),
    (0.0, 200.0, 0),
    (100.0, 100.0, None),
    (100.0, 50.0, None),
    (None, 200.0, None),
])  # fmt: skip
def test_training_has_paid_for_itself_when_it_has_saved_as_long_as_it_took(training_seconds, rate, inputs):
    found = inputs_to_break_even(training_seconds, 100.0, rate)
    assert found is inputs or found == pytest.approx(inputs, abs=1)


def test_a_card_breaks_even_where_it_does_so_first(texts, tokenizer):
    card = cost_card(budgetformer("bert"), texts, tokenizer, rows=2, repeats=1)
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
    monkeypatch.setattr(profiling, "_measure_times", lambda *given: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="differs by"):
        cost_card(model, texts, tokenizer, rows=4, repeats=1)


def test_memory_is_that_of_weights_and_of_results_while_they_live():
    weight = torch.ones(1000)
    with profiling._HeldMemory([weight]) as held, torch.no_grad():
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
    static = prune(model, [[0], [1], [2]])
    one, many, cut = (
        cost_card(x, texts, tokenizer, (1.0,), batch_size=size, rows=6, repeats=1).results[0].peak_memory
        for x, size in ((model, 1), (model, 6), (static, 6))
    )
    assert one < many
    assert cut < many


def test_energy_is_measured_without_leaving_files_and_says_what_is_estimated(
    texts, tokenizer, monkeypatch, tmp_path, capfd
):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "FRA")
    monkeypatch.setattr(profiling, "_ENERGY_SECONDS", 0.1)
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
