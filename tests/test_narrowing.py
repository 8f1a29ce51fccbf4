"""What the narrow encoder is made of, and models that are cut down to a budget."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from conftest import STOCK, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetFormerModel
from hf_budgetformer.tools.narrowing import cut, order_units, unit_importance


def labelled(backbone_type):
    return [{**batch_of([9, 4, 6], backbone_type, seed=seed), "labels": torch.tensor([0, 1, 2])} for seed in range(3)]


def parts_of(layer):
    """Attention output and second feed-forward matrix of a full layer; both backbones name them alike."""
    return layer.attention.output.dense, layer.output.dense


# Order of the units


def test_importance_is_the_mean_slope_of_the_loss_in_a_gate(backbone_type):
    model, [batch] = budgetformer(backbone_type), labelled(backbone_type)[:1]
    importances = unit_importance(model, [batch])
    for index, layer in enumerate(model.base_model.encoder.layer):
        attention, feed_forward = parts_of(layer)
        for dense, size, importance in (
            (attention, 4, importances[index].heads),
            (feed_forward, 1, importances[index].neurons),
        ):
            for unit in range(0, len(importance), 3):
                slope = 0.0
                for row in range(3):
                    single = {name: x[row : row + 1] for name, x in batch.items()}
                    slope += abs(slope_of_loss(model, dense, slice(unit * size, (unit + 1) * size), single))
                assert importance[unit].item() == pytest.approx(slope, rel=0.03, abs=2e-3)


def slope_of_loss(model, dense, columns, batch):
    """By differences: of the full model's loss, in a factor of some columns."""
    before, losses = dense.weight[:, columns].clone(), []
    with torch.no_grad():
        for gate in (1.02, 0.98):
            dense.weight[:, columns] = before * gate
            losses.append(model(**batch, budget=1.0).loss.item())
        dense.weight[:, columns] = before
    return (losses[0] - losses[1]) / 0.04


def test_importance_leaves_the_model_as_it_was(backbone_type):
    model = budgetformer(backbone_type).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unit_importance(model, labelled(backbone_type))
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in model.base_model.encoder.layer:
        assert not any(part._forward_pre_hooks for part in layer.modules())


def test_units_that_matter_most_come_first(backbone_type):
    """All heads and neurons but one of each layer write nothing, so only those can matter."""
    model, heads, neurons = budgetformer(backbone_type), [1, 3, 2], [23, 5, 17]
    with torch.no_grad():
        for layer, head, neuron in zip(model.base_model.encoder.layer, heads, neurons, strict=True):
            attention, feed_forward = parts_of(layer)
            attention.weight.mul_((torch.arange(16) // 4 == head).float())
            feed_forward.weight.mul_((torch.arange(24) == neuron).float())
    model.narrow.steps += 5
    order_units(model, labelled(backbone_type))
    assert model.narrow.steps == 0
    for narrow, layer, head, neuron in zip(
        model.narrow.layer, model.base_model.encoder.layer, heads, neurons, strict=True
    ):
        attention, feed_forward = parts_of(layer)
        assert torch.equal(narrow.attention_output.weight[:, :4], attention.weight[:, 4 * head : 4 * head + 4])
        assert torch.equal(narrow.down.weight[:, 0], feed_forward.weight[:, neuron])


def test_models_and_batches_that_tell_nothing_are_refused(backbone_type):
    model = budgetformer(backbone_type)
    with pytest.raises(ValueError, match=r"batches must have labels, got one with the keys \['attention_mask', 'input"):
        order_units(model, [batch_of([3], backbone_type)])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        order_units(model, [])
    with pytest.raises(ValueError, match="must have a narrow encoder, got one with router='layer'"):
        order_units(budgetformer(backbone_type, router="layer"), labelled(backbone_type))
    for wrong in (STOCK[backbone_type][2](stock_config(backbone_type)), cut(model, 0.25)):
        with pytest.raises(ValueError, match=f"with a full encoder, got {type(wrong).__name__}: make one"):
            order_units(wrong, labelled(backbone_type))


# Cut models


@pytest.mark.parametrize("executor", ["auto", "masked"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
@torch.no_grad()
def test_a_cut_model_answers_as_the_model_does_at_that_budget(backbone_type, budget, executor):
    model, batch = budgetformer(backbone_type, narrow_budget=0.5), batch_of([9, 4, 6, 6], backbone_type)
    small = cut(model, budget)
    expected = model(**batch, budget=budget, executor="auto")
    got = small(**batch, executor=executor)
    assert torch.equal(got.budget, expected.budget)
    if executor == "auto":
        assert torch.equal(got.logits, expected.logits)
    else:
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cut_model_can_be_cut_again_and_asked_for_less(backbone_type):
    model, batch = budgetformer(backbone_type, narrow_budget=0.5), batch_of([9, 4], backbone_type)
    small = cut(model, 0.4)
    expected = model(**batch, budget=0.2).logits
    assert torch.equal(cut(small, 0.2)(**batch).logits, expected)
    assert torch.equal(small(**batch, budget=0.2).logits, expected)
    with pytest.raises(ValueError, match=r"budget must be at most 0.4 for a model that was cut to it, got 0.5"):
        small(**batch, budget=0.5)
    with pytest.raises(ValueError, match=r"budget must be at most 0.4 for a model that was cut to it, got 1"):
        small(**batch, budget=1.0)


def test_a_cut_model_is_really_smaller(backbone_type):
    model = budgetformer(backbone_type, narrow_budget=0.5)
    small = cut(model, 0.25)
    assert all(name.startswith(("narrow.", f"{backbone_type}.embeddings.")) for name in small.state_dict())
    for layer, heads in zip(small.narrow.layer, small.narrow.widest.counts.heads, strict=True):
        assert layer.attention_output.weight.shape == (16, 4 * max(1, heads))
    assert small.num_parameters() < model.num_parameters() / 2


@pytest.mark.parametrize("columns", [("labels",), ("teacher_logits",), ("labels", "teacher_logits")])
def test_a_cut_model_trains_from_labels_and_a_teacher_and_comes_back_from_its_folder(backbone_type, columns, tmp_path):
    small = cut(budgetformer(backbone_type), 0.25)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    row = {"labels": 1, "teacher_logits": [0.1, 2.0, 0.0]}
    rows = [{"input_ids": [5, 6, 7], **{name: row[name] for name in columns}}] * 8
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(small, arguments, train_dataset=rows).train()
    for name in ("narrow.head", "narrow.layer.0.qkv.weight", f"{backbone_type}.embeddings.word_embeddings.weight"):
        changed = [key for key in before if key.startswith(name)]
        assert any(not torch.equal(small.state_dict()[key], before[key]) for key in changed), name
    small.eval().save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.state_dict().keys() == small.state_dict().keys()
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = batch_of([5, 3], backbone_type)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, small(**batch).logits)


def test_the_loss_of_a_cut_model_is_shared_between_labels_and_teacher(backbone_type):
    small = cut(budgetformer(backbone_type, distillation_weight=0.25), 0.25).train()
    batch = {**batch_of([5, 4, 3], backbone_type)}
    labels, teacher = torch.tensor([0, 1, 2]), torch.randn(3, 3)
    alone = small(**batch, labels=labels).loss
    logits = small(**batch).logits
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(logits, labels))
    taught = small(**batch, teacher_logits=teacher).loss / 0.25
    both = small(**batch, labels=labels, teacher_logits=teacher).loss
    torch.testing.assert_close(both, 0.75 * alone + 0.25 * taught)


def test_what_cannot_be_cut_is_named(backbone_type):
    model = budgetformer(backbone_type)
    for budget in (0.5, 1, 0.0, None):
        with pytest.raises(
            ValueError, match=rf"budget must be a float in \(0, 0.25\], the narrow budget, got {budget}"
        ):
            cut(model, budget)
    with pytest.raises(ValueError, match=r"budget must pay for a unit at least, 0\.0\d+, got 1e-06"):
        cut(model, 1e-6)
    for wrong in (STOCK[backbone_type][2](stock_config(backbone_type)), budgetformer(backbone_type, router="layer")):
        with pytest.raises(ValueError, match=f"with a narrow encoder, got {type(wrong).__name__}"):
            cut(wrong, 0.25)
    with pytest.raises(ValueError, match="must have a classification head, got BudgetFormerModel"):
        cut(BudgetFormerModel(model.config), 0.25)
