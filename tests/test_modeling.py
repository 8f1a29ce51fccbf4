"""The models: the stock one at budget 1, independent of the batch, clear about bad input."""

import copy
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import find_labels

from conftest import LONGEST, STOCK, batch_of, budgetformer, stock_classifier, stock_config, stock_folder
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.budgets import confidence
from hf_budgetformer.losses import teacher_divergence
from hf_budgetformer.tools.tuning import calibrate_margins


LENGTHS = [7, 12, 1, 4]


def with_budgetformer(backbone_type, folder, **kwargs):
    """A stock classifier and the BudgetFormer built on its folder, the reference path, both in eval mode."""
    stock_folder(backbone_type, folder)
    stock = STOCK[backbone_type][2].from_pretrained(folder, **kwargs).eval()
    return stock, BudgetFormerForSequenceClassification.from_pretrained(folder, executor="masked", **kwargs).eval()


# The full model is the stock model


@pytest.mark.parametrize("side", ["right", "left", None])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_one_is_the_stock_model_bit_for_bit(backbone_type, dtype, implementation, side, tmp_path):
    """Contract 1; in training too, gradients included."""
    stock, model = with_budgetformer(backbone_type, tmp_path, dtype=dtype, attn_implementation=implementation)
    batch = batch_of(LENGTHS if side else [9, 9, 9], backbone_type, side or "right")
    labels = torch.tensor([0, 1, 2, 0])[: len(batch["input_ids"])]
    expected = stock(**batch, labels=labels)
    got = model(**batch, labels=labels, budget=1.0)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    torch.testing.assert_close(
        model(**batch, budget=1.0, executor="auto").logits,
        expected.logits,
        rtol=1e-5,
        atol=1e-5 if dtype is torch.float32 else 5e-2,
    )

    for one in (stock, model):
        one.train()
        one(**batch, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_every_problem_type_has_the_stock_loss(backbone_type, problem, tmp_path):
    labels = {
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        "single_label_classification": torch.tensor([2, 0, -100, 1]),
    }[problem]
    stock_folder(backbone_type, tmp_path, num_labels=1 if problem == "regression" else 3)
    stock = STOCK[backbone_type][2].from_pretrained(tmp_path).eval()
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, executor="masked").eval()
    batch = batch_of(LENGTHS, backbone_type)
    assert torch.equal(model(**batch, labels=labels, budget=1.0).loss, stock(**batch, labels=labels).loss)
    assert model.config.problem_type == problem
    outputs = model.train()(**batch, labels=labels)
    torch.testing.assert_close(
        outputs.loss.detach(), model.training_log["task_loss"] + model.training_log["divergence"]
    )


def test_hidden_states_and_attentions_are_the_stock_ones(backbone_type, tmp_path):
    stock, model = with_budgetformer(backbone_type, tmp_path, attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    batch = batch_of(LENGTHS, backbone_type)
    expected, got = stock(**batch, **options), model(**batch, **options)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(expected[name])
        assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True)), name


def test_the_stock_class_loads_our_folder(backbone_type, tmp_path):
    """Contract 1: only our own keys are foreign to it."""
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    stock, report = STOCK[backbone_type][2].from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["unexpected_keys"]} == {"narrow"}
    assert not report["missing_keys"]
    batch = batch_of(LENGTHS, backbone_type)
    assert torch.equal(stock.eval()(**batch).logits, model(**batch, budget=1.0, executor="masked").logits)


# Budgets and looks


def test_until_it_is_trained_a_plain_call_is_the_full_model_and_says_so_once(backbone_type, caplog):
    model, batch = budgetformer(backbone_type, trained=False), batch_of(LENGTHS, backbone_type)
    transformers_logging.get_logger("transformers").warning_once.cache_clear()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        plain = [model(**batch) for _ in range(3)]
        rough = [model(**batch, budget=0.25) for _ in range(3)]
    logging.getLogger("transformers").propagate = False
    full = model(**batch, budget=1.0)
    assert all(torch.equal(outputs.logits, full.logits) for outputs in plain)
    assert plain[0].budget.tolist() == [1.0] * 4
    assert rough[0].budget.tolist() == [0.25] * 4
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "The narrow encoder has not been trained yet",
        "The narrow encoder answers, and has not been trained yet",
    ]


def test_once_it_is_trained_a_plain_call_looks_twice(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([3, 9, 4, 7, 5, 6], backbone_type)
    first, full = model(**batch, budget=1 / 12), model(**batch, budget=1.0)
    sure = confidence(first.logits, None)
    model.config.confidence = [sure.median().item() + 1e-3]
    doubted = sure < model.config.confidence[0]
    assert 0 < doubted.sum() < 6
    outputs = model(**batch)
    expected = torch.where(doubted[:, None], full.logits, first.logits)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.budget, first.budget + doubted)
    assert torch.equal(model(**batch, budget=1 / 12).logits, first.logits)  # asked for: no second look


def test_three_looks_are_summed(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([3, 9, 4, 7, 5, 6], backbone_type)
    model.config.looks, model.config.confidence = [1 / 12, 1 / 4, 1], [1, 1]
    outputs = model(**batch)
    torch.testing.assert_close(outputs.logits, model(**batch, budget=1.0).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.budget, torch.full((6,), 1 / 12 + 1 / 4 + 1))
    model.config.confidence = [0, 0]
    assert torch.equal(model(**batch).logits, model(**batch, budget=1 / 12).logits)


def test_a_mean_budget_is_spent_in_the_mean(backbone_type):
    """Contract 5: within 5% on rows like those the margins were measured on."""
    model = budgetformer(backbone_type)
    batches = [batch_of([3, 9, 4, 7, 5, 6, 8, 2] * 8, backbone_type, seed=seed) for seed in range(8)]
    calibrate_margins(model, batches[:4])
    for budget in (0.3, 0.4, 0.5, 0.8):
        spent = torch.cat([model(**batch, budget=budget).budget for batch in batches[:4]])
        assert spent.mean().item() == pytest.approx(budget, rel=0.05)
        assert {round(x, 4) for x in spent.tolist()} == {0.0833, 1.0833}
        others = torch.cat([model(**batch, budget=budget).budget for batch in batches[4:]])
        assert others.mean().item() == pytest.approx(budget, rel=0.2)


def test_inputs_of_different_budgets_share_a_batch(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    calibrate_margins(model, [batch])
    budgets = [0.1, 0.25, 0.5, 1.0]
    mixed = model(**batch, budget=torch.tensor(budgets))
    for row, budget in enumerate(budgets):
        alone = model(**{name: x[row : row + 1] for name, x in batch.items()}, budget=budget)
        torch.testing.assert_close(mixed.logits[row : row + 1], alone.logits, rtol=1e-5, atol=1e-5)
        assert mixed.budget[row] == alone.budget[0]


def test_a_unit_that_is_closed_has_no_influence(backbone_type):
    model, batch = budgetformer(backbone_type, narrow_budget=0.75), batch_of([9, 4], backbone_type)
    before = {budget: model(**batch, budget=budget).logits for budget in (0.25, 0.5)}
    with torch.no_grad():
        for layer in model.narrow.layer:  # the second of three heads, and the second block of neurons
            layer.qkv.weight[12:24] += 3.0
            layer.up.weight[6:12] -= 2.0
            layer.down.weight[:, 6:12] *= -5.0
    assert torch.equal(model(**batch, budget=0.25).logits, before[0.25])
    assert not torch.allclose(model(**batch, budget=0.5).logits, before[0.5])


def test_the_encoder_alone_runs_at_a_budget_and_cannot_doubt(backbone_type):
    classifier, batch = budgetformer(backbone_type, looks=[0.25]), batch_of(LENGTHS, backbone_type)
    model = BudgetFormerModel(classifier.config).eval()
    model.load_state_dict(classifier.state_dict(), strict=False)
    narrow, masked = model(**batch), model(**batch, executor="masked")
    assert narrow.budget.tolist() == [0.25] * 4
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(narrow.last_hidden_state[real], masked.last_hidden_state[real], rtol=1e-5, atol=1e-5)
    assert not narrow.last_hidden_state[~real].any()
    assert model(**batch, budget=1.0).budget.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match=r"budget.*narrow_budget=0.25.*without a head|calibrate_margins"):
        model(**batch, budget=0.5)


def test_a_regression_is_never_doubted(backbone_type):
    config = BudgetFormerConfig.from_backbone_config(stock_config(backbone_type, num_labels=1))
    model, batch = BudgetFormerForSequenceClassification(config).eval(), batch_of(LENGTHS, backbone_type)
    model.narrow.steps.fill_(1)
    assert torch.equal(model(**batch).logits, model(**batch, budget=1.0).logits)
    model.config.looks = [0.25]
    assert torch.equal(model(**batch).logits, model(**batch, budget=0.25).logits)
    model.config.looks = [0.25, 1.0]
    with pytest.raises(ValueError, match="looks must hold one budget"):
        model(**batch)


MODELS = {name: budgetformer(name) for name in ("bert", "roberta")}


@given(data=st.data(), name=st.sampled_from(["bert", "roberta"]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_input_is_answered_the_same_in_any_company(data, name):
    """Contract 4: whatever it is batched with, padding, order; and so is what it spends."""
    model = MODELS[name]
    lengths = data.draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=5))
    share = st.floats(1 / 16, 0.25, width=32)
    budgets = data.draw(st.lists(st.one_of(share, st.just(1.0)), min_size=len(lengths), max_size=len(lengths)))
    side = data.draw(st.sampled_from(["right", "left"]))
    seed = data.draw(st.integers(0, 999))
    batch, budget = batch_of(lengths, name, side, seed), torch.tensor(budgets)
    if name == "bert" and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        outputs = model(**batch, budget=budget)
        assert (outputs.budget <= budget + 1e-5).all()
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        permuted = model(**{key: x[order] for key, x in batch.items()}, budget=budget[order])
        torch.testing.assert_close(permuted.logits, outputs.logits[order], rtol=1e-4, atol=1e-5)
        assert torch.equal(permuted.budget, outputs.budget[order])
        row = data.draw(st.integers(0, len(lengths) - 1))
        real = batch["attention_mask"][row].bool()
        single = {key: x[row : row + 1, real] for key, x in batch.items()}
        alone = model(**single, budget=budget[row : row + 1])
        if side == "right":  # the stock heads, and so ours, read the first position even where that is padding
            torch.testing.assert_close(alone.logits, outputs.logits[row : row + 1], rtol=1e-4, atol=1e-5)
        assert alone.budget[0] == outputs.budget[row]


# Traps of transformers 5: what goes wrong in silence


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_not_silently_ignored(backbone_type, implementation):
    """Trap 7."""
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    model.set_attn_implementation(implementation)
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[batch["attention_mask"] == 0] = 100.0
    positions = model.base_model.embeddings.create_position_ids_from_input_ids(batch["input_ids"], 1) if (
        backbone_type == "roberta"
    ) else None  # fmt: skip
    disturbed = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions).logits
    torch.testing.assert_close(disturbed, expected, rtol=1e-5, atol=1e-5)


def test_no_mask_and_a_mask_of_ones_agree(backbone_type):
    """Trap 17: the sdpa mask is None when nothing is padded."""
    model, batch = budgetformer(backbone_type), batch_of([6, 6], backbone_type)
    torch.testing.assert_close(model(**batch).logits, model(batch["input_ids"]).logits)


def test_attention_implementations_can_be_switched_and_agree(backbone_type):
    """Trap 16: upstream reads our source to decide whether switching is allowed."""
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    assert model.config._attn_implementation == "sdpa"
    expected = model(**batch).logits
    model.set_attn_implementation("eager")
    assert model.base_model.encoder.layer[0].attention.self.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_names_of_old_checkpoints_do_not_come_back_when_saved(tmp_path):
    """Trap 1: with them, Trainer would resume from nothing."""
    from safetensors.torch import load_file, save_file

    folder = stock_folder("bert", tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    model = BudgetFormerForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, weights["bert.embeddings.LayerNorm.weight"])
    model.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()


@pytest.mark.parametrize("cls", [BudgetFormerForSequenceClassification, BudgetFormerModel])
def test_what_is_new_is_written_when_a_plain_checkpoint_is_loaded(backbone_type, cls, tmp_path):
    """Contract 6. Traps 2, 3, 4: own modules are skipped, get BERT's initialisation, or stay unwritten memory."""
    model, report = cls.from_pretrained(stock_folder(backbone_type, tmp_path), output_loading_info=True)
    task = cls is BudgetFormerForSequenceClassification
    new = {name.split(".")[0] for name in report["missing_keys"]}
    assert new == {"narrow"} if task or backbone_type == "bert" else new == {"narrow", backbone_type}
    base = model.base_model
    narrow, full = model.narrow.layer[1], base.encoder.layer[1]
    rows = full.intermediate.dense.weight
    assert all(any(torch.equal(row, other) for other in rows) for row in narrow.up.weight)
    assert model.narrow.steps.item() == 0
    if task:
        pairs = zip(model.narrow.head.parameters(), model.classifier.parameters(), strict=True)
        assert all(torch.equal(ours, stock) for ours, stock in pairs)
    longest = base.config.max_position_embeddings
    assert torch.equal(base.embeddings.position_ids, torch.arange(longest)[None])
    assert not base.embeddings.token_type_ids.any()


def test_the_paper_routers_are_written_when_a_plain_checkpoint_is_loaded(backbone_type, tmp_path):
    folder = stock_folder(backbone_type, tmp_path, hidden_size=64, num_attention_heads=8)
    model = BudgetFormerForSequenceClassification.from_pretrained(folder, router="layer")
    encoder, multiplier = model.base_model.encoder, model.config.router_lr_multiplier
    router = encoder.layer[1].router
    assert router.scorer.weight.std().item() * multiplier == pytest.approx(0.3, rel=0.15)
    assert router.controller.hidden.weight.std().item() * multiplier == pytest.approx(0.3, rel=0.15)
    assert not router.controller.output.weight.any()
    assert not router.scorer.bias.any()
    assert torch.sigmoid(encoder.own_budget()).item() == pytest.approx((0.5 - 1 / 8) / (1 - 1 / 8))
    assert encoder.exploration.steps.item() == 0


def test_another_number_of_labels_gives_both_heads_anew(backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    again = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert again.narrow.steps.item() == 1
    pairs = zip(again.narrow.head.parameters(), again.classifier.parameters(), strict=True)
    assert all(torch.equal(ours, stock) for ours, stock in pairs)
    assert torch.equal(again.narrow.layer[0].qkv.weight, model.narrow.layer[0].qkv.weight)


def enable_checkpointing(model):
    """Under the name it has since transformers 5.24, or before."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def test_gradient_checkpointing_counts_a_step_once_and_gives_the_same_gradients(backbone_type):
    """Trap 11: a layer's forward runs twice."""
    batch = {**batch_of(LENGTHS, backbone_type), "labels": torch.tensor([0, 1, 2, 0])}
    original, gradients = budgetformer(backbone_type), {}
    for checkpointed in (False, True):
        model = copy.deepcopy(original)
        if checkpointed:
            enable_checkpointing(model)
        model.train()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        assert model.narrow.steps.item() == 2
        gradients[checkpointed] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)


def test_only_labels_counts_as_a_label():
    """Trap 10."""
    assert find_labels(BudgetFormerForSequenceClassification) == ["labels"]


def test_the_loss_function_is_the_sequence_classifiers():
    """Trap 6: it is chosen by a pattern on the class name."""
    assert budgetformer("bert").loss_type == "ForSequenceClassification"


def test_head_mask_is_refused_with_advice(backbone_type):
    """Trap 18: upstream swallows it."""
    with pytest.raises(TypeError, match=r"head_mask.*budget"):
        budgetformer(backbone_type)(**batch_of([3], backbone_type), head_mask=torch.ones(3, 4))


# Training and evaluation


def test_inference_is_deterministic_and_counts_nothing(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    labels = torch.tensor([0, 1, 2, 0])
    first, second = model(**batch, labels=labels), model(**batch, labels=labels)
    assert torch.equal(first.logits, second.logits)
    with torch.no_grad():
        model.train()(**batch)
    assert model.narrow.steps.item() == 1


def test_every_parameter_gets_a_gradient_whatever_is_drawn(backbone_type):
    """Distributed training waits for each, those of closed units too."""
    order = [5] * 4 + [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4 + [0] * 4
    model = budgetformer(backbone_type, opening_order=order, narrow_budget=0.75).train()
    for step in range(6):
        model.zero_grad()
        model.narrow.steps.fill_(step)
        model(**batch_of(LENGTHS, backbone_type), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_frozen_full_model_does_not_run_where_its_answers_are_given(backbone_type, tmp_path):
    folder = stock_folder(backbone_type, tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = BudgetFormerForSequenceClassification.from_pretrained(folder, freeze_full=True)
    batch, labels = batch_of(LENGTHS, backbone_type), torch.tensor([0, 1, 2, 0])
    teacher_logits = model(**batch, budget=1.0).logits.detach()
    model.train()
    ran = []
    model.full_layers()[0].register_forward_hook(lambda *_: ran.append(1))
    given = model(**batch, labels=labels, teacher_logits=teacher_logits)
    assert ran == []
    model.narrow.steps.fill_(0)
    outputs = model(**batch, labels=labels)
    assert ran == [1]
    torch.testing.assert_close(outputs.logits, teacher_logits)  # without dropout
    torch.testing.assert_close(outputs.loss, given.loss + model.training_log["task_loss"])
    outputs.loss.backward()
    learned = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {"narrow"}
    assert {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad} == {"narrow"}


def test_the_narrow_encoder_learns_nothing_into_the_full_model(backbone_type):
    """Its gradient ends at the embeddings and at the full model's answer."""
    model = budgetformer(backbone_type).train()
    outputs = model(**batch_of(LENGTHS, backbone_type))
    assert outputs.loss is None
    outputs.logits.sum().backward()  # of the full model, plus what is attached
    with_narrow = {name: x.grad.clone() for name, x in model.named_parameters() if not name.startswith("narrow.")}
    assert model.narrow.layer[0].qkv.weight.grad.abs().max() > 0
    stock = stock_classifier(backbone_type)
    stock.load_state_dict(model.state_dict(), strict=False)
    stock.train()(**batch_of(LENGTHS, backbone_type)).logits.sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(with_narrow[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_without_labels_teach_a_narrow_encoder_beside_a_frozen_model(backbone_type):
    model = budgetformer(backbone_type, freeze_full=True).train()
    outputs = model(**batch_of(LENGTHS, backbone_type))
    outputs.loss.backward()
    assert all(x.grad is not None for x in model.narrow.head.parameters())
    assert outputs.loss.item() == pytest.approx(model.training_log["divergence"].item())


def test_training_makes_the_narrow_encoder_say_what_the_full_model_says(backbone_type):
    model = budgetformer(backbone_type, trained=False, freeze_full=True, narrow_budget=0.5)
    batch = batch_of([5, 9, 7, 3] * 4, backbone_type)
    expected = model(**batch, budget=1.0).logits

    def divergence():
        return teacher_divergence(model(**batch, budget=0.5).logits, expected, "").mean().item()

    before = divergence()
    model.train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    assert divergence() < 0.5 * before
    assert torch.equal(model(**batch, budget=1.0).logits, expected)
    assert model.is_trained()


# Bad input: a clear error before anything runs


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"budget": 0.0}, ValueError, r"budget.*\(0, 1\].*got 0.0"),
        ({"budget": 1.5}, ValueError, r"budget.*\(0, 1\].*got 1.5"),
        ({"budget": float("nan")}, ValueError, r"budget.*got nan"),
        ({"budget": 3}, ValueError, r"budget.*float.*got 3"),
        ({"budget": "half"}, ValueError, r"budget.*got 'half'"),
        ({"budget": torch.tensor([0.5, 0.5])}, ValueError, r"budget.*\(4,\).*got.*\(2,\)"),
        ({"budget": torch.tensor([1, 1, 1, 1])}, ValueError, r"budget.*got a torch.int64"),
        ({"budget": torch.tensor([0.5, 0.5, 0.0, 0.5])}, ValueError, r"budget.*got tensor"),
        ({"budget": torch.tensor([0.5, 0.5, float("nan"), 0.5])}, ValueError, r"budget.*got tensor"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, ValueError, r"labels.*\[0, 3\).*got \[0, 1, 3, 0\]"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, r"labels.*\[0, 3\)"),
        ({"attention_mask": torch.ones(4, 5)}, ValueError, r"attention_mask.*\(4, 12\).*got \(4, 5\)"),
        ({"inputs_embeds": torch.ones(4, 12, 16)}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds.*neither"),
        ({"budgets": 0.5}, TypeError, r"\['budgets'\]"),
        ({"head_budget": 0.5}, TypeError, r"head_budget is of hf_budgetformer 0.1: write budget="),
        ({"budget": 0.6}, ValueError, r"budget must be a float of at most 0.25 in training"),
        ({"teacher_logits": torch.zeros(4, 2)}, ValueError, r"teacher_logits.*\(4, 3\).*\(4, 2\)"),
        ({"executor": "fast"}, ValueError, r"executor.*\['auto', 'masked'\], got 'fast'"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(arguments, error, named):
    model = budgetformer("bert").train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"(?s){named}"):
        model(**{**batch_of(LENGTHS), **arguments})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_empty_batch_is_refused(backbone_type, shape):
    with pytest.raises(ValueError, match=r"input_ids must hold at least one input.*got [02]"):
        budgetformer(backbone_type)(torch.zeros(shape, dtype=torch.long))


def test_an_input_longer_than_the_position_table_is_refused(backbone_type):
    model = budgetformer(backbone_type)
    model(**batch_of([LONGEST], backbone_type))
    with pytest.raises(ValueError, match=f"at most {LONGEST} tokens.*got {LONGEST + 1}.*truncation=True"):
        model(**batch_of([LONGEST + 1], backbone_type))


def test_a_stock_config_is_refused_by_the_constructor(backbone_type):
    with pytest.raises(TypeError, match=r"BudgetFormerConfig\.from_backbone_config"):
        BudgetFormerModel(stock_config(backbone_type))


# At home among the others


def test_a_stock_checkpoints_labels_are_kept_and_num_labels_can_be_set(backbone_type, tmp_path):
    stock_folder(backbone_type, tmp_path, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    assert BudgetFormerForSequenceClassification.from_pretrained(tmp_path).config.id2label == {0: "bad", 1: "good"}
    base = tmp_path / "base"
    STOCK[backbone_type][1](stock_config(backbone_type, num_labels=2)).save_pretrained(base)
    assert BudgetFormerForSequenceClassification.from_pretrained(base, num_labels=5).num_labels == 5


def test_loading_our_own_checkpoint_says_nothing(backbone_type, tmp_path, caplog):
    budgetformer(backbone_type).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        _, report = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert not any(report.values())


def test_embeddings_can_be_resized(backbone_type):
    model = budgetformer(backbone_type)
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == 50
    assert model(torch.tensor([[49, 48]])).logits.shape == (1, 3)


def test_a_budgetformer_of_random_weights_needs_no_checkpoint():
    config = BudgetFormerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert BudgetFormerForSequenceClassification(config).eval()(torch.tensor([[1, 2]])).logits.shape == (1, 2)


def test_a_deep_copy_answers_the_same(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([5], backbone_type)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)
