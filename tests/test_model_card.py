"""A checkpoint's README: what was measured is in it, what somebody wrote stays, what is wrong is named."""

import json
import os
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from conftest import budgetformer, stock_folder
from hf_budgetformer.tools import model_card
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.model_card import write_model_card
from hf_budgetformer.tools.profiling import PARTS, BudgetCost, CostCard, SpeedCeiling
from hf_budgetformer.tools.tuning import BudgetTest, TunedBudget


pytest.importorskip("matplotlib")

OWN, FULL = (
    BudgetResult(None, 43, 0.86, (0.77, 0.92), 0.5, [0.5] * 3),
    BudgetResult(1.0, 45, 0.9, (0.8, 0.95), 1.0, [1.0] * 3),
)
EVALUATION = Evaluation(
    50, [FULL, OWN], {name: [0.1 * n for n in range(12)] for name in ("length", "entropy", "heads")},
    {"data": "/home/somebody/teapots/reviews.csv", "seed": 3},
)  # fmt: skip
COST = BudgetCost(1.0, 1.0, dict.fromkeys(PARTS, 1e6), 2.0, 3.0, 400.0, 12.0)
FILES = {
    "evaluation": EVALUATION.to_dict(),
    "static": replace(EVALUATION, results=[replace(OWN, accuracy=0.815)], inputs={}).to_dict(),
    "tuning": TunedBudget(
        0.25, 0.9, [BudgetTest(0.25, 50, 0.01, (-0.02, 0.03), "within", 0.26)], 150, 650,
        {"tolerance": 0.035, "confidence": 0.95, "rows": 50},
    ).to_dict(),
    "costs": CostCard(
        6543, 6321, replace(COST, throughput=123.0), [COST], SpeedCeiling(2.0, 1.0), None,
        {"cpu": "An abacus", "cores": 2, "gpu": None}, {"torch": "2"},
        {"rows": 50, "batch_size": 32, "threads": 2, "dtype": "float32", "training_seconds": 90.0,
         "tokens": {"real": 7, "padded": 9}},
    ).to_dict(),
    "training": {
        "log_history": [{"step": n, "loss": 1.0, "budget": 0.5, "temperature": 1.0} for n in range(3)],
        "arguments": {"learning_rate": 3e-5, "seed": 3, "output_dir": "/home/somebody/out"},
        "base_model": "bert-base-uncased", "dataset": "stanfordnlp/imdb", "rows": 25000, "seconds": 90.0,
        "teacher": "/home/somebody/out/teacher",
    },
}  # fmt: skip
PLOTS = {"accuracy", "layers", "inputs", "time", "training"}


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
        os.link(path, folder / path.name)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Spares the time that plots take."""
    monkeypatch.setattr(model_card, "_draw", lambda *_: None)


def leave(folder, *names):
    (folder / "budgetformer").mkdir(exist_ok=True)
    for name in names:
        (folder / "budgetformer" / f"{name}.json").write_text(json.dumps(FILES[name]))


def drawn(folder):
    return {path.stem for path in folder.rglob("*.png")}


def headings(text):
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_everything_that_was_measured_is_in_it(checkpoint):
    leave(checkpoint, *FILES)
    path = write_model_card(str(checkpoint), repo_id="me/reviews", language="en", license="mit")
    assert path == checkpoint / "README.md"
    text = path.read_text()
    assert headings(text) == [
        "What it is", "How to use it", "Accuracy by budget", "The budget that keeps accuracy", "What it costs",
        "How it was trained", "Limits",
    ]  # fmt: skip
    figures = [
        "90.0%",
        "86.0%",
        "81.5%",
        "within 3.5 points",
        "6,543 parameters",
        "An abacus",
        "3.25x",
        "25,000 rows of",
    ]
    for figure in [
        *figures,
        "stanfordnlp/imdb, taught by a fine-tuned plain model, out/teacher, in 1.5 minutes",
        "learning_rate: 3e-05",
        "50 rows of teapots/reviews.csv",
    ]:
        assert figure in text
    assert "somebody" not in text
    assert drawn(checkpoint) == PLOTS
    assert all(f"](budgetformer/plots/{name}.png)" in text for name in PLOTS)


def test_metadata_goes_through_huggingface_hub_and_back(checkpoint, undrawn):
    leave(checkpoint, *FILES)
    data = ModelCard.load(write_model_card(checkpoint, "me/reviews", "en", "mit")).data
    assert data.to_dict() | {"model-index": None} == {
        "language": "en", "license": "mit", "library_name": "transformers", "pipeline_tag": "text-classification",
        "base_model": "bert-base-uncased", "datasets": ["stanfordnlp/imdb"], "metrics": ["accuracy"],
        "tags": ["budgetformer", "adaptive-computation"], "model-index": None,
    }  # fmt: skip
    assert data.model_name == "me/reviews"
    found = [(x.metric_type, x.metric_name, x.metric_value, x.dataset_name) for x in data.eval_results]
    assert found == [
        ("accuracy", "accuracy, head budget 1", 0.9, "teapots/reviews.csv"),
        ("accuracy", "accuracy, own heads", 0.86, "teapots/reviews.csv"),
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
    (checkpoint / "budgetformer" / "costs.json").unlink()
    better = replace(EVALUATION, results=[FULL, replace(OWN, accuracy=0.873)])
    (checkpoint / "budgetformer" / "evaluation.json").write_text(json.dumps(better.to_dict()))
    text = write_model_card(checkpoint).read_text()
    assert "87.3%" in text
    assert "86.0%" not in text
    assert headings(text) == ["What it is", "How to use it", "Accuracy by budget", "Limits"]
    assert [x.metric_value for x in ModelCard(text).data.eval_results] == [0.9, 0.873]


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
    assert [x.metric_name for x in data.eval_results] == ["Accuracy", "accuracy, head budget 1", "accuracy, own heads"]


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
    assert names["out"].head_budget.tolist() == pytest.approx([0.25, 0.25], abs=0.1)


def test_a_static_checkpoint_is_not_said_to_choose(saved, tokenizer, tmp_path):
    folder = tmp_path / "baked"
    prune(budgetformer("bert"), [[0, 1], [2], [0, 3]]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "budgetformer").mkdir()
    (folder / "budgetformer" / "evaluation.json").write_text(json.dumps(FILES["static"]))
    text = write_model_card(folder).read_text()
    assert "by layer: 2, 1, 2" in text
    assert "head_budget=" not in text
    assert "routing" not in text
    assert not drawn(folder)


def test_folders_that_hold_no_budgetformer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a BudgetFormer checkpoint, got .*nowhere with model type None"):
        write_model_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold a BudgetFormer checkpoint, got .*stock with model type 'bert'"):
        write_model_card(stock_folder("bert", tmp_path / "stock"))
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("evaluation", '{"rows": 50, '), ("evaluation", '{"rows": 50}'), ("costs", "[]"), ("tuning", '{"curve": [1]}'),
     ("training", "{}"), ("static", "\xff")],
)  # fmt: skip
def test_a_broken_file_is_named_and_nothing_is_written(checkpoint, name, content):
    leave(checkpoint, *FILES)
    (checkpoint / "budgetformer" / f"{name}.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}\.json does not hold what it should .*: make it again"):
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
