"""A checkpoint's README: what was measured is in it, what somebody wrote stays, what is wrong is named."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from conftest import budgetformer, stock_folder
from hf_budgetformer.tools import model_card, tuning
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.model_card import write_model_card
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.profiling import BudgetCost, CostCard
from hf_budgetformer.tools.results import save_result, write_json


pytest.importorskip("matplotlib")

PLAIN = BudgetResult(None, 43, 0.86, (0.77, 0.92), 0.95, 0.5)
FULL = BudgetResult(1.0, 45, 0.9, (0.8, 0.95), 1.0, 1.0)
EVALUATION = Evaluation(
    50, [FULL, PLAIN], {name: [0.1 * n for n in range(12)] for name in ("length", "entropy", "spent")}, {"seed": 3}
)
COST = BudgetCost(1.0, 1.0, 1e6, 2.0, 3.0, 400.0, 12.0)
SETTINGS = {"risk": "disagreement", "level": 0.035, "confidence": 0.95, "rows": 5000}
PROMISE = {**SETTINGS, "looks": [0.25, 1.0], "thresholds": [0.6], "bound": 0.03, "lost": 0.004, "doubted": 1000}
MEASURED = {
    "evaluation": EVALUATION.to_dict(),
    "tuning": tuning.Tuning(
        [0.25, 1.0], [0.6], PROMISE, [tuning.TestedLooks(0.25, 0.6, 0.2, 0.45, 0.5, 0.004, 0.03)], SETTINGS
    ).to_dict(),
    "costs": CostCard(
        6543, 6321, replace(COST, throughput=123.0), [COST], None,
        {"cpu": "An abacus", "cores": 2, "gpu": None}, {"torch": "2"},
        {"rows": 50, "batch_size": 32, "threads": 2, "dtype": "float32", "training_seconds": 90.0,
         "tokens": {"real": 7, "padded": 9}},
    ).to_dict(),
}  # fmt: skip
TRAINING = {
    "log_history": [{"step": n, "loss": 1.0, "budget": 0.2, "divergence": 0.5} for n in range(3)],
    "arguments": {"learning_rate": 3e-5, "seed": 3, "output_dir": "/home/somebody/out"},
    "base_model": "bert-base-uncased", "dataset": "stanfordnlp/imdb", "rows": 25000, "seconds": 90.0,
    "teacher": "/home/somebody/out/teacher",
}  # fmt: skip
DATA = "/home/somebody/teapots/reviews.csv"
PLOTS = {"accuracy", "inputs", "time", "training"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "tiny-reviews"
    budgetformer("bert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A folder with the tiny checkpoint's files; the README may be written there."""
    folder = tmp_path / "tiny-reviews"
    folder.mkdir()
    for path in saved.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Spares the time that plots take."""
    for name in ("plot_accuracy", "plot_inputs", "plot_time", "plot_training"):
        monkeypatch.setattr(model_card, name, lambda values, path: path)


def leave(folder, *kinds):
    for kind in kinds:
        if kind == "training":
            write_json(folder / "budgetformer" / "training.json", TRAINING)
        else:
            save_result(folder, kind, MEASURED[kind], DATA, "test", 50)


def drawn(folder):
    return {path.stem for path in folder.rglob("*.png")}


def headings(text):
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_everything_that_was_measured_is_in_it(checkpoint):
    leave(checkpoint, *MEASURED, "training")
    path = write_model_card(str(checkpoint), repo_id="me/reviews", language="en", license="mit")
    assert path == checkpoint / "README.md"
    text = path.read_text()
    assert headings(text) == [
        "What it is", "How to use it", "Accuracy by budget", "The promise", "What it costs",
        "How it was trained", "Limits",
    ]  # fmt: skip
    figures = [
        "90.0%",
        "86.0%",
        "differ from the full model's on at most 3.5% of texts like the 5,000 of the calibration",
        "6,543 parameters",
        "An abacus",
        "3.25x",
        "25,000 rows of",
    ]
    for figure in [
        *figures,
        "stanfordnlp/imdb, taught by out/teacher, in 1.5 minutes",
        "learning_rate: 3e-05",
        "On 50 rows of teapots/reviews.csv, test, by a model whose plain call looks at budgets of 0.0833, then 1",
    ]:
        assert figure in text
    assert "somebody" not in text
    assert drawn(checkpoint) == PLOTS
    assert all(f"](budgetformer/plots/{name}.png)" in text for name in PLOTS)


def test_metadata_goes_through_huggingface_hub_and_back(checkpoint, undrawn):
    leave(checkpoint, *MEASURED, "training")
    data = ModelCard.load(write_model_card(checkpoint, "me/reviews", "en", "mit")).data
    assert data.to_dict() | {"model-index": None} == {
        "language": "en", "license": "mit", "library_name": "transformers", "pipeline_tag": "text-classification",
        "base_model": "bert-base-uncased", "datasets": ["stanfordnlp/imdb"], "metrics": ["accuracy"],
        "tags": ["budgetformer", "adaptive-computation"], "model-index": None,
    }  # fmt: skip
    assert data.model_name == "me/reviews"
    results = [(x.metric_type, x.metric_name, x.metric_value, x.dataset_name) for x in data.eval_results]
    assert results == [
        ("accuracy", "accuracy, budget 1", 0.9, "teapots/reviews.csv"),
        ("accuracy", "accuracy, plain call", 0.86, "teapots/reviews.csv"),
    ]


def test_what_was_not_measured_is_left_out_and_needs_no_matplotlib(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_model_card(checkpoint).read_text()
    assert headings(text) == ["What it is", "How to use it", "Limits"]
    assert "Accuracy was not measured" in text
    assert "![" not in text
    data = ModelCard(text).data.to_dict()
    assert not data.keys() & {"base_model", "datasets", "metrics", "model-index", "license", "language"}
    assert not drawn(checkpoint)


def test_what_somebody_wrote_stays_where_it_is(checkpoint, undrawn):
    leave(checkpoint, "evaluation")
    text = write_model_card(checkpoint).read_text()
    text = text.replace("# tiny-reviews\n", "# Reviews of teapots\n\nBy the teapot club.\n")
    text = text.replace(
        "<!-- budgetformer:begin limits -->",
        "## Intended use\n\nTeapots: \\1 {}.\n\n<!-- budgetformer:begin limits -->",
    )
    text = text.replace("tags:\n", "widget:\n- text: A fine spout.\nlicense: mit\ntags:\n- teapots\n")
    text += "\n## Thanks\n\nTo all pots.  "
    (checkpoint / "README.md").write_text(text)
    before = text
    assert write_model_card(checkpoint).read_text() == before
    leave(checkpoint, "training")
    after = write_model_card(checkpoint).read_text()
    assert headings(after) == [
        "What it is", "How to use it", "Accuracy by budget", "How it was trained", "Intended use", "Limits", "Thanks",
    ]  # fmt: skip
    for written in ("# Reviews of teapots\n\nBy the teapot club.\n", "\n\nTeapots: \\1 {}.\n\n", "\n\nTo all pots.  "):
        assert written in after
    data = ModelCard(after).data
    assert (data["widget"], data.license) == ([{"text": "A fine spout."}], "mit")
    assert data.tags == ["teapots", "budgetformer", "adaptive-computation"]


def test_generated_parts_are_replaced_and_go_with_their_files(checkpoint, undrawn):
    leave(checkpoint, "evaluation", "costs")
    write_model_card(checkpoint)
    shutil.rmtree(checkpoint / "budgetformer" / "costs")
    better = replace(EVALUATION, results=[FULL, replace(PLAIN, accuracy=0.873)])
    save_result(checkpoint, "evaluation", better.to_dict(), DATA, "test", 50)
    text = write_model_card(checkpoint).read_text()
    assert "87.3%" in text
    assert "86.0%" not in text
    assert headings(text) == ["What it is", "How to use it", "Accuracy by budget", "Limits"]
    assert [x.metric_value for x in ModelCard(text).data.eval_results] == [0.9, 0.873]


def test_a_small_evaluation_neither_replaces_a_large_one_nor_is_published_in_its_place(checkpoint, undrawn):
    leave(checkpoint, "evaluation")
    small = replace(EVALUATION, rows=20, results=[replace(FULL, accuracy=0.99)])
    save_result(checkpoint, "evaluation", small.to_dict(), DATA, "test", 20)
    save_result(checkpoint, "evaluation", small.to_dict(), "me/others", None, 20)
    text = write_model_card(checkpoint).read_text()
    assert text.index("On 50 rows of teapots/reviews.csv, test,") < text.index(
        "On 20 rows of teapots/reviews.csv, test,"
    )
    results = [(x.dataset_name, x.dataset_split, x.metric_value) for x in ModelCard(text).data.eval_results]
    assert results == [
        ("teapots/reviews.csv", "test", 0.9), ("teapots/reviews.csv", "test", 0.86), ("me/others", None, 0.99),
    ]  # fmt: skip
    assert "Accuracy was measured on teapots/reviews.csv, test and me/others only" in text


def test_figures_of_a_plain_call_are_out_of_date_once_its_looks_have_changed(checkpoint):
    leave(checkpoint, "evaluation")
    write_model_card(checkpoint)
    assert "accuracy" in drawn(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(checkpoint / "config.json", {**config, "looks": [0.125, 1.0], "confidence": [0.6]})
    text = write_model_card(checkpoint).read_text()
    assert "A plain call looks at budgets of 0.125, then 1, until the margin reaches 0.6." in text
    assert "plain call looks at budgets of 0.0833, then 1, until the margin reaches 0.8. OUT OF DATE" in text
    assert [x.metric_name for x in ModelCard(text).data.eval_results] == ["accuracy, budget 1"]
    assert not drawn(checkpoint), "what no longer holds is not drawn"
    assert "![" not in text


def test_figures_are_out_of_date_once_the_weights_have_changed(checkpoint, undrawn):
    leave(checkpoint, "evaluation", "costs", "tuning")
    model = budgetformer("bert")
    model.classifier.bias.data += 1.0
    model.save_pretrained(checkpoint)
    text = write_model_card(checkpoint).read_text()
    assert text.count("OUT OF DATE: the weights have changed since") == 3
    assert "Accuracy was not measured" in text
    assert not ModelCard(text).data.eval_results
    leave(checkpoint, "evaluation", "costs", "tuning")
    assert "OUT OF DATE" not in write_model_card(checkpoint).read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "trained with it (`budget=1.0`)"),
        ({"freeze_full": True}, "as it was before (`budget=1.0`)"),
        ({"trained": False}, "A plain call runs the full model, for the narrow encoder has not been trained."),
        ({"looks": [0.25]}, "A plain call looks once, at a budget of 0.25."),
        ({"router": "layer"}, "A plain call runs the share of the heads that it learned to choose."),
        ({"router": "layer", "looks": [0.5]}, "A plain call runs 0.5 of the heads."),
    ],
)
def test_it_says_what_a_plain_call_is(tmp_path, fields, words):
    budgetformer("bert", **fields).save_pretrained(tmp_path)
    assert words in write_model_card(tmp_path).read_text()


def test_the_promise_is_told_in_words_as_long_as_the_looks_are_those_it_was_made_for(tmp_path):
    words = "Its answers differ from the full model's on at most 3.5% of texts like the 5,000 of the calibration"
    budgetformer("bert", looks=[0.25, 1.0], confidence=[0.6], promise=PROMISE).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    assert f"A plain call looks at budgets of 0.25, then 1, until the margin reaches 0.6. {words}" in text
    assert "What is promised holds for texts like those of the calibration; on others tune again." in text
    budgetformer("bert", looks=[0.25, 1.0], confidence=[0.5], promise=PROMISE).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    assert "Its answers" not in text
    assert "promised" not in text


def test_a_readme_of_the_trainer_is_added_to(checkpoint, undrawn):
    theirs = (
        "---\nlibrary_name: transformers\nbase_model: bert-base-cased\ntags:\n- generated_from_trainer\nmetrics: f1\n"
        "model-index:\n- name: out\n  results:\n  - task:\n      name: Texts\n      type: text-classification\n"
        "    dataset:\n      name: imdb\n      type: imdb\n    metrics:\n    - name: Accuracy\n      type: accuracy\n"
        "      value: 0.5\n---\n\n# out\n\nThis model is a fine-tuned version.\n"
    )
    (checkpoint / "README.md").write_text(theirs)
    leave(checkpoint, "evaluation")
    for _ in range(2):
        text = write_model_card(checkpoint).read_text()
    assert "\n---\n\n# out\n\nThis model is a fine-tuned version.\n\n<!-- budgetformer:begin about -->\n" in text
    data = ModelCard(text).data
    assert (data.base_model, data.metrics, data.model_name) == ("bert-base-cased", ["f1", "accuracy"], "out")
    assert data.tags == ["generated_from_trainer", "budgetformer", "adaptive-computation"]
    assert [x.metric_name for x in data.eval_results] == ["Accuracy", "accuracy, budget 1", "accuracy, plain call"]


@pytest.mark.parametrize("theirs", ["# Mine\r\n\r\nBy hand.\r\n", "\ufeff# Mine\n\nBy hand, w\u00f6rtlich.\n", ""])
def test_a_readme_without_metadata_keeps_its_text_and_line_ends(checkpoint, theirs):
    (checkpoint / "README.md").write_bytes(theirs.encode())
    written = write_model_card(checkpoint).read_bytes().decode()
    assert theirs.lstrip("\ufeff") in written
    assert written.count("\n") == written.count("\r\n") or "\r" not in written
    assert write_model_card(checkpoint).read_bytes().decode() == written


def test_the_code_in_it_runs(checkpoint, monkeypatch):
    """Pipelines with remote code are shown in tests/test_hub.py."""
    monkeypatch.chdir(checkpoint.parent)
    text = write_model_card(checkpoint).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["out"].budget.tolist() == pytest.approx([names["model"].narrow.order.look(0.125).cost] * 2)


def test_a_model_that_was_cut_is_not_said_to_go_on_to_the_full_one(tokenizer, tmp_path):
    cut(budgetformer("bert"), 0.25).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    assert "Cut from a model of 3 layers of 4 attention heads" in text
    assert "A plain call looks once, at a budget of 0.2" in text
    assert "doubt" not in text


def test_folders_that_hold_no_budgetformer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a BudgetFormer checkpoint, got .*nowhere with model type None"):
        write_model_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold a BudgetFormer checkpoint, got .*stock with model type 'bert'"):
        write_model_card(stock_folder("bert", tmp_path / "stock"))
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize(
    ("kind", "content"),
    [("evaluation", '{"rows": 50, '), ("evaluation", {"rows": 50}), ("costs", []), ("tuning", {"tested": [1]}),
     ("training", "{}"), ("training", "\xff")],
)  # fmt: skip
def test_a_broken_file_is_named_and_nothing_is_written(checkpoint, kind, content):
    leave(checkpoint, *MEASURED, "training")
    [path] = (checkpoint / "budgetformer").glob(f"{kind}*/*.json" if kind != "training" else "training.json")
    if isinstance(content, str):
        path.write_bytes(content.encode("latin-1"))
    else:
        write_json(path, {**json.loads(path.read_text()), "result": content})
    with pytest.raises(ValueError, match=rf"budgetformer/{kind}.* does not hold what it should .*: make it again"):
        write_model_card(checkpoint)
    assert not (checkpoint / "README.md").exists()
    assert not drawn(checkpoint)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (b"---\n[1\n---\n# Mine\n", "must be UTF-8, with valid metadata"),
        (b"---\n- a\n---\n# Mine\n", "must be UTF-8, with valid metadata"),
        (b"# Mine\n\xff\n", "must be UTF-8, with valid metadata"),
        (b"# Mine\n<!-- budgetformer:begin use -->\nhalf\n", r"in one pair, begin and end, got \[\('begin', 'use'\)\]"),
        (b"<!-- budgetformer:begin use -->\n<!-- budgetformer:end use -->\n" * 2, "in one pair"),
    ],
)
def test_a_readme_that_cannot_be_renewed_stays(checkpoint, theirs, message):
    (checkpoint / "README.md").write_bytes(theirs)
    with pytest.raises(ValueError, match=message):
        write_model_card(checkpoint)
    assert (checkpoint / "README.md").read_bytes() == theirs


def test_the_hub_may_refuse_but_need_not_be_there(checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr(model_card.logger, "warning", said.append)
    write_model_card(checkpoint)  # tests are offline
    assert "The Hub could not check the metadata" in said[0]
    before = (checkpoint / "README.md").read_bytes()

    def refuse(card):
        raise ValueError('"license" must be one of')

    monkeypatch.setattr(ModelCard, "validate", refuse)
    with pytest.raises(ValueError, match='"license" must be one of'):
        write_model_card(checkpoint, license="none of them")
    assert (checkpoint / "README.md").read_bytes() == before


def test_a_missing_tokenizer_is_told(checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr(model_card.logger, "warning", said.append)
    (checkpoint / "tokenizer_config.json").unlink()
    write_model_card(checkpoint)
    assert "holds no tokenizer" in said[0]


def test_without_matplotlib_the_command_that_installs_it_is_named(checkpoint, monkeypatch):
    leave(checkpoint, "evaluation")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[plots\]"'):
        write_model_card(checkpoint)
    assert not (checkpoint / "README.md").exists()
