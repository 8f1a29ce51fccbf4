"""The recipe: teacher logits through a column, mixed rows, a full model that stays as it is, and the two stages."""

import copy
import json
import os

import pytest
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from conftest import STOCK, budgetformer, equal_shares, stock_classifier, stock_config
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits
from hf_budgetformer.tools.recipe import label_names, last_checkpoint, taught_rows, train_classifier
from hf_budgetformer.tools.training import mix_rows


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
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    first = add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:]
    assert calls
    calls.clear()
    assert add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:] == first
    assert not calls
    with torch.no_grad():
        teacher.classifier.bias += 1.0
    assert add_teacher_logits(rows, teacher, tokenizer)["teacher_logits"][:] != first
    assert calls


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


# Mixed rows


def marked_rows(kind):
    """30 rows, the words of each a token of its own, and one of special tokens alone; of pairs as BERT or RoBERTa."""
    rows = {"input_ids": [], "labels": []}
    for row in range(30):
        words = [5 + row] * (row + 1)
        half = len(words) // 2
        parts = {
            "single": words,
            "bert": [*words[:half], 3, *words[half:]],
            "roberta": [*words[:half], 3, 3, *words[half:]],
        }
        rows["input_ids"].append([2, *parts[kind], 3])
        rows["labels"].append(row % 3)
    rows["input_ids"].append([2, 3])
    rows["labels"].append(0)
    if kind == "bert":
        rows["token_type_ids"] = [[min(place, 1) for place in range(len(row))] for row in rows["input_ids"]]
    rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("kind", ["single", "bert", "roberta"])
def test_a_mixed_row_has_a_span_of_another_row_and_else_stays_as_it_is(tokenizer, kind):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = marked_rows(kind)
    mixed = mix_rows(rows, 2, tokenizer)
    assert mixed.column_names == [name for name in rows.column_names if name != "labels"]
    assert mixed.features == {name: rows.features[name] for name in mixed.column_names}
    assert len(mixed) == 2 * len(rows)
    changed_rows = 0
    for number, new in enumerate(mixed):
        old = rows[number % len(rows)]
        assert {name: new[name] for name in new if name != "input_ids"} == {
            name: old[name] for name in new if name != "input_ids"
        }
        assert [x if x < 5 else 0 for x in new["input_ids"]] == [x if x < 5 else 0 for x in old["input_ids"]]
        words = [
            (before, after) for before, after in zip(old["input_ids"], new["input_ids"], strict=True) if before >= 5
        ]
        changed = [place for place, (before, after) in enumerate(words) if before != after]
        if changed:
            changed_rows += 1
            assert changed == list(range(changed[0], changed[-1] + 1))
            assert len({words[place][1] for place in changed}) == 1
            assert len(changed) <= max(1, len(words) / 2)
    assert changed_rows > 0.8 * len(mixed)


def test_mixed_rows_depend_on_the_rows_and_the_seed_alone(tokenizer, tokenized):
    first = mix_rows(tokenized, 1, tokenizer)["input_ids"][:]
    set_seed(7)
    assert mix_rows(tokenized.with_format("torch"), 1, tokenizer)["input_ids"][:] == first
    assert mix_rows(tokenized, 1, tokenizer, seed=1)["input_ids"][:] != first
    twice = mix_rows(tokenized, 2, tokenizer)["input_ids"][:]
    assert twice[:64] == first
    assert twice[64:] != first


def test_what_cannot_be_mixed_is_refused(tokenizer, tokenized, texts):
    for times in (0, -1, 0.5):
        with pytest.raises(ValueError, match=f"times must be an integer >= 1, got {times}"):
            mix_rows(tokenized, times, tokenizer)
    with pytest.raises(ValueError, match=r"must have a column 'input_ids', got the columns \['text', 'label'\]"):
        mix_rows(texts, 1, tokenizer)


# Rows for a narrow encoder


@pytest.mark.parametrize("mixed", [0, 1, 2])
def test_taught_rows_are_given_unlabelled_and_mixed_ones_with_the_teachers_answers(tokenizer, tokenized, mixed):
    teacher = stock_teacher().eval()
    rows, unlabelled = tokenized.select(range(40)), tokenized.select(range(40, 64)).remove_columns("label")
    taught = taught_rows(rows.with_format("torch"), teacher, tokenizer, unlabelled, mixed, seed=2)
    assert len(taught) == 64 * (1 + mixed)
    assert taught.column_names == [*unlabelled.column_names, "teacher_logits", "labels"]
    assert taught["input_ids"][:64] == tokenized["input_ids"][:]
    if mixed:
        assert taught["input_ids"][64:] == mix_rows(tokenized, mixed, tokenizer, seed=2)["input_ids"][:]
    for row in taught.select(range(0, len(taught), 9)):
        with torch.no_grad():
            logits = teacher(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), logits, rtol=1e-4, atol=1e-5)
        assert row["labels"] == logits.argmax().item()


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_teacher_of_another_kind_gives_labels_of_its_kind(tokenizer, tokenized, problem):
    teacher = stock_teacher(num_labels=1 if problem == "regression" else 3, problem_type=problem)
    taught = taught_rows(tokenized.select(range(8)), teacher, tokenizer)
    logits = torch.tensor(taught["teacher_logits"][:])
    expected = logits[:, 0] if problem == "regression" else (logits > 0).float()
    torch.testing.assert_close(torch.tensor(taught["labels"][:]), expected)


def test_rows_that_cannot_be_taught_are_refused(tokenizer, tokenized, texts):
    with pytest.raises(ValueError, match="mixed must be an integer >= 0, got -1"):
        taught_rows(tokenized, stock_teacher(), tokenizer, mixed=-1)
    with pytest.raises(ValueError, match=r"must have a column 'input_ids', got the columns \['text', 'label'\]"):
        taught_rows(texts, stock_teacher(), tokenizer)


# A full model that stays as it is


def test_the_plain_trainer_trains_the_narrow_encoder_alone_from_the_column(
    backbone_type, tokenizer, tokenized, tmp_path
):
    fine_tuned = stock_classifier(backbone_type)
    fine_tuned.save_pretrained(tmp_path / "fine-tuned")
    rows = add_teacher_logits(tokenized, str(tmp_path / "fine-tuned"), tokenizer)
    model = BudgetFormerForSequenceClassification.from_pretrained(
        tmp_path / "fine-tuned", freeze_full=True, opening_order=equal_shares()
    )
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
    record = train_classifier(plain, texts, arguments_for(tmp_path / "out"), validation=texts)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    before = AutoModelForSequenceClassification.from_pretrained(plain)
    assert not torch.equal(teacher.classifier.weight, before.classifier.weight)
    for name, value in teacher.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.is_trained()
    assert model.config.freeze_full
    assert model.config.margins is not None
    assert record["teacher"] == str(tmp_path / "out" / "teacher")
    assert 0.0 <= record["validation"]["eval_accuracy"] <= 1.0


def test_the_last_checkpoint_is_whole_unfinished_and_of_this_run(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "max_steps": 12}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-11").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11, "max_')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "record.json").write_text("{}")
    later = (tmp_path / "record.json").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "record.json", ns=(later, later))
    assert last_checkpoint(tmp_path, since=tmp_path / "record.json") is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_run_goes_on_from_its_last_checkpoint_in_either_stage(plain, texts, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": "last", "lr_scheduler_type": "constant"}
    train_classifier(plain, texts, arguments_for(tmp_path / "out", **options))
    weights = [tmp_path / "out" / name for name in ("model.safetensors", "teacher/model.safetensors")]
    before = [path.read_bytes() for path in weights]
    taught = weights[1].stat().st_mtime_ns
    weights[0].write_bytes(before[0][:100])
    train_classifier(plain, texts, arguments_for(tmp_path / "out", **options))
    assert weights[1].stat().st_mtime_ns == taught
    assert [path.read_bytes() for path in weights] == before
    (tmp_path / "out" / "teacher" / "budgetformer" / "training.json").unlink()
    weights[1].write_bytes(before[1][:100])
    train_classifier(plain, texts, arguments_for(tmp_path / "out", **options))
    assert [path.read_bytes() for path in weights] == before


def test_a_fine_tuned_checkpoint_stays_as_it_is(plain, texts, tmp_path):
    record = train_classifier(plain, texts, arguments_for(tmp_path / "out"), fine_tuned=True)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, value in AutoModelForSequenceClassification.from_pretrained(plain).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not (tmp_path / "out" / "teacher").exists()
    assert record["teacher"] == plain
    again = train_classifier(str(tmp_path / "out"), texts, arguments_for(tmp_path / "again"), fine_tuned=True)
    assert again["base_model"] == str(tmp_path / "out")


def test_both_learn_together_without_a_teacher(plain, texts, tmp_path):
    record = train_classifier(plain, texts, arguments_for(tmp_path / "out", logging_steps=1), together=True)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    before = AutoModelForSequenceClassification.from_pretrained(plain)
    assert not torch.equal(model.classifier.weight, before.classifier.weight)
    assert not model.config.freeze_full
    assert {"task_loss", "divergence"} <= record["log_history"][0].keys()


@pytest.mark.parametrize(
    ("options", "rows", "steps"),
    [({}, 128, 8), ({"mixed": 0}, 64, 8), ({"mixed": 3}, 256, 16), ({"unlabelled": 2}, 384, 24)],
)
def test_the_narrow_encoder_takes_twice_the_steps_or_as_many_as_reading_every_row_takes(
    plain, texts, tmp_path, options, rows, steps
):
    if "unlabelled" in options:
        options = {"unlabelled": concatenate_datasets([texts.remove_columns("label")] * options["unlabelled"])}
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 16}
    arguments = arguments_for(tmp_path / "out", **settings, logging_steps=1, lr_scheduler_type="constant")
    record = train_classifier(plain, texts, arguments, **options)
    assert record["narrow"]["rows"] == rows
    assert record["narrow"]["unlabelled"] == len(options.get("unlabelled", []))
    assert [entry["learning_rate"] for entry in record["log_history"] if "loss" in entry] == [6e-4] * steps
    assert record["arguments"]["learning_rate"] == arguments.learning_rate == 1e-3  # those given, and unchanged
    assert BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out").narrow.steps == steps


def test_a_number_of_steps_holds_for_both_stages_and_the_rate_of_the_narrow_encoder_can_be_set(plain, texts, tmp_path):
    arguments = arguments_for(tmp_path / "out", logging_steps=1, lr_scheduler_type="constant")
    record = train_classifier(plain, texts, arguments, narrow_learning_rate=2e-4)
    assert [entry["learning_rate"] for entry in record["log_history"] if "loss" in entry] == [2e-4] * 2


def test_a_fine_tuned_model_is_taught_by_texts_that_nobody_labelled(plain, texts, tmp_path):
    unlabelled = texts.remove_columns("label")
    before = AutoModelForSequenceClassification.from_pretrained(plain)
    arguments = arguments_for(tmp_path / "out")
    record = train_classifier(plain, texts.select(range(8)), arguments, fine_tuned=True, unlabelled=unlabelled)
    assert (record["rows"], record["narrow"]["rows"], record["narrow"]["unlabelled"]) == (8, 144, 64)
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_stage_two_cannot_take_is_refused_before_anything_is_trained(plain, texts, tmp_path):
    arguments = arguments_for(tmp_path / "out")
    unlabelled = texts.remove_columns("label")
    for message, options in {
        "narrow_learning_rate must be a float > 0, got 0": {"narrow_learning_rate": 0},
        "mixed must be an integer >= 0, got 0.5": {"mixed": 0.5},
        "unlabelled must be None with together=True": {"unlabelled": unlabelled, "together": True},
        'unlabelled must be None .*router="layer"': {"unlabelled": unlabelled, "router": "layer"},
        r"text_pair where train has it, got the columns \['text', 'text_pair'\]": {
            "unlabelled": unlabelled.add_column("text_pair", unlabelled["text"][:])
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            train_classifier(plain, texts, arguments, **options)
    assert not (tmp_path / "out").exists()


def test_the_papers_routers_are_taught_too(plain, texts, tmp_path):
    record = train_classifier(plain, texts, arguments_for(tmp_path / "out", logging_steps=1), router="layer")
    assert "distillation_loss" in record["log_history"][0]
    assert record["narrow"] == {}
    assert max(entry.get("learning_rate", 0.0) for entry in record["log_history"]) == 1e-3
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
