"""The recipe in two stages: fine-tune the backbone as usual, then train a narrow encoder beside it."""

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..backbones import max_input_length
from ..configuration_budgetformer import BudgetFormerConfig
from ..modeling_budgetformer import BudgetFormerForSequenceClassification
from .checkpoints import load_config, load_trained
from .results import write_json
from .tables import label_ids
from .training import BudgetCallback, add_teacher_logits


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


def label_names(dataset: "Dataset") -> list[str]:
    """Names of a training set's labels: those of its class label, distinct strings sorted, or LABEL_0 and so on.

    Raises:
        ValueError: Labels are neither strings nor integers from 0 on, or there are fewer than two.
    """
    names, labels = getattr(dataset.features["label"], "names", None), set(dataset["label"])
    if names is None and all(isinstance(label, str) for label in labels):
        names = sorted(labels)
    if names is None and labels == set(range(len(labels))):
        names = [f"LABEL_{label}" for label in sorted(labels)]
    if names is None or len(labels) < 2:
        raise ValueError(
            "label must hold at least two different strings, or integers from 0 on without a gap, got "
            f"{sorted(labels, key=str)[:10]}."
        )
    return list(names)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def _tokenized(
    dataset: "Dataset", config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> "Dataset":
    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
    return encoded.add_column("labels", label_ids(dataset, config).tolist())


def _check_labels(checkpoint: str, train: "Dataset", fine_tuned: bool, new_head: bool) -> Any:
    """The labels that the model gets, as fields of its configuration; raises ValueError where they do not fit."""
    known = load_config(checkpoint)
    names = sorted(known.label2id, key=known.label2id.get)
    if fine_tuned:
        try:
            label_ids(train, known)
        except ValueError as error:
            raise ValueError(
                f"checkpoint {checkpoint} has the labels {names}, the data have others ({error}) Leave out fine_tuned "
                "(--fine-tuned) to fine-tune it on them, or give data with its labels."
            ) from None
    else:
        found = label_names(train)
        # A checkpoint without a classifier has none of these architectures, and two labels by default.
        has_head = any("SequenceClassification" in name for name in known.architectures or [])
        if has_head and not new_head and len(found) != len(names):
            raise ValueError(
                f"checkpoint {checkpoint} has {len(names)} labels, {names}, the data have {len(found)}, {found}: give "
                "new_head=True (--new-head) to train a classifier of its own for them."
            )
        names = found
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def train_classifier(
    checkpoint: str,
    train: "Dataset",
    arguments: TrainingArguments,
    validation: "Dataset | None" = None,
    fine_tuned: bool = False,
    together: bool = False,
    new_head: bool = False,
    max_length: int | None = None,
    source: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Trains a BudgetFormer from a plain checkpoint, and saves it in `arguments.output_dir`, ready for use.

    Stage one fine-tunes the stock model and saves it in the folder `teacher` there; stage two trains the narrow encoder
    beside it, from its answers, and leaves it as it is. Both take the same arguments.

    ```python
    train_classifier("bert-base-uncased", read_table("train.csv"), TrainingArguments("out", learning_rate=3e-5))
    ```

    Args:
        checkpoint: Folder or Hub id of a BERT or RoBERTa model.
        train: Rows with text, text_pair if there are two, and label, as `tools.tables.read_table` returns them.
        arguments: Of the Trainer. With `resume_from_checkpoint` stage two goes on, and stage one is not repeated.
        validation: Rows to evaluate on while training, if the arguments say so, and at the end; with it budgets between
            the narrow one and 1 can be asked for.
        fine_tuned: Whether `checkpoint` is a classifier for these labels already, and stays as it is: no stage one.
        together: Whether to train both encoders at once, in one stage.
        new_head: Whether a checkpoint with another number of labels gets a new classifier.
        max_length: Tokens kept of a text. None: all the tokenizer allows.
        source: What the training set is called, for the record.
        **fields: Of `BudgetFormerConfig`.

    Returns:
        What is written to `budgetformer/training.json`: "base_model", "teacher", "dataset", "rows", "max_length",
        "arguments", "log_history" (of stage two), "validation" (the last figures on it), "seconds" (what stage two
        took, with asking the teacher) and "stage_one_seconds".

    Raises:
        ValueError: An argument is not allowed, or labels are not what `label_names` wants or the checkpoint has.
    """
    if fine_tuned and together:
        raise ValueError("fine_tuned and together must not both be True: what stays as it is does not learn.")
    if load_config(checkpoint).model_type == "budgetformer" and not fine_tuned:
        raise ValueError(f"checkpoint must be a plain model, or fine_tuned already, got the BudgetFormer {checkpoint}.")
    output, started = Path(str(arguments.output_dir)), time.perf_counter()
    resumed = arguments.resume_from_checkpoint
    teacher = load_trained(checkpoint, arguments.device) if fine_tuned else None
    labels = _check_labels(checkpoint, train, fine_tuned, new_head)
    config, strange = BudgetFormerConfig.from_pretrained(checkpoint, return_unused_kwargs=True, **labels, **fields)
    if strange:
        BudgetFormerConfig(**strange)  # says what became of a field of version 0.1
        raise ValueError(f"fields must be those of BudgetFormerConfig, got {sorted(strange)}.")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_input_length(config))
    rows = _tokenized(train, config, tokenizer, max_length)
    held_out = None if validation is None else _tokenized(validation, config, tokenizer, max_length)

    def run(model: Any, rows: "Dataset", folder: Path) -> tuple[Trainer, dict[str, float]]:
        own = copy.copy(arguments)
        own.output_dir = str(folder)
        trainer = Trainer(
            model, own, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, compute_metrics=_accuracy
        )
        if model.config.model_type == "budgetformer":
            BudgetCallback(order=not together).attach(trainer)
        trainer.train(resume_from_checkpoint=resumed)
        metrics = {} if held_out is None else trainer.evaluate()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()  # or another process would load what is not there yet
        return trainer, metrics

    start, head = checkpoint, {"ignore_mismatched_sizes": new_head}
    if not (fine_tuned or together):
        start = str(output / "teacher")
        if not resumed:
            set_seed(arguments.seed)
            stock = AutoModelForSequenceClassification.from_pretrained(checkpoint, **labels, **head)
            run(stock, rows, output / "teacher")
    between = time.perf_counter()
    if not together:
        rows = add_teacher_logits(rows, teacher or load_trained(start, arguments.device), tokenizer)
        fields = {"freeze_full": True, **fields}
    set_seed(arguments.seed)
    model = BudgetFormerForSequenceClassification.from_pretrained(start, **labels, **head, **fields)
    trainer, metrics = run(model, rows, output)
    found = {
        "base_model": checkpoint,
        "teacher": None if together else start,
        "dataset": source,
        "rows": len(train),
        "max_length": max_length,
        "arguments": trainer.args.to_dict(),
        "log_history": trainer.state.log_history,
        "validation": metrics,
        "seconds": time.perf_counter() - between,
        "stage_one_seconds": between - started,
    }
    if trainer.is_world_process_zero():
        write_json(output / "budgetformer" / "training.json", found)
    return found


__all__ = ["label_names", "train_classifier"]
