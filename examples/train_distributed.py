r"""Trains a BudgetFormer with the plain Trainer in as many processes as are started, on one machine or several.

    python examples/train_distributed.py --output_dir out
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_distributed.py \
        --model my-fine-tuned-bert --teacher my-fine-tuned-bert --dataset reviews.csv --output_dir out

Beside the options below, those of `transformers.TrainingArguments` are options here; batch sizes are those of one
process. `--resume_from_checkpoint FOLDER` goes on where a checkpoint was made by as many processes.
"""

import argparse
import os
from dataclasses import dataclass, field

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from datasets import DatasetDict  # type: ignore[import-untyped]
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from common import DOCSTRINGS, demo_checkpoint, metrics, print_table, read_config, read_texts, score, tokenized
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits


BUDGETS = {"own budget": None, "all heads": 1.0, "1/4": 0.25}


@dataclass
class Source:
    """What is trained, and on what."""

    model: str = field(default="", metadata={"help": "BERT, RoBERTa or BudgetFormer: folder or Hub id"})
    teacher: str = field(default="", metadata={"help": "fine-tuned classifier to learn from: folder or Hub id"})
    dataset: str = field(default=DOCSTRINGS, metadata={"help": "file, folder or Hub id with columns text and label"})
    max_length: int = field(default=64, metadata={"help": "tokens read of a text"})


def shard_without_gpus(arguments: TrainingArguments) -> None:
    """Has FSDP heeded where there is no GPU: accelerate 1.15 would leave the model whole and say nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and arguments.device.type == "cpu":
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU


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
        if source.teacher:
            data["train"] = add_teacher_logits(data["train"], source.teacher, tokenizer)
    labels = texts["train"].features["label"].names
    set_seed(arguments.seed)  # what is new in the model is the same everywhere
    model = BudgetFormerForSequenceClassification.from_pretrained(
        name, id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)}
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=metrics,
        # 0 is a wish for no exploration, which the callback would set to the length of the training.
        callbacks=[BudgetCallback()] if model.config.exploration_steps else None,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    rows = [(name, *score(trainer, data["test"], budget)) for name, budget in BUDGETS.items()]
    if trainer.is_world_process_zero():
        print(
            f"{arguments.world_size} processes, {trainer.accelerator.distributed_type.value} on {arguments.device.type}"
        )
        print_table(rows)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
