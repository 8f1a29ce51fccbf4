"""The methods that are compared: each trains something beside, or in place of, the full model, and answers rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy.fits import ask, collect, fit
from accuracy.otherwise import train_by_recipe
from accuracy.rows import Rows
from torch import nn
from torch.nn import functional as F

from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification
from hf_budgetformer.budgets import OpeningOrder


@dataclass
class Task:
    """What a method is given: the full model's folder, rows, rows for training with its answers, and how to train.

    Args:
        full: Folder of the full model.
        rows: Of the data set.
        taught: As `tools.recipe.taught_rows` makes them.
        epochs: Passes over them.
        recipe: "learning_rate".
        seed: Of order and starts.
    """

    full: Path
    rows: Rows
    taught: Any
    epochs: float
    recipe: dict[str, Any]
    seed: int


# Logits of every row (N, num_labels), by the share of the full model's work they cost.
Answers = dict[float, np.ndarray]
CONSTANTS = (1 / 4, 1 / 6, 1 / 8, 1 / 12)


def _answers(model: Any, rows: Rows, budgets: tuple[float, ...]) -> dict[str, Answers]:
    return {
        split: {budget: ask(model, getattr(rows, split), budget=budget) for budget in budgets}
        for split in ("calibration", "test")
    }


def narrow(task: Task) -> tuple[dict[str, Answers], float]:
    """The product: the narrow encoder as the Trainer and `BudgetCallback` make it."""
    model: Any = BudgetFormerForSequenceClassification.from_pretrained(task.full, freeze_full=True)
    callbacks = [BudgetCallback(disagreement=None)]
    seconds = fit(model, task.taught, task.epochs, task.recipe["learning_rate"], task.seed, callbacks=callbacks)
    for split in ("calibration", "test"):  # for routers that read more than logits
        states = _pooled(model, getattr(task.rows, split), 1 / 6)
        np.savez_compressed(task.full.parent / f"pooled-{split}.npz", states=states.astype(np.float16))
    return _answers(model, task.rows, CONSTANTS), seconds


def by_recipe(budgets: tuple[float, ...], **changes: Any) -> Callable[[Task], Any]:
    """A narrow encoder made otherwise, on the same rows with the same steps, rate and teacher."""

    def run(task: Task) -> tuple[dict[str, Answers], float]:
        recipe = {"epochs": task.epochs, "learning_rate": task.recipe["learning_rate"], **changes}
        model, seconds = train_by_recipe(task.full, task.rows.train, task.taught, recipe, task.seed)
        return _answers(model, task.rows, budgets), seconds

    return run


def exit_head(width: int, labels: int) -> nn.Module:
    """What answers behind a layer, from the first token's state and the mean of all, together `width` wide."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, labels))


def exits(task: Task) -> tuple[dict[str, Answers], float]:
    """Early exit: on the states of each layer of the full model, as it is, a classifier of its own.

    Each reads the first token and the mean of all, through a hidden layer as wide as the model.
    """
    model: Any = BudgetFormerForSequenceClassification.from_pretrained(task.full).eval()
    rows = {"train": task.taught, "calibration": task.rows.calibration, "test": task.rows.test}
    features = {split: _states(model, x) for split, x in rows.items()}
    teacher, labels = np.array(task.taught["teacher_logits"], dtype=np.float32), task.rows.labels
    layers, width = features["train"].shape[1:]
    torch.manual_seed(task.seed)
    heads = nn.ModuleList(exit_head(width, labels) for _ in range(layers))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.01)
    inputs, target = torch.from_numpy(features["train"]), torch.from_numpy(teacher).softmax(-1)
    epochs = 10
    steps = epochs * len(inputs) // 32
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (steps + 1))
    for _ in range(epochs):
        for places in torch.randperm(len(inputs)).split(32):
            loss = sum(
                F.kl_div(head(inputs[places, n]).log_softmax(-1), target[places], reduction="batchmean")
                for n, head in enumerate(heads)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        answers = {
            split: {
                (n + 1) / (layers + 1): head(torch.from_numpy(features[split][:, n])).numpy()
                for n, head in enumerate(heads)
            }
            for split in ("calibration", "test")
        }
    return answers, 0.0


def _pooled(model: Any, rows: Any, budget: float) -> np.ndarray:
    """What the narrow encoder's head reads, at that budget: (N, D)."""
    pooled: list[torch.Tensor] = []
    hook = model.narrow.pooler.register_forward_hook(lambda module, inputs, output: pooled.append(output))

    def read(batch: Any) -> torch.Tensor:
        model(**batch, budget=budget)
        return pooled.pop()

    try:
        return collect(model, rows, read)
    finally:
        hook.remove()


def _states(model: Any, rows: Any) -> np.ndarray:
    """First token and mean of all tokens behind each layer but the last: (N, layers - 1, 2 D) float32."""

    def read(batch: Any) -> torch.Tensor:
        out = model.base_model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"][:, None, :, None].float()  # (B, 1, L, 1)
        states = torch.stack(out.hidden_states[1:-1], 1)  # (B, layers - 1, L, D)
        return torch.cat([states[:, :, 0], (states * mask).sum(2) / mask.sum(2)], -1)

    return collect(model, rows, read)


def routers(task: Task) -> tuple[dict[str, Answers], float]:
    """The paper's routers in every layer, trained from the full model and its answers, at a quarter of the heads.

    Heads alone are closed, so that the cost is that of all neurons and a quarter of the heads.
    """
    model: Any = BudgetFormerForSequenceClassification.from_pretrained(task.full, router="layer", target_budget=0.25)
    seconds = fit(model, task.taught, task.epochs / 2, 5e-5, task.seed, callbacks=[BudgetCallback()])
    order = OpeningOrder(model.config)
    heads = order.head_flops * model.config.num_attention_heads * order.layers / order.total_flops
    cost = 1.0 - 0.75 * heads
    answers = {split: {cost: ask(model, getattr(task.rows, split), budget=0.25)} for split in ("calibration", "test")}
    return answers, seconds


METHODS: dict[str, Callable[[Task], Any]] = {
    "narrow": narrow,
    "static 1/4": by_recipe((1 / 4,), narrow_budget=1 / 4, shares=[1.0]),
    "static 1/8": by_recipe((1 / 8,), narrow_budget=1 / 8, shares=[1.0]),
    # A third of the steps at a half, then the less important half of its units goes.
    "iterative 1/4": by_recipe((1 / 4,), narrow_budget=1 / 2, stages=[[1 / 3, [1.0]], [2 / 3, [0.5]]]),
    "static 1/2": by_recipe((1 / 2,), narrow_budget=1 / 2, shares=[1.0]),
    "layers": by_recipe((1 / 3, 1 / 6), narrow_budget=1 / 3, shares=[0.5, 1.0], order="layers"),
    "exits": exits,
    "shared widths": by_recipe(CONSTANTS, narrow_budget=1.0, shares=[1 / 12, 1 / 6, 1 / 4, 1.0], learning_rate=1e-4),
    "routers": routers,
    "random start": by_recipe(CONSTANTS, importance="random"),
    "truncated start": by_recipe(CONSTANTS, importance="first"),
}
