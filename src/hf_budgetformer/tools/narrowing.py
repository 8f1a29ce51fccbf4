"""What the narrow encoder is made of: its units in order of importance, and models cut down to a budget."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from ..backbones import stock_config
from ..narrow import Importance
from .checkpoints import check_classifier


def _check_narrow(model: Any) -> Any:
    """The model, if it has a narrow encoder beside a full one and a head; raises ValueError."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind != "budgetformer" or not hasattr(model, "task") or not model.config.full_encoder:
        raise ValueError(
            f"model must be a BudgetFormer classifier with a full encoder, got {type(model).__name__}: make one with "
            "BudgetFormerForSequenceClassification.from_pretrained(checkpoint)."
        )
    if model.narrow is None:
        raise ValueError("model must have a narrow encoder, got one with router='layer'.")
    return model


def unit_importance(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Importance]:
    """How much the full model's loss would change with each unit's gate, all open: mean of |d loss / d gate|.

    Method: Michel, Levy, Neubig 2019 (arXiv 1905.10650), for heads and neurons alike.

    Args:
        model: A BudgetFormer classifier; its weights and mode stay as they are.
        batches: What `forward` takes, with labels.

    Returns:
        For each layer the importance of its heads (H,) and neurons (I,), >= 0.

    Raises:
        ValueError: The model is of another kind, or there is no batch, or one has no labels.
    """
    ours = _check_narrow(model)
    names, layers = ours.backbone.names, ours.full_layers()
    heads = ours.config.num_attention_heads
    gates: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []

    def open_gates(units: int) -> Any:
        def multiply(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0]  # (B, L, units * size)
            gate = hidden.new_ones(len(hidden), units, requires_grad=True)
            gates.append(gate)
            spread = gate.repeat_interleave(hidden.shape[-1] // units, dim=-1)
            return (hidden * spread[:, None], *args[1:])

        return multiply

    hooks = []
    for layer in layers:
        for part, units in (("attention_output", heads), ("down", ours.config.intermediate_size)):
            hooks.append(names.of(layer, part).register_forward_pre_hook(open_gates(units)))
    was_training = model.training
    model.eval()  # without dropout
    try:
        for batch in batches:
            gates.clear()
            inputs = {name: value for name, value in batch.items() if name != "teacher_logits"}
            with torch.enable_grad():
                loss = ours(**inputs, budget=1.0, executor="masked").loss
                if loss is None:
                    raise ValueError(f"batches must have labels, got one with the keys {sorted(batch)}.")
                gradients = torch.autograd.grad(loss, gates)
            # The loss is a mean over the batch.
            batch_sums = [gradient.abs().sum(0).float() * len(gates[0]) for gradient in gradients]
            sums = [a + b for a, b in zip(sums, batch_sums, strict=True)] if sums else batch_sums
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("batches must hold at least one batch, got none.")
    return [Importance(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def order_units(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Lets the narrow encoder be born again, from the units that matter most to the labels of these rows.

    On load it is born from the units of the largest weights; gradients know better. `BudgetCallback` calls it before
    the first step; a loop of your own may. What the narrow encoder had learned is lost.

    Args:
        model: A BudgetFormer classifier on a fine-tuned backbone.
        batches: What `forward` takes, with labels: a few hundred rows are enough.

    Raises:
        ValueError: As in `unit_importance`.
    """
    importance = unit_importance(model, batches)
    _check_narrow(model).init_narrow(importance)


@torch.no_grad()
def cut(model: nn.Module, budget: float) -> Any:
    """A static model: the embeddings, what `budget` opens of the narrow encoder, and its head; nothing else.

    It is a classifier of the same class with really smaller weights, and saves, loads and trains like any: from labels,
    from `teacher_logits`, or from both. Its answers are those of `model` at that budget.

    Args:
        model: A BudgetFormer classifier with a narrow encoder; a cut one can be cut again.
        budget: At most `config.narrow_budget`.

    Raises:
        ValueError: The model is of another kind, or the budget is not allowed or opens nothing.
    """
    ours: Any = model
    config: Any = getattr(ours, "config", None)
    if getattr(config, "model_type", None) != "budgetformer" or getattr(ours, "narrow", None) is None:
        raise ValueError(f"model must be a BudgetFormer classifier with a narrow encoder, got {type(model).__name__}.")
    if ours.narrow.head is None:
        raise ValueError(f"model must have a classification head, got {type(model).__name__}.")
    if not isinstance(budget, float) or not 0.0 < budget <= config.narrow_budget:
        raise ValueError(f"budget must be a float in (0, {config.narrow_budget:g}], the narrow budget, got {budget!r}.")
    look = ours.narrow.order.look(budget)
    if not look.cost:
        raise ValueError(f"budget must pay for a unit at least, {ours.narrow.order.costs[1]:.4g}, got {budget!r}.")
    small_config: Any = copy.deepcopy(config)
    small_config.narrow_budget, small_config.full_encoder = budget, False
    small_config.looks = small_config.confidence = small_config.margins = small_config.promise = None
    small_config.ranking = None
    small_config.freeze_full = False
    small = type(ours)(small_config).to(ours.narrow.steps.device, ours.dtype)
    for name in ours.backbone.embeddings:
        if (module := getattr(small.base_model, name, None)) is not None:
            module.load_state_dict(getattr(ours.base_model, name).state_dict())
    small.narrow.load_state_dict(_prefix(ours.narrow.state_dict(), small.narrow.state_dict()))
    return small.train(ours.training)


def _prefix(wide: Mapping[str, torch.Tensor], narrow: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first rows and columns of each weight, as many as the narrower one has."""
    return {name: wide[name][tuple(map(slice, value.shape))] for name, value in narrow.items()}


def stock_model(model: nn.Module) -> Any:
    """The stock classifier with the full model's weights, in eval mode.

    Args:
        model: A BudgetFormer classifier with a full encoder.

    Raises:
        ValueError: The model was cut.
    """
    ours: Any = model
    check_classifier(model)
    if not ours.config.full_encoder:
        raise ValueError("model must have its full encoder, got one that was cut.")
    config = stock_config(ours.config)
    stock = AutoModelForSequenceClassification.from_config(config, attn_implementation=ours.config._attn_implementation)
    weights = ours.state_dict()
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
    return stock.to(ours.device, ours.dtype).eval()


__all__ = ["cut", "order_units", "stock_model", "unit_importance"]
