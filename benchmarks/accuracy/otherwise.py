"""Narrow encoders made otherwise than by the recipe: to choose it, and as baselines, with the same steps, teacher."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy.fits import collect, fit
from datasets import Dataset
from inputs import load_tokenizer
from torch.func import functional_call
from torch.nn import functional as F
from transformers import Trainer

from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.attention import EVERYTHING
from hf_budgetformer.losses import teacher_divergence
from hf_budgetformer.narrow import Importance
from hf_budgetformer.tools.narrowing import unit_importance
from hf_budgetformer.tools.training import mix_rows


DEFAULTS: dict[str, Any] = {
    "epochs": 3,
    "learning_rate": 1e-4,
    "shares": [1 / 3, 2 / 3, 1],
    "weights": None,
    "importance": "gradient",
    "order": "default",
    "hidden": None,
    "hidden_weight": 1.0,
    "fold": False,
    "extra": 0,
    "extra_kind": "swap",
    "spare": False,
    "temperature": 1.0,
    "batch_size": 32,
    "narrow_budget": 0.25,
    "loss": "kl",
    "norms": False,
    "stages": None,
    "noise": 0.0,
}


def batches(rows: Dataset, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches as rows come, with labels where there are any."""
    for start in range(0, len(rows), size):
        inputs = rows[start : start + size]
        labels = {"labels": torch.tensor(inputs["labels"])} if "labels" in inputs else {}
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        yield {**load_tokenizer().pad(inputs, return_tensors="pt"), **labels}


def opening_order(kind: str, config: Any, importance: list[Importance] | None = None) -> list[int] | None:
    """Sublayers' numbers in the order in which their units open, one for each unit.

    Args:
        kind: "default", the model's own; "equal"; "heads3" or "neurons2", times the share; "late" and "early", wider
            there; "layers", whole ones; "skip:4.5", sublayers closed until the others are full; "global", by
            importance for a FLOP.
        config: Of the model.
        importance: For "global".
    """
    if kind == "default":
        return None
    layers, units = config.num_hidden_layers, config.num_attention_heads  # as many blocks of neurons as heads
    if kind == "layers":
        spread = [layer for start in range(3) for layer in range(start, layers, 3)]
        return [2 * layer + part for layer in spread for part in [0] * units + [1] * units]
    steps: list[tuple[float, int]] = []
    for sublayer in range(2 * layers):
        depth = sublayer // 2 / max(1, layers - 1)
        for unit in range(units):
            share = (unit + 1) / units
            if kind.startswith("heads") and sublayer % 2 == 0:
                share /= float(kind.removeprefix("heads"))
            elif kind.startswith("neurons") and sublayer % 2:
                share /= float(kind.removeprefix("neurons"))
            elif kind == "late":
                share /= 1.0 + depth
            elif kind == "early":
                share /= 2.0 - depth
            elif kind.startswith("skip:") and str(sublayer) in kind.removeprefix("skip:").split("."):
                share += 10.0
            elif kind == "global" and unit and importance is not None:  # the first of each sublayer opens anyhow
                values = importance[sublayer // 2][sublayer % 2].sort(descending=True).values
                share = 1e6 - float(values.unflatten(0, (units, -1)).sum(-1)[unit]) / (1.0 if sublayer % 2 else 0.58)
            steps.append((round(share, 9), sublayer))
    return [sublayer for _, sublayer in sorted(steps)]


@torch.no_grad()
def fold_means(model: Any, rows: Dataset, importance: list[Importance]) -> None:
    """Adds the mean output of units left out to the biases of the narrow encoder."""
    base, narrow = model.base_model, model.narrow
    sums: dict[int, torch.Tensor] = {}
    count = 0
    hooks = []

    def keep(index: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            sums[index] = sums.get(index, 0) + args[0].flatten(0, -2).sum(0)

        return hook

    for n, layer in enumerate(base.encoder.layer):
        hooks.append(layer.attention.output.dense.register_forward_pre_hook(keep(2 * n)))
        hooks.append(layer.output.dense.register_forward_pre_hook(keep(2 * n + 1)))
    model.eval()
    for batch in batches(rows.take(512)):
        batch.pop("labels")
        model(**batch, budget=1.0)
        count += int(batch["attention_mask"].sum())
    for hook in hooks:
        hook.remove()
    for n, (narrow_layer, full) in enumerate(zip(narrow.layer, base.encoder.layer, strict=True)):
        heads = importance[n].heads.argsort(descending=True, stable=True)[narrow_layer.heads :]
        rest = (heads[:, None] * narrow_layer.size + torch.arange(narrow_layer.size)).flatten()
        narrow_layer.attention_output.bias += full.attention.output.dense.weight[:, rest] @ (sums[2 * n][rest] / count)
        rest = importance[n].neurons.argsort(descending=True, stable=True)[narrow_layer.neurons :]
        narrow_layer.down.bias += full.output.dense.weight[:, rest] @ (sums[2 * n + 1][rest] / count)


def states(model: Any, rows: Dataset, kind: str) -> np.ndarray:
    """First token's states of the full model, (N, K, D): "pooled", of the last layer "cls", of all "layers"."""

    def read(batch: Any) -> torch.Tensor:
        out = model.base_model(**batch, output_hidden_states=True)
        if kind == "pooled":
            return out.pooler_output[:, None]
        hidden = out.hidden_states[-1:] if kind == "cls" else out.hidden_states[1:]
        return torch.stack([layer[:, 0] for layer in hidden], 1)

    return collect(model, rows, read)


def augment(rows: Dataset, times: int, kind: str, seed: int) -> Dataset:
    """New rows of training rows, without labels: "swap", mixed as by the recipe, words under the "mask", or "drop"."""
    if kind == "swap":
        return mix_rows(rows, times, load_tokenizer(), seed)
    draw, tokenizer = random.Random(seed), load_tokenizer()
    special, mask = set(tokenizer.all_special_ids), tokenizer.mask_token_id
    columns = [name for name in rows.column_names if name in tokenizer.model_input_names]

    def change(row: dict[str, list[int]]) -> dict[str, list[int]]:
        if kind == "mask":
            hit = [token not in special and draw.random() < 0.15 for token in row["input_ids"]]
            ids = [mask if gone else token for token, gone in zip(row["input_ids"], hit, strict=True)]
            return {**row, "input_ids": ids}
        if kind == "drop":
            stays = [token in special or draw.random() > 0.2 for token in row["input_ids"]]
            return {name: [x for x, stay in zip(values, stays, strict=True) if stay] for name, values in row.items()}
        raise ValueError(f"extra_kind must be one of 'swap', 'mask', 'drop', got {kind!r}.")

    given = rows.select_columns(columns)
    return Dataset.from_list([change(row) for _ in range(times) for row in given], features=given.features)


class Norms(torch.nn.Module):
    """Norms and biases of a narrow encoder's layers, once for each budget that is trained.

    Args:
        layers: Of the narrow encoder, as they begin.
        shares: Of the narrow budget.
    """

    def __init__(self, layers: Any, shares: list[float]) -> None:
        super().__init__()
        self.shares = sorted({*shares})
        self.names = [
            [name for name, x in layer.named_parameters() if "norm" in name or name.endswith("bias")]
            for layer in layers
        ]
        self.copies = torch.nn.ModuleList(
            torch.nn.ModuleList(
                torch.nn.ParameterList(layer.get_parameter(name).detach().clone() for name in names)
                for layer, names in zip(layers, self.names, strict=True)
            )
            for _ in self.shares
        )

    def of(self, share: float, layer: int) -> dict[str, torch.Tensor]:
        """What stands in for a layer's parameters, of the least budget that is trained and not below that share."""
        level = next((n for n, x in enumerate(self.shares) if x > share - 1e-6), len(self.shares) - 1)
        return dict(zip(self.names[layer], self.copies[level][layer], strict=True))

    @torch.no_grad()
    def put_into(self, layers: Any, share: float) -> None:
        """Makes the layers those of a budget."""
        for number, layer in enumerate(layers):
            for name, value in self.of(share, number).items():
                layer.get_parameter(name).copy_(value)


class NarrowTrainer(Trainer):
    """Trains the narrow encoder of a BudgetFormer by its class's `recipe`."""

    recipe: dict[str, Any]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Divergence from the teacher at one drawn budget, and by the recipe of hidden states."""
        recipe = self.recipe
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        target, hidden_target = inputs.pop("teacher_logits"), inputs.pop("teacher_states", None)
        narrow = model.narrow
        if recipe["noise"]:  # the teacher read the words that are hidden here
            words = torch.rand_like(inputs["input_ids"], dtype=torch.float) < recipe["noise"]
            special = torch.isin(inputs["input_ids"], torch.tensor(load_tokenizer().all_special_ids))
            masked = load_tokenizer().mask_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_fill(words & ~special, masked)
        embedded = model.embed(inputs)
        share = recipe["draw"].choices(recipe["shares"], recipe["weights"])[0]
        look = narrow.order.look(share * narrow.widest.cost)
        hidden, states_of_layers = embedded.hidden, []
        norms = getattr(model, "norms", None)
        for number, layer in enumerate(narrow.layer):
            call = (hidden, embedded.batch.layout, look.counts.heads[number], look.counts.neurons[number])
            hidden = layer(*call) if norms is None else functional_call(layer, norms.of(share, number), call)
            states_of_layers.append(hidden)
        first = embedded.batch.first(hidden)
        answer = model.read_answer(embedded, first, narrow=True).logits
        t = recipe["temperature"]
        if recipe["loss"] == "mse":
            loss = (answer - target).square().mean()
        else:
            loss = t * t * teacher_divergence(answer / t, target / t, "single_label_classification").mean()
        if recipe["hidden"] == "tokens":
            with torch.no_grad():
                full, targets = embedded.hidden, []
                for layer in model.full_layers():
                    full = layer(full, sequences=embedded.batch.sequences, reach=EVERYTHING)
                    targets.append(full)
            pairs = list(zip(states_of_layers, targets, strict=True))
            if not recipe.get("all_layers"):
                pairs = pairs[-1:]
            loss = loss + recipe["hidden_weight"] * sum(F.mse_loss(a, b) / b.var() for a, b in pairs) / len(pairs)
        elif recipe["hidden"] is not None:
            if recipe["hidden"] == "pooled":
                got = narrow.pool(first)[:, None]
            elif recipe["hidden"] == "cls":
                got = first[:, None]
            else:
                got = torch.stack([embedded.batch.first(x) for x in states_of_layers], 1)
            loss = loss + recipe["hidden_weight"] * F.mse_loss(got, hidden_target) / hidden_target.var()
        narrow.count_step(answer)
        return (loss, {}) if return_outputs else loss


def train_by_recipe(full: Path, rows: Dataset, taught: Dataset, recipe: dict[str, Any], seed: int) -> tuple[Any, float]:
    """A model whose narrow encoder was trained by `recipe`, and the seconds it took.

    Args:
        full: Folder of the full model, which stays as it is.
        rows: Labelled, for importance.
        taught: With `teacher_logits`, to train on.
        recipe: What differs from `DEFAULTS`. "stages", parts of the epochs with their "shares", has the units ordered
            again between them.
        seed: Of order, starts and draws.
    """
    recipe = {**DEFAULTS, **recipe}
    fields = {"freeze_full": True, "narrow_budget": recipe["narrow_budget"]}
    some = rows.select(np.linspace(0, len(rows) - 1, 256).astype(int).tolist())
    probe: Any = BudgetFormerForSequenceClassification.from_pretrained(full, **fields)
    kind, importance = recipe["importance"], None
    if kind == "gradient":
        importance = unit_importance(probe, batches(some))
    elif kind == "fisher":
        importance = fisher_importance(probe, some)
    elif kind == "activation":
        importance = activation_importance(probe, some)
    elif kind == "first":  # whatever comes first
        heads, neurons = probe.config.num_attention_heads, probe.config.intermediate_size
        first = Importance(-torch.arange(heads).float(), -torch.arange(neurons).float())
        importance = [first] * probe.config.num_hidden_layers
    order = opening_order(recipe["order"], probe.config, importance)
    model: Any = BudgetFormerForSequenceClassification.from_pretrained(full, opening_order=order, **fields)
    if kind != "weights":
        model.init_narrow(importance)
    if kind == "random":
        _start_anew(model.narrow, seed)
    if recipe["fold"]:
        fold_means(model, some, importance)
    if recipe["norms"]:
        model.norms = Norms(model.narrow.layer, recipe["shares"])
    columns = ("input_ids", "token_type_ids", "attention_mask", "teacher_logits")
    taught = taught.select_columns([name for name in taught.column_names if name in columns])
    start = time.perf_counter()
    if recipe["hidden"] in ("cls", "pooled", "layers"):
        taught = taught.add_column("teacher_states", states(model, taught, recipe["hidden"]).tolist())
    asking = time.perf_counter() - start
    rate, size = recipe["learning_rate"], recipe["batch_size"]
    seconds = 0.0
    for number, (part, shares) in enumerate(recipe["stages"] or [[1.0, recipe["shares"]]]):
        if number:
            order_again(model, taught.take(256))
        NarrowTrainer.recipe = {**recipe, "shares": shares, "draw": random.Random(seed)}
        epochs = part * recipe["epochs"]
        seconds += fit(model, taught, epochs, rate, seed, size, NarrowTrainer, remove_unused_columns=False)
    return model, seconds + asking


def order_again(model: Any, rows: Dataset) -> None:
    """Sorts the units of the narrow encoder by their importance now: mean of |d divergence / d gate|, all open.

    A gate's gradient is the sum, over the weights through which its unit goes out, of weight times gradient.

    Args:
        model: Its narrow encoder has begun to learn.
        rows: With `teacher_logits`.
    """
    layers = model.narrow.layer
    outputs = [[layer.attention_output.weight, layer.down.weight] for layer in layers]
    importance = [[torch.zeros(layer.heads), torch.zeros(layer.neurons)] for layer in layers]
    model.eval()
    for start in range(0, len(rows), 8):
        some = rows[start : start + 8]
        target = torch.tensor(some.pop("teacher_logits"))
        answer = model(**load_tokenizer().pad(some, return_tensors="pt"), budget=model.narrow.widest.cost).logits
        loss = teacher_divergence(answer, target, "single_label_classification").mean()
        gradients = iter(torch.autograd.grad(loss, [weight for pair in outputs for weight in pair]))
        for pair, sums in zip(outputs, importance, strict=True):
            for weight, units in zip(pair, sums, strict=True):
                units += (weight * next(gradients)).sum(0).unflatten(0, (len(units), -1)).sum(-1).abs().detach()
    with torch.no_grad():
        for layer, (heads, neurons) in zip(layers, importance, strict=True):
            parts = ((layer.qkv, layer.attention_output, heads), (layer.up, layer.down, neurons))
            for into, out, units in parts:
                order = units.argsort(descending=True, stable=True)
                for value in (into.weight, into.bias):
                    value.copy_(value.unflatten(0, (len(units), -1))[order].flatten(0, 1))
                out.weight.copy_(out.weight.unflatten(1, (len(units), -1))[:, order].flatten(1))


def _start_anew(narrow: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for module in narrow.layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()


def fisher_importance(model: Any, rows: Dataset) -> list[Importance]:
    """Mean square of the gates' gradients, row by row."""
    total: Any = None
    for batch in batches(rows, 1):
        one = unit_importance(model, [batch])
        squares = [Importance(x.heads.square(), x.neurons.square()) for x in one]
        if total is not None:
            pairs = zip(total, squares, strict=True)
            squares = [Importance(a.heads + b.heads, a.neurons + b.neurons) for a, b in pairs]
        total = squares
    return total


@torch.no_grad()
def activation_importance(model: Any, rows: Dataset) -> list[Importance]:
    """Mean square of what each unit adds to the hidden states."""
    sums: dict[tuple[int, int], torch.Tensor] = {}
    hooks = []

    def keep(key: tuple[int, int], dense: Any, units: int) -> Any:
        def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden = args[0].flatten(0, -2).unflatten(-1, (units, -1))  # (T, units, size)
            weight = dense.weight.unflatten(1, (units, -1))  # (D, units, size)
            if hidden.shape[-1] == 1:
                added = hidden.square().sum((0, 2)) * weight.square().sum((0, 2))
            else:
                added = torch.einsum("tus,dus->tud", hidden, weight).square().sum((0, 2))
            sums[key] = sums.get(key, torch.zeros(())) + added

        return add

    for number, layer in enumerate(model.full_layers()):
        for part, dense in enumerate((layer.attention.output.dense, layer.output.dense)):
            units = dense.in_features if part else model.config.num_attention_heads
            hooks.append(dense.register_forward_pre_hook(keep((number, part), dense, units)))
    model.eval()
    for batch in batches(rows):
        batch.pop("labels")
        model(**batch, budget=1.0)
    for hook in hooks:
        hook.remove()
    return [Importance(sums[n, 0], sums[n, 1]) for n in range(model.config.num_hidden_layers)]
