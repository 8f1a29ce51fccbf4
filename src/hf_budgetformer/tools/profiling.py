"""What a model costs and closed heads save: FLOPs counted part by part, time, memory and energy as measured here."""

import inspect
import logging
import math
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..packing import find_packing
from .data import batches_by_length, check_classifier, distinct_budgets


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


PARTS = ("embeddings", "projections", "core", "feed_forward", "router", "head")
# How long each way is run for its energy: codecarbon takes a sample a second.
_ENERGY_SECONDS = 5.0


@dataclass(frozen=True)
class FlopsProfile:
    """FLOPs of one batch by part, 2 for each multiply-add; only matrix products count, as in `FlopCounterMode`.

    Attributes:
        sparse: Of this model without padding and closed heads; keys are `PARTS`. "projections" are query, key, value
            and output, "core" the scores and the weighted sum, "head" the pooler and the classifier.
        backbone: Of the unmodified backbone on the same batch, padding included.
        head_share: Mean share of heads that ran.
        token_share: Share of the padded batch that is kept.
    """

    sparse: dict[str, int]
    backbone: dict[str, int]
    head_share: float
    token_share: float

    @property
    def ratio(self) -> float:
        """FLOPs of this model over those of the backbone."""
        return sum(self.sparse.values()) / sum(self.backbone.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [(part, self.sparse[part], self.backbone[part]) for part in PARTS]
        rows.append(("total", sum(self.sparse.values()), sum(self.backbone.values())))
        lines = [f"{'GFLOPs':<14}{'this model':>12}{'backbone':>12}{'share':>8}"]
        for part, ours, stock in rows:
            share = f"{ours / stock:>8.1%}" if stock else f"{'-':>8}"
            lines.append(f"{part:<14}{ours / 1e9:>12.4f}{stock / 1e9:>12.4f}{share}")
        return "\n".join([*lines, f"heads run {self.head_share:.1%}, tokens kept {self.token_share:.1%}"])


@dataclass(frozen=True)
class SpeedCeiling:
    """Medians, in seconds, of the packed model with all heads and of what no closed head can spare it.

    Attributes:
        all_heads: With all heads open; of a model cut down to static heads, all that are left.
        unavoidable: Without any attention or routing: embeddings, packing, feed-forward, norms and head.
    """

    all_heads: float
    unavoidable: float

    @property
    def ratio(self) -> float:
        """How many times faster closing heads alone can make the packed model at the very most."""
        return self.all_heads / self.unavoidable


def _checked_inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """The batch without labels, the encoder, and the token ids or embeddings; raises ValueError."""
    encoder: Any = getattr(model, "base_model", None)
    if not hasattr(encoder, "own_budget"):
        raise ValueError(f"model must be a BudgetFormer model, got {type(model).__name__}.")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first.")
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a mapping as a tokenizer returns it, got {type(batch).__name__}.")
    inputs = {name: value for name, value in batch.items() if name != "labels" and value is not None}
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        raise ValueError(
            "batch must hold input_ids or inputs_embeds as a tensor (B, L, ...), got keys "
            f"{sorted(inputs)}: call the tokenizer with return_tensors='pt'."
        )
    return inputs, encoder, tokens


def profile(
    model: nn.Module, batch: Mapping[str, Any], head_budget: float | torch.Tensor | None = None
) -> FlopsProfile:
    """Counts FLOPs for the heads the routers choose on `batch`; runs the model once.

    The count is of the sparse executors (`executor="sparse"`); "auto" may compute more where that is faster.

    Args:
        model: A BudgetFormer model in eval mode.
        batch: `input_ids` (B, L) or `inputs_embeds` (B, L, D), with `attention_mask` (B, L) and the rest of what
            `forward` takes; labels are ignored.
        head_budget: As in `forward`.

    Raises:
        ValueError: An argument is not of that kind.
    """
    inputs, encoder, tokens = _checked_inputs(model, batch)
    with torch.no_grad():
        gates = model(**inputs, head_budget=head_budget, output_head_gates=True).head_gates  # (B, layers, H)
    rows, length = tokens.shape[:2]
    packing = find_packing(inputs.get("attention_mask"), (rows, length), tokens.device)
    lengths = torch.tensor(packing.lengths)
    keys = lengths.clone()
    if packing.padded_first:
        keys[-packing.padded_first :] -= 1
    counts = packing.sort(gates.sum(-1).round().long()).cpu()  # (B, layers), open heads

    config = encoder.config
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    size, kept = width // heads, int(lengths.sum())
    opened = counts.sum(-1)
    asked = config.head_budget if head_budget is None else head_budget
    routed = not config.static_heads and (asked is None or not bool((torch.as_tensor(asked) == 1.0).all()))
    feed_forward = 4 * layers * width * config.intermediate_size
    controller = config.router_hidden_size * (width + 1)
    # Beyond the layers every matrix is applied once to each input: to its pooled or its first token.
    outside = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer." not in name]
    head = 2 * rows * sum(module.weight.numel() for module in outside)
    return FlopsProfile(
        sparse={
            "embeddings": 0,
            "projections": 8 * width * size * int((opened * lengths).sum()),
            "core": 4 * size * int((opened * lengths * keys).sum()),
            "feed_forward": feed_forward * kept,
            "router": 2 * rows * layers * (controller + width * heads) * routed,
            "head": head,
        },
        backbone={
            "embeddings": 0,
            "projections": 8 * layers * width * width * rows * length,
            "core": 4 * layers * width * rows * length * length,
            "feed_forward": feed_forward * rows * length,
            "router": 0,
            "head": head,
        },
        head_share=gates.float().mean().item(),
        token_share=kept / (rows * length),
    )


def speed_ceiling(model: nn.Module, batch: Mapping[str, Any], repeats: int = 7) -> SpeedCeiling:
    """Measures how much time closing heads could save at most: all of attention, and nothing else.

    Args:
        model: A BudgetFormer model in eval mode, on the sdpa attention implementation.
        batch: As in `profile`.
        repeats: Timed runs of each of the two, taken in turn after one to warm up; the median counts.

    Raises:
        ValueError: An argument is not of that kind.
    """
    inputs, encoder, tokens = _checked_inputs(model, batch)
    if encoder.config._attn_implementation != "sdpa":
        raise ValueError(f"model must use the sdpa attention, got {encoder.config._attn_implementation!r}.")
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an integer >= 1, got {repeats!r}.")

    asked = None if encoder.config.static_heads else 1.0

    def run() -> float:
        start = time.perf_counter()
        model(**inputs, head_budget=asked, executor="auto")
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # Where the layers found it, for a model loaded from the Hub brings its own code.
    module = inspect.getmodule(type(encoder.encoder.layer[0]))
    skip: Callable[..., torch.Tensor] = lambda attention, output, hidden, *rest: hidden  # noqa: E731
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(repeats + 1):
            times[0].append(run())
            with mock.patch.object(module, "gated_attention", skip):
                times[1].append(run())
    return SpeedCeiling(*(statistics.median(samples[1:]) for samples in times))


@dataclass(frozen=True)
class BudgetCost:
    """What one way to run the texts costs.

    Attributes:
        asked: Share of the heads asked for; None: nothing was, and the model did what it does by itself.
        heads: Mean share of the heads that ran.
        flops: Of one input in the mean, by part (`PARTS`), as `FlopsProfile` counts them.
        latency_p50: Milliseconds that a single input takes, without padding: median over inputs.
        latency_p95: The same, 95th percentile.
        throughput: Inputs a second, in batches.
        peak_memory: MiB that tensors hold at most while the largest batch runs, weights included; what an operation
            needs only inside itself is not counted.
        energy: kWh for 1,000 inputs in batches, if measured.
        co2e: kg for the same.
        break_even: Inputs, in batches, after which the time saved has made up for the training; None if never, or if
            it is unknown how long that took.
    """

    asked: float | None
    heads: float
    flops: dict[str, float]
    latency_p50: float
    latency_p95: float
    throughput: float
    peak_memory: float
    energy: float | None = None
    co2e: float | None = None
    break_even: int | None = None


@dataclass(frozen=True)
class CostCard:
    """What a classifier costs at several budgets, beside the stock model in the same run.

    Attributes:
        parameters: Of the model.
        stock_parameters: Of the stock model.
        stock: With the same weights, on the same batches, padded.
        results: One for each budget, in the order asked.
        ceiling: What closing heads could save at most, on a batch of middling length.
        energy: Where energy and CO2e are from, if measured: "estimated", whether the processor's share is worked out
            from its load for want of a counter that can be read (that of the memory always is); "cpu", codecarbon's
            name for the way; "carbon", whose electricity.
        hardware: "cpu", "cores", "gpu".
        software: Versions.
        settings: What was run.
    """

    parameters: int
    stock_parameters: int
    stock: BudgetCost
    results: list[BudgetCost]
    ceiling: SpeedCeiling
    energy: dict[str, Any] | None
    hardware: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, Any]

    @property
    def break_even(self) -> int | None:
        """Inputs after which training has paid for itself, at the budget where that is soonest; see `BudgetCost`."""
        return min((x.break_even for x in self.results if x.break_even is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CostCard":
        """From what `to_dict` returned, through JSON or not."""
        results = [BudgetCost(**result) for result in values["results"]]
        parts = {"stock": BudgetCost(**values["stock"]), "ceiling": SpeedCeiling(**values["ceiling"])}
        return cls(**{**values, **parts, "results": results})

    def __str__(self) -> str:
        told, tokens, paid = self.settings, self.settings["tokens"], self.settings["training_seconds"] is not None
        costs = [["budget", "heads", "p50 ms", "p95 ms", "inputs/s", "speed", "MiB"]]
        costs[0] += ["Wh/1,000", "g CO2e/1,000"] * bool(self.energy) + ["pays after"] * paid
        flops = [["MFLOPs", *PARTS[1:], "total"]]
        for x in (self.stock, *self.results):
            name = "stock" if x is self.stock else "own" if x.asked is None else f"{x.asked:.3f}"
            line = [name, f"{x.heads:.1%}", f"{x.latency_p50:.2f}", f"{x.latency_p95:.2f}", f"{x.throughput:.1f}"]
            line += [f"{x.throughput / self.stock.throughput:.2f}x", f"{x.peak_memory:.1f}"]
            line += [f"{1e3 * amount:.3g}" for amount in (x.energy, x.co2e) if amount is not None]
            line += ["-" if x.break_even is None else f"{x.break_even:,}"] * paid
            costs.append(line)
            flops.append([name, *(f"{x.flops[part] / 1e6:.2f}" for part in PARTS[1:])])
            flops[-1].append(f"{sum(x.flops.values()) / 1e6:.2f}")
        notes = [
            f"{self.parameters:,} parameters, stock {self.stock_parameters:,}; with no heads at all it would be "
            f"{self.ceiling.ratio:.2f}x as fast as with all it has",
            f"{told['rows']} texts, {tokens['real']} tokens, {tokens['padded']} with padding: in batches of "
            f"{told['batch_size']} sorted by length for throughput and memory, one by one for latency",
            f"{told['dtype']}, {told['threads']} threads; "
            + ", ".join(f"{name} {x}" for name, x in {**self.hardware, **self.software}.items() if x is not None),
        ]
        if self.energy:
            way = "estimated" if self.energy["estimated"] else "measured"
            notes.append(f"energy {way} ({self.energy['cpu']}), electricity of {self.energy['carbon']}")
        return "\n".join([*_table(costs), "", *_table(flops), "", *notes])


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def inputs_to_break_even(training_seconds: float | None, stock_rate: float, rate: float) -> int | None:
    """Inputs after which a model has made up for its training by being faster than the stock one; None: never.

    None too if `training_seconds` is None; rates are inputs a second.
    """
    if training_seconds is None or rate <= stock_rate:
        return None
    return math.ceil(training_seconds / (1.0 / stock_rate - 1.0 / rate))


def stock_model(model: nn.Module) -> Any:
    """The stock classifier on the same backbone, with the same weights, in eval mode.

    Heads that `model` has lost are there, at full cost, and add nothing: the answers are those of `model`.

    Args:
        model: A BudgetFormer classifier, with routers (its answers with all heads open) or cut down to static heads.
    """
    ours: Any = model
    config, kind = ours.config, CONFIG_MAPPING[ours.config.backbone_model_type]
    known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    stock_config = kind.from_dict({name: x for name, x in config.to_dict().items() if name in known})
    stock = AutoModelForSequenceClassification.from_config(
        stock_config, attn_implementation=config._attn_implementation
    )
    size, weights = config.hidden_size // config.num_attention_heads, ours.state_dict()
    for name, whole in stock.state_dict().items():
        given = weights[name].to("cpu", whole.dtype)
        if given.shape == whole.shape:
            whole.copy_(given)
            continue
        heads = torch.tensor(config.static_heads[int(name.split(".layer.")[1].split(".")[0])])
        places = (heads[:, None] * size + torch.arange(size)).flatten()
        whole.zero_().index_copy_(int(given.shape[0] == whole.shape[0]), places, given)
    return stock.to(ours.device, ours.dtype).eval()


class _HeldMemory(TorchDispatchMode):
    """Bytes that tensors hold, now and at most, while operations run: weights, and results that are still alive."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in weights}
        self.bytes = self.peak = sum(self.sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, id(storage))
        return result

    def _free(self, storage: int) -> None:
        self.bytes -= self.sizes.pop(storage)


def _measure_times(runs: Sequence[Callable[[Any], Any]], batches: Sequence[Any], repeats: int) -> np.ndarray:
    """Seconds, (repeats, batches, runs); runs take turns at each batch, and a first round warms up."""
    seconds = np.zeros((repeats + 1, len(batches), len(runs)))
    for place in np.ndindex(*seconds.shape):
        start = time.perf_counter()
        runs[place[2]](batches[place[1]])
        seconds[place] = time.perf_counter() - start
    return seconds[1:]


def _measure_energy(
    runs: Sequence[Callable[[Any], Any]], batches: Sequence[Any], rows: int
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Energy in kWh and CO2e in kg for 1,000 inputs of each run, and where they are from; raises ImportError."""
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:
        raise ImportError('Energy needs codecarbon: pip install "hf-budgetformer[energy]".') from None
    logging.getLogger("codecarbon").setLevel("CRITICAL")  # before it has read its own setting, it talks
    nowhere: dict[str, Any] = {"output_methods": [], "emissions_endpoint": None, "electricitymaps_api_token": None}
    tracker = OfflineEmissionsTracker(tracking_mode="process", log_level="critical", **nowhere)
    found = []
    try:
        for run in runs:
            tracker.start_task()
            inputs, end = 0, time.perf_counter() + _ENERGY_SECONDS
            while time.perf_counter() < end:
                for batch in batches:
                    run(batch)
                inputs += rows
            used = tracker.stop_task()
            found.append((1000 * used.energy_consumed / inputs, 1000 * used.emissions / inputs))
    finally:
        tracker.stop()
    # Nothing public tells how the figures came about; only CPU can be without a counter, other chips always read one.
    way = next((part._mode for part in tracker._hardware if type(part).__name__ == "CPU"), "counter")
    carbon = used.country_iso_code or "the world in the mean"
    return found, {"estimated": way in ("cpu_load", "constant"), "cpu": way, "carbon": carbon}


def _find_hardware(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}


def cost_card(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float | None] = (1.0, 0.5, 0.25, None),
    batch_size: int = 32,
    rows: int = 256,
    repeats: int = 5,
    max_length: int | None = None,
    training_seconds: float | None = None,
    energy: bool = False,
) -> CostCard:
    """Measures what a classifier costs at several budgets, beside the stock model with the same weights.

    All of them take turns at each batch, and medians count. Nothing is timed unless the model with all heads, or with
    those it has left, answers as the stock model does.

    Args:
        model: A BudgetFormer classifier; asked in eval mode, and left in the mode it was in. One cut down to static
            heads takes no budget and is measured once, whatever `budgets` are.
        dataset: Typical inputs: texts in `text` and, for pairs, `text_pair`, or tokenized.
        tokenizer: Of the model.
        budgets: Shares in (0, 1]; None: `config.head_budget`, or the budget the model chooses where that is None.
        batch_size: Rows of a batch, >= 1; sorted by length, which saves the stock model padding too.
        rows: How many inputs are taken, evenly spread over the data, >= 1.
        repeats: Times that each batch counts, >= 1.
        max_length: Tokens kept of a text that is not tokenized yet. None: all the tokenizer allows.
        training_seconds: What training took beyond having the stock model, for `break_even`.
        energy: Whether to measure energy and CO2e, which takes 5 seconds for each budget. codecarbon reads the country
            from the environment variable CODECARBON_COUNTRY_ISO_CODE; without it the world's mean electricity counts.

    Raises:
        ValueError: An argument is not allowed.
        RuntimeError: The answers are not those of the stock model.
        ImportError: codecarbon is not installed.
    """
    ours: Any = model
    check_classifier(model)
    budgets = distinct_budgets(budgets)
    for name, count in (("batch_size", batch_size), ("rows", rows), ("repeats", repeats)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}.")
    if not len(dataset) or not {"text", "input_ids"} & set(dataset.column_names):
        got = f"{len(dataset)} rows of {dataset.column_names}"
        raise ValueError(f"dataset must have rows, and a column 'text' or 'input_ids', got {got}.")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, rows).astype(int))
    columns = dataset.with_format(None)[chosen.tolist()]
    batches, singles = (
        [batch.to(ours.device) for _, batch in batches_by_length(columns, tokenizer, size, max_length)]
        for size in (batch_size, 1)
    )
    masks = [batch["attention_mask"] for batch in batches]
    tokens = {"real": sum(x.sum().item() for x in masks), "padded": sum(x.numel() for x in masks)}
    settings = {"checkpoint": ours.name_or_path, "rows": len(singles), "tokens": tokens, "batch_size": batch_size}
    settings |= {"repeats": repeats, "max_length": max_length, "training_seconds": training_seconds}
    settings |= {"threads": torch.get_num_threads(), "dtype": str(ours.dtype).removeprefix("torch.")}
    asked = budgets if ours.config.static_heads is None else [None]
    was_training = model.training
    model.eval()
    try:
        return _measure(ours, asked, batches, singles, settings, energy)
    finally:
        model.train(was_training)


@torch.no_grad()
def _measure(
    model: Any, budgets: Sequence[float | None], batches: Any, singles: Any, settings: dict[str, Any], energy: bool
) -> CostCard:
    stock, rows = stock_model(model), len(singles)
    everything, tolerance = None if model.config.static_heads else 1.0, 1e-4 if model.dtype == torch.float32 else 5e-2
    for batch in batches:
        expected, got = stock(**batch).logits.float(), model(**batch, head_budget=everything).logits.float()
        difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"model differs by {difference:.2g} from the stock model with the same weights, more than "
                f"{tolerance:g}: what is not right is not timed."
            )

    def run(asked: Callable[..., Any], batch: Any) -> None:
        asked(**batch).logits.cpu()  # which waits for the device

    ways = [stock, *(partial(model, head_budget=budget) for budget in budgets)]
    runs = [partial(run, way) for way in ways]
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    memory = []
    for way, owner in zip(runs, [stock, *[model] * len(budgets)], strict=True):
        with _HeldMemory([*owner.parameters(), *owner.buffers()]) as held:
            way(largest)
        memory.append(held.peak / 2**20)
    used, source = _measure_energy(runs, batches, rows) if energy else ([(None, None)] * len(runs), None)
    ceiling = speed_ceiling(model, batches[len(batches) // 2], settings["repeats"])
    profiles = [[profile(model, batch, budget) for batch in batches] for budget in budgets]
    latency = 1e3 * np.quantile(_measure_times(runs, singles, 1), (0.5, 0.95), axis=(0, 1))  # (2, runs)
    rates = rows / np.median(_measure_times(runs, batches, settings["repeats"]).sum(1), axis=0)  # (runs,)

    def cost(place: int, asked: float | None, heads: float, counts: list[dict[str, int]]) -> BudgetCost:
        flops = {part: sum(count[part] for count in counts) / rows for part in PARTS}
        stock_rate, rate = rates[[0, place]].tolist()
        paid = inputs_to_break_even(settings["training_seconds"], stock_rate, rate)
        rest: list[Any] = [*latency[:, place].tolist(), rate, memory[place], *used[place], paid]
        return BudgetCost(asked, heads, flops, *rest)

    results = []
    for place, (budget, found) in enumerate(zip(budgets, profiles, strict=True), 1):
        heads = sum(x.head_share * len(batch["input_ids"]) for x, batch in zip(found, batches, strict=True)) / rows
        results.append(cost(place, budget, heads, [x.sparse for x in found]))
    return CostCard(
        parameters=model.num_parameters(),
        stock_parameters=stock.num_parameters(),
        stock=cost(0, None, 1.0, [x.backbone for x in profiles[0]]),
        results=results,
        ceiling=ceiling,
        energy=source,
        hardware=_find_hardware(model.device),
        software={name: version(name) for name in ("torch", "transformers", "hf-budgetformer")},
        settings=settings,
    )


__all__ = [
    "BudgetCost",
    "CostCard",
    "FlopsProfile",
    "SpeedCeiling",
    "cost_card",
    "inputs_to_break_even",
    "profile",
    "speed_ceiling",
    "stock_model",
]
