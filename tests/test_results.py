"""Results beside a checkpoint: one for each data set, and stale ones known as such."""

import json

import pytest

from conftest import budgetformer
from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools.results import read_results, save_result, short_name, write_json


@pytest.fixture
def folder(tmp_path):
    budgetformer("bert", stir=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_result_is_read_as_it_was_saved(folder):
    path = save_result(folder, "evaluation", {"accuracy": 0.75}, "/home/me/data/sst2/test.csv", "test", 872)
    assert path == folder / "budgetformer" / "evaluation" / "sst2-test.csv-test-872-rows.json"
    [record] = read_results(folder, "evaluation")
    assert (record.data, record.split, record.rows) == ("sst2/test.csv", "test", 872)
    assert (record.looks, record.confidence, record.stale) == (None, None, False)
    assert record.result == {"accuracy": 0.75}
    assert "/home/me" not in path.read_text(), "where data lie is nobody's business"
    assert read_results(folder, "costs") == []


def test_a_small_evaluation_does_not_replace_a_large_one(folder):
    save_result(folder, "evaluation", {"accuracy": 0.8}, "me/data", None, 2000)
    save_result(folder, "evaluation", {"accuracy": 1.0}, "me/data", None, 20)
    save_result(folder, "evaluation", {"accuracy": 0.9}, "me/other", None, 500)
    assert [(x.data, x.rows) for x in read_results(folder, "evaluation")] == [
        ("me/data", 2000), ("me/other", 500), ("me/data", 20),
    ]  # fmt: skip
    save_result(folder, "evaluation", {"accuracy": 0.81}, "me/data", None, 2000)
    assert [x.result["accuracy"] for x in read_results(folder, "evaluation")] == [0.81, 0.9, 1.0]


def test_a_result_is_stale_once_the_looks_of_a_plain_call_have_changed(folder):
    save_result(folder, "evaluation", {}, None, None, 3)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "looks": [0.125, 1.0], "confidence": [0.5]})
    [record] = read_results(folder, "evaluation")
    assert record.stale
    assert (record.changed, record.looks) == (("looks",), None)
    save_result(folder, "evaluation", {}, "new", None, 2)
    assert [(x.data, x.stale) for x in read_results(folder, "evaluation")] == [("new", False), (None, True)]
    assert read_results(folder, "evaluation")[0].confidence == [0.5]


def test_a_result_is_stale_once_the_weights_have_changed(folder):
    save_result(folder, "costs", {}, "me/data", None, 3)
    model = BudgetFormerForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder)
    assert not read_results(folder, "costs")[0].stale, "the same weights, saved once more"
    model.classifier.bias.data += 1.0
    model.save_pretrained(folder)
    assert read_results(folder, "costs")[0].changed == ("weights",)


def test_weights_in_several_files_count_too(folder):
    model = BudgetFormerForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_result(folder, "costs", {}, "me/data", None, 3)
    model.classifier.bias.data += 1.0
    model.save_pretrained(folder, max_shard_size="5KB")
    assert read_results(folder, "costs")[0].stale


def test_a_model_of_the_hub_gets_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save_result("me/model", "evaluation", {}, "me/data", None, 3) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_a_damaged_file_is_named(folder, content):
    path = save_result(folder, "tuning", {}, "me/data", None, 3)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name} does not hold what it should"):
        read_results(folder, "tuning")


@pytest.mark.parametrize(
    ("source", "name"),
    [("sst2", "sst2"), ("me/data", "me/data"), ("/a/b/c/test.csv", "c/test.csv"), ("C:\\x\\y", "x/y")],
)
def test_short_name(source, name):
    assert short_name(source) == name


def test_a_file_is_written_at_once(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "deep" / "x.json", {("no", "key"): 1})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
