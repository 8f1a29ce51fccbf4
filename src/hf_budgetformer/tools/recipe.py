"""The recipe in two stages: fine-tune the backbone as usual, then train a narrow encoder beside it."""

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..backbones import max_input_length
from ..budgets import problem_type
from ..configuration_budgetformer import BudgetFormerConfig
from ..metrics.budgetformer.budgetformer import describe_answers
from ..modeling_budgetformer import BudgetFormerForSequenceClassification
from ..positions import extend_positions
from .checkpoints import load_config, load_tokenizer, load_trained
from .evaluation import evaluate_budgets
from .results import write_json
from .tables import label_values
from .training import BudgetCallback, add_teacher_logits, mix_rows
from .tuning import decisions


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


# Of the narrow encoder, whatever the full model's was: it is small, and begins as a part of one. See
# `benchmarks/accuracy`.
NARROW_LEARNING_RATE = 6e-4
# For each step of the full model, which costs several times as much.
NARROW_STEPS = 2
# For each given row. The full model is asked about them too.
MIXED_ROWS = 1


def find_problem(dataset: "Dataset") -> str:
    """What a training set asks for, by the kind of its labels.

    Returns:
        "multi_label_classification" where they are lists, "regression" where they are floats, else
        "single_label_classification".
    """
    first = dataset.with_format(None)[0]["label"]
    if isinstance(first, list):
        return "multi_label_classification"
    return "regression" if isinstance(first, float) else "single_label_classification"


def label_names(dataset: "Dataset", problem: str = "single_label_classification") -> list[str]:
    """Names of a training set's labels: those of its class label, distinct strings sorted, or LABEL_0 and so on.

    Args:
        dataset: With the column label.
        problem: As of `find_problem`. A regression's one value is called LABEL_0, as upstream.

    Raises:
        ValueError: Labels are neither strings, bools nor integers from 0 on, or there are fewer than two.
    """
    if problem == "regression":
        return ["LABEL_0"]
    kind, values = dataset.features["label"], dataset.with_format(None)["label"][:]
    if problem == "multi_label_classification":
        kind, values = getattr(kind, "feature", kind), [label for labels in values for label in labels]
    names, labels = getattr(kind, "names", None), set(values)
    if names is None and all(isinstance(label, str | bool) for label in labels):
        names = sorted(map(str, labels))
    if names is None and labels == set(range(len(labels))):
        names = [f"LABEL_{label}" for label in sorted(labels)]
    if names is None or len(labels) < 2:
        raise ValueError(
            "label must hold at least two different strings, or integers from 0 on without a gap, got "
            f"{sorted(labels, key=str)[:10]}."
        )
    return list(names)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """For the Trainer; nothing of a regression, whose loss says all."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if logits.shape[-1] == 1:
        return {}
    problem = "multi_label_classification" if labels.ndim > 1 else None
    return {"accuracy": describe_answers(decisions(logits, problem), labels)["accuracy"]}


class _StageBar(ProgressCallback):
    """The Trainer's own bar, with the name of the stage before it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)


def _tokenized(
    dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, max_length: int | None, config: Any = None
) -> "Dataset":
    """Tokenized rows; with the labels of `config`, if it is given."""

    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
    return encoded if config is None else encoded.add_column("labels", label_values(dataset, config).tolist())


def taught_rows(
    rows: "Dataset",
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    unlabelled: "Dataset | None" = None,
    mixed: int = MIXED_ROWS,
    seed: int = 0,
) -> "Dataset":
    """Rows to train the narrow encoder of a classifier on: given and mixed ones, with the full model's answers.

    ```python
    train = taught_rows(train, "my-fine-tuned-bert", tokenizer)
    model = BudgetFormerForSequenceClassification.from_pretrained("my-fine-tuned-bert", freeze_full=True)
    Trainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[BudgetCallback()]).train()
    ```

    Args:
        rows: Tokenized rows. Labels that they have are not read.
        teacher: The fine-tuned model, as in `tools.training.add_teacher_logits`.
        tokenizer: Of the teacher.
        unlabelled: Further tokenized rows.
        mixed: Rows of `tools.training.mix_rows` for each of these, >= 0.
        seed: Of the mixing.

    Returns:
        The given rows, the unlabelled and the mixed ones, in this order: the columns that the tokenizer makes,
        `teacher_logits`, and as `labels` the labels that the teacher gives.

    Raises:
        ValueError: `mixed` is below 0, or the rows are not tokenized.
    """
    from datasets import concatenate_datasets  # here, for it takes long to import

    _check_mixed(mixed)
    columns = [name for name in rows.column_names if name in tokenizer.model_input_names]
    if "input_ids" not in columns:
        raise ValueError(f"rows must have a column 'input_ids', got the columns {rows.column_names}.")
    parts = [part.with_format(None).select_columns(columns) for part in (rows, unlabelled) if part is not None]
    given = concatenate_datasets(parts)
    if mixed:
        given = concatenate_datasets([given, mix_rows(given, mixed, tokenizer, seed)])
    model: Any = teacher if isinstance(teacher, nn.Module) else load_trained(teacher)
    taught = add_teacher_logits(given, model, tokenizer)
    logits = np.array(taught["teacher_logits"][:])
    labels = {
        "single_label_classification": logits.argmax(-1),
        "multi_label_classification": (logits > 0).astype(np.float32),
        "regression": logits[:, 0] if logits.shape[-1] == 1 else logits,
    }
    return taught.add_column("labels", labels[problem_type(model.config)].tolist())


def _check_mixed(mixed: int) -> None:
    if not isinstance(mixed, int) or mixed < 0:
        raise ValueError(f"mixed must be an integer >= 0, got {mixed!r}.")


def _label_fields(names: Sequence[str], problem: str) -> dict[str, Any]:
    """Fields of a configuration."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": numbers, "problem_type": problem}


def _check_labels(
    checkpoint: str, train: "Dataset", fine_tuned: bool, new_head: bool, labels: Sequence[str] | None, problem: Any
) -> dict[str, Any]:
    """The labels that the model gets, as fields of its configuration; raises ValueError where they do not fit."""
    if labels is not None and len(set(labels)) < max(2, len(labels)):
        raise ValueError(f"labels must be two different names or more, got {list(labels)}.")
    known = load_config(checkpoint)
    names = sorted(known.label2id, key=known.label2id.get)
    if fine_tuned:
        if labels is not None and len(labels) != len(names):
            raise ValueError(f"labels must name the {len(names)} of {checkpoint}, {names}, got {list(labels)}.")
        for name, value in _label_fields(labels or names, problem or problem_type(known)).items():
            setattr(known, name, value)
        try:
            label_values(train, known)
        except ValueError as error:
            raise ValueError(
                f"checkpoint {checkpoint} has the labels {names}, the data have others ({error}) Leave out fine_tuned "
                "(--fine-tuned) to fine-tune it on them, or give data with its labels."
            ) from None
        names, problem = list(labels or names), known.problem_type
    else:
        problem = problem or find_problem(train)
        data_names = list(labels or label_names(train, problem))
        # A checkpoint without a classifier has none of these architectures, and two labels by default.
        has_head = any("SequenceClassification" in name for name in known.architectures or [])
        if has_head and not new_head and len(data_names) != len(names):
            raise ValueError(
                f"checkpoint {checkpoint} has {len(names)} labels, {names}, the data have {len(data_names)}, "
                f"{data_names}: give new_head=True (--new-head) to train a classifier of its own for them."
            )
        names = data_names
    return _label_fields(names, problem)


def last_checkpoint(folder: str | Path, since: Path | None = None) -> str | None:
    """The last checkpoint of a Trainer in a folder that was written to its end, and from which there are steps to take.

    Going on from one after the last step, a Trainer takes one more.

    Args:
        folder: The Trainer's `output_dir`.
        since: A file; checkpoints that are older are of another run.

    Returns:
        Its folder; None where there is none.
    """
    oldest = since.stat().st_mtime_ns if since is not None and since.is_file() else 0
    steps: dict[int, str] = {}
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):  # what the Trainer writes last
        try:
            values = json.loads(state.read_text("utf-8"))
        except ValueError:
            continue
        if values["global_step"] < values["max_steps"] and state.stat().st_mtime_ns >= oldest:
            steps[values["global_step"]] = str(state.parent)
    return steps[max(steps)] if steps else None


def _plain_calls(model: Any, rows: "Dataset", tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, float]:
    """What plain calls of a trained model answer and spend, beside the full model alone."""
    full, plain = evaluate_budgets(model, rows, tokenizer, (1.0, None), batch_size).results
    figures = {
        "eval_accuracy": plain.accuracy,
        "eval_error": plain.error,
        "eval_budget": plain.spent,
        "eval_agreement": plain.agreement,
        "eval_full_accuracy": full.accuracy,
        "eval_full_error": full.error,
    }
    return {name: value for name, value in figures.items() if value is not None}


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
    unlabelled: "Dataset | None" = None,
    mixed: int = MIXED_ROWS,
    narrow_learning_rate: float = NARROW_LEARNING_RATE,
    labels: Sequence[str] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Trains a BudgetFormer from a plain checkpoint, and saves it in `arguments.output_dir`, ready for use.

    Stage one fine-tunes the stock model and saves it in the folder `teacher` there; stage two trains the narrow encoder
    beside it, from its answers, and leaves it as it is. Stage two has the rows of `taught_rows`: the training rows,
    others without labels if there are any, and mixed ones. Both stages take the same arguments, except that the
    learning rate of stage two is the narrow encoder's own, and that epochs are counted so that it takes twice the steps
    of stage one, or more if that is what reading every row once takes; `max_steps` holds for either as it is.

    With `router="layer"` stage two trains the paper's routers on the training rows, by the same arguments.

    ```python
    train_classifier("bert-base-uncased", read_table("train.csv"), TrainingArguments("out", learning_rate=3e-5))
    ```

    Args:
        checkpoint: Folder or Hub id of a BERT or RoBERTa model.
        train: Rows with text, text_pair if there are two, and label, as `tools.tables.read_table` returns them. Lists
            as labels make a classifier of several labels at once, floats a regression.
        arguments: Of the Trainer. With `resume_from_checkpoint` stage two goes on, and stage one is not repeated;
            "last" goes on, in either stage, from what `last_checkpoint` finds, or begins where there is none. Give the
            `seed` of the first run then, for it draws the mixed rows too.
        validation: Rows to evaluate on while training, if the arguments say so, and at the end; with it budgets between
            the narrow one and 1 can be asked for.
        fine_tuned: Whether `checkpoint` is a classifier for these labels already, and stays as it is: no stage one.
        together: Whether to train both encoders at once, in one stage.
        new_head: Whether a checkpoint with another number of labels gets a new classifier.
        max_length: Tokens kept of a text, here and wherever the tokenizer that is saved cuts texts. None: all the
            tokenizer allows.
        source: What the training set is called, for the record.
        unlabelled: Further rows for stage two, with text, and text_pair if the training rows have it. They need no
            labels, for the full model answers them.
        mixed: Mixed rows for each training row and each unlabelled one, >= 0.
        narrow_learning_rate: Of stage two, > 0.
        labels: Names of the labels, in the order of their numbers. None: see `label_names`; with `fine_tuned` those of
            the checkpoint.
        **fields: Of `BudgetFormerConfig`; problem_type="regression" where integers are no classes.

    Returns:
        What is written to `budgetformer/training.json`: "base_model", "teacher", "dataset", "rows", "max_length",
        "arguments" (as given), "narrow" (what differs in stage two: "learning_rate", "num_train_epochs", "rows",
        "unlabelled" and "mixed"; empty where nothing does), "log_history" (of stage two), "validation" (the last
        figures on it), "seconds" (what stage two took, with asking the teacher), "stage_one_seconds" and
        "stage_one_log_history". Among the figures on validation rows "eval_accuracy" and "eval_budget" are those of
        plain calls, "eval_agreement" how often they answer as the full model does, and "eval_full_accuracy" is the full
        model's; "eval_error" and "eval_full_error" take the place of the accuracies in a regression.

    Raises:
        ValueError: An argument is not allowed, or labels are not what `label_names` wants or the checkpoint has.
    """
    if not (isinstance(narrow_learning_rate, float) and narrow_learning_rate > 0.0):
        raise ValueError(f"narrow_learning_rate must be a float > 0, got {narrow_learning_rate!r}.")
    _check_mixed(mixed)
    if unlabelled is not None and (together or fields.get("router") == "layer"):
        raise ValueError(
            'unlabelled must be None with together=True or router="layer": it teaches a narrow encoder alone.'
        )
    if unlabelled is not None and ("text_pair" in unlabelled.column_names) != ("text_pair" in train.column_names):
        raise ValueError(
            f"unlabelled must have text_pair where train has it, got the columns {unlabelled.column_names} and "
            f"{train.column_names}."
        )
    if fine_tuned and together:
        raise ValueError("fine_tuned and together must not both be True: what stays as it is does not learn.")
    known = load_config(checkpoint)
    longer = fields.get("max_position_embeddings", 0) > known.max_position_embeddings
    if fine_tuned and longer:
        raise ValueError(
            "max_position_embeddings must not exceed the checkpoint's with fine_tuned, for positions are learned, got "
            f"{fields['max_position_embeddings']} > {known.max_position_embeddings}."
        )
    window = fields.get("attention_window")
    if not together and window is not None and window != getattr(known, "attention_window", None):
        raise ValueError(f"attention_window={window} needs together=True (--together), the stock model has none.")
    if known.model_type == "budgetformer" and not fine_tuned:
        raise ValueError(f"checkpoint must be a plain model, or fine_tuned already, got the BudgetFormer {checkpoint}.")
    output, started = Path(str(arguments.output_dir)), time.perf_counter()
    resumed: str | None = arguments.resume_from_checkpoint
    goes_on = resumed == "last"
    teacher = load_trained(checkpoint, arguments.device) if fine_tuned else None
    named = _check_labels(checkpoint, train, fine_tuned, new_head, labels, fields.pop("problem_type", None))
    config, strange = BudgetFormerConfig.from_pretrained(checkpoint, return_unused_kwargs=True, **named, **fields)
    if strange:
        BudgetFormerConfig(**strange)  # says what became of a field of version 0.1
        raise ValueError(f"fields must be those of BudgetFormerConfig, got {sorted(strange)}.")
    tokenizer = load_tokenizer(checkpoint)
    longest = max_input_length(config)
    tokenizer.model_max_length = longest if longer else min(tokenizer.model_max_length, longest)
    if max_length is not None:  # remembered with the model, for whoever cuts texts later
        if max_length < 1:
            raise ValueError(f"max_length must be None or an integer >= 1, got {max_length}.")
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    rows = _tokenized(train, tokenizer, max_length, config)
    more = None if unlabelled is None else _tokenized(unlabelled, tokenizer, max_length)
    held_out = None if validation is None else _tokenized(validation, tokenizer, max_length, config)
    output.mkdir(parents=True, exist_ok=True)  # nothing is refused from here on

    def run(
        model: Any, rows: "Dataset", folder: Path, stage: str, resumed: str | None, **changes: Any
    ) -> tuple[Trainer, dict[str, float]]:
        stage_arguments = copy.copy(arguments)
        for name, value in {"output_dir": str(folder), **changes}.items():
            setattr(stage_arguments, name, value)
        trainer = Trainer(
            model,
            stage_arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=_accuracy,
        )
        if model.config.model_type == "budgetformer":
            BudgetCallback(order=not together).attach(trainer)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_StageBar(stage))
        trainer.train(resume_from_checkpoint=resumed)
        metrics = {} if held_out is None else trainer.evaluate()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()  # or another process would load what is not there yet
        return trainer, metrics

    start, head = checkpoint, {"ignore_mismatched_sizes": new_head}
    # Beside the teacher, for a run that is resumed without its first stage.
    record, stage_one = output / "teacher" / "budgetformer" / "training.json", {"seconds": 0.0, "log_history": []}
    if not (fine_tuned or together):
        start = str(output / "teacher")
        if not resumed:
            record.unlink(missing_ok=True)  # of a run before, which is over
        if not resumed or (goes_on and not record.is_file()):
            set_seed(arguments.seed)
            stock = AutoModelForSequenceClassification.from_pretrained(checkpoint, **named, **head)
            if "max_position_embeddings" in fields:
                extend_positions(stock, fields["max_position_embeddings"])
            halfway = last_checkpoint(output / "teacher") if goes_on else None
            first, _ = run(stock, rows, output / "teacher", "Stage 1 of 2, the plain model", halfway)
            stage_one = {"seconds": time.perf_counter() - started, "log_history": first.state.log_history}
            if first.is_world_process_zero():
                write_json(record, stage_one)
        elif record.is_file():
            stage_one = json.loads(record.read_text("utf-8"))
    between = time.perf_counter()
    changes: dict[str, Any] = {}
    about_rows: dict[str, int] = {}
    if not together:
        teacher = teacher or load_trained(start, arguments.device)
        if config.router == "layer":  # the full model learns on, from its own answers before
            rows = add_teacher_logits(rows, teacher, tokenizer)
        else:
            epochs = arguments.num_train_epochs
            rows = taught_rows(rows, teacher, tokenizer, more, mixed, arguments.seed)
            passes = max(NARROW_STEPS * epochs * len(train) / len(rows), min(epochs, 1.0))
            changes = {"learning_rate": narrow_learning_rate, "num_train_epochs": passes}
            about_rows = {"rows": len(rows), "unlabelled": 0 if more is None else len(more), "mixed": mixed}
        fields = {"freeze_full": True, **fields}
    set_seed(arguments.seed)
    model = BudgetFormerForSequenceClassification.from_pretrained(start, **named, **head, **fields)
    number = "" if fine_tuned or together else "Stage 2 of 2, "
    stage = number + ("both encoders" if together else "the narrow encoder")
    if goes_on:
        resumed = last_checkpoint(output, since=record)
    trainer, metrics = run(model, rows, output, stage[:1].upper() + stage[1:], resumed, **changes)
    if held_out is not None:
        metrics |= _plain_calls(model, held_out, tokenizer, arguments.per_device_eval_batch_size)
    training = {
        "base_model": checkpoint,
        "teacher": None if together else start,
        "dataset": source,
        "rows": len(train),
        "max_length": max_length,
        "arguments": arguments.to_dict(),
        "narrow": {**changes, **about_rows},
        "log_history": trainer.state.log_history,
        "validation": metrics,
        "seconds": time.perf_counter() - between,
        "stage_one_seconds": stage_one["seconds"],
        "stage_one_log_history": stage_one["log_history"],
    }
    if trainer.is_world_process_zero():
        write_json(output / "budgetformer" / "training.json", training)
    return training


__all__ = ["find_problem", "label_names", "last_checkpoint", "taught_rows", "train_classifier"]
