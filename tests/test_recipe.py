"""The recipe: distillation through a column, and budgets that go where they are needed."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from conftest import STOCK, batch_of, budgetformer, stock_config
from hf_budgetformer import (
    BudgetCallback,
    BudgetFormerConfig,
    BudgetFormerForSequenceClassification,
    add_teacher_logits,
)
from hf_budgetformer.losses import need_loss, teacher_divergence


def stock_teacher(backbone_type="bert", **fields):
    """A stock classifier whose answers differ between inputs."""
    set_seed(3)
    teacher = STOCK[backbone_type][2](stock_config(backbone_type, **fields)).train()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(8.0)
    return teacher


# Teacher logits


def test_the_column_holds_what_the_teacher_says_of_each_row_alone(tokenizer, tokenized, backbone_type):
    teacher = stock_teacher(backbone_type)
    rows = add_teacher_logits(tokenized, teacher, tokenizer, batch_size=5)
    assert teacher.training
    assert rows.column_names == [*tokenized.column_names, "teacher_logits"]
    teacher.eval()
    for index in (0, 7, 63):
        alone = teacher(torch.tensor([tokenized[index]["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(rows[index]["teacher_logits"]), alone.detach(), rtol=1e-4, atol=1e-5)


def test_texts_give_the_same_as_tokens_and_the_teacher_may_be_a_folder(tokenizer, tmp_path):
    texts = {"text": ["a b c", "d", "e f g h i j"], "text_pair": ["b", "c d e", "f"]}
    teacher = stock_teacher()
    teacher.save_pretrained(tmp_path)
    encoded = Dataset.from_dict(dict(tokenizer(texts["text"], texts["text_pair"], truncation=True, max_length=6)))
    of_tokens = add_teacher_logits(encoded, teacher, tokenizer)
    of_texts = add_teacher_logits(Dataset.from_dict(texts), str(tmp_path), tokenizer, max_length=6)
    torch.testing.assert_close(
        torch.tensor(of_texts["teacher_logits"][:]), torch.tensor(of_tokens["teacher_logits"][:])
    )


def test_the_answers_are_cached_by_the_teachers_weights(tokenizer, tokenized, tmp_path, monkeypatch):
    tokenized.save_to_disk(tmp_path)
    rows, teacher = Dataset.load_from_disk(str(tmp_path)), stock_teacher()
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    first = add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:]
    assert asked
    asked.clear()
    assert add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:] == first
    assert not asked
    with torch.no_grad():
        teacher.classifier.bias += 1.0
    assert add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:] != first
    assert asked


def test_rows_that_cannot_be_asked_about_are_refused(tokenizer, tokenized):
    with pytest.raises(ValueError, match=r"'input_ids' or 'text', got the columns \['sentence'\]"):
        add_teacher_logits(Dataset.from_dict({"sentence": ["a"]}), stock_teacher(), tokenizer)
    rows = add_teacher_logits(tokenized.select(range(2)), stock_teacher(), tokenizer)
    with pytest.raises(ValueError, match=r"must not have a column 'teacher_logits' yet"):
        add_teacher_logits(rows, stock_teacher(), tokenizer)


@pytest.mark.parametrize("wrong", [torch.zeros(4, 2), torch.zeros(3, 3), torch.zeros(4), torch.zeros(4, 3).long()])
def test_teacher_logits_of_another_size_are_refused(wrong, backbone_type):
    model = budgetformer(backbone_type).train()
    with pytest.raises(ValueError, match=r"teacher_logits must be a float tensor of shape \(4, 3\).*got torch\."):
        model(**batch_of([5, 4, 3, 2], backbone_type), labels=torch.zeros(4).long(), teacher_logits=wrong)
    assert not model.base_model.training_log.keys() & {"task_loss", "distillation_loss", "need_loss"}


def test_the_loss_is_shared_between_task_and_teacher(backbone_type):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "distillation_weight": 0.5}
    model, batch = budgetformer(backbone_type, **still).train(), batch_of([5, 4, 3], backbone_type)
    labels, teacher = torch.tensor([0, 1, 2]), torch.randn(3, 3)
    outputs = model(**batch, labels=labels, teacher_logits=teacher)
    log = model.base_model.training_log
    divergence = teacher_divergence(outputs.logits, teacher, "").mean()
    task = torch.nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(log["distillation_loss"], divergence)
    torch.testing.assert_close(log["task_loss"], task)
    expected = 0.5 * task + 0.5 * divergence + log["need_loss"] + 5.0 * log["budget_loss"]
    torch.testing.assert_close(outputs.loss, expected)
    model.config.distillation_weight = 0.0
    model.config.need_scale = 0.0
    outputs, log = model(**batch, labels=labels, teacher_logits=teacher), model.base_model.training_log
    torch.testing.assert_close(outputs.loss, log["task_loss"] + 5.0 * log["budget_loss"])


def test_need_is_told_the_teachers_divergence_or_else_the_task_loss(monkeypatch):
    from hf_budgetformer import modeling_budgetformer

    told = []
    monkeypatch.setattr(
        modeling_budgetformer, "need_loss", lambda need, cost: (told.append(cost), need_loss(need, cost))[1]
    )
    model, batch = budgetformer("bert").train(), batch_of([5, 4, 3])
    labels, teacher = torch.tensor([0, 1, 2]), torch.randn(3, 3)
    logits = model(**batch, labels=labels, teacher_logits=teacher).logits
    torch.testing.assert_close(told.pop(), teacher_divergence(logits, teacher, ""))
    logits = model(**batch, labels=labels).logits
    torch.testing.assert_close(told.pop(), torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    model(**batch)
    assert told == []


def test_teacher_logits_change_nothing_at_inference(backbone_type):
    model, batch = budgetformer(backbone_type), batch_of([5, 4], backbone_type)
    labels = torch.tensor([0, 1])
    plain, taught = model(**batch, labels=labels), model(**batch, labels=labels, teacher_logits=torch.randn(2, 3))
    assert torch.equal(plain.loss, taught.loss)
    assert torch.equal(plain.logits, taught.logits)


@pytest.mark.parametrize("taught", [True, False])
def test_the_plain_trainer_takes_the_column_or_does_without(taught, tokenizer, tokenized, tmp_path):
    set_seed(0)
    model = budgetformer("bert", stir=False)
    rows = add_teacher_logits(tokenized, stock_teacher(), tokenizer) if taught else tokenized
    arguments = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=16, logging_steps=10,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[BudgetCallback()])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(("distillation_loss" in entry) == taught for entry in logs)
    assert logs[-1]["progress"] == pytest.approx(29 / 30, abs=1e-3)  # exploration ends with the training
    assert logs[-1]["temperature"] < 0.35


# Budgets that follow the need


HARD = 20  # token ids from here on


def planted_model(need_scale):
    """A frozen backbone of one layer in which easy tokens pass through head 0 only and hard ones through all four."""
    set_seed(0)
    stock = stock_config("bert", hidden_size=32, num_hidden_layers=1, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0)  # fmt: skip
    config = BudgetFormerConfig.from_backbone_config(stock, need_scale=need_scale, exploration_steps=150)
    model = BudgetFormerForSequenceClassification(config)
    # Directions free of a mean, so that the layer norm of the embeddings keeps to them.
    basis = torch.linalg.qr(torch.cat([torch.ones(32, 1), torch.randn(32, 31)], 1)).Q[:, 1:]  # (32, 31)
    easy, hard = basis[:, :12], basis[:, 12:24]
    with torch.no_grad():
        embeddings, [layer] = model.bert.embeddings, model.bert.encoder.layer
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        words = embeddings.word_embeddings.weight
        words[:HARD] = torch.randn(HARD, 12) @ easy.T
        words[HARD:] = torch.randn(len(words) - HARD, 12) @ hard.T
        value = torch.randn(32, 32)
        value[8:] = value[8:] @ hard @ hard.T  # heads 1 to 3 are blind to easy tokens
        layer.attention.self.value.weight.copy_(value)
        layer.attention.output.dense.weight.copy_(torch.randn(32, 32))
        for weight in (model.bert.pooler.dense.weight, model.classifier.weight):
            weight.copy_(0.4 * torch.randn_like(weight))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." in name or "own_budget" in name)
    return model


def planted_inputs(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    hard = torch.arange(rows) % 2 == 1
    ids = torch.randint(5, HARD, (rows, 8), generator=generator)
    return torch.where(hard[:, None], ids + HARD, ids), hard


def test_the_hard_half_is_given_more_heads():
    """Half of the inputs need one head, half need all: nothing but their cost tells the router which is which."""
    model = planted_model(need_scale=2.0)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-4, weight_decay=0.0)
    for step in range(150):
        ids, _ = planted_inputs(32, step)
        with torch.no_grad():
            teacher = model.eval()(ids, head_budget=1.0).logits
        model.train()(ids, labels=teacher.argmax(-1), teacher_logits=teacher).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, hard = planted_inputs(200, seed=12345)  # not trained on
    with torch.no_grad():
        heads = model.eval()(ids, head_budget=0.5).head_budget
    assert heads[hard].mean() - heads[~hard].mean() >= 0.25  # one head of four
    assert heads.mean().item() == pytest.approx(0.5, rel=0.2)
