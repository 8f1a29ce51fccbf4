"""Steps of the plain Trainer on the stock model, on ours learning whole, and on ours beside a frozen full model."""

import argparse
import tempfile
import time
from functools import partial
from typing import Any

import torch
from inputs import build_models, load_tokenizer, make_batches, read_texts, tokenize
from measure import Agreement, interleave, ratio, spread
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments


SETTINGS: dict[str, Any] = {"model": "minilm", "cells": []}
CELL = {"data": "docstrings", "max_length": 128, "dtype": "float32", "batch_size": 32, "steps": 1}


class StepClock(TrainerCallback):
    """Seconds of optimiser steps, from the batch being there to the weights being updated."""

    seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts."""
        self.seconds -= time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops."""
        self.seconds += time.perf_counter()


def train(model: Any, rows: list[dict[str, Any]], cell: dict[str, Any], folder: str, seed: int) -> float:
    """Seconds a step of a fresh plain Trainer; a seed gives the same batches whatever the model."""
    clock = StepClock()
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=cell["batch_size"], max_steps=cell["steps"], learning_rate=5e-5, seed=seed,
        bf16=cell["dtype"] == "bfloat16", use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorWithPadding(load_tokenizer())
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds / cell["steps"]


def make_models(settings: dict[str, Any], rows: list[dict[str, Any]], agreement: Agreement) -> dict[str, Any]:
    """The models whose steps are timed, once they agree: the full model with stock, packed with masked."""
    stock, learning = build_models(settings)
    _, frozen = build_models({**settings, "freeze_full": True})
    stock.accepts_loss_kwargs = False  # or it would be given what changes its loss under accumulation, ours not
    [batch] = make_batches([row["input_ids"] for row in rows[:8]], 8, False)
    for name, model in (("full model learning", learning), ("full model frozen", frozen)):
        agreement.check(name, model(**batch, budget=1.0, executor="masked").logits, stock(**batch).logits)
        # Gradients on: the path that training takes.
        for budget in (1.0, model.config.narrow_budget):
            masked = model(**batch, budget=budget, executor="masked").logits
            agreement.check(f"{name}, packed", model(**batch, budget=budget).logits, masked)
    return {"stock": stock, "learning": learning, "frozen": frozen}


def measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times a step of each model, interleaved, on the same batches.

    "learning" is the default: both encoders learn. "frozen" is `freeze_full` with `teacher_logits` in the rows, where
    the full model does not run. "cost" is our time over stock's.
    """
    agreement, sources = Agreement(settings["dtype"]), {}
    figures: dict[str, dict[str, Any]] = {str(threads): {} for threads in settings["threads"]}
    for given in settings["cells"]:
        cell = {**CELL, **given}
        # For the shuffling of the Trainer to draw from: every round has batches of its own.
        count = cell["batch_size"] * cell["steps"] * 8
        texts, sources[cell["data"]] = read_texts(cell["data"], options.data, count, settings["seed"])
        rows = [
            {"input_ids": ids, "labels": index % 2}  # the time does not depend on them
            for index, ids in enumerate(tokenize(texts, cell["max_length"]))
        ]
        taught = [{**row, "teacher_logits": [0.5, -0.5]} for row in rows]
        models = make_models(settings, rows, agreement)
        with tempfile.TemporaryDirectory() as folder:
            for threads, cells in figures.items():
                torch.set_num_threads(int(threads))
                runs = {
                    name: partial(train, model, taught if name == "frozen" else rows, cell, folder)
                    for name, model in models.items()
                }
                times = interleave(runs, settings["repeats"])
                cells[f"{cell['data']} {cell['dtype']}"] = {
                    "cell": cell,
                    **{
                        name: {
                            "seconds_per_step": spread(seconds),
                            "ratio": ratio(times, name, "stock"),
                            "cost": ratio(times, "stock", name),
                        }
                        for name, seconds in times.items()
                    },
                }
    return {"agreement": agreement.to_dict(), "data": list(sources.values()), "figures": figures}
