"""The metric module: loaded from its folder offline, what it computes, and what its Space needs."""

import re
import shutil
from pathlib import Path

import evaluate
import pytest

from hf_budgetformer.metrics.budgetformer import budgetformer


FOLDER = Path(budgetformer.__file__).parent


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a copy of the folder, as it would lie in a Space, far from the package."""
    folder = tmp_path_factory.mktemp("space") / "budgetformer"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return lambda *name: evaluate.load(str(folder), *name)


def test_figures_are_shares_of_the_rows(load):
    metric = load()
    labels = {"predictions": [0, 1, 2, 2], "references": [0, 1, 1, 1]}
    assert metric.compute(**labels) == {"accuracy": 0.5}
    scores = metric.compute(**labels, full_predictions=[0, 1, 1, 2], budgets=[0.25, 0.25, 1.25, 1.0])
    assert scores == {"accuracy": 0.5, "agreement": 0.75, "mean_budget": 0.6875, "doubtful": 0.25}
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add(prediction=0, reference=0)
    assert metric.compute(budgets=[2.0, 0.5, 0.5])["doubtful"] == pytest.approx(1 / 3)


def test_of_several_labels_all_must_be_right(load):
    scores = load("multilabel").compute(
        predictions=[[0, 1], [1, 1]], references=[[0, 0], [1, 1]], full_predictions=[[0, 1], [1, 1]]
    )
    assert scores == {"accuracy": 0.5, "agreement": 1.0}


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"full_predictions must have the shape of predictions, \(2,\), got \(3,\)"):
        budgetformer.describe_answers([0, 1], [0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=r"budgets must have one value for each of 2 rows, got \(1,\)"):
        budgetformer.describe_answers([0, 1], [0, 1], budgets=[0.5])


def test_the_examples_in_its_documents_are_true(load):
    card = (FOLDER / "README.md").read_text("utf-8")
    for text in (card, budgetformer.BudgetFormerMetric.__doc__ or "", load().inputs_description):
        for call, result in re.findall(r"metric\.compute\((.*)\)\n(?:#)?\s*(\{.*\})", text):
            assert load().compute(**eval(f"dict({call})")) == eval(result)
    assert "metric.compute(" in card


def test_a_space_has_what_it_needs():
    names = {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"}
    assert names == {"README.md", "__init__.py", "app.py", "budgetformer.py", "requirements.txt"}
    source = (FOLDER / "budgetformer.py").read_text("utf-8")
    needed = (FOLDER / "requirements.txt").read_text("utf-8")
    assert not re.search(r"^\s*from \.|import hf_budgetformer", source, flags=re.MULTILINE)
    for name in re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE):
        assert name == "typing" or name in needed
