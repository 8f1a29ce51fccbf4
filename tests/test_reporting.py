"""What training logs reaches those whom `report_to` names."""

import pytest
from transformers import Trainer, TrainingArguments

from conftest import budgetformer
from hf_budgetformer import BudgetCallback


LOOK = {"loss", "task_loss", "divergence", "budget"}
LAYER = {
    "loss", "task_loss", "need_loss", "budget", "budget_loss", "entropy", "temperature", "progress",
    "heads/layer_00", "heads/layer_01", "heads/layer_02",
}  # fmt: skip
PARTS = pytest.mark.parametrize(("router", "parts"), [("look", LOOK), ("layer", LAYER)])


def train(reporter, folder, tokenizer, rows, router):
    arguments = TrainingArguments(
        folder, max_steps=4, logging_steps=2, per_device_train_batch_size=8, report_to=reporter, project="tiny",
        run_name="first", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = budgetformer("bert", router=router)
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    BudgetCallback().attach(trainer)
    trainer.train()
    return {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}


@PARTS
def test_tensorboard_gets_every_part(router, parts, tokenizer, tokenized, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = train("tensorboard", tmp_path, tokenizer, tokenized, router)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    written = accumulator.EventAccumulator(str(events)).Reload()
    assert {f"train/{name}" for name in parts} <= set(written.Tags()["scalars"])
    for name in parts:
        values = {event.step: event.value for event in written.Scalars(f"train/{name}")}
        assert values == pytest.approx({step: entry[name] for step, entry in logged.items()}, rel=1e-5)


@PARTS
def test_trackio_gets_the_same_without_a_server(router, parts, tokenizer, tokenized, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    utils = pytest.importorskip("trackio.utils")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    folder = utils.TRACKIO_DIR
    logged = train("trackio", tmp_path, tokenizer, tokenized, router)
    assert (folder / "tiny.db").is_file()
    rows = [row for row in storage.get_logs("tiny", "first") if "train/loss" in row]
    written = {row["train/global_step"]: row for row in rows[-2:]}
    assert written.keys() == logged.keys() == {2, 4}
    for step, row in written.items():
        assert {name: row[f"train/{name}"] for name in parts} == {name: logged[step][name] for name in parts}


def test_heads_by_layer_are_shares_whose_mean_is_what_was_spent(tokenizer, tokenized, tmp_path):
    for entry in train("none", tmp_path, tokenizer, tokenized, "layer").values():
        heads = [entry[f"heads/layer_{layer:02}"] for layer in range(3)]
        assert all(0.25 <= share <= 1.0 for share in heads)
        assert sum(heads) / 3 == pytest.approx(entry["budget"], abs=0.1)
