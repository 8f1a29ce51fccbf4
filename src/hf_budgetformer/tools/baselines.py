"""Cheaper ways to run fewer heads, to compare with: heads or layers that are gone for every input alike."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn


def _kept_heads(model: nn.Module) -> list[list[int]]:
    """Heads of each layer that a model still has; raises ValueError."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "budgetformer":
        raise ValueError(f"model must be a BudgetFormer model, got {type(model).__name__}.")
    return config.static_heads or [list(range(config.num_attention_heads))] * config.num_hidden_layers


def head_importance(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """How much the loss would change with each head's gate, all heads open: mean of |d loss / d gate| over inputs.

    Normalised by its length in each layer. Method: Michel, Levy, Neubig 2019, arXiv 1905.10650.

    Args:
        model: A BudgetFormer classifier; its weights and mode stay as they are.
        batches: What `forward` takes, with labels.

    Returns:
        (layers, H), float, >= 0; 0 for heads the model has lost.

    Raises:
        ValueError: The model is no BudgetFormer, or a batch has no labels.
    """
    kept, ours = _kept_heads(model), cast(Any, model)
    layers = ours.base_model.encoder.layer
    total = torch.zeros(len(layers), layers[0].heads, device=ours.device)
    gates: list[torch.Tensor] = []

    def open_all(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        gates.append(args[0].new_ones(len(args[0]), module.num_attention_heads, requires_grad=True))
        return args, {**kwargs, "gates": gates[-1]}

    hooks = [layer.attention.self.register_forward_pre_hook(open_all, with_kwargs=True) for layer in layers]
    was_training = model.training
    model.eval()  # without dropout
    try:
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError(f"batches must have labels, got one with the keys {sorted(batch)}.")
            gates.clear()
            with torch.enable_grad():
                asked = {} if ours.config.static_heads else {"head_budget": 1.0}
                loss = ours(**batch, **asked, executor="masked").loss
            for row, heads, gradient in zip(total, kept, torch.autograd.grad(loss, gates), strict=True):
                row[heads] += gradient.abs().sum(0) * len(batch["labels"])  # the loss is a mean over the batch
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return total / total.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def most_important(importance: torch.Tensor, count: int, per_layer: bool = False) -> list[list[int]]:
    """The `count` heads of highest importance, at least one in each layer.

    Args:
        importance: (layers, H), see `head_importance`; random numbers give random heads.
        count: Heads kept of the whole model, from its number of layers to that of its heads.
        per_layer: Whether every layer keeps the same number, `count / layers`.

    Returns:
        For each layer its heads, as `config.static_heads` wants them.

    Raises:
        ValueError: So many heads cannot be kept.
    """
    layers, heads = importance.shape
    if not layers <= count <= layers * heads or (per_layer and count % layers):
        multiple = f", a multiple of {layers}," if per_layer else ""
        raise ValueError(f"count must be a number{multiple} from {layers} to {layers * heads}, got {count}.")
    best_first = importance.argsort(dim=-1, descending=True)
    kept = [row[: count // layers if per_layer else 1].tolist() for row in best_first]
    if not per_layer:
        for flat in importance.flatten().argsort(descending=True).tolist():
            layer, head = divmod(flat, heads)
            if sum(map(len, kept)) < count and head not in kept[layer]:
                kept[layer].append(head)
    return [sorted(row) for row in kept]


def prune(model: nn.Module, heads: list[list[int]]) -> Any:
    """A copy of a classifier that is cut down to some heads: smaller weights, no routers, the same class.

    It trains, saves and loads like any other; its answers are those of `model` with just these heads open.

    Args:
        model: A BudgetFormer model, cut down already or not.
        heads: For each layer a rising list of the heads to keep.

    Raises:
        ValueError: The model is no BudgetFormer, or has lost some of these heads.
        StrictDataclassClassValidationError: `heads` is no such list.
    """
    present, ours = _kept_heads(model), cast(Any, model)
    lost = [sorted(set(wanted) - set(had)) for wanted, had in zip(heads, present, strict=False)]
    if any(lost) and ours.config.static_heads:
        raise ValueError(f"heads must be among those the model still has, {present}, got {heads}.")
    config = copy.deepcopy(ours.config)
    config.static_heads, config.head_budget = heads, None
    config.validate()
    pruned = type(ours)(config).to(ours.device, ours.dtype)
    size = config.hidden_size // config.num_attention_heads
    weights = {name: x for name, x in ours.state_dict().items() if ".router." not in name}
    prefix = next(name for name in weights if ".layer.0." in name).split("layer.0.")[0]
    for index, (kept, had) in enumerate(zip(heads, present, strict=True)):
        places = torch.tensor([had.index(head) for head in kept])
        rows = (places[:, None] * size + torch.arange(size)).flatten().to(ours.device)
        attention = f"{prefix}layer.{index}.attention."
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                name = f"{attention}self.{part}.{kind}"
                weights[name] = weights[name][rows]
        weights[f"{attention}output.dense.weight"] = weights[f"{attention}output.dense.weight"][:, rows]
    known = pruned.state_dict().keys()
    pruned.load_state_dict({name: x for name, x in weights.items() if name in known})
    return pruned.train(ours.training)


def drop_layers(model: nn.Module, count: int) -> Any:
    """A copy of a classifier with its first `count` layers only, all of their heads, and no routers.

    Args:
        model: A BudgetFormer model.
        count: Layers to keep, at least one.

    Raises:
        ValueError: The model is no BudgetFormer, or has not so many layers.
    """
    kept = _kept_heads(model)
    shallow: Any = copy.deepcopy(model)
    layers = shallow.base_model.encoder.layer
    if not 1 <= count <= len(layers):
        raise ValueError(f"count must be from 1 to {len(layers)}, got {count}.")
    shallow.base_model.encoder.layer = layers[:count]
    shallow.config.num_hidden_layers = count
    shallow.config.static_heads = kept[:count] if shallow.config.static_heads else None
    return prune(shallow, kept[:count])


__all__ = ["drop_layers", "head_importance", "most_important", "prune"]
