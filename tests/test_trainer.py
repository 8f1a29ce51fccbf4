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

from conftest import batch_of, budgetformer, stock_classifier
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.tools.baselines import head_importance, prune
from hf_budgetformer.tools.training import rank_heads


# Its name since transformers 5.24, or before.
CHECKPOINTING = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, x))
# No randomness in the gates: half of four heads is two, and nothing explores.
DETERMINISTIC = {"budget_sampling": 0.0, "exploration_steps": 0}


def trainer_for(model, folder, tokenizer, train, callbacks=None, evaluate_on=None, loss=None, **arguments):
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
    return Trainer(
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
            self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_plain_trainer_learns_the_task_and_the_budget(backbone_type, tokenizer, tokenized, tmp_path):
    set_seed(1)
    model = budgetformer(
        backbone_type, stir=False, exploration_steps=60, router_lr_multiplier=10.0, budget_sampling=0.25
    )
    model.base_model.own_budget.bias.data.fill_(0.2)  # far from the target: it must be trained towards it
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized, max_steps=100, learning_rate=4e-3, logging_steps=100)
    trainer.train()
    predictions = trainer.predict(tokenized)
    assert (predictions.predictions.argmax(-1) == predictions.label_ids).mean() > 0.8
    assert model.base_model.exploration.steps.item() == 100
    batch = next(iter(trainer.get_eval_dataloader(tokenized)))
    spent = model(**batch).head_budget.mean().item()
    assert spent == pytest.approx(0.5, abs=0.1)


def test_resuming_in_mid_exploration_gives_the_losses_of_the_uninterrupted_run(
    backbone_type, tokenizer, tokenized, tmp_path
):
    def run(checkpoint=None):
        set_seed(0)
        model = budgetformer(backbone_type, exploration_steps=8)
        trainer = trainer_for(model, tmp_path, tokenizer, tokenized, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert len(set(logged(whole, "loss"))) == 8
    assert resumed.model.base_model.exploration.steps.item() == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_schedule_survives_saving_and_loading_and_evaluation_never_advances_it(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", exploration_steps=20)
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized, max_steps=5, evaluate_on=tokenized)
    trainer.train()
    trainer.evaluate()
    trainer.predict(tokenized)
    trainer.save_model(tmp_path / "saved")
    again = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.bert.exploration.steps.item() == 5
    assert again.bert.exploration.progress().item() == pytest.approx(0.25)


def test_the_best_model_is_loaded_at_the_end(backbone_type, tokenizer, tokenized, tmp_path):
    model = budgetformer(backbone_type)
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, evaluate_on=tokenized, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        max_steps=6, learning_rate=5e-2,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    saved = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{2 * (best + 1)}")
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_predictions_are_the_logits_and_nothing_else(backbone_type, tokenizer, tokenized, tmp_path):
    """Trap 9: every unlisted output joins them."""
    model = budgetformer(backbone_type)
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized)
    for mode in (model.eval, model.train):
        mode()
        predictions = trainer.predict(tokenized).predictions
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == (64, 3)


def test_accumulated_gradients_equal_the_large_batchs(tokenizer, tokenized, tmp_path):
    """Trap 5: forward takes **kwargs, and Trainer would not divide by the number of micro-batches."""
    gradients = []
    for accumulation, batch_size in ((1, 16), (4, 4)):
        set_seed(0)
        model = budgetformer("bert", **DETERMINISTIC, budget_loss_weight=0.0, need_scale=0.0, stir=False)
        keeper = GradientsAtFirstStep()
        trainer_for(
            model, tmp_path, tokenizer, tokenized.select(range(16)), max_steps=1, callbacks=[keeper],
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
        ).train()  # fmt: skip
        gradients.append(keeper.gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for name, gradient in gradients[0].items() if "scorer" in name)


def test_the_callback_counts_optimizer_steps_under_accumulation(tokenizer, tokenized, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, model.bert.exploration.steps.item()))

    model = budgetformer("bert", exploration_steps=999)
    trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback(), Watch()], max_steps=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    assert seen == [(step, step) for step in range(4)]
    assert model.config.exploration_steps == 4


@pytest.mark.parametrize(
    "outer_loss",
    [{"label_smoothing_factor": 0.1}, {"loss": lambda outputs, labels, **_: outputs["logits"].sum() * 0}],
    ids=["label_smoothing", "compute_loss_func"],
)
def test_the_routers_losses_are_not_dropped_when_the_task_loss_is_computed_outside(
    backbone_type, outer_loss, tokenizer, tokenized, tmp_path
):
    """Trap 8: both take the labels away from the model."""
    model = budgetformer(backbone_type, stir=False, target_head_budget=0.25, **DETERMINISTIC)
    model.base_model.own_budget.bias.data.fill_(0.05)
    before = model.base_model.own_budget().item()
    trainer_for(model, tmp_path, tokenizer, tokenized, learning_rate=1e-2, **outer_loss).train()
    assert model.base_model.own_budget().item() < before - 0.3


def test_the_callback_logs_the_parts_of_the_loss_for_everyone_who_reads_logs(tokenizer, tokenized, tmp_path):
    """Trap 14: the history is written before callbacks are asked; reports elsewhere, before later callbacks."""
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = trainer_for(budgetformer("bert"), tmp_path, tokenizer, tokenized, callbacks=[Reporter()], max_steps=3)
    BudgetCallback().attach(trainer)
    trainer.train()
    parts = {"task_loss", "budget", "budget_loss", "entropy", "temperature", "progress"}
    for entries in (reported, trainer.state.log_history):
        training = [entry for entry in entries if "loss" in entry]
        assert len(training) == 3
        assert all(parts <= entry.keys() for entry in training)
    assert logged(trainer, "progress") == pytest.approx([0.0, 1 / 3, 2 / 3], abs=1e-3)
    temperatures = logged(trainer, "temperature")
    assert temperatures == sorted(temperatures, reverse=True)


def biases_of(model):
    return [layer.router.scorer.bias.detach().clone() for layer in model.base_model.encoder.layer]


def test_heads_are_ranked_by_their_importance_for_the_training_rows(backbone_type, tokenizer, tokenized, tmp_path):
    model = budgetformer(backbone_type, stir=False)
    importance = head_importance(model, [DataCollatorWithPadding(tokenizer)(list(tokenized))])
    set_seed(0)
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=1, learning_rate=0.0
    )
    trainer.train()
    for layer, row in zip(model.base_model.encoder.layer, importance, strict=True):
        scores = layer.router.scorer.bias.detach() * layer.router.scorer.multiplier
        assert torch.equal(scores.argsort(), row.argsort())
        assert scores.std(correction=0).item() == pytest.approx(3.0, abs=1e-4)
        assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)


def test_ranking_draws_nothing_and_keeps_weights_gradients_and_mode(tokenizer, tokenized, tmp_path):
    model = budgetformer("bert", stir=False).train()
    trainer = trainer_for(model, tmp_path, tokenizer, tokenized)
    before, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    BudgetCallback().on_train_begin(
        trainer.args, trainer.state, trainer.control, model=model, train_dataloader=trainer.get_train_dataloader()
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"bert.encoder.layer.{index}.router.scorer.bias" for index in range(3)}


def test_what_is_trained_already_unlabelled_or_a_stream_is_not_ranked(tokenizer, tokenized, tmp_path):
    def ranked(rows, steps=0, rank=True, **arguments):
        set_seed(0)
        model = budgetformer("bert", stir=False)
        model.bert.exploration.steps.fill_(steps)
        before = biases_of(model)
        trainer_for(
            model, tmp_path, tokenizer, rows, callbacks=[BudgetCallback(rank=rank)], max_steps=1, learning_rate=0.0,
            **arguments,
        ).train()  # fmt: skip
        return not all(map(torch.equal, biases_of(model), before))

    assert ranked(tokenized)
    assert not ranked(tokenized, rank=False)
    assert not ranked(tokenized, steps=3)
    assert not ranked(tokenized.to_iterable_dataset())
    teacher = tokenized.remove_columns("label").add_column("teacher_logits", [[0.0, 1.0, 2.0]] * len(tokenized))
    outside = lambda outputs, labels, **_: outputs["logits"].sum() * 0  # noqa: E731
    assert not ranked(teacher, loss=outside)
    soft = tokenized.remove_columns("label").add_column("labels", [[0.2, 0.3, 0.5]] * len(tokenized))
    assert not ranked(soft, loss=outside)


def test_an_encoder_without_a_classifier_trains_with_the_callback(tokenized, tokenizer, tmp_path):
    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BudgetFormerModel(budgetformer("bert").config)
            self.score = torch.nn.Linear(self.encoder.config.hidden_size, 3)

        def forward(self, input_ids, attention_mask, labels):
            logits = self.score(self.encoder(input_ids, attention_mask=attention_mask).pooler_output)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = tokenized.rename_column("label", "labels")
    trainer = trainer_for(Scorer(), tmp_path, tokenizer, rows, callbacks=[BudgetCallback()], max_steps=2)
    trainer.train()
    assert len(logged(trainer, "budget")) == 2


def test_static_heads_cannot_be_ranked():
    with pytest.raises(ValueError, match="model must have routers, the heads of this one are static"):
        rank_heads(prune(budgetformer("bert"), [[0], [1], [2]]), [])


def test_the_callback_needs_a_budgetformer(tokenizer, tokenized, tmp_path):
    trainer = trainer_for(stock_classifier("bert"), tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()])
    with pytest.raises(
        TypeError, match="BudgetCallback needs a BudgetFormer model with routers, got BertForSequenceClassification"
    ):
        trainer.train()


@pytest.mark.parametrize("arguments", [{"bf16": True}, {CHECKPOINTING: True}])
def test_it_trains_under(arguments, backbone_type, tokenizer, tokenized, tmp_path):
    set_seed(0)
    model = budgetformer(backbone_type, head_budget=0.5)
    trainer = trainer_for(
        model, tmp_path, tokenizer, tokenized, max_steps=60, learning_rate=4e-3,
        callbacks=[BudgetCallback()], **arguments,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "task_loss")
    assert all(np.isfinite(losses))
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])


def test_an_autocast_batch_routes_in_full_precision(backbone_type):
    model = budgetformer(backbone_type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch_of([5, 9], backbone_type), output_head_gates=True)
    assert outputs.head_gates.dtype == torch.float32


WORKER = Path(__file__).parent / "ddp_worker.py"


def test_two_processes_give_the_gradient_of_the_whole_batch_and_one_schedule(tokenizer, tokenized, tmp_path):
    set_seed(0)
    model = budgetformer("bert", stir=False, **DETERMINISTIC, budget_loss_weight=0.0, need_scale=0.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokenized.save_to_disk(tmp_path / "data")
    keeper = GradientsAtFirstStep()
    whole = trainer_for(
        model, tmp_path / "one", tokenizer, tokenized, callbacks=[keeper], max_steps=3,
        per_device_train_batch_size=16, max_grad_norm=0.0,
    )  # fmt: skip
    whole.train()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    finished = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    for name, gradient in keeper.gradients.items():
        torch.testing.assert_close(ranks[0]["gradients"][name], gradient, msg=name, rtol=1e-4, atol=1e-6)
    assert [rank["steps"] for rank in ranks] == [3, 3]
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(ranks[1]["weights"][name], value), name


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
    assert state["log_history"][0]["progress"] == 0.0
