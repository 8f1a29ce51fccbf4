"""Longer inputs: position tables that grow, and windows of attention that the backbone does not have."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import GPT2Config, GPT2Model, ModernBertConfig

from conftest import LONGEST, STOCK, batch_of, budgetformer, stock_classifier, stock_folder
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification
from hf_budgetformer.positions import extend_positions
from hf_budgetformer.tools.narrowing import cut


OFFSET = {"bert": 0, "roberta": 2}


@pytest.fixture
def plain(backbone_type, tmp_path):
    return stock_folder(backbone_type, tmp_path)


def table_of(model):
    return model.base_model.embeddings.position_embeddings.weight


def test_a_longer_table_repeats_the_trained_rows_and_says_so(plain, backbone_type, caplog):
    rows, offset = 3 * LONGEST + 5, OFFSET[backbone_type]
    old = table_of(STOCK[backbone_type][2].from_pretrained(plain))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        model = BudgetFormerForSequenceClassification.from_pretrained(plain, max_position_embeddings=rows)
    assert f"from {LONGEST + offset} to {rows} rows" in caplog.text
    assert (
        model.config.max_position_embeddings
        == rows
        == len(table_of(model))
        == len(model.get_position_embeddings().weight)
    )
    assert torch.equal(table_of(model)[:offset], old[:offset])
    for place in range(rows - offset):
        assert torch.equal(table_of(model)[offset + place], old[offset + place % LONGEST])


def test_short_inputs_are_answered_as_before_and_long_ones_at_all(plain, backbone_type):
    before = STOCK[backbone_type][2].from_pretrained(plain).eval()
    model = BudgetFormerForSequenceClassification.from_pretrained(plain, max_position_embeddings=100).eval()
    short, long = (batch_of(x, backbone_type) for x in ([9, LONGEST], [98, 50]))
    with torch.no_grad():
        torch.testing.assert_close(model(**short, budget=1.0).logits, before(**short).logits)
        for budget in (1.0, 0.25):
            packed = model(**long, budget=budget).logits
            torch.testing.assert_close(packed, model(**long, budget=budget, executor="masked").logits)


def test_an_extended_model_is_saved_and_loaded_by_both_classes(plain, backbone_type, tmp_path):
    BudgetFormerForSequenceClassification.from_pretrained(plain, max_position_embeddings=100).save_pretrained(
        tmp_path / "long"
    )
    again = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "long").eval()
    stock = STOCK[backbone_type][2].from_pretrained(tmp_path / "long").eval()
    batch = batch_of([90, 40], backbone_type)
    torch.testing.assert_close(again(**batch, budget=1.0).logits, stock(**batch).logits)
    short = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "long", max_position_embeddings=20)
    assert torch.equal(table_of(short), table_of(again)[:20])
    with pytest.raises(ValueError, match="at most"):
        short(**batch)


def test_a_stock_model_is_extended_alike(backbone_type):
    model = stock_classifier(backbone_type)
    extend_positions(model, 100)
    assert model.config.max_position_embeddings == model.base_model.config.max_position_embeddings == 100
    model(**batch_of([90, 3], backbone_type)).logits.sum().backward()
    assert table_of(model).grad is not None


def test_what_cannot_be_extended_is_refused():
    with pytest.raises(ValueError, match="integer > 2, got 2"):
        extend_positions(stock_classifier("roberta"), 2)
    with pytest.raises(ValueError, match="integer > 0, got 'many'"):
        budgetformer("bert").resize_position_embeddings("many")
    with pytest.raises(ValueError, match="got 'gpt2'"):
        extend_positions(GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5)), 10)


def test_rotations_need_no_table():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 40,
    }
    config = BudgetFormerConfig.from_backbone_config(
        ModernBertConfig(**sizes, pad_token_id=0, max_position_embeddings=40)
    )
    model = BudgetFormerForSequenceClassification(config).eval()
    model.resize_position_embeddings(60)
    model(**batch_of([50]), budget=1.0)
    with pytest.raises(ValueError, match="no position table"):
        model.get_position_embeddings()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("budget", [1.0, 0.25, 0.5])
def test_a_window_is_the_masked_square_and_leaves_the_first_token_everywhere(backbone_type, side, budget):
    """Packed against padded, outputs and gradients."""
    model = budgetformer(backbone_type, attention_window=6, looks=[0.25, 1.0], confidence=[0.5])
    batch, results = batch_of([30, 5, 30, 17], backbone_type, side), []
    for executor in ("auto", "masked"):
        model.zero_grad()
        logits = model(**batch, executor=executor, budget=budget if budget != 0.5 else None).logits
        logits.square().sum().backward()
        results.append((logits.detach(), [x.grad for x in model.parameters() if x.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    wide = budgetformer(backbone_type, attention_window=64)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(wide(**batch, budget=1.0).logits, model(**batch, budget=1.0).logits, atol=1e-3)
        stock = stock_classifier(backbone_type)
        stock.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(wide(**batch, budget=1.0).logits, stock(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_is_far_away_is_seen_through_the_first_token_alone():
    """In one layer a token knows of its neighbours and of the first; the first knows of all."""
    model = budgetformer("bert", num_hidden_layers=1, attention_window=4)
    batch = batch_of([30])
    embedded = model.embed(batch)
    hidden = embedded.hidden.detach().requires_grad_()
    embedded.hidden = hidden
    states = model.encode_full(embedded)
    for place, seen in ((0, set(range(30))), (20, {0, 18, 19, 20, 21, 22}), (29, {0, 27, 28, 29})):
        (gradient,) = torch.autograd.grad(states[place].sum(), hidden, retain_graph=True)
        assert set(gradient.abs().sum(-1).nonzero()[:, 0].tolist()) <= seen
        (gradient,) = torch.autograd.grad(states[place].square().sum(), hidden, retain_graph=True)
        assert set((gradient.abs().sum(-1) > 1e-9).nonzero()[:, 0].tolist()) == seen


def test_a_window_goes_along_when_a_model_is_cut_or_trained(tmp_path):
    model = budgetformer("bert", attention_window=6)
    batch = batch_of([30, 12])
    small = cut(model, 0.25).eval()
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch, budget=0.25).logits)
    model.train()
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert all(x.grad is not None for x in model.narrow.layer.parameters())


def test_a_window_that_means_nothing_is_refused():
    for value in (0, 3, -2):
        with pytest.raises(StrictDataclassFieldValidationError, match="even integer >= 2"):
            BudgetFormerConfig(attention_window=value)
    with pytest.raises(StrictDataclassClassValidationError, match="router='layer'"):
        BudgetFormerConfig(attention_window=8, router="layer")
    with pytest.raises(StrictDataclassClassValidationError, match="windows of their own"):
        BudgetFormerConfig(attention_window=8, backbone_model_type="modernbert")
    model = budgetformer("bert", attention_window=6)
    with pytest.raises(ValueError, match="output_attentions must be False with attention_window"):
        model(**batch_of([9]), output_attentions=True)
