"""The data sets that benchmarks are made from, read as a user's own would be; they are not part of this repository."""

import json
import os
from pathlib import Path

import pytest

from hf_budgetformer.tools.recipe import label_names
from hf_budgetformer.tools.tables import read_rows, read_table


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
EXPERIMENTS = [json.loads(path.read_text()) for path in BENCHMARKS.glob("experiments/*.json")]
EXPERIMENTS += [json.loads(path.read_text()) for path in BENCHMARKS.glob("paper/*.json")]
CELLS = [cell for settings in EXPERIMENTS for cell in [settings, *settings.get("cells", [])]]
SOURCES = sorted({cell["data"] for cell in CELLS if cell.get("data", "docstrings") != "docstrings"})
pytestmark = pytest.mark.data


@pytest.fixture
def data():
    folder = os.environ.get("DATA")
    if not folder:
        pytest.skip("DATA does not name a folder of data sets: make test-data DATA=folder")
    return Path(folder)


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_of_an_experiment_can_be_read(name, data):
    train, test = (read_table(str(data / name / f"{split}.parquet")) for split in ("train", "test"))
    assert set(test["label"]) <= set(train["label"])
    assert len(label_names(train)) >= 2
    rows = list(read_rows(str(data / name / "test.parquet")))
    assert len(rows) == len(test)
    assert not [fault for _, fault in rows if fault]
    assert [row["text"] for row, _ in rows] == test["text"][:]
