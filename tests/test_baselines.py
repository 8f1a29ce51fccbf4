"""Models that are cut down: their answers are those of the whole model with the same heads open."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from conftest import STOCK, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetCallback
from hf_budgetformer.tools.baselines import drop_layers, head_importance, most_important, prune
from hf_budgetformer.tools.profiling import profile


HEADS = [[0, 2], [3], [0, 1, 3]]  # of 3 layers of 4


def with_open(model, heads):
    """What `model` answers with the same heads open for all inputs."""
    for layer, kept in zip(model.base_model.encoder.layer, heads, strict=True):
        chosen = torch.zeros(4).index_fill(0, torch.tensor(kept), 1.0)
        layer.router._choose = lambda count, scores, chosen=chosen: chosen.expand_as(scores)
    return lambda **batch: model(**batch, executor="masked", output_head_gates=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("executor", ["auto", "sparse", "masked"])
@torch.no_grad()
def test_a_pruned_model_equals_the_masked_one(backbone_type, executor, side):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type, side=side)
    pruned = prune(model, HEADS)
    got, expected = pruned(**batch, executor=executor, output_head_gates=True), with_open(model, HEADS)(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.head_gates, expected.head_gates)
    assert got.head_budget.tolist() == [0.5] * 3


def test_a_pruned_model_is_smaller_has_no_routers_and_counts_right(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    pruned = prune(model, HEADS)
    assert not any("router" in name or "own_budget" in name for name in pruned.state_dict())
    attention = pruned.base_model.encoder.layer[1].attention
    assert attention.self.query.weight.shape == (4, 16)
    assert attention.output.dense.weight.shape == (16, 4)
    found = profile(pruned, batch)
    assert found.head_share == 0.5
    assert found.sparse["router"] == 0
    assert found.sparse["projections"] == 8 * 16 * 4 * 6 * 19


def test_a_pruned_model_trains_and_comes_back_from_its_folder(backbone_type, tmp_path):
    pruned = prune(budgetformer(backbone_type), HEADS)
    rows = [{"input_ids": [5, 6, 7], "labels": 1, "teacher_logits": [0.1, 2.0, 0.0]}] * 4
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    Trainer(pruned, arguments, train_dataset=rows).train()
    pruned.eval().save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.config.static_heads == HEADS
    for name, value in pruned.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = batch_of([5, 3], backbone_type)
    torch.testing.assert_close(again(**batch).logits, pruned(**batch).logits)


def test_a_pruned_model_can_be_pruned_again(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([9, 4], backbone_type)
    less = [[2], [3], [0, 3]]
    twice, once = prune(prune(model, HEADS), less), prune(model, less)
    assert torch.equal(twice(**batch).logits, once(**batch).logits)
    with pytest.raises(ValueError, match=r"heads must be among those the model still has.*\[0, 2\].*\[\[1\]"):
        prune(prune(model, HEADS), [[1], [3], [0]])


def test_a_pruned_model_takes_no_budget_and_no_callback(tmp_path):
    pruned = prune(budgetformer("bert"), HEADS)
    with pytest.raises(ValueError, match=r"head_budget must be None.*static.*0\.5"):
        pruned(**batch_of([3]), head_budget=0.5)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True)
    rows = [{"input_ids": [5, 6, 7], "labels": 1}] * 4
    with pytest.raises(TypeError, match="BudgetFormer model with routers"):
        Trainer(pruned, arguments, train_dataset=rows, callbacks=[BudgetCallback()]).train()


def test_pruning_refuses_what_is_no_list_of_heads():
    with pytest.raises(StrictDataclassClassValidationError, match="static_heads"):
        prune(budgetformer("bert"), [[0], [1], []])
    with pytest.raises(ValueError, match="model must be a BudgetFormer model, got Bert"):
        prune(STOCK["bert"][2](stock_config("bert")), HEADS)


def test_fewer_layers_are_the_first_ones(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([9, 4], backbone_type)
    shallow = drop_layers(model, 2)
    asked = model.base_model(**batch, head_budget=1.0, output_hidden_states=True).hidden_states[2]
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(shallow.base_model(**batch).last_hidden_state[mask], asked[mask], rtol=1e-5, atol=1e-5)
    assert len(model.base_model.encoder.layer) == 3  # left as it was
    with pytest.raises(ValueError, match="count must be from 1 to 3, got 4"):
        drop_layers(model, 4)


def labelled(backbone_type):
    return [{**batch_of([9, 4, 6], backbone_type, seed=seed), "labels": torch.tensor([0, 1, 2])} for seed in range(3)]


def test_importance_picks_the_planted_head(backbone_type):
    """All heads but one write nothing, so only that one can matter."""
    model, planted = budgetformer(backbone_type), [1, 3, 2]
    with torch.no_grad():
        for layer, head in zip(model.base_model.encoder.layer, planted, strict=True):
            keep = torch.zeros(16).index_fill(0, torch.arange(head * 4, head * 4 + 4), 1.0)
            layer.attention.output.dense.weight *= keep
    importance = head_importance(model, labelled(backbone_type))
    assert importance.argmax(-1).tolist() == planted
    assert importance.sum(-1).tolist() == pytest.approx([1.0] * 3)  # all others are zero
    assert most_important(importance, 3) == [[head] for head in planted]


def test_importance_is_the_mean_of_the_gates_gradients(backbone_type):
    model, [batch] = budgetformer(backbone_type), labelled(backbone_type)[:1]
    model.train()
    found = head_importance(model, [batch])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    slopes = torch.zeros(3, 4)
    for row in range(3):
        single = {name: x[row : row + 1] for name, x in batch.items()}
        for layer, head in [(layer, head) for layer in range(3) for head in range(4)]:
            dense = model.base_model.encoder.layer[layer].attention.output.dense
            columns, losses = slice(head * 4, head * 4 + 4), []
            before = dense.weight[:, columns].clone()
            for gate in (1.01, 0.99):
                with torch.no_grad():
                    dense.weight[:, columns] = before * gate
                    losses.append(model(**single, head_budget=1.0).loss)
                    dense.weight[:, columns] = before
            slopes[layer, head] += ((losses[0] - losses[1]) / 0.02).abs()
    torch.testing.assert_close(found, slopes / slopes.norm(dim=-1, keepdim=True), rtol=2e-2, atol=2e-2)


def test_importance_of_what_is_left_of_a_pruned_model(backbone_type):
    importance = head_importance(prune(budgetformer(backbone_type), HEADS), labelled(backbone_type))
    assert [row.nonzero().flatten().tolist() for row in importance] == HEADS
    with pytest.raises(ValueError, match="batches must have labels"):
        head_importance(budgetformer(backbone_type), [batch_of([3], backbone_type)])


def test_the_most_important_heads_leave_no_layer_without_any():
    importance = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.0, 0.0]])
    assert most_important(importance, 4) == [[0, 1, 2], [1]]
    assert most_important(importance, 4, per_layer=True) == [[0, 1], [0, 1]]
    assert most_important(importance, 8) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"count must be a number from 2 to 8, got 1"):
        most_important(importance, 1)
    with pytest.raises(ValueError, match=r"a multiple of 2, from 2 to 8, got 3"):
        most_important(importance, 3, per_layer=True)
