"""The recipe in two stages: fine-tune the backbone as usual, then train a BudgetFormer that it teaches."""

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
from .data import label_ids, load_config, write_json
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


def train_classifier(
    checkpoint: str,
    train: "Dataset",
    arguments: TrainingArguments,
    validation: "Dataset | None" = None,
    teacher: str | None = None,
    one_stage: bool = False,
    max_length: int | None = None,
    source: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Trains a BudgetFormer from a plain checkpoint, and saves it in `arguments.output_dir`, ready for use.

    Stage one fine-tunes the stock model and saves it in the folder `teacher` there; stage two starts from that and is
    taught by it. Both take the same arguments.

    ```python
    train_classifier("bert-base-uncased", read_table("train.csv"), TrainingArguments("out", learning_rate=3e-5))
    ```

    Args:
        checkpoint: Folder or Hub id of a BERT or RoBERTa model.
        train: Rows with text, text_pair if there are two, and label, as `tools.data.read_table` returns them.
        arguments: Of the Trainer. With `resume_from_checkpoint` stage two goes on, and stage one is not repeated.
        validation: Rows to evaluate on while training, if the arguments say so, and at the end.
        teacher: Folder or Hub id of a fine-tuned classifier to learn from, in place of stage one; the model starts from
            `checkpoint` and takes over the teacher's labels.
        one_stage: Whether to do without any teacher.
        max_length: Tokens kept of a text. None: all the tokenizer allows.
        source: What the training set is called, for the record.
        **fields: Of `BudgetFormerConfig`.

    Returns:
        What is written to `budgetformer/training.json`: "base_model", "teacher", "dataset", "rows", "max_length",
        "arguments", "log_history" (of stage two), "validation" (the last figures on it), "seconds" (what stage two
        took, with asking the teacher) and "stage_one_seconds".

    Raises:
        ValueError: An argument is not allowed, or labels are not what `label_names` wants or the teacher knows.
    """
    if teacher and one_stage:
        raise ValueError(f"teacher must be None where one_stage is True, got {teacher!r}.")
    output, started = Path(str(arguments.output_dir)), time.perf_counter()
    resumed = arguments.resume_from_checkpoint
    if resumed and not one_stage:
        teacher = teacher or str(output / "teacher")
    if load_config(checkpoint).model_type == "budgetformer" and not (teacher or one_stage):
        raise ValueError(f"checkpoint must be a plain model for stage one, got the BudgetFormer {checkpoint}.")
    names = label_names(train) if teacher is None else [x for _, x in sorted(load_config(teacher).id2label.items())]
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}}
    labels["problem_type"] = "single_label_classification"
    config, strange = BudgetFormerConfig.from_pretrained(checkpoint, return_unused_kwargs=True, **labels, **fields)
    if strange:
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
        if getattr(model.base_model, "own_budget", None) is not None:
            BudgetCallback().attach(trainer)
        trainer.train(resume_from_checkpoint=resumed)
        metrics = {} if held_out is None else trainer.evaluate()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()  # or another process would load what is not there yet
        return trainer, metrics

    start = checkpoint
    if not (teacher or one_stage):
        set_seed(arguments.seed)
        run(AutoModelForSequenceClassification.from_pretrained(checkpoint, **labels), rows, output / "teacher")
        start = teacher = str(output / "teacher")
    between = time.perf_counter()
    if teacher:
        rows = add_teacher_logits(rows, teacher, tokenizer)
    set_seed(arguments.seed)
    model = BudgetFormerForSequenceClassification.from_pretrained(start, **labels, **fields)
    trainer, metrics = run(model, rows, output)
    found = {
        "base_model": checkpoint,
        "teacher": teacher,
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
