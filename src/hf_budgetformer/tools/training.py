"""Company for the plain Trainer: optional, training is right without it."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def _find_encoder(model: nn.Module) -> Any:
    # By attribute, for a model loaded from the Hub with its own code is of another class than the installed one.
    for module in model.modules():
        if hasattr(module, "exploration") and hasattr(module, "training_log"):
            return module
    raise TypeError(f"BudgetCallback needs a BudgetFormer model, got {type(model).__name__}.")


class BudgetCallback(TrainerCallback):
    """Anneals over the whole training, and logs the parts of the loss.

    Without it the model anneals by counting its own forward passes up to `config.exploration_steps`. With it, progress
    is the Trainer's global step over its last step, exact under gradient accumulation too; `config.exploration_steps`
    is set to that last step.

    Logged at every logging step of the Trainer, from the latest forward pass: `task_loss` (where the model sees the
    labels), `budget` (mean share of heads), `budget_loss`, `entropy`, `temperature`, `progress`.

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[BudgetCallback()])
    ```

    Reporting integrations (TensorBoard and others named in `report_to`) run before callbacks given this way; to reach
    them too, call `BudgetCallback().attach(trainer)` instead.
    """

    def attach(self, trainer: Trainer) -> "BudgetCallback":
        """Adds this callback to `trainer`, before those that report logs elsewhere; returns it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets exploration last as long as the training."""
        _find_encoder(kwargs["model"]).config.exploration_steps = state.max_steps

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


__all__ = ["BudgetCallback"]
