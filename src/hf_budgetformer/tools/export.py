"""From a model that chooses to one that has chosen: small, and plain enough for any runtime."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .baselines import prune


@torch.no_grad()
def count_open_heads(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], head_budget: float | None = None
) -> torch.Tensor:
    """How often the routers open each head.

    Args:
        model: A BudgetFormer model with routers; asked in eval mode, and left in the mode it was in.
        batches: What `forward` takes; labels are ignored.
        head_budget: Share of the heads asked for, a float in (0, 1]; None: the model's own.

    Returns:
        (layers, H), float: the share of the inputs for which a head is open.

    Raises:
        ValueError: The model has no routers, or there is no batch.
    """
    ours: Any = model
    if getattr(getattr(ours, "base_model", None), "own_budget", None) is None:
        raise ValueError(f"model must be a BudgetFormer model with routers, got {type(model).__name__}.")
    total, inputs, was_training = torch.zeros(()), 0, model.training
    model.eval()
    try:
        for batch in batches:
            given = {name: x.to(ours.device) for name, x in batch.items() if name not in ("labels", "teacher_logits")}
            gates = ours(**given, head_budget=head_budget, output_head_gates=True).head_gates  # (B, layers, H)
            total, inputs = total.to(gates.device) + gates.sum(0), inputs + len(gates)
    finally:
        model.train(was_training)
    if not inputs:
        raise ValueError("batches must hold at least one batch, got none.")
    return total / inputs


def bake(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], head_budget: float | None = None) -> Any:
    """A static copy of a model: for each layer the heads that its router opens most often, and no router.

    Every layer keeps as many heads as it opens in the mean, rounded such that the sum over layers is right. The copy's
    weights are really cut: it is small, fast at every size, has one budget, and answers as `model` does with just these
    heads open. It may be trained further with a plain Trainer, and saves and loads like any other.

    Args:
        model: A BudgetFormer model with routers.
        batches: Typical inputs, as `forward` takes them; labels are ignored.
        head_budget: Share of the heads asked for, a float in (0, 1]; None: the model's own.

    Raises:
        ValueError: The model has no routers, or there is no batch.
    """
    opened = count_open_heads(model, batches, head_budget)
    heads, carry = [], 0.5
    for shares in opened:
        exact = shares.sum().item() + carry
        count = max(1, int(exact + 1e-4))
        carry = max(0.0, exact - count)
        heads.append(sorted(shares.argsort(descending=True, stable=True)[:count].tolist()))
    return prune(model, heads)


__all__ = ["bake", "count_open_heads"]
