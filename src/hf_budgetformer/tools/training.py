"""Company for the plain Trainer: optional, training is right without it."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .baselines import head_importance
from .data import batches_by_length, weights_digest


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

# Standard deviations of log importance become this many units of a head's score; noise on scores begins at half a unit.
_RANK_SCALE = 3.0
# Rows, evenly spaced, that importance is estimated from.
_RANK_ROWS = 256


def _find_encoder(model: nn.Module) -> Any:
    # By attribute, for a model loaded from the Hub with its own code is of another class than the installed one.
    for module in model.modules():
        if getattr(module, "exploration", None) is not None and hasattr(module, "training_log"):
            return module
    raise TypeError(f"BudgetCallback needs a BudgetFormer model with routers, got {type(model).__name__}.")


def _find_classifier(model: nn.Module, encoder: Any) -> Any:
    owners = (x for x in model.modules() if isinstance(x, PreTrainedModel) and x is not encoder)
    return next((x for x in owners if x.base_model is encoder), None)


def _has_labels(batch: Mapping[str, torch.Tensor], config: Any) -> bool:
    """Whether the model's own loss is meant; numbers for several labels may be for a loss computed outside."""
    labels = batch.get("labels")
    clear = config.problem_type is not None or config.num_labels == 1
    return labels is not None and (clear or not labels.is_floating_point())


def _some_batches(loader: Any, size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Evenly spaced rows of a loader's data set, collated; nothing is iterated, so training draws what it would."""
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return []
    rows = torch.linspace(0, len(dataset) - 1, min(_RANK_ROWS, len(dataset))).long().tolist()
    chunks = (loader.collate_fn([dataset[row] for row in rows[at : at + size]]) for at in range(0, len(rows), size))
    return [{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in chunk.items()} for chunk in chunks]


def rank_heads(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Lets a model that has not been trained yet begin with its most important heads, rather than with any.

    Every scorer's bias becomes the logarithm of the heads' importance, standardised within the layer. Training then
    changes the order, for each input. `BudgetCallback` calls it; a loop of your own may, before its first step.

    Args:
        model: A BudgetFormer classifier with routers, on a fine-tuned backbone.
        batches: What `forward` takes, with labels: a few hundred rows are enough.

    Raises:
        ValueError: The model is no BudgetFormer or has no routers, or a batch has no labels.
    """
    if getattr(model.config, "static_heads", None) is not None:  # before the work; other models are refused by it
        raise ValueError("model must have routers, the heads of this one are static.")
    importance = head_importance(model, batches).clamp(min=1e-6).log()
    spread = importance.std(-1, correction=0, keepdim=True).clamp(min=1e-6)
    scores = _RANK_SCALE * (importance - importance.mean(-1, keepdim=True)) / spread
    for layer, row in zip(model.base_model.encoder.layer, scores, strict=True):
        scorer = layer.router.scorer
        value = (row / scorer.multiplier).to(scorer.bias.dtype)
        if isinstance(scorer.bias, DTensor):  # FSDP2
            value = distribute_tensor(value, scorer.bias.device_mesh, scorer.bias.placements)
        with torch.no_grad():
            scorer.bias.copy_(value)


class BudgetCallback(TrainerCallback):
    """Ranks heads before the first step, anneals over the whole training, and logs the parts of the loss.

    Training starts from the importance of each head for the labels of up to 256 training rows, see `rank_heads`; a
    model that was trained before or is resumed stays as it is, as where batches have no `labels` that the model's own
    loss takes, or the data are a stream.

    Without it the model anneals by counting its own forward passes up to `config.exploration_steps`. With it, progress
    is the Trainer's global step over its last step, exact under gradient accumulation too; `config.exploration_steps`
    is set to that last step.

    Logged at every logging step of the Trainer, from the latest forward pass: `task_loss` (where the model sees the
    labels), `distillation_loss` (with `teacher_logits`), `need_loss`, `budget` (mean share of heads), `budget_loss`,
    `entropy`, `temperature`, `progress`, and for each layer the share of its heads that ran: `heads/layer_00` and on.

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[BudgetCallback()])
    ```

    Reporting integrations (TensorBoard and others named in `report_to`) run before callbacks given this way; to reach
    them too, call `BudgetCallback().attach(trainer)` instead.

    Args:
        rank: Whether heads are ranked. Not where the encoder has yet to learn what its heads are for.
    """

    def __init__(self, rank: bool = True) -> None:
        self.rank = rank

    def attach(self, trainer: Trainer) -> "BudgetCallback":
        """Adds this callback to `trainer`, before those that report logs elsewhere; returns it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets exploration last as long as the training, and ranks the heads of a model that begins."""
        encoder = _find_encoder(kwargs["model"])
        encoder.config.exploration_steps = state.max_steps
        model = _find_classifier(kwargs["model"], encoder)
        if self.rank and model is not None and state.global_step == 0 and encoder.exploration.steps == 0:
            batches = _some_batches(kwargs.get("train_dataloader"), args.per_device_train_batch_size, model.device)
            if batches and all(_has_labels(batch, model.config) for batch in batches):
                rank_heads(model, batches)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the schedule to the Trainer's step."""
        _find_encoder(kwargs["model"]).exploration.steps.fill_(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes back the count of a micro-batch."""
        self.on_step_begin(args, state, control, **kwargs)

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
        parts = {name: round(value.item(), 4) for name, value in _find_encoder(kwargs["model"]).training_log.items()}
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
        ValueError: The rows are neither tokenized nor texts, or have such a column already.
    """
    from datasets.fingerprint import Hasher  # type: ignore[import-untyped]  # here, for it takes long to import

    columns = dataset.column_names
    if "teacher_logits" in columns:
        raise ValueError(f"dataset must not have a column 'teacher_logits' yet, got the columns {columns}.")
    if not {"input_ids", "text"} & set(columns):
        raise ValueError(f"dataset must have a column 'input_ids' or 'text', got the columns {columns}.")
    if not isinstance(teacher, nn.Module):
        teacher = AutoModelForSequenceClassification.from_pretrained(teacher)
    model: Any = teacher

    def ask(rows: dict[str, list[Any]]) -> dict[str, list[list[float]]]:
        logits: list[list[float]] = [[] for _ in next(iter(rows.values()))]
        for places, batch in batches_by_length(rows, tokenizer, batch_size, max_length):
            for place, answer in zip(places, model(**batch.to(model.device)).logits.float().tolist(), strict=True):
                logits[place] = answer
        return {"teacher_logits": logits}

    asked = [dataset._fingerprint, weights_digest(model), Hasher.hash(tokenizer), max_length]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return dataset.map(ask, batched=True, new_fingerprint=Hasher.hash(asked), desc="Asking the teacher")
    finally:
        model.train(was_training)


__all__ = ["BudgetCallback", "add_teacher_logits", "rank_heads"]
