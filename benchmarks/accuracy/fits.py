"""How the models of this comparison are trained and asked: by the plain Trainer, all of them alike."""

import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from inputs import load_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed


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


@torch.no_grad()
def ask(model: Any, rows: Dataset, batch_size: int = 32, **call: Any) -> np.ndarray:
    """Logits of every row, (N, num_labels) float32, in batches of like length; the mode stays as it was."""
    ids = [len(x) for x in rows["input_ids"]]
    order = np.argsort(ids, kind="stable")
    columns = [name for name in rows.column_names if name in ("input_ids", "token_type_ids", "attention_mask")]
    logits = np.zeros((len(rows), model.config.num_labels), dtype=np.float32)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = rows[places.tolist()]
        batch = load_tokenizer().pad({name: found[name] for name in columns}, return_tensors="pt")
        logits[places] = model(**batch, **call).logits.float().numpy()
    model.train(was_training)
    return logits
