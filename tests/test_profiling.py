"""The analytic count against torch's own counter, on the whole model; and the measured ceiling."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import STOCK, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetFormerModel, modeling_budgetformer
from hf_budgetformer.tools.profiling import PARTS, profile, speed_ceiling


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
