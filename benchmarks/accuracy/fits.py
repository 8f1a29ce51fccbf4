"""How the models of this comparison are trained and asked: by the plain Trainer, all of them alike."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accuracy.rows import Rows
from datasets import Dataset
from inputs import load_tokenizer, minilm
from transformers import BatchEncoding, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_budgetformer.tools.batching import batches_by_length


def fit(
    model: Any,
    rows: Dataset,
    epochs: float,
    learning_rate: float,
    seed: int,
    batch_size: int = 32,
    trainer_class: type[Trainer] = Trainer,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> float:
    """Trains `model` in place; returns seconds.

    Args:
        model: What the Trainer takes.
        rows: With `input_ids` and what else `forward` takes.
        epochs: Passes over the rows.
        learning_rate: At its highest, after a tenth of the steps; then it falls linearly to 0.
        seed: Of order and dropout.
        batch_size: Rows a step.
        trainer_class: Where the loss is computed outside the model.
        callbacks: Of the Trainer.
        **options: Further `TrainingArguments`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            weight_decay=0.01,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="group_by_length",
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=100,
            use_cpu=True,
            **options,
        )
        collator = DataCollatorWithPadding(load_tokenizer())
        trainer = trainer_class(model, arguments, collator, rows, callbacks=callbacks)
        set_seed(seed)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def fine_tune(model_class: Any, rows: Rows, settings: dict[str, Any], seed: int, **options: Any) -> tuple[Any, float]:
    """MiniLM, or the settings' model, trained on the labels of a data set; and the seconds it took.

    Args:
        model_class: Made by its `from_pretrained`.
        rows: Of the data set.
        settings: Of all, and over them those of the data set.
        seed: Of head, order and dropout.
        **options: Of `fit`.
    """
    torch.manual_seed(seed)
    model = model_class.from_pretrained(settings.get("model") or minilm(), num_labels=rows.labels)
    rate = settings.get("learning_rate", settings["full_learning_rate"])
    return model, fit(model, rows.train, settings["epochs"], rate, seed, settings["batch_size"], **options)


@torch.no_grad()
def collect(model: Any, rows: Dataset, read: Callable[[BatchEncoding], torch.Tensor], size: int = 32) -> np.ndarray:
    """What `read` makes of every row, (N, ...) float32, in batches of like length.

    Args:
        model: In eval mode meanwhile; its mode comes back.
        rows: Tokenized.
        read: From a batch of B rows to (B, ...).
        size: Rows in a batch.
    """
    values: list[Any] = [None] * len(rows)
    was_training = model.training
    model.eval()
    for places, batch in batches_by_length(rows[:], load_tokenizer(), size):
        for place, value in zip(places, read(batch).float().numpy(), strict=True):
            values[place] = value
    model.train(was_training)
    return np.stack(values)


def ask(model: Any, rows: Dataset, **call: Any) -> np.ndarray:
    """Logits of every row, (N, num_labels) float32."""
    return collect(model, rows, lambda batch: model(**batch, **call).logits)
