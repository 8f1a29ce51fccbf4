"""The plain Trainer: nothing special is needed, and nothing is lost in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_budgetformer.narrow
from conftest import STOCK, budgetformer, stock_classifier, stock_folder
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.tools.narrowing import cut, unit_importance
from hf_budgetformer.tools.tuning import rows_needed, tune


# Its name since transformers 5.24, or before.
CHECKPOINTING = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, x))
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


class OutsideTrainer(Trainer):
    """The Trainer of a thousand tutorials: a loss of its own from the logits, the labels left among the inputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy."""
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def trainer_for(
    model, folder, tokenizer, train, callbacks=None, evaluate_on=None, loss=None, trainer=Trainer, **arguments
):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return trainer(
        model,
        TrainingArguments(folder, **{**defaults, **arguments}),
        train_dataset=train,
        eval_dataset=evaluate_on,
        processing_class=tokenizer,
        callbacks=callbacks,
        compute_loss_func=loss,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class GradientsAtFirstStep(TrainerCallback):
    """Keeps what reaches the optimizer at the first step."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            self.gradients = {name: parameter.grad.clone() for name, parameter in learning.items()}


@pytest.fixture
def one_budget(monkeypatch):
    """The narrow encoder trains at its full width alone, whichever step it is."""
    monkeypatch.setattr(hf_budgetformer.narrow, "TRAINED_SHARES", (1.0,))


def narrow_weights(model):
    return {name: x.detach().clone() for name, x in model.narrow.named_parameters()}


def changed(before, after):
    return {name for name, x in before.items() if not torch.equal(after[name], x)}


@pytest.mark.parametrize("callbacks", [[], [BudgetCallback()]], ids=["plain", "callback"])
def test_the_full_model_learns_bit_for_bit_as_the_stock_class_does(
    callbacks, backbone_type, tokenizer, tokenized, tmp_path
):
    """With dropout, on the padded path, gradients unclipped, for the norm is that of all gradients."""
    folder = stock_folder(backbone_type, tmp_path / "stock", **DROPOUT)
    stock = STOCK[backbone_type][2].from_pretrained(folder)
    stock.accepts_loss_kwargs = False
    ours = BudgetFormerForSequenceClassification.from_pretrained(folder, executor="masked")
    for model, added in ((stock, []), (ours, callbacks)):
        trainer_for(model, tmp_path, tokenizer, tokenized, callbacks=list(added), max_grad_norm=0.0).train()
    before = STOCK[backbone_type][2].from_pretrained(folder).state_dict()
    learned = {name: x for name, x in ours.state_dict().items() if not name.startswith("narrow.")}
    assert learned.keys() == before.keys()
    assert not changed(stock.state_dict(), learned)
    assert len(changed(before, learned)) == len(dict(ours.named_parameters())) - len(narrow_weights(ours))
    ours.save_pretrained(tmp_path / "ours")
    again, info = STOCK[backbone_type][2].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not changed(stock.state_dict(), again.state_dict())
    assert info["unexpected_keys"] == {name for name in ours.state_dict() if name.startswith("narrow.")}
    assert not info["missing_keys"]


def test_a_plain_trainer_teaches_both_encoders(tokenizer, tokenized, tmp_path):
    set_seed(1)  # of five tried, the narrow encoder of seed 0 alone gets stuck, at 0.64
    model = budgetformer("bert", trained=False)
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized, max_steps=100, learning_rate=4e-3, logging_steps=100)
    trainer.train()
    assert model.narrow.steps.item() == 100
    model.eval()
    for budget in (1.0, 0.25, 1 / 6):
        right = 0
        for batch in trainer.get_eval_dataloader(tokenized):
            labels = batch.pop("labels")
            right += (model(**batch, budget=budget).logits.argmax(-1) == labels).sum().item()
        assert right / 64 > 0.8, budget


def test_resuming_gives_the_losses_of_the_uninterrupted_run(tokenizer, tokenized, tmp_path):
    def run(checkpoint=None):
        set_seed(0)
        model = budgetformer("bert", trained=False)
        trainer = trainer_for(
            model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], save_strategy="steps", save_steps=3
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    for part in ("loss", "divergence", "budget"):
        assert logged(whole, part) == logged(resumed, part)
    assert len(set(logged(whole, "loss"))) == 8
    assert len(set(logged(whole, "budget"))) > 1
    assert resumed.model.narrow.steps.item() == 8
    assert not changed(whole.model.state_dict(), resumed.model.state_dict())


def test_evaluation_does_not_count_as_training(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", trained=False)
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized, max_steps=5, evaluate_on=tokenized)
    trainer.evaluate()
    assert not model.is_trained()
    trainer.train()
    trainer.evaluate()
    trainer.predict(tokenized)
    trainer.save_model(tmp_path / "saved")
    again = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.narrow.steps.item() == 5
    assert again.is_trained()


def test_the_best_model_is_loaded_at_the_end(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert")
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, evaluate_on=tokenized, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        max_steps=6, learning_rate=5e-2,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    saved = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{2 * (best + 1)}")
    assert not changed(saved.state_dict(), model.state_dict())


def test_predictions_are_the_logits_and_nothing_else(tokenizer, tokenized, tmp_path):
    """Trap 9: every unlisted output joins them."""
    model = budgetformer("bert")
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized)
    for mode in (model.eval, model.train):
        mode()
        predictions = trainer.predict(tokenized).predictions
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == (64, 3)


@pytest.mark.usefixtures("one_budget")
@pytest.mark.parametrize("kind", ["look", "layer", "cut"])
def test_accumulated_gradients_equal_the_large_batchs(kind, tokenizer, tokenized, tmp_path):
    """Trap 5: forward takes **kwargs, and Trainer would not divide by the number of micro-batches."""
    routers = {"router": "layer", "budget_sampling": 0.0, "exploration_steps": 0, "budget_loss_weight": 0.0}
    routers["need_scale"] = 0.0
    gradients = []
    for accumulation, batch_size in ((1, 16), (4, 4)):
        set_seed(0)
        # With routers half of four heads is two, so that nothing is drawn.
        model = budgetformer("bert", stir=False, **(routers if kind == "layer" else {}))
        keeper = GradientsAtFirstStep()
        trainer_for(
            cut(model, 0.25) if kind == "cut" else model, tmp_path, tokenizer, tokenized.select(range(16)),
            max_steps=1, callbacks=[keeper], per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
        ).train()  # fmt: skip
        gradients.append(keeper.gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)
    learns = {"look": "narrow.layer.0.qkv", "layer": "scorer", "cut": "narrow.layer.0.qkv"}[kind]
    assert any(gradient.any() for name, gradient in gradients[0].items() if learns in name)


def test_the_callback_counts_optimizer_steps_of_the_routers_under_accumulation(tokenizer, tokenized, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, model.bert.encoder.exploration.steps.item()))

    model = budgetformer("bert", router="layer", exploration_steps=999)
    trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback(), Watch()], max_steps=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    assert seen == [(step, step) for step in range(4)]
    assert model.config.exploration_steps == 4


OUTSIDE = {
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"loss": lambda outputs, labels, **_: outputs["logits"].sum() * 0},
    "labels left among the inputs": {"trainer": OutsideTrainer},
}


@pytest.mark.parametrize("outside", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("freeze_full", [False, True])
def test_the_narrow_encoder_learns_where_the_loss_is_computed_outside(
    outside, freeze_full, tokenizer, tokenized, tmp_path
):
    """Trap 8: Trainer takes the labels away from the model; or it leaves them, and reads the logits alone."""
    model = budgetformer("bert", freeze_full=freeze_full)
    full, narrow = model.classifier.state_dict(), narrow_weights(model)
    full = {name: x.clone() for name, x in full.items()}
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback(order=False)], max_steps=32,
        learning_rate=1e-2, weight_decay=0.0, **outside,
    )  # fmt: skip
    trainer.train()
    divergence = logged(trainer, "divergence")
    if freeze_full or "loss" in outside:  # else it runs after a moving target
        assert np.mean(divergence[-8:]) < 0.6 * np.mean(divergence[:8])
    assert {f"layer.{n}.qkv.weight" for n in range(3)} <= changed(narrow, narrow_weights(model))
    moved = bool(changed(full, model.classifier.state_dict()))
    assert moved is not (freeze_full or "loss" in outside)


@pytest.mark.parametrize("freeze_full", [False, True])
def test_a_loss_computed_outside_takes_the_same_gradients_of_ours(freeze_full, tokenizer, tokenized, tmp_path):
    gradients = []
    for trainer in (Trainer, OutsideTrainer):
        set_seed(0)
        model, keeper = budgetformer("bert", freeze_full=freeze_full), GradientsAtFirstStep()
        trainer_for(
            model, tmp_path, tokenizer, tokenized, callbacks=[keeper], max_steps=1, trainer=trainer, max_grad_norm=0.0
        ).train()
        gradients.append(keeper.gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-5, atol=1e-7)


def test_where_the_teacher_has_spoken_the_frozen_model_does_not_run(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", freeze_full=True)
    rows = tokenized.add_column("teacher_logits", [[0.0, 1.0, 2.0]] * len(tokenized))
    calls = []
    model.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer_for(model, tmp_path, tokenizer, rows, max_steps=4).train()
    assert calls == []
    moved = changed(before, model.state_dict())
    assert all(name.startswith("narrow.") for name in moved)
    assert {"narrow.steps", "narrow.head.classifier_copy.weight", "narrow.layer.0.qkv.weight"} <= moved


def test_the_callback_logs_the_parts_of_the_loss_for_everyone_who_reads_logs(tokenizer, tokenized, tmp_path):
    """Trap 14: the history is written before callbacks are asked; reports elsewhere, before later callbacks."""
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = trainer_for(budgetformer("bert"), tmp_path, tokenizer, tokenized, callbacks=[Reporter()], max_steps=3)
    BudgetCallback().attach(trainer)
    trainer.train()
    for entries in (reported, trainer.state.log_history):
        training = [entry for entry in entries if "loss" in entry]
        assert len(training) == 3
        for entry in training:
            assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["divergence"], abs=2e-3)
            assert 0.0 < entry["budget"] <= 0.25


def test_units_are_ordered_by_their_importance_for_the_training_rows(backbone_type, tokenizer, tokenized, tmp_path):
    model = budgetformer(backbone_type, trained=False, narrow_budget=1.0)
    importance = unit_importance(model, [DataCollatorWithPadding(tokenizer)(list(tokenized))])
    trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=1, learning_rate=0.0
    ).train()
    for narrow, full, units in zip(model.narrow.layer, model.base_model.encoder.layer, importance, strict=True):
        queries = narrow.qkv.weight.unflatten(0, (4, 3, 4))[:, 0]  # by head
        expected = full.attention.self.query.weight.unflatten(0, (4, 4))
        assert torch.equal(queries, expected[units.heads.argsort(descending=True)])
        neurons = units.neurons.argsort(descending=True)
        assert torch.equal(narrow.up.weight, full.intermediate.dense.weight[neurons])
        assert torch.equal(narrow.down.weight, full.output.dense.weight[:, neurons])


def test_ordering_draws_nothing_and_keeps_the_full_model_gradients_and_mode(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", trained=False).train()
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized)
    before, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    BudgetCallback().on_train_begin(
        trainer.args, trainer.state, trainer.control, model=model, train_dataloader=trainer.get_train_dataloader()
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = changed(before, model.state_dict())
    assert moved
    assert all(name.startswith("narrow.layer.") for name in moved)


def test_what_is_trained_already_unlabelled_or_a_stream_is_not_ordered(tokenizer, tokenized, tmp_path):
    def ordered(rows, order=True, trained=False, **arguments):
        set_seed(0)
        model = budgetformer("bert", trained=trained)
        before = narrow_weights(model)
        trainer_for(
            model, tmp_path, tokenizer, rows, callbacks=[BudgetCallback(order=order)], max_steps=1, learning_rate=0.0,
            **arguments,
        ).train()  # fmt: skip
        return bool(changed(before, narrow_weights(model)))

    assert ordered(tokenized)
    assert not ordered(tokenized, order=False)
    assert not ordered(tokenized, trained=True)
    assert not ordered(tokenized.to_iterable_dataset())
    outside = lambda outputs, labels, **_: outputs["logits"].sum() * 0  # noqa: E731
    assert not ordered(tokenized.remove_columns("label"), loss=outside)
    soft = tokenized.remove_columns("label").add_column("labels", [[0.2, 0.3, 0.5]] * len(tokenized))
    assert not ordered(soft, loss=outside)


def test_the_evaluation_set_says_how_sure_the_first_look_is(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert")
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], evaluate_on=tokenized, max_steps=2,
        eval_strategy="steps",
    )  # fmt: skip
    trainer.train()
    model.eval()
    for budget in (0.4, 0.6):
        with torch.no_grad():
            budgets = [model(**batch, budget=budget).budget for batch in trainer.get_eval_dataloader(tokenized)]
        assert torch.cat(budgets).mean().item() == pytest.approx(budget, abs=0.05)
    bare = budgetformer("bert")
    trainer_for(bare, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=1).train()
    assert bare.config.margins is None


def calibrated(model, folder, tokenizer, rows, evaluate_on, callback):
    trainer_for(
        model, folder, tokenizer, rows, callbacks=[callback], evaluate_on=evaluate_on, max_steps=2,
        eval_strategy="steps" if evaluate_on is not None else "no",
    ).train()  # fmt: skip
    return model.config


def test_at_the_end_the_looks_are_those_that_tune_finds_on_the_evaluation_set(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert")
    config = calibrated(model, tmp_path, tokenizer, tokenized, tokenized, BudgetCallback(disagreement=0.3))
    tuning = tune(model, tokenized, tokenizer, disagreement=0.3, write=False)
    assert tuning.promise["rows"] == 64
    assert (config.looks, config.confidence, config.promise) == (tuning.looks, tuning.confidence, tuning.promise)
    assert config.margins["budget"] == min(config.looks[0], config.narrow_budget)


def test_too_few_rows_to_promise_anything_are_warned_of(tokenizer, tokenized, tmp_path, caplog):
    config = calibrated(budgetformer("bert"), tmp_path, tokenizer, tokenized, tokenized, BudgetCallback())
    [message] = [record.message for record in caplog.records if "too few" in record.message]
    assert "64 rows to evaluate on are too few to promise that at most 1% of the answers differ" in message
    assert f"it takes {rows_needed('disagreement', 0.01, 0.8 * 0.05)}." in message
    assert config.looks is config.confidence is config.promise is None
    assert config.margins["budget"] == pytest.approx(1 / 12)


@pytest.mark.parametrize("disagreement", [0.3, None])
def test_looks_of_the_user_stay_and_promise_nothing(tokenizer, tokenized, tmp_path, disagreement):
    model = budgetformer("bert", looks=[0.2, 1.0], confidence=[0.9])
    config = calibrated(model, tmp_path, tokenizer, tokenized, tokenized, BudgetCallback(disagreement=disagreement))
    assert (config.looks, config.confidence, config.promise) == ([0.2, 1.0], [0.9], None)
    assert config.margins["budget"] == 0.2


def test_further_training_voids_the_promise_and_its_looks(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert")
    config = calibrated(model, tmp_path, tokenizer, tokenized, tokenized, BudgetCallback(disagreement=0.3))
    assert config.promise is not None
    calibrated(model, tmp_path, tokenizer, tokenized, None, BudgetCallback())
    assert config.looks is config.confidence is config.promise is config.margins is None


@pytest.mark.parametrize("disagreement", [0.0, 1.0, 1, "0.1"])
def test_a_promise_that_is_none_is_refused(disagreement):
    with pytest.raises(ValueError, match=rf"disagreement must be None or a float in \(0, 1\), got {disagreement!r}"):
        BudgetCallback(disagreement=disagreement)


def test_an_encoder_without_a_classifier_trains_with_the_callback(tokenized, tokenizer, tmp_path):
    """A module of the user's own around the encoder, whose loss it computes itself."""

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BudgetFormerModel(budgetformer("bert").config)
            self.score = torch.nn.Linear(self.encoder.config.hidden_size, 3)

        def forward(self, input_ids, attention_mask, labels):
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.score(hidden[:, 0])
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = tokenized.rename_column("label", "labels")
    model = Scorer()
    before = narrow_weights(model.encoder)
    trainer = trainer_for(model, tmp_path, tokenizer, rows, callbacks=[BudgetCallback()], max_steps=4)
    trainer.train()
    assert len(logged(trainer, "divergence")) == 4
    assert "layer.0.qkv.weight" in changed(before, narrow_weights(model.encoder))


def test_the_callback_needs_a_budgetformer(tokenizer, tokenized, tmp_path):
    trainer = trainer_for(stock_classifier("bert"), tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()])
    with pytest.raises(TypeError, match="BudgetCallback needs a BudgetFormer model, got BertForSequenceClassification"):
        trainer.train()


@pytest.mark.parametrize("arguments", [{"bf16": True}, {CHECKPOINTING: True}])
def test_it_trains_under(arguments, tokenizer, tokenized, tmp_path):
    model = budgetformer("bert")
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, max_steps=32, learning_rate=5e-3,
        callbacks=[BudgetCallback()], **arguments,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "task_loss")
    assert all(np.isfinite(losses + logged(trainer, "divergence")))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_checkpointing_counts_a_step_once_and_changes_no_gradient(tokenizer, tokenized, tmp_path):
    """Trap 11: a layer's forward runs twice."""
    gradients = []
    for checkpointing in (False, True):
        set_seed(0)
        model, keeper = budgetformer("bert", trained=False), GradientsAtFirstStep()
        arguments = {CHECKPOINTING: checkpointing}
        trainer_for(model, tmp_path, tokenizer, tokenized, callbacks=[keeper], max_steps=1, **arguments).train()
        assert model.narrow.steps.item() == 1
        gradients.append(keeper.gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.slow
def test_a_compiled_model_learns_what_the_eager_one_does(tokenizer, tokenized, tmp_path):
    curves = []
    for compiled in (False, True):
        set_seed(0)
        model = budgetformer("bert", trained=False, num_hidden_layers=2)
        trainer = trainer_for(
            model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=5,
            torch_compile=compiled, torch_compile_backend="eager" if compiled else None,
        )  # fmt: skip
        trainer.train()
        assert model.narrow.steps.item() == 5
        curves.append([logged(trainer, part) for part in ("loss", "divergence", "budget")])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3, atol=2e-4)
    assert len(set(curves[0][2])) > 1


WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_the_whole_batch(tokenizer, tokenized, tmp_path):
    """With the model's own loss, and with one computed outside from the logits, labels among the inputs."""
    budgetformer("bert", trained=False).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokenized.save_to_disk(tmp_path / "data")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    finished = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for trainer in (Trainer, OutsideTrainer):
        model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "model")
        keeper = GradientsAtFirstStep()
        whole = trainer_for(
            model, tmp_path / "one", tokenizer, tokenized, callbacks=[keeper], max_steps=3, trainer=trainer,
            per_device_train_batch_size=16, max_grad_norm=0.0,
        )  # fmt: skip
        whole.train()
        ranks = [torch.load(tmp_path / f"{trainer.__name__}-{rank}.pt") for rank in (0, 1)]
        for name, gradient in keeper.gradients.items():
            torch.testing.assert_close(ranks[0]["gradients"][name], gradient, msg=name, rtol=1e-4, atol=1e-6)
        assert [rank["steps"] for rank in ranks] == [3, 3]
        assert not changed(ranks[0]["weights"], ranks[1]["weights"])


def test_label_collator_is_not_needed(tokenizer, tokenized, tmp_path):
    trainer = trainer_for(budgetformer("bert"), tmp_path, tokenizer, tokenized)
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}


def test_the_state_written_by_trainer_is_json(tokenizer, tokenized, tmp_path):
    """The callback adds plain numbers to the history, not tensors."""
    trainer = trainer_for(
        budgetformer("bert"), tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["divergence"] > 0.0


def test_a_plain_trainer_trains_the_narrow_encoder_of_a_frozen_one(tokenizer, tokenized, tmp_path):
    """Texts are enough: the loss is its divergence. An encoder that learns itself needs a loss from outside."""
    STOCK["bert"][1](stock_classifier("bert").config).save_pretrained(tmp_path / "stock")
    rows = tokenized.remove_columns("label")
    model = BudgetFormerModel.from_pretrained(tmp_path / "stock", freeze_full=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, tokenizer, rows, callbacks=[BudgetCallback()], max_steps=40)
    trainer.train()
    divergence = logged(trainer, "divergence")
    assert logged(trainer, "loss") == pytest.approx(divergence, abs=1e-3)
    assert np.mean(divergence[-6:]) < 0.8 * np.mean(divergence[:6])
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all(name.startswith("narrow.") for name in changed)

    learning = BudgetFormerModel.from_pretrained(tmp_path / "stock").train()
    assert "loss" not in learning(**tokenizer(["w1 w2"], return_tensors="pt"))
