"""Every backbone keeps the contracts: the rows of the table, and one more that is not in it."""

import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import VOCABULARY
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.attention import BAND_QUERIES, Reach, attend_band, attend_packed, attend_padded
from hf_budgetformer.backbones import BACKBONES, Backbone, LayerNames
from hf_budgetformer.budgets import OpeningOrder
from hf_budgetformer.packing import find_packing
from hf_budgetformer.tools.narrowing import cut, stock_model, unit_importance
from hf_budgetformer.tools.profiling import count_flops


# Norms before its sublayers, and one behind the last layer: nothing about it is said anywhere but in this row.
ONE_MORE = {
    "roberta-prelayernorm": Backbone(
        LayerNames(attention_norm="attention.LayerNorm", feed_forward_norm="intermediate.LayerNorm"),
        positions_follow_padding=True,
        norm_first=True,
        final_norm="LayerNorm",
    )
}
ROWS = [*BACKBONES, *ONE_MORE]
LENGTHS = [40, 7, 40, 13, 1]
OWN = {
    "distilbert": {
        "dim": 16,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "electra": {"embedding_size": 12, "summary_last_dropout": 0.0},
    "modernbert": {"local_attention": 8, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
}


@pytest.fixture(autouse=True)
def one_more_row(monkeypatch):
    for name, row in ONE_MORE.items():
        monkeypatch.setitem(BACKBONES, name, row)


def tiny_config(kind, **fields):
    """Of the stock class, by its own names."""
    stock = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 50, "num_labels": 3, "initializer_range": 0.3,
        "pad_token_id": 1 if BACKBONES[kind].positions_follow_padding else 0,
    }  # fmt: skip
    if kind != "distilbert":
        stock |= {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
        stock |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return CONFIG_MAPPING[kind](**{**stock, **OWN.get(kind, {}), **fields})


def tiny_batch(kind, lengths=LENGTHS, side="right"):
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=draw)
    return {"input_ids": ids.masked_fill(mask == 0, tiny_config(kind).pad_token_id), "attention_mask": mask}


@pytest.fixture
def pair(kind, tmp_path):
    """A stock classifier, and ours from its folder; in eval mode."""
    AutoModelForSequenceClassification.from_config(tiny_config(kind)).save_pretrained(tmp_path / "stock")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()
    ours = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "stock", narrow_budget=0.75)
    return stock, ours.eval()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_budget_one_is_the_stock_model_bit_for_bit(kind, side, pair):
    """Contract 1; in training too, gradients included."""
    stock, model = pair
    batch, labels = tiny_batch(kind, side=side), torch.tensor([0, 2, 1, 1, 0])
    expected = stock(**batch, labels=labels)
    got = model(**batch, labels=labels, budget=1.0, executor="masked")
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    packed = model(**batch, budget=1.0).logits
    # On the left stock answers from a padding token; where attention is local, that sees nothing or what is beside it.
    if side == "right" or kind != "modernbert":
        torch.testing.assert_close(packed, expected.logits, rtol=1e-5, atol=1e-5)
    for one in (stock, model):
        one.train()
        one(**batch, labels=labels, **({} if one is stock else {"executor": "masked"})).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("budget", [0.75, 0.3, 0.1])
def test_packed_views_equal_the_masked_reference(kind, budget, pair):
    """Contract 2: outputs and gradients."""
    _, model = pair
    batch, results = tiny_batch(kind), {}
    for executor in ("masked", "auto"):
        model.zero_grad()
        model.train()
        outputs = model(**batch, budget=budget, executor=executor, labels=torch.tensor([0, 2, 1, 1, 0]))
        outputs.loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if name.startswith("narrow.")}
        answer = model.eval()(**batch, budget=budget, executor=executor).logits
        results[executor] = (answer, gradients)
    torch.testing.assert_close(results["auto"][0], results["masked"][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results["masked"][1].items():
        torch.testing.assert_close(results["auto"][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ROWS)
@torch.no_grad()
def test_at_full_width_it_is_the_full_encoder_and_at_a_budget_what_is_cut_to_it(kind, pair):
    """Contract 3, whatever order units are stored in."""
    stock, model = pair
    batch = tiny_batch(kind)
    model.narrow.steps.fill_(1)
    static = cut(model, 0.3)
    torch.testing.assert_close(static(**batch).logits, model(**batch, budget=0.3).logits, rtol=1e-6, atol=1e-6)
    config = BudgetFormerConfig.from_backbone_config(stock.config, narrow_budget=1.0)
    whole = BudgetFormerForSequenceClassification(config).eval()
    whole.load_state_dict(stock.state_dict(), strict=False)
    with torch.enable_grad():
        whole.init_narrow(unit_importance(whole, [{**batch, "labels": torch.tensor([0, 2, 1, 1, 0])}]))
    answer = whole._answer(whole.embed(batch), whole.narrow.widest)
    torch.testing.assert_close(answer, stock(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ROWS)
@torch.no_grad()
def test_an_input_is_answered_the_same_in_any_company(kind, pair):
    """Contract 4, in looks."""
    _, model = pair
    batch = tiny_batch(kind)
    model.narrow.steps.fill_(1)
    sure = model(**batch, budget=0.3).logits.softmax(-1).topk(2).values.diff(dim=-1).abs()
    model.config.looks, model.config.confidence = [0.3, 1.0], [sure.quantile(0.6).item()]
    together = model(**batch)
    assert 0 < (together.budget > 1).sum() < 5
    for row, length in enumerate(LENGTHS):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-5, atol=1e-5)
        assert alone.budget.item() == together.budget[row].item()


@pytest.mark.parametrize("kind", ROWS)
def test_checkpoints_go_both_ways(kind, pair, tmp_path):
    """Contract 6: only our own keys are new; bit-identical when loaded again; the stock class loads our folder."""
    stock, _ = pair
    model, info = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert info["missing_keys"]
    assert all(name.startswith("narrow.") for name in info["missing_keys"])
    model.save_pretrained(tmp_path / "ours")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is BudgetFormerForSequenceClassification
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())
    back, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("narrow.") for name in info["unexpected_keys"])
    for model in (back, stock_model(again)):
        assert torch.equal(model.eval()(**tiny_batch(kind)).logits, stock(**tiny_batch(kind)).logits)
    encoder, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(encoder) is BudgetFormerModel
    expected = AutoModel.from_pretrained(tmp_path / "stock").eval()(**tiny_batch(kind)).last_hidden_state
    hidden = encoder.eval()(**tiny_batch(kind)).last_hidden_state
    real = tiny_batch(kind)["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ROWS)
@torch.no_grad()
def test_copies_answer_alike(kind, pair):
    """Deep copies, and what another process is sent."""
    _, model = pair
    expected = model(**tiny_batch(kind), budget=1.0).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**tiny_batch(kind), budget=1.0).logits, expected)


@pytest.mark.parametrize("kind", ROWS)
def test_flops_are_counted_right(kind, pair):
    """Contract 5: of a budget over the full encoder, for inputs of the reference length."""
    _, model = pair
    batch = tiny_batch(kind, [8, 8])
    model.config.reference_length = 8
    order = OpeningOrder(model.config)
    look = order.look(0.4)
    embedded = model.embed(batch)
    narrow, full = (
        count_flops(lambda encode=encode: encode(embedded))
        for encode in (lambda x: model.encode_narrow(x, look), model.encode_full)
    )
    assert narrow / full == pytest.approx(look.cost, rel=0.01)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("encoder", ["narrow", "full"])
def test_the_last_layer_run_for_first_positions_alone_is_the_whole_one_there(kind, side, encoder, pair):
    """Outputs and gradients; and it is cheaper."""
    _, model = pair
    if kind == "modernbert":  # local attention in the last layer too
        model.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    look = OpeningOrder(model.config).look(0.4)
    encode = model.encode_full if encoder == "full" else partial(model.encode_narrow, look=look)
    results = {}
    for first in (False, True):
        embedded = model.embed(tiny_batch(kind, side=side))
        embedded.hidden = embedded.hidden.detach().requires_grad_()
        hidden = encode(embedded, first=first)
        read = hidden if first else embedded.batch.first(hidden)
        (gradient,) = torch.autograd.grad(read.square().sum(), embedded.hidden)
        flops = count_flops(lambda embedded=embedded, first=first: encode(embedded, first=first))
        results[first] = (read, gradient, flops)
    for index in range(2):
        torch.testing.assert_close(results[True][index], results[False][index], rtol=1e-4, atol=1e-5)
    assert results[True][2] < 0.9 * results[False][2]


@pytest.mark.parametrize("length", [9, BAND_QUERIES + 1, 3 * BAND_QUERIES - 5, 5 * BAND_QUERIES])
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("first_is_global", [False, True])
def test_a_band_is_what_the_masked_square_is(length, window, first_is_global):
    """Outputs and gradients."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, length, 8, generator=draw).requires_grad_() for _ in range(3)]
    reach = Reach(None, window, first_is_global)
    band = attend_band(*parts, reach)
    square = attend_padded([x.transpose(1, 2) for x in parts], None, reach)
    square = square.unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(band, square, rtol=1e-5, atol=1e-6)
    wanted = torch.randn(band.shape, generator=draw)
    for one, other in zip(*(torch.autograd.grad((x * wanted).sum(), parts) for x in (band, square)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reach", [Reach(None, 16), Reach(None, 16, first_is_global=True)])
def test_local_attention_of_packed_sequences_is_that_of_the_padded_batch(side, reach):
    draw, lengths = torch.Generator().manual_seed(0), [150, 20, 150, 3]
    mask = (torch.arange(150) < torch.tensor(lengths)[:, None]).long()
    mask = mask if side == "right" else mask.flip(1)
    packing = find_packing(mask, (4, 150), torch.device("cpu"))
    parts = torch.randn(3, 4, 150, 2, 8, generator=draw).unbind(0)
    expected = attend_padded(parts, mask, reach)
    got = packing.pad(attend_packed([packing.pack(x) for x in parts], packing.sequences, reach=reach))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


def test_the_mean_of_tokens_is_pooled_as_upstream(tmp_path):
    kind = "modernbert"
    config = tiny_config(kind, classifier_pooling="mean")
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    model = BudgetFormerForSequenceClassification(BudgetFormerConfig.from_backbone_config(config, narrow_budget=0.5))
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    batch = tiny_batch(kind)
    torch.testing.assert_close(model(**batch, budget=1.0).logits, stock(**batch).logits, rtol=1e-5, atol=1e-5)
    masked = model(**batch, budget=0.3, executor="masked").logits
    torch.testing.assert_close(model(**batch, budget=0.3).logits, masked, rtol=1e-5, atol=1e-5)


def test_what_is_said_of_the_papers_routers_on_another_layout():
    config = BudgetFormerConfig.from_backbone_config(tiny_config("modernbert"), router="layer")
    with pytest.raises(ValueError, match="router must be 'look' for a backbone of type 'modernbert', got 'layer'"):
        BudgetFormerForSequenceClassification(config)
