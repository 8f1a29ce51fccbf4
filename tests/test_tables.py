"""Labelled texts from files: what is read, and what is said of what cannot be."""

import itertools
import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from conftest import budgetformer, stock_classifier, stock_config
from hf_budgetformer.tools.batching import batches_by_length
from hf_budgetformer.tools.checkpoints import load_classifier
from hf_budgetformer.tools.tables import label_ids, label_values, read_rows, read_table


ROWS = [{"text": 'w1, "w2"', "label": 0}, {"text": "w3\nw4 é", "label": 2}, {"text": "", "label": 1}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def files(folder):
    """The same rows in every format."""
    lines = [json.dumps(row) for row in ROWS]
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return {
        "parquet": str(folder / "rows.parquet"),
        "csv": write(folder / "rows.csv", '\ufefftext,label\r\n"w1, ""w2""",0\r\n"w3\nw4 é",2\r\n,1\r\n'),
        "jsonl": write(folder / "rows.jsonl", "\n".join([lines[0], "", *lines[1:]])),
        "lines": write(folder / "lines.json", "\n".join(lines) + "\n"),
        "array": write(folder / "array.json", json.dumps(ROWS, indent=1)),
    }


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "lines", "array"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    source = files(tmp_path)[kind]
    assert read_table(source).to_list() == ROWS
    assert list(read_rows(source)) == [({"text": row["text"]}, None) for row in ROWS]


def test_a_text_file_has_a_text_in_each_line(tmp_path):
    source = write(tmp_path / "rows.txt", "w1 w2\r\n\nw3")
    assert [row["text"] for row, _ in read_rows(source)] == ["w1 w2", "", "w3"]


def test_pairs_and_columns_of_other_names_are_found(tmp_path):
    row = {"sentence": "w1", "other": "w2", "text_pair": "w3", "target": "yes"}
    source = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert read_table(source, columns={"text": "sentence", "label": "target"}).to_list() == [
        {"text": "w1", "text_pair": "w3", "label": "yes"}
    ]
    names = {"text": "sentence", "text_pair": "other"}
    assert list(read_rows(source, columns=names)) == [({"text": "w1", "text_pair": "w2"}, None)]


def test_class_labels_of_a_parquet_file_keep_their_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "rows.parquet")
    assert read_table(str(tmp_path / "rows.parquet")).features["label"].names == ["a", "b", "c"]


def test_splits_of_a_hub_data_set_are_asked_for(monkeypatch):
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits if split is None else splits[split])
    assert read_table("me/data", split="test").to_list() == ROWS[:1]
    with pytest.raises(ValueError, match=r"me/data: split must be one of \['train', 'test'\], got none"):
        read_table("me/data")


BROKEN = {
    "jsonl": (b'{"text": "w1", "label": 1}\n{"text": "w2", "la', "row 1 is not json"),
    "csv": (b"text,label\nw1,1\nw2,1,9\n", "row 1 has more fields than the header"),
    "short.csv": (b"text,label\nw1,1\nw2\n", "row 1 has no 'label'"),
    "quote.csv": (b'text,label\nw1,1\nw2,"1\n', "row 1 is not csv"),
    "latin.csv": (b"text,label\nw1,1\nw\xe9,1\n", "row 1 is not UTF-8 in 'text'"),
    "null.jsonl": (b'{"text": "w1", "label": 1}\n{"text": null, "label": 1}\n', "row 1 has no 'text'"),
    "number.jsonl": (b'{"text": "w1", "label": 1}\n{"text": 5, "label": 1}\n', "row 1 has no text as 'text' but 5"),
    "string.jsonl": (b'{"text": "w1", "label": 1}\n"w2"\n', "row 1 is no mapping of columns but 'w2'"),
    "list.jsonl": (b'{"text": "w1", "label": 1}\n[1, 2]\n', r"row 1 is no mapping of columns but \[1, 2\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named_and_left_out_only_if_asked_to(name, tmp_path, caplog):
    content, message = BROKEN[name]
    source = write(tmp_path / f"rows.{name}", content)
    with pytest.raises(ValueError, match=rf"1 of 2 rows are broken .*: {message}.*--skip-bad"):
        read_table(source)
    assert read_table(source, skip_bad=True).to_list() == [{"text": "w1", "label": 1}]
    assert "1 of 2 rows are broken" in caplog.text


def test_only_some_of_many_broken_rows_are_named(tmp_path):
    lines = [json.dumps({"text": "w1", "label": 0} if row % 100 else {"text": "w1"}) for row in range(1, 1001)]
    with pytest.raises(ValueError, match=r"10 of 1000 rows .* row 99 .* row 499 has no 'label', and 5 more\."):
        read_table(write(tmp_path / "rows.jsonl", "\n".join(lines)))


def test_what_cannot_be_read_at_all_is_said(tmp_path):
    columns = write(tmp_path / "columns.csv", "a,label\nw1,1")
    for message, source, names in [
        (r"columns.csv must have a column 'text', got the columns \['a', 'label'\].*--column text=NAME", columns, {}),
        (r"must have a column 'b', got the columns \['a', 'label'\]", columns, {"text": "b"}),
        (r"must have a column 'pair', got", columns, {"text": "a", "text_pair": "pair"}),
        (r"columns must name those of .* got \['lable'\]", columns, {"lable": "a"}),
        (r"empty.csv must hold at least one row", write(tmp_path / "empty.csv", ""), {}),
        (r"header.csv must hold at least one row", write(tmp_path / "header.csv", "text,label\n"), {}),
        (r"rows.parquet is no parquet file", write(tmp_path / "rows.parquet", "PAR1"), {}),
        (r"rows.json is not json", write(tmp_path / "rows.json", '[{"text": "w1"'), {}),
        (r"name must end in one of .parquet, .csv", write(tmp_path / "rows.xlsx", ""), {}),
    ]:
        with pytest.raises(ValueError, match=message):
            read_table(source, columns=names)
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such file"):
        read_table(str(tmp_path / "none.csv"))


def test_rows_are_read_as_they_are_needed(tmp_path):
    source = write(tmp_path / "rows.jsonl", '{"text": "w1"}\n' * 5000 + "broken")
    assert len(list(itertools.islice(read_rows(source), 5000))) == 5000
    Dataset.from_dict({"text": ["w1"] * 5000}).to_parquet(tmp_path / "rows.parquet", batch_size=1000)
    rows = read_rows(str(tmp_path / "rows.parquet"))
    assert next(rows) == ({"text": "w1"}, None)
    assert sum(1 for _ in rows) == 4999


def test_labels_become_the_models_numbers():
    config = stock_config("bert", num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    rows = lambda labels, **kind: Dataset.from_dict({"text": ["w"] * len(labels), "label": labels}, **kind)  # noqa: E731
    assert label_ids(rows([1, 0]), config).tolist() == [1, 0]
    assert label_ids(rows(["yes", "no"]), config).tolist() == [1, 0]
    assert label_ids(rows([True, False]), config).tolist() == [1, 0]
    turned = stock_config("bert", num_labels=2, id2label={0: "True", 1: "False"}, label2id={"True": 0, "False": 1})
    assert label_ids(rows([True, False]), turned).tolist() == [0, 1]
    for names, expected in ((["yes", "no"], [1, 0]), (["A", "B"], [0, 1])):  # names the model does not know: numbers
        named = rows([0, 1]).cast_column("label", ClassLabel(names=names))
        assert label_ids(named, config).tolist() == expected
    for bad in ([0, 2], [-1, 0], [0.0, 1.0], ["yes", "maybe"]):
        with pytest.raises(ValueError, match=r"integers in \[0, 2\) as 'label', got .*\['no', 'yes'\]"):
            label_ids(rows(bad), config)


def test_several_labels_and_numbers_become_what_a_loss_takes():
    names = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
    several = stock_config("bert", problem_type="multi_label_classification", **names)
    rows = lambda labels, **kind: Dataset.from_dict({"text": ["w"] * len(labels), "label": labels}, **kind)  # noqa: E731
    expected = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    for labels in ([["a", "c"], []], [[2, 0], []], [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]):
        assert label_values(rows(labels), several).tolist() == expected
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["c", "b", "a"]))})
    assert label_values(rows([[0, 2], []], features=features), several).tolist() == expected
    for bad in ([["a", "d"]], [[3]], ["a"], [[0.5, 0.5]]):
        with pytest.raises(
            ValueError, match=r"dataset must have (integers in \[0, 3\)|lists of labels) as 'label', got"
        ):
            label_values(rows(bad), several)
    number = stock_config("bert", num_labels=1)
    assert label_values(rows([1.5, -2.0]), number).tolist() == [1.5, -2.0]
    assert label_values(rows([1, 2]), number).tolist() == [1.0, 2.0]
    for bad in (["a"], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="dataset must have finite numbers as 'label', got"):
            label_values(rows(bad), number)


def test_numbers_of_a_csv_file_are_classes_unless_one_has_a_fraction(tmp_path):
    for labels, expected in ((["1", "0"], [1, 0]), (["1.0", "0.0"], [1, 0]), (["1.5", "2"], [1.5, 2.0])):
        source = write(tmp_path / "rows.csv", "text,label\n" + "".join(f"w,{label}\n" for label in labels))
        column = read_table(source)["label"][:]
        assert [(type(x), x) for x in column] == [(type(x), x) for x in expected]
    with pytest.raises(ValueError, match=r"rows\.jsonl must have labels of one kind"):
        read_table(write(tmp_path / "rows.jsonl", '{"text": "w", "label": 1}\n{"text": "w", "label": "a"}'))


def test_batches_hold_every_row_once_and_little_padding(texts, tokenizer):
    columns, seen = texts[:], []
    for places, batch in batches_by_length(columns, tokenizer, 10, max_length=12):
        again = tokenizer([columns["text"][place] for place in places], truncation=True, max_length=12, padding=True)
        assert batch["input_ids"].tolist() == again["input_ids"]
        seen += places.tolist()
    lengths = [min(12, len(text.split()) + 2) for text in columns["text"]]
    assert sorted(seen) == list(range(64))
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"max_length must be None or an integer >= 1, got {wrong}"):
            next(batches_by_length(columns, tokenizer, 10, max_length=wrong))
    assert [lengths[place] for place in seen] == sorted(lengths)


def test_only_trained_classifiers_load(tmp_path, tokenizer):
    stock = stock_classifier("bert")
    for name, model in {"stock": stock, "ours": budgetformer("bert"), "base": stock.bert}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert not load_classifier(str(tmp_path / "stock"))[0].training
    assert load_classifier(str(tmp_path / "ours"), budgeted=True)[1].model_max_length == tokenizer.model_max_length
    (tmp_path / "none").mkdir()
    for message, name, budgeted in [
        (r"model's folder or Hub id, got .*none without a config.json", "none", False),
        (r"model's folder or Hub id, got .*nowhere: ", "nowhere", False),
        (r"must be a BudgetFormer, got the bert model .*budgetformer train .*stock DATA --output", "stock", True),
        (r"must be a trained classifier, got .*base without classifier.bias, classifier.weight", "base", False),
    ]:
        with pytest.raises(ValueError, match=message):
            load_classifier(str(tmp_path / name), budgeted)
