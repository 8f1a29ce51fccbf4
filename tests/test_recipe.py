"""The recipe: teacher logits through a column, a full model that stays as it is, and the two stages."""

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from conftest import STOCK, budgetformer, stock_classifier, stock_config
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits
from hf_budgetformer.tools.recipe import label_names, train_classifier


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


def test_a_budgetformer_teaches_what_its_full_model_says(tokenizer, tokenized):
    model = budgetformer("bert", looks=[0.1])
    rows = add_teacher_logits(tokenized, model, tokenizer)
    with torch.no_grad():
        alone = model(torch.tensor([tokenized[0]["input_ids"]]), budget=1.0).logits[0]
    torch.testing.assert_close(torch.tensor(rows[0]["teacher_logits"]), alone, rtol=1e-4, atol=1e-5)


def test_a_teacher_without_a_trained_head_is_refused(tokenizer, tokenized, tmp_path):
    stock_classifier("bert").bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained classifier, got .* without classifier.bias, classifier.weight"):
        add_teacher_logits(tokenized, str(tmp_path), tokenizer)


# A full model that stays as it is


def test_the_plain_trainer_trains_the_narrow_encoder_alone_from_the_column(
    backbone_type, tokenizer, tokenized, tmp_path
):
    fine_tuned = stock_classifier(backbone_type)
    fine_tuned.save_pretrained(tmp_path / "fine-tuned")
    rows = add_teacher_logits(tokenized, str(tmp_path / "fine-tuned"), tokenizer)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "fine-tuned", freeze_full=True)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=40, learning_rate=3e-3, per_device_train_batch_size=16, logging_steps=10,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    BudgetCallback().attach(trainer)
    trainer.train()
    trainer.evaluate()
    for name, value in fine_tuned.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    logs = [entry["divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1] < logs[0] / 2
    assert model.narrow.steps == 40
    assert model.config.margins is not None


# The two stages


@pytest.fixture
def plain(tmp_path, tokenizer):
    """Folder of a plain classifier of three labels and its tokenizer."""
    stock_classifier("bert").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


def arguments_for(folder, **fields):
    return TrainingArguments(
        str(folder), **{"max_steps": 2, "report_to": "none", "use_cpu": True, "learning_rate": 1e-3, **fields}
    )


def test_two_stages_leave_the_teacher_in_the_model_bit_for_bit(plain, texts, tmp_path):
    found = train_classifier(plain, texts, arguments_for(tmp_path / "out"), validation=texts)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    before = AutoModelForSequenceClassification.from_pretrained(plain)
    assert not torch.equal(teacher.classifier.weight, before.classifier.weight)
    for name, value in teacher.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.is_trained()
    assert model.config.freeze_full
    assert model.config.margins is not None
    assert found["teacher"] == str(tmp_path / "out" / "teacher")
    assert 0.0 <= found["validation"]["eval_accuracy"] <= 1.0


def test_a_fine_tuned_checkpoint_stays_as_it_is(plain, texts, tmp_path):
    found = train_classifier(plain, texts, arguments_for(tmp_path / "out"), fine_tuned=True)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, value in AutoModelForSequenceClassification.from_pretrained(plain).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not (tmp_path / "out" / "teacher").exists()
    assert found["teacher"] == plain
    again = train_classifier(str(tmp_path / "out"), texts, arguments_for(tmp_path / "again"), fine_tuned=True)
    assert again["base_model"] == str(tmp_path / "out")


def test_both_learn_together_without_a_teacher(plain, texts, tmp_path):
    found = train_classifier(plain, texts, arguments_for(tmp_path / "out", logging_steps=1), together=True)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    before = AutoModelForSequenceClassification.from_pretrained(plain)
    assert not torch.equal(model.classifier.weight, before.classifier.weight)
    assert not model.config.freeze_full
    assert {"task_loss", "divergence"} <= found["log_history"][0].keys()


def test_the_papers_routers_are_taught_too(plain, texts, tmp_path):
    found = train_classifier(plain, texts, arguments_for(tmp_path / "out", logging_steps=1), router="layer")
    assert "distillation_loss" in found["log_history"][0]
    assert BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out").narrow is None


def test_labels_that_differ_are_said_and_what_to_do(plain, texts, tmp_path):
    two = texts.filter(lambda row: row["label"] < 2)
    message = r"plain has 3 labels, \['LABEL_0', .*\], the data have 2, \['LABEL_0', 'LABEL_1'\]: .*--new-head"
    with pytest.raises(ValueError, match=message):
        train_classifier(plain, two, arguments_for(tmp_path / "out"))
    train_classifier(plain, two, arguments_for(tmp_path / "out"), new_head=True)
    assert BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2
    named = texts.map(lambda row: {"label": "abc"[row["label"]]})
    with pytest.raises(ValueError, match=r"plain has the labels \['LABEL_0', .*got 'a' in 64 of 64 rows.*--fine-tuned"):
        train_classifier(plain, named, arguments_for(tmp_path / "named"), fine_tuned=True)


def test_a_checkpoint_without_a_head_is_fine_tuned_for_any_labels_but_is_not_fine_tuned(texts, tokenizer, tmp_path):
    stock_classifier("bert").bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"must be a trained classifier, got .*base without classifier.bias"):
        train_classifier(str(tmp_path / "base"), texts, arguments_for(tmp_path / "out"), fine_tuned=True)
    train_classifier(str(tmp_path / "base"), texts, arguments_for(tmp_path / "out"))
    assert BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


def test_labels_of_a_training_set_get_names():
    rows = lambda labels: Dataset.from_dict({"label": labels})  # noqa: E731
    assert label_names(rows(["b", "a", "b"])) == ["a", "b"]
    assert label_names(rows([1, 0, 1])) == ["LABEL_0", "LABEL_1"]
    assert label_names(rows([1, 0]).cast_column("label", ClassLabel(names=["x", "y", "z"]))) == ["x", "y", "z"]
    for labels in (["a", "a"], [1, 2], [-1, 0], [0.5, 1.5]):
        with pytest.raises(ValueError, match="at least two different strings, or integers from 0 on"):
            label_names(rows(labels))
