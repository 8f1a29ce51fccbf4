"""Company for the plain Trainer: optional, training is right without it."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ..budgets import first_look_budget, has_confidence
from ..configuration_budgetformer import is_share
from .batching import batches_by_length
from .checkpoints import load_trained, weights_digest
from .narrowing import order_units
from .tuning import (
    Calibration,
    apply_tuning,
    calibrate_margins,
    choose_looks,
    kept_promise,
    look_budgets,
    rows_needed,
    share_error,
)


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

logger = logging.get_logger(__name__)

# Rows, evenly spaced, that importance is estimated from.
_ORDER_ROWS = 256


def _find_model(model: nn.Module) -> Any:
    """The outermost BudgetFormer model in a module: a task's, or an encoder alone."""
    # By name, for a model loaded from the Hub with its own code is of another class than the installed one.
    for module in model.modules():
        if hasattr(type(module), "init_narrow"):  # of the class, for adapters pass on what they are asked
            return module
    raise TypeError(f"BudgetCallback needs a BudgetFormer model, got {type(model).__name__}.")


def _has_labels(batch: Mapping[str, torch.Tensor], config: Any) -> bool:
    """Whether the model's own loss is meant; numbers for several labels may be for a loss computed outside."""
    labels = batch.get("labels", batch.get("start_positions"))
    clear = config.problem_type is not None or config.num_labels == 1
    return labels is not None and (clear or not labels.is_floating_point())


def _count_rows(loader: Any) -> int | None:
    """Rows of a loader's data set; None where there is no loader, or its data are a stream."""
    dataset: Any = getattr(loader, "dataset", None)
    return None if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") else len(dataset)


def _collate(loader: Any, rows: Sequence[int], size: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """Batches of rows of a loader's data set; the loader is not iterated, so that training draws what it would."""
    for start in range(0, len(rows), size):
        yield loader.collate_fn([loader.dataset[row] for row in rows[start : start + size]])


def _some_batches(loader: Any, size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Evenly spaced rows, collated; none of a stream."""
    count = _count_rows(loader)
    if not count:
        return []
    rows = torch.linspace(0, count - 1, min(_ORDER_ROWS, count)).long().tolist()
    chunks = _collate(loader, rows, size)
    return [{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in chunk.items()} for chunk in chunks]


class BudgetCallback(TrainerCallback):
    """Orders units before the first step, calibrates the looks after the last one, and logs the parts of the loss.

    Before: the narrow encoder is born from the units that matter most to the labels of up to 256 training rows, see
    `tools.narrowing.order_units`. A model that was trained before or is resumed stays as it is; where batches have no
    `labels` that the model's own loss takes, or the data are a stream, it stays as it was loaded, born by the norms of
    its weights.

    After: where the Trainer has rows to evaluate on, the looks of a plain call become the cheapest ones that keep the
    promise on rows like these, with 95% confidence, as `tools.tuning.tune` would find them; looks that the user set
    stay. `config.margins` is stored too, so that budgets between `config.narrow_budget` and 1 can be asked for. Where
    these rows are too few for the promise, a warning says how many it takes, and the looks stay as they are. Every
    process reads all rows, so that all come to the same looks.

    Logged at every logging step of the Trainer, from the latest forward pass: `task_loss` (where the full model sees
    labels), `divergence` (of the narrow encoder from the full one), `budget` (what it ran at). With `router="layer"`
    also `distillation_loss`, `need_loss`, `budget_loss`, `entropy`, `temperature`, `progress`, and for each layer the
    share of its heads that ran, `heads/layer_00` and on; exploration then lasts as long as the training.

    ```python
    trainer = Trainer(model, args, train_dataset=train, eval_dataset=validation, callbacks=[BudgetCallback()])
    ```

    Reporting integrations (TensorBoard and others named in `report_to`) run before callbacks given this way; to reach
    them too, call `BudgetCallback().attach(trainer)` instead.

    Args:
        order: Whether units are ordered. Not where the encoder has yet to learn what its units are for.
        disagreement: The promise: share of the inputs, in (0, 1), on which a plain call's answer may differ from the
            full model's. None: looks stay as they are.
    """

    def __init__(self, order: bool = True, disagreement: float | None = 0.01) -> None:
        if disagreement is not None and not (is_share(disagreement) and disagreement < 1.0):
            raise ValueError(f"disagreement must be None or a float in (0, 1), got {disagreement!r}.")
        self.order = order
        self.disagreement = disagreement
        self._ended = False

    def attach(self, trainer: Trainer) -> "BudgetCallback":
        """Adds this callback to `trainer`, before those that report logs elsewhere; returns it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Orders the units of a model that begins."""
        model = _find_model(kwargs["model"])
        if model.config.router == "layer":
            model.config.exploration_steps = state.max_steps
            return
        self._forget_calibration(model.config)
        begins = state.global_step == 0 and not model.is_trained()
        if not (
            self.order and begins and hasattr(model, "task") and model.config.full_encoder and model.narrow.is_whole()
        ):
            return
        batches = _some_batches(kwargs.get("train_dataloader"), args.per_device_train_batch_size, args.device)
        if batches and all(_has_labels(batch, model.config) for batch in batches):
            order_units(model, batches)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the exploration of `router="layer"` to the Trainer's step."""
        model = _find_model(kwargs["model"])
        if model.config.router == "layer":
            model.base_model.encoder.exploration.steps.fill_(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes back the count of a micro-batch."""
        self.on_step_begin(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrates the looks, where there are rows to do it on."""
        self._ended = True
        self._calibrate(_find_model(kwargs["model"]), kwargs.get("eval_dataloader"), args.eval_batch_size)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Calibrates the looks at the first evaluation after training, if there was none before its end."""
        model = _find_model(kwargs["model"])
        if self._ended and model.config.margins is None:  # the Trainer makes its loader no earlier
            self._calibrate(model, kwargs.get("eval_dataloader"), args.eval_batch_size)

    def _forget_calibration(self, config: Any) -> None:
        """Drops what was calibrated with other weights; looks stay where the user set them."""
        if kept_promise(config):
            config.confidence = config.looks = None
        config.margins = config.promise = config.ranking = None

    def _calibrate(self, model: Any, loader: Any, size: int) -> None:
        config = model.config
        doubtful = config.full_encoder and has_confidence(config)
        classifier = getattr(model, "task", None) == "SequenceClassification"
        if loader is None or model.narrow is None or not classifier or not doubtful:
            return
        count = _count_rows(loader)  # all rows in every process, which thus all come to the same looks
        batches = iter(loader) if count is None else _collate(loader, range(count), size)
        first: Mapping[str, torch.Tensor] = next(batches, {})
        if not {"input_ids", "inputs_embeds"} & first.keys():  # sentence-transformers collates texts
            return
        batches = chain([first], batches)
        if self.disagreement is None or config.looks is not None:
            calibrate_margins(model, batches)
            return
        budgets = look_budgets(config)
        calibration = Calibration(model, batches, budgets)
        rows = len(calibration.answers[1.0])
        needed = rows_needed("disagreement", self.disagreement, max(share_error(0.05, budgets)))
        if rows >= needed:
            apply_tuning(config, choose_looks(calibration, "disagreement", self.disagreement), calibration)
            return
        nearest = min(budgets, key=lambda budget: abs(budget - first_look_budget(config)))
        config.margins = calibration.margins(nearest)
        logger.warning(
            f"{rows} rows to evaluate on are too few to promise that at most {100 * self.disagreement:.3g}% of the "
            f"answers differ from the full model's: it takes {needed}. The looks of a plain call stay as they are."
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the parts of the loss to the training logs."""
        if logs is None or "loss" not in logs:
            return
        parts = {name: round(value.item(), 4) for name, value in _find_model(kwargs["model"]).training_log.items()}
        logs.update(parts)
        state.log_history[-1].update(parts)  # the Trainer copied the logs into its history before this call


def add_teacher_logits(
    dataset: "Dataset",
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    max_length: int | None = None,
) -> "Dataset":
    """Adds what a fine-tuned model says of each row, for distillation: the column `teacher_logits`.

    `forward` takes the column like any other, so a plain Trainer needs nothing more. The result is cached by
    `datasets`, by the teacher's weights.

    ```python
    train = add_teacher_logits(train, "my-fine-tuned-bert", tokenizer)
    Trainer(model, args, train_dataset=train, processing_class=tokenizer).train()
    ```

    Args:
        dataset: Tokenized rows (`input_ids` and what else the tokenizer makes), or texts: columns `text` and, for
            pairs, `text_pair`.
        teacher: A sequence classifier, or its folder or Hub id; with as many labels as the model to be trained. Usually
            the fine-tuned backbone that training starts from.
        tokenizer: Of the teacher.
        batch_size: Rows the teacher reads at a time.
        max_length: Tokens kept of a text, as in training; only for rows that are not tokenized yet. None: all the
            tokenizer allows.

    Returns:
        The data set with one column more: lists of num_labels floats.

    Raises:
        ValueError: The rows are neither tokenized nor texts, or have such a column already, or the teacher's head has
            not been trained.
    """
    from datasets.fingerprint import Hasher  # type: ignore[import-untyped]  # here, for it takes long to import

    columns = dataset.column_names
    if "teacher_logits" in columns:
        raise ValueError(f"dataset must not have a column 'teacher_logits' yet, got the columns {columns}.")
    if not {"input_ids", "text"} & set(columns):
        raise ValueError(f"dataset must have a column 'input_ids' or 'text', got the columns {columns}.")
    model: Any = teacher if isinstance(teacher, nn.Module) else load_trained(teacher)

    ours = model.config.model_type == "budgetformer" and model.config.router == "look" and model.config.full_encoder
    asks = {"budget": 1.0} if ours else {}  # what the full model says

    def ask(rows: dict[str, list[Any]]) -> dict[str, list[list[float]]]:
        logits: list[list[float]] = [[] for _ in next(iter(rows.values()))]
        for places, batch in batches_by_length(rows, tokenizer, batch_size, max_length):
            answers = model(**batch.to(model.device), **asks).logits.float().tolist()
            for place, answer in zip(places, answers, strict=True):
                logits[place] = answer
        return {"teacher_logits": logits}

    inputs = [dataset._fingerprint, weights_digest(model), Hasher.hash(tokenizer), max_length]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return dataset.map(ask, batched=True, new_fingerprint=Hasher.hash(inputs), desc="Asking the teacher")
    finally:
        model.train(was_training)


def mix_rows(dataset: "Dataset", times: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> "Dataset":
    """Makes new rows of given ones: in each a span of tokens is replaced by one of a row drawn at random.

    Nobody knows their labels, but a teacher has an answer to them (see `add_teacher_logits`), and a narrow encoder that
    learns from these answers too comes nearer to the teacher on rows that neither has seen. The span is 15 to 50% of a
    row's tokens, or all that the other row has. Special tokens stay where they are, and so the row keeps its length.

    ```python
    mixed = mix_rows(train, 1, tokenizer)
    train = add_teacher_logits(concatenate_datasets([train.select_columns(mixed.column_names), mixed]), mine, tokenizer)
    ```

    Args:
        dataset: Tokenized rows: `input_ids` and what else the tokenizer makes.
        times: New rows for each given one, >= 1.
        tokenizer: Of the rows.
        seed: Of the draw: the same rows and seed give the same new rows.

    Returns:
        The new rows alone, those of all given rows `times` over, without labels: the columns that the tokenizer makes.

    Raises:
        ValueError: `times` is below 1, or the rows are not tokenized.
    """
    from datasets import Dataset  # here, for it takes long to import

    if not isinstance(times, int) or times < 1:
        raise ValueError(f"times must be an integer >= 1, got {times!r}.")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset must have a column 'input_ids', got the columns {dataset.column_names}.")
    draw = random.Random(seed)
    special = set(tokenizer.all_special_ids)
    columns = [name for name in dataset.column_names if name in tokenizer.model_input_names]
    plain = dataset.with_format(None).select_columns(columns)
    ids = plain["input_ids"][:]
    words = [[place for place, token in enumerate(row) if token not in special] for row in ids]
    mixed = []
    for _ in range(times):
        for row, places in zip(ids, words, strict=True):
            other = draw.randrange(len(ids))
            count = min(max(1, int(len(places) * draw.uniform(0.15, 0.5))), len(places), len(words[other]))
            target = draw.randrange(len(places) - count + 1)
            source = draw.randrange(len(words[other]) - count + 1)
            changed = list(row)
            for step in range(count):
                changed[places[target + step]] = ids[other][words[other][source + step]]
            mixed.append(changed)
    rest = {name: plain[name][:] * times for name in columns if name != "input_ids"}
    return Dataset.from_dict({"input_ids": mixed, **rest}, features=plain.features)


__all__ = ["BudgetCallback", "add_teacher_logits", "mix_rows"]
