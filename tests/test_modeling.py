"""The models: equal to the stock ones with all heads open, independent of the batch, clear about bad input."""

import copy
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.generic import find_labels

from conftest import LONGEST, STOCK, batch_of, budgetformer, stock_classifier, stock_config, stock_folder
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel


LENGTHS = [7, 12, 1, 4]
BUDGETS = [0.25, 0.5, 0.75, 1.0]


def with_budgetformer(backbone_type, folder, **kwargs):
    """A stock classifier and the BudgetFormer built on its folder, the reference path, both in eval mode."""
    stock_folder(backbone_type, folder)
    stock = STOCK[backbone_type][2].from_pretrained(folder, **kwargs).eval()
    return stock, BudgetFormerForSequenceClassification.from_pretrained(folder, executor="masked", **kwargs).eval()


# All gates open is the stock model


@pytest.mark.parametrize("side", ["right", "left", None])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_heads_open_equals_the_stock_model_bit_for_bit(backbone_type, dtype, implementation, side, tmp_path):
    stock, model = with_budgetformer(backbone_type, tmp_path, dtype=dtype, attn_implementation=implementation)
    batch = batch_of(LENGTHS if side else [9, 9, 9], backbone_type, side or "right")
    labels = torch.tensor([0, 1, 2, 0])[: len(batch["input_ids"])]
    expected = stock(**batch, labels=labels)
    got = model(**batch, labels=labels, head_budget=1.0)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)

    model.config.head_budget = 1.0
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
    assert torch.equal(model(**batch, labels=labels, head_budget=1.0).loss, stock(**batch, labels=labels).loss)
    assert model.config.problem_type == problem


def test_hidden_states_and_attentions_are_the_stock_ones(backbone_type, tmp_path):
    stock, model = with_budgetformer(backbone_type, tmp_path, attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    batch = batch_of(LENGTHS, backbone_type)
    expected, got = stock(**batch, **asked), model(**batch, **asked, head_budget=1.0)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(expected[name])
        assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True)), name


# Gates


@pytest.mark.parametrize("head_budget", [None, 0.5])
def test_a_closed_head_has_no_influence(backbone_type, head_budget):
    model = budgetformer(backbone_type)
    single = batch_of([9], backbone_type)
    before = model(**single, head_budget=head_budget, output_head_gates=True)
    assert before.head_gates.shape == (1, 3, 4)
    with torch.no_grad():
        for layer, open_heads in enumerate(before.head_gates[0]):
            attention = model.base_model.encoder.layer[layer].attention
            size = attention.self.attention_head_size
            for head in (open_heads == 0).nonzero().flatten().tolist():
                rows = slice(head * size, (head + 1) * size)
                for projection in (attention.self.query, attention.self.key, attention.self.value):
                    projection.weight[rows] += 3.0
                    projection.bias[rows] -= 2.0
                attention.output.dense.weight[:, rows] *= -5.0
    assert (before.head_gates == 0).any()
    assert torch.equal(model(**single, head_budget=head_budget).logits, before.logits)


def test_an_open_head_has_influence(backbone_type):
    model = budgetformer(backbone_type)
    single = batch_of([9], backbone_type)
    before = model(**single, head_budget=0.5, output_head_gates=True)
    head = before.head_gates[0, 0].argmax().item()
    with torch.no_grad():
        model.base_model.encoder.layer[0].attention.self.value.bias[head * 4 : head * 4 + 4] += 3.0
    assert not torch.allclose(model(**single, head_budget=0.5).logits, before.logits)


def test_reported_budget_is_the_mean_of_the_gates_and_differs_between_inputs(backbone_type):
    outputs = budgetformer(backbone_type)(**batch_of(LENGTHS, backbone_type), output_head_gates=True)
    assert torch.equal(outputs.head_budget, outputs.head_gates.mean((1, 2)))
    assert len(set(outputs.head_budget.tolist())) > 1
    assert outputs.head_budget.dtype == torch.float32


def test_head_gates_come_only_on_request(backbone_type):
    assert budgetformer(backbone_type)(**batch_of([3], backbone_type)).head_gates is None


def test_a_requested_budget_by_call_by_config_and_by_tensor_is_the_same(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    by_call = model(**batch, head_budget=0.25)
    by_tensor = model(**batch, head_budget=torch.full((4,), 0.25))
    model.config.head_budget = 0.25
    by_config = model(**batch)
    assert torch.equal(by_call.logits, by_tensor.logits)
    assert torch.equal(by_call.logits, by_config.logits)
    assert not torch.equal(model(**batch, head_budget=0.75).logits, by_config.logits)  # a call goes before the config


def test_inputs_of_different_budgets_share_a_batch(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    mixed = model(**batch, head_budget=torch.tensor(BUDGETS), output_head_gates=True)
    for row, budget in enumerate(BUDGETS):
        alone = model(**{name: x[row : row + 1] for name, x in batch.items()}, head_budget=budget)
        torch.testing.assert_close(mixed.logits[row : row + 1], alone.logits, rtol=1e-5, atol=1e-5)
        assert mixed.head_budget[row] == alone.head_budget[0]
    assert (mixed.head_gates[3] == 1).all()


MODELS = {name: budgetformer(name) for name in ("bert", "roberta")}


@given(data=st.data(), name=st.sampled_from(["bert", "roberta"]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_properties_of_any_batch_and_budget(data, name):
    """Contract 3, permutation, k within [1, H], monotone in the request, reported as spent."""
    model = MODELS[name]
    lengths = data.draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=5))
    budgets = data.draw(
        st.lists(st.floats(0, 1, exclude_min=True, width=32), min_size=len(lengths), max_size=len(lengths))
    )
    side = data.draw(st.sampled_from(["right", "left"]))
    seed = data.draw(st.integers(0, 999))
    batch, requested = batch_of(lengths, name, side, seed), torch.tensor(budgets)
    if name == "bert" and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        outputs = model(**batch, head_budget=requested, output_head_gates=True)
        opened = outputs.head_gates.sum(-1)
        assert ((opened >= 1) & (opened <= 4)).all()
        assert torch.equal(outputs.head_budget, outputs.head_gates.mean((1, 2)))

        more = model(**batch, head_budget=(requested * 1.5).clamp(max=1.0), output_head_gates=True)
        first = more.head_gates[:, 0].sum(-1) >= opened[:, 0]
        assert first.all()  # later layers see another input, the first one the same

        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        permuted = model(**{key: x[order] for key, x in batch.items()}, head_budget=requested[order])
        torch.testing.assert_close(permuted.logits, outputs.logits[order], rtol=1e-4, atol=1e-5)

        row = data.draw(st.integers(0, len(lengths) - 1))
        real = batch["attention_mask"][row].bool()
        single = {key: x[row : row + 1, real] for key, x in batch.items()}
        alone = model(**single, head_budget=requested[row : row + 1])
        # Hidden states: the stock heads, and so ours, read the first position even where that is padding.
        together = model.base_model(**batch, head_budget=requested).last_hidden_state[row, real]
        apart = model.base_model(**single, head_budget=requested[row : row + 1]).last_hidden_state[0]
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
        if side == "right":
            torch.testing.assert_close(alone.logits, outputs.logits[row : row + 1], rtol=1e-4, atol=1e-5)
        assert alone.head_budget[0] == outputs.head_budget[row]


def test_any_request_of_all_heads_opens_all(backbone_type):
    model = budgetformer(backbone_type)
    for request in (1.0, torch.ones(4), torch.ones(4, dtype=torch.float64)):
        assert model(**batch_of(LENGTHS, backbone_type), head_budget=request).head_budget.tolist() == [1.0] * 4


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
def test_routers_and_buffers_are_initialised_when_loading_a_plain_checkpoint(backbone_type, cls, tmp_path):
    """Traps 2, 3, 4: out-of-tree modules are skipped, get BERT's initialisation, or stay unwritten memory."""
    model = cls.from_pretrained(stock_folder(backbone_type, tmp_path, hidden_size=64, num_attention_heads=8))
    base = model.base_model if cls is BudgetFormerForSequenceClassification else model
    router, multiplier = base.encoder.layer[1].router, base.config.router_lr_multiplier
    assert router.scorer.weight.std().item() * multiplier == pytest.approx(0.3, rel=0.15)
    assert router.controller.hidden.weight.std().item() * multiplier == pytest.approx(0.3, rel=0.15)
    assert not router.controller.output.weight.any()
    assert not router.scorer.bias.any()
    assert torch.sigmoid(base.own_budget()).item() == pytest.approx((0.5 - 1 / 8) / (1 - 1 / 8))
    assert base.exploration.steps.item() == 0
    longest = base.config.max_position_embeddings
    assert torch.equal(base.embeddings.position_ids, torch.arange(longest)[None])
    assert not base.embeddings.token_type_ids.any()


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
        assert model.base_model.exploration.steps.item() == 1
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
    with pytest.raises(TypeError, match=r"head_mask.*head_budget"):
        budgetformer(backbone_type)(**batch_of([3], backbone_type), head_mask=torch.ones(3, 4))


# Training and evaluation


def test_inference_is_deterministic_and_counts_nothing(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    labels = torch.tensor([0, 1, 2, 0])
    first, second = model(**batch, labels=labels), model(**batch, labels=labels)
    assert torch.equal(first.logits, second.logits)
    assert first.aux_loss is None
    with torch.no_grad():
        model.train()(**batch)
    assert model.base_model.exploration.steps.item() == 0


def test_training_reports_the_parts_of_its_loss(backbone_type):
    model = budgetformer(backbone_type).train()
    outputs = model(**batch_of(LENGTHS, backbone_type), labels=torch.tensor([0, 1, 2, 0]))
    log = model.base_model.training_log
    parts = {"task_loss", "need_loss", "budget", "budget_loss", "entropy", "temperature", "progress"}
    assert set(log) == parts | {f"heads/layer_{layer:02}" for layer in range(3)}
    torch.testing.assert_close(outputs.loss, log["task_loss"] + outputs.aux_loss)
    assert not any(value.requires_grad for value in log.values())


def test_every_parameter_gets_a_gradient_whether_a_budget_was_requested_or_not(backbone_type):
    """Distributed training waits for each."""
    for head_budget in (None, 0.5, 1.0):
        model = budgetformer(backbone_type).train()
        model(
            **batch_of(LENGTHS, backbone_type), labels=torch.tensor([0, 1, 2, 0]), head_budget=head_budget
        ).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Bad input: a clear error before anything runs


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"head_budget": 0.0}, ValueError, r"head_budget.*\(0, 1\].*got 0.0"),
        ({"head_budget": 1.5}, ValueError, r"head_budget.*\(0, 1\].*got 1.5"),
        ({"head_budget": float("nan")}, ValueError, r"head_budget.*got nan"),
        ({"head_budget": 3}, ValueError, r"head_budget.*float.*got 3"),
        ({"head_budget": "half"}, ValueError, r"head_budget.*got 'half'"),
        ({"head_budget": torch.tensor([0.5, 0.5])}, ValueError, r"head_budget.*\(4,\).*got.*\(2,\)"),
        ({"head_budget": torch.tensor([1, 1, 1, 1])}, ValueError, r"head_budget.*got a torch.int64"),
        ({"head_budget": torch.tensor([0.5, 0.5, 0.0, 0.5])}, ValueError, r"head_budget.*got tensor"),
        ({"head_budget": torch.tensor([0.5, 0.5, float("nan"), 0.5])}, ValueError, r"head_budget.*got tensor"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, ValueError, r"labels.*\[0, 3\).*got \[0, 1, 3, 0\]"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, r"labels.*\[0, 3\)"),
        ({"attention_mask": torch.ones(4, 5)}, ValueError, r"attention_mask.*\(4, 12\).*got \(4, 5\)"),
        ({"inputs_embeds": torch.ones(4, 12, 16)}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds.*neither"),
        ({"budget": 0.5}, TypeError, r"\['budget'\]"),
        ({"executor": "fast"}, ValueError, r"executor.*\['auto', 'sparse', 'masked'\], got 'fast'"),
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
    with pytest.raises(ValueError, match=r"input_ids must hold at least one input.*got shape"):
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


def test_the_stock_model_of_the_same_name_stays_untouched(backbone_type):
    """Importing the package patches nothing."""
    stock = stock_classifier(backbone_type)
    assert not any("router" in name for name in stock.state_dict())


def test_all_heads_asked_for_at_inference_are_not_routed(backbone_type):
    """What routers would say is known, so they need no time; while learning they are asked all the same."""
    model, asked = budgetformer(backbone_type), []
    for layer in model.base_model.encoder.layer:
        layer.router.register_forward_hook(lambda *_: asked.append(1))
    ids = batch_of([6, 6, 6])["input_ids"]
    outputs = [model(ids, head_budget=1.0, output_head_gates=True, executor=x) for x in ("auto", "masked")]
    outputs.append(model(ids, head_budget=torch.ones(3), output_head_gates=True))
    assert asked == []
    assert all(output.head_gates.all() and output.head_budget.eq(1.0).all() for output in outputs)
    model(ids, head_budget=torch.tensor([1.0, 1.0, 0.5]))
    assert asked
    asked.clear()
    model.train()(ids, labels=torch.zeros(3, dtype=torch.int64), head_budget=1.0).loss.backward()
    assert asked
