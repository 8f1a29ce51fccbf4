r"""Trains a BudgetFormer with the plain Trainer in as many processes as are started, on one machine or several.

    python examples/train_distributed.py --output_dir out
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_distributed.py \
        --model my-fine-tuned-bert --freeze_full true --dataset reviews.csv --output_dir out

Beside the options below, those of `transformers.TrainingArguments` are options here; batch sizes are those of one
process. `--resume_from_checkpoint FOLDER` goes on where a checkpoint was made by as many processes.
"""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from common import DOCSTRINGS, demo_checkpoint, read_config, read_texts, tokenized
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits


# What a plain call does, by `config.looks`. One look: processes that share a sharded model must all run the same part.
LOOKS = {"full model": [1.0], "1/4": [0.25]}


@dataclass
class Source:
    """What is trained, and on what."""

    model: str = field(default="", metadata={"help": "BERT, RoBERTa or BudgetFormer: folder or Hub id"})
    freeze_full: bool = field(default=False, metadata={"help": "the model is fine-tuned already and stays as it is"})
    teacher: str = field(default="", metadata={"help": "fine-tuned classifier to learn from; freeze_full: model"})
    dataset: str = field(default=DOCSTRINGS, metadata={"help": "file, folder or Hub id with columns text and label"})
    max_length: int = field(default=64, metadata={"help": "tokens read of a text"})


def shard_without_gpus(arguments: TrainingArguments) -> None:
    """Has FSDP heeded where there is no GPU: accelerate 1.15 would leave the model whole and say nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and arguments.device.type == "cpu":
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy; and the mean budget where the Trainer was told to keep it."""
    outputs: Any = prediction.predictions
    logits, *spent = outputs if isinstance(outputs, tuple) else (outputs,)
    figures = {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}
    return {**figures, "budget": float(spent[0].mean())} if spent else figures


def score(trainer: Trainer, test: Dataset, looks: list[float]) -> tuple[float, float]:
    """Accuracy and mean budget of plain calls with other looks, asked in all processes."""
    config: Any = trainer.model.config  # type: ignore[union-attr]
    before, config.looks = config.looks, looks
    try:
        figures: Any = trainer.predict(test, ignore_keys=[]).metrics  # or else it would leave the budgets out
    finally:
        config.looks = before
    return figures["test_accuracy"], figures["test_budget"]


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, scores at a few budgets."""
    kinds = [Source, TrainingArguments]
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # type: ignore[arg-type]
    # Without GPUs the processes would not find each other unless told so; the loss reaches every parameter.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), ddp_find_unused_parameters=False)
    source, arguments = parser.parse_args_into_dataclasses(argv)
    shard_without_gpus(arguments)
    name = source.model or demo_checkpoint()
    _, tokenizer = read_config(name, "Give a BERT, RoBERTa or BudgetFormer checkpoint: a folder, or a Hub id.")
    with arguments.main_process_first():  # the others find it in the cache
        texts = read_texts(source.dataset)
        data = DatasetDict({split: tokenized(rows, tokenizer, source.max_length) for split, rows in texts.items()})
        teacher = source.teacher or (name if source.freeze_full else "")
        if teacher:  # with freeze_full a step then costs what the narrow encoder costs
            data["train"] = add_teacher_logits(data["train"], teacher, tokenizer)
        # On one half it is measured how sure the first look is, on the other how good the answers are.
        parts = data["test"].train_test_split(0.5, seed=arguments.seed)
    labels = texts["train"].features["label"].names
    set_seed(arguments.seed)  # what is new in the model is the same everywhere
    model = BudgetFormerForSequenceClassification.from_pretrained(
        name,
        freeze_full=source.freeze_full,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=parts["train"],
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[BudgetCallback()],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.evaluate()  # the callback measures how sure the first look is
    trainer.save_model()
    scores = {label: score(trainer, parts["test"], looks) for label, looks in LOOKS.items()}
    if trainer.is_world_process_zero():
        print(
            f"{arguments.world_size} processes, {trainer.accelerator.distributed_type.value} on {arguments.device.type}"
        )
        for label, (accuracy, budget) in scores.items():
            print(f"{label:<10}  accuracy {accuracy:.4f}  mean budget {budget:.3f}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
