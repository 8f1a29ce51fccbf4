"""What a model costs at several budgets: FLOPs, time, memory and energy, measured here beside the stock model."""

import logging
import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.logging import get_logger, tqdm

from ..budgets import problem_type
from .batching import batches_by_length, tokenized
from .checkpoints import check_classifier, distinct_budgets
from .evaluation import BUDGETS, wilson_interval
from .narrowing import stock_model
from .rivals import RIVALS, check_against, make_rivals
from .tables import label_values
from .tuning import decisions, describe_promise, kept_promise


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

logger = get_logger(__name__)

AS_THEY_COME = "as they come"
# How long each way is run for its energy: codecarbon takes a sample a second.
ENERGY_SECONDS = 5.0


@dataclass(frozen=True)
class BudgetCost:
    """What one way to run the texts costs.

    Attributes:
        asked: The budget asked for; None: a plain call, or the stock model's.
        spent: Mean share of the full model's work, all looks together.
        flops: Of one input in the mean, 2 for each multiply-add, matrix products only, as `FlopCounterMode` counts.
        latency_p50: Milliseconds that a single input takes, without padding: median over inputs.
        latency_p95: The same, 95th percentile.
        throughput: Inputs a second, in batches.
        peak_memory: MiB that tensors hold at most while the largest batch runs, weights included; what an operation
            needs only inside itself is not counted.
        energy: kWh for 1,000 inputs in batches, if measured.
        co2e: kg for the same.
        break_even: Inputs, in batches, after which the time saved has made up for the training; None if never, or if
            it is unknown how long that took.
        accuracy: Share of the inputs answered rightly; None, as the next, without labels and for a regression.
        interval: Bounds of the accuracy on inputs like these, 95% (Wilson's score interval).
    """

    asked: float | None
    spent: float
    flops: float
    latency_p50: float
    latency_p95: float
    throughput: float
    peak_memory: float
    energy: float | None = None
    co2e: float | None = None
    break_even: int | None = None
    accuracy: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class RivalCost:
    """What the stock model costs when it is run otherwise.

    Attributes:
        name: "as they come": plain PyTorch, on batches of texts in the order of the data; else of `rivals.AGAINST`, on
            the batches sorted by length that the budgets are measured on.
        latency_p50: As in `BudgetCost`.
        latency_p95: As in `BudgetCost`.
        throughput: As in `BudgetCost`.
        agreement: Share of the inputs that another runtime labels as the stock model does; None for a regression, and
            in plain PyTorch.
        accuracy: As in `BudgetCost`.
        interval: As in `BudgetCost`.
    """

    name: str
    latency_p50: float
    latency_p95: float
    throughput: float
    agreement: float | None
    accuracy: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class CostCard:
    """What a classifier costs at several budgets, beside the stock model in the same run.

    Attributes:
        parameters: Of the model.
        stock_parameters: Of the stock model; None: there is none, the model was cut.
        stock: With the full model's weights, on the same batches, padded; None: there is none.
        results: One for each budget, in the order asked.
        energy: Where energy and CO2e are from, if measured: "estimated", whether the processor's share is worked out
            from its load for want of a counter that can be read (that of the memory always is); "cpu", codecarbon's
            name for the way; "carbon", whose electricity.
        hardware: "cpu", "cores", "gpu".
        software: Versions.
        settings: What was run.
        rivals: What a user could pick instead, if asked for.
    """

    parameters: int
    stock_parameters: int | None
    stock: BudgetCost | None
    results: list[BudgetCost]
    energy: dict[str, Any] | None
    hardware: dict[str, Any]
    software: dict[str, str]
    settings: dict[str, Any]
    rivals: list[RivalCost] = field(default_factory=list)

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
        stock = None if values["stock"] is None else BudgetCost(**_with_tuple(values["stock"]))
        results = [BudgetCost(**_with_tuple(result)) for result in values["results"]]
        rivals = [RivalCost(**_with_tuple(rival)) for rival in values.get("rivals", [])]
        return cls(**{**values, "stock": stock, "results": results, "rivals": rivals})

    def __str__(self) -> str:
        settings, tokens = self.settings, self.settings["tokens"]
        paid = settings["training_seconds"] is not None
        rows = [["budget", "spent", "MFLOPs", "p50 ms", "p95 ms", "inputs/s", "speed", "MiB"]]
        rows[0] += ["Wh/1,000", "g CO2e/1,000"] * bool(self.energy) + ["pays after"] * paid
        rows[0] += ["accuracy", "95% interval"] * self._is_labelled
        if self.stock is not None:
            rows.append(self._row("stock, sorted" if self.rivals else "stock", self.stock, paid))
        for x in self.results:
            rows.append(self._row(_budget_name(x), x, paid))
        stock = "a model that was cut has no stock model to compare with"
        if self.stock_parameters is not None:
            stock = f"stock {self.stock_parameters:,}"
        versions = {**self.hardware, **self.software}
        notes = [
            f"{self.parameters:,} parameters, {stock}",
            f"{settings['rows']} texts, {tokens['real']} tokens, {tokens['padded']} with padding: in batches of "
            f"{settings['batch_size']} sorted by length for throughput and memory, one by one for latency",
            f"{settings['dtype']}, {settings['threads']} threads; "
            + ", ".join(f"{name} {x}" for name, x in versions.items() if x is not None),
        ]
        if self.energy:
            way = "estimated" if self.energy["estimated"] else "measured"
            notes.append(f"energy {way} ({self.energy['cpu']}), electricity of {self.energy['carbon']}")
        compared = ["", *_table(self._rival_rows()), "", self._answer_to_buyer()] if self.rivals else []
        return "\n".join([*_table(rows), "", *notes, *compared])

    @property
    def _is_labelled(self) -> bool:
        return self.results[0].accuracy is not None

    def _rival_rows(self) -> list[list[str]]:
        """The stock model run otherwise, and how many times its inputs a second each budget answers."""
        names = [_budget_name(x) for x in self.results]
        kept = ["same labels", *["accuracy"] * self._is_labelled]
        rows = [["instead", "p50 ms", "p95 ms", "inputs/s", *kept, *(f"{name} gains" for name in names)]]
        for rival in self.rivals:
            agreement = "-" if rival.agreement is None else f"{rival.agreement:.1%}"
            row = [_rival_name(rival), f"{rival.latency_p50:.2f}", f"{rival.latency_p95:.2f}"]
            row += [f"{rival.throughput:.1f}", agreement, *_kept_columns(rival)[: self._is_labelled]]
            rows.append(row + [f"{x.throughput / rival.throughput:.2f}x" for x in self.results])
        return rows

    def _answer_to_buyer(self) -> str:
        """What is gained on the best of the others, in a line."""
        best = max(self.rivals, key=lambda rival: rival.throughput)
        safe = [x for x in self.results if x.asked is None or x.asked == 1.0]
        ours = max(safe or self.results, key=lambda x: x.throughput)
        name = "a plain call" if ours.asked is None else f"the budget {ours.asked:.3f}"
        promise = self.settings["promise"]
        if ours.asked == 1.0:
            kept = "Its answers are the stock model's."
        elif ours.asked is None and promise is not None:
            kept = promise
        elif ours.asked is None:
            kept = "Nothing is promised of its answers: run tune."
        else:
            kept = "Nothing is promised at a fixed budget."
        return (
            f"On these texts {name} answers {ours.throughput / best.throughput:.2f} times as many inputs a second as "
            f"the best of the others, {_rival_name(best)}. {kept}"
        )

    def _row(self, name: str, x: BudgetCost, paid: bool) -> list[str]:
        speed = "-" if self.stock is None else f"{x.throughput / self.stock.throughput:.2f}x"
        row = [name, f"{x.spent:.3f}", f"{x.flops / 1e6:.2f}", f"{x.latency_p50:.2f}", f"{x.latency_p95:.2f}"]
        row += [f"{x.throughput:.1f}", speed, f"{x.peak_memory:.1f}"]
        row += [f"{1e3 * amount:.3g}" for amount in (x.energy, x.co2e) if amount is not None]
        row += ["-" if x.break_even is None else f"{x.break_even:,}"] * paid
        return row + _kept_columns(x) * self._is_labelled


def _with_tuple(values: dict[str, Any]) -> dict[str, Any]:
    interval = values.get("interval")
    return {**values, "interval": None if interval is None else tuple(interval)}


def _kept_columns(x: BudgetCost | RivalCost) -> list[str]:
    """Accuracy and its interval."""
    if x.accuracy is None or x.interval is None:
        return ["-", "-"]
    return [f"{x.accuracy:.1%}", "[{:.1%}, {:.1%}]".format(*x.interval)]


def _budget_name(x: BudgetCost) -> str:
    return "plain" if x.asked is None else f"{x.asked:.3f}"


def _rival_name(rival: RivalCost) -> str:
    if rival.name in (AS_THEY_COME, "sorted"):
        return f"stock, {rival.name}"
    return f"{rival.name}, sorted"


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


class HeldMemory(TorchDispatchMode):
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


def _measure_times(runs: Sequence[Callable[[Any], Any]], batches: Sequence[Any], repeats: int, name: str) -> np.ndarray:
    """Seconds, (repeats, batches, runs); runs take turns at each batch, and a first round warms up."""
    seconds = np.zeros((repeats + 1, len(batches), len(runs)))
    with tqdm(total=seconds.size, desc=name, leave=False, disable=None) as bar:
        for place in np.ndindex(*seconds.shape):
            start = time.perf_counter()
            runs[place[2]](batches[place[1]])
            seconds[place] = time.perf_counter() - start
            bar.update()
    return seconds[1:]


def _run_one_of(run: Callable[[Any], Any], place: int, batches: Sequence[Any]) -> None:
    run(batches[place])


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
    energies = []
    try:
        for run in runs:
            tracker.start_task()
            inputs, end = 0, time.perf_counter() + ENERGY_SECONDS
            while time.perf_counter() < end:
                for batch in batches:
                    run(batch)
                inputs += rows
            used = tracker.stop_task()
            energies.append((1000 * used.energy_consumed / inputs, 1000 * used.emissions / inputs))
    finally:
        tracker.stop()
    # Nothing public tells how the figures came about; only CPU can be without a counter, other chips always read one.
    method = next((part._mode for part in tracker._hardware if type(part).__name__ == "CPU"), "counter")
    carbon = used.country_iso_code or "the world in the mean"
    return energies, {"estimated": method in ("cpu_load", "constant"), "cpu": method, "carbon": carbon}


def _find_hardware(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what `run` does, by torch's counter, which sees attention where it is made of plain products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def cost_card(
    model: nn.Module,
    dataset: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    budgets: Iterable[float | None] | None = None,
    batch_size: int = 32,
    rows: int = 256,
    repeats: int = 5,
    max_length: int | None = None,
    training_seconds: float | None = None,
    energy: bool = False,
    against: Sequence[str] = (),
) -> CostCard:
    """Measures what a classifier costs at several budgets, beside the stock model with the full model's weights.

    All of them take turns at each batch, and medians count. Nothing is timed unless the full model answers as the stock
    model does.

    Args:
        model: A BudgetFormer classifier; asked in eval mode, and left in the mode it was in. One that was cut is
            measured beside no stock model.
        dataset: Typical inputs: texts in `text` and, for pairs, `text_pair`, or tokenized; with labels, as in
            `tools.tables.label_values`, accuracy is counted too.
        tokenizer: Of the model.
        budgets: Floats in (0, 1], and None for a plain call. If there are none, those of `tools.evaluation`; of a model
            that was cut a plain call alone.
        batch_size: Rows of a batch, >= 1; sorted by length, which saves the stock model padding too.
        rows: How many inputs are taken, evenly spread over the data, >= 1.
        repeats: Times that each batch counts, >= 1.
        max_length: Tokens kept of a text that is not tokenized yet. None: all the tokenizer allows.
        training_seconds: What training took beyond having the stock model, for `break_even`.
        energy: Whether to measure energy and CO2e, which takes 5 seconds for each budget. codecarbon reads the country
            from the environment variable CODECARBON_COUNTRY_ISO_CODE; without it the world's mean electricity counts.
        against: What else is measured, of `rivals.AGAINST`: "sorted", the stock model in plain PyTorch on batches
            sorted by length, and the stock model in other runtimes, on the CPU; where anything is given, the stock
            model on batches as they come too.

    Raises:
        ValueError: An argument is not allowed.
        RuntimeError: The answers are not those of the stock model.
        ImportError: codecarbon or another runtime is not installed.
    """
    ours: Any = model
    check_classifier(model)
    check_against(against)
    _check_comparable(against, ours)
    if budgets is None:
        budgets = BUDGETS if ours.config.full_encoder else [None]
    levels = distinct_budgets(budgets)
    for name, count in (("batch_size", batch_size), ("rows", rows), ("repeats", repeats)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}.")
    if not len(dataset) or not {"text", "input_ids"} & set(dataset.column_names):
        got = f"{len(dataset)} rows of {dataset.column_names}"
        raise ValueError(f"dataset must have rows, and a column 'text' or 'input_ids', got {got}.")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, rows).astype(int))
    columns = dataset.with_format(None)[chosen.tolist()]
    inputs = tokenized(columns, tokenizer, max_length)
    places, batches = zip(*batches_by_length(inputs, tokenizer, batch_size), strict=True)
    batches = [batch.to(ours.device) for batch in batches]
    singles = [batch.to(ours.device) for _, batch in batches_by_length(inputs, tokenizer, 1)]
    labels = _labels_of(dataset, ours.config)
    if labels is not None:
        labels = labels[chosen][np.concatenate(places)]
    unsorted_batches = [batch.to(ours.device) for batch in _batches_in_order(inputs, tokenizer, batch_size)]
    masks = [batch["attention_mask"] for batch in batches]
    settings = {
        "checkpoint": ours.name_or_path,
        "rows": len(singles),
        "tokens": {"real": sum(x.sum().item() for x in masks), "padded": sum(x.numel() for x in masks)},
        "batch_size": batch_size,
        "repeats": repeats,
        "max_length": max_length,
        "training_seconds": training_seconds,
        "threads": torch.get_num_threads(),
        "dtype": str(ours.dtype).removeprefix("torch."),
        "against": list(dict.fromkeys(against)),
        "promise": describe_promise(kept_promise(ours.config)) or None,
    }
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _measure(ours, levels, batches, unsorted_batches, singles, labels, settings, energy)
    finally:
        model.train(was_training)


def _labels_of(dataset: "Dataset", config: Any) -> np.ndarray | None:
    """Labels of all rows that accuracy is counted by; None where there are none that the model could give."""
    if problem_type(config) == "regression" or not {"label", "labels"} & set(dataset.column_names):
        return None
    try:
        return label_values(dataset, config)
    except ValueError as error:
        logger.warning("Accuracy is left out: %s", error)
        return None


def _kept(logits: Iterable[torch.Tensor], labels: np.ndarray | None, config: Any) -> dict[str, Any]:
    """Accuracy and its interval, of logits in the order of the labels; without labels none are asked for."""
    if labels is None:
        return {}
    answers = decisions(torch.cat([x.float().cpu() for x in logits]), problem_type(config)).numpy()
    right = answers == labels
    correct = int((right if right.ndim == 1 else right.all(-1)).sum())
    return {"accuracy": correct / len(labels), "interval": wilson_interval(correct, len(labels))}


def _check_comparable(against: Sequence[str], model: Any) -> None:
    """Raises ValueError unless the model can be measured against these."""
    if against and not model.config.full_encoder:
        raise ValueError(f"against must be empty for a model that was cut, got {list(against)}.")
    if set(against) - {"sorted"} and model.device.type != "cpu":
        raise ValueError(f"against must be of ['sorted'] for a model on {model.device}, got {list(against)}.")


def _batches_in_order(
    inputs: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[BatchEncoding]:
    for start in range(0, len(inputs["input_ids"]), size):
        yield tokenizer.pad({name: x[start : start + size] for name, x in inputs.items()}, return_tensors="pt")


def _check_answers(model: Any, stock: Any, batches: Any) -> None:
    """Raises RuntimeError unless the full model answers as the stock model does."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    for batch in batches:
        expected, got = stock(**batch).logits.float(), model(**batch, budget=1.0).logits.float()
        difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"model differs by {difference:.2g} from the stock model with the same weights, more than "
                f"{tolerance:g}: what is not right is not timed."
            )


def _measure(
    model: Any,
    budgets: Sequence[float | None],
    batches: Any,
    unsorted_batches: Any,
    singles: Any,
    labels: np.ndarray | None,
    settings: dict[str, Any],
    energy: bool,
) -> CostCard:
    stock = stock_model(model) if model.config.full_encoder else None
    calls = [partial(model, budget=budget) for budget in budgets]
    owners = [model] * len(budgets)
    levels = list(budgets)
    if stock is not None:
        _check_answers(model, stock, batches)
        calls, owners, levels = [stock, *calls], [stock, *owners], [None, *levels]

    def run(call: Callable[..., Any], batch: Any) -> None:
        call(**batch).logits.cpu()  # which waits for the device

    runtimes = [name for name in settings["against"] if name in RIVALS]
    rivals = make_rivals(runtimes, model, batches, settings["threads"])
    runs, rows = [partial(run, call) for call in calls], len(singles)
    timed: list[Callable[[Any], Any]] = [*runs, *(rival.answer for rival in rivals.values())]
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    used, source = _measure_energy(runs, batches, rows) if energy else ([(None, None)] * len(runs), None)
    latency = 1e3 * np.quantile(
        _measure_times(timed, singles, 1, "Timing single texts"), (0.5, 0.95), axis=(0, 1)
    )  # (2, runs)

    # Last, where anything is compared, the stock model on batches as they come.
    batched: list[Callable[[Any], Any]] = [partial(_run_one_of, run_one, 0) for run_one in timed]
    batched += [partial(_run_one_of, runs[0], 1)] * bool(settings["against"])
    pairs = list(zip(batches, unsorted_batches, strict=True))
    rates = rows / np.median(
        _measure_times(batched, pairs, settings["repeats"], "Timing batches").sum(1), axis=0
    )  # (runs,)
    costs = []
    for place, (call, owner) in enumerate(zip(calls, owners, strict=True)):
        with HeldMemory([*owner.parameters(), *owner.buffers()]) as held:
            runs[place](largest)
        rate, spent, paid = rates[place].item(), 1.0, None
        logits: Iterable[torch.Tensor] = (call(**batch).logits for batch in batches)
        if owner is model:
            outs = [call(**batch) for batch in batches]
            spent, logits = sum(out.budget.sum().item() for out in outs) / rows, [out.logits for out in outs]
        if owner is model and stock is not None:
            paid = inputs_to_break_even(settings["training_seconds"], rates[0].item(), rate)
        cost = BudgetCost(
            asked=levels[place],
            spent=spent,
            flops=sum(count_flops(partial(call, **batch)) for batch in batches) / rows,
            latency_p50=latency[0, place].item(),
            latency_p95=latency[1, place].item(),
            throughput=rate,
            peak_memory=held.peak / 2**20,
            energy=used[place][0],
            co2e=used[place][1],
            break_even=paid,
            **_kept(logits, labels, model.config),
        )
        costs.append(cost)
    others = []
    for name in [AS_THEY_COME, *settings["against"]] if settings["against"] else []:
        place = len(runs) + list(rivals).index(name) if name in rivals else 0
        other = RivalCost(
            name=name,
            latency_p50=latency[0, place].item(),
            latency_p95=latency[1, place].item(),
            throughput=rates[-1 if name == AS_THEY_COME else place].item(),
            agreement=rivals[name].agreement if name in rivals else None,
            **(
                _kept((rivals[name].answer(batch) for batch in batches), labels, model.config)
                if name in rivals
                else {"accuracy": costs[0].accuracy, "interval": costs[0].interval}  # of the stock model
            ),
        )
        others.append(other)
    return CostCard(
        parameters=model.num_parameters(),
        stock_parameters=None if stock is None else stock.num_parameters(),
        stock=None if stock is None else costs[0],
        results=costs if stock is None else costs[1:],
        energy=source,
        hardware=_find_hardware(model.device),
        software={name: version(name) for name in ("torch", "transformers", "hf-budgetformer")},
        settings=settings,
        rivals=others,
    )


__all__ = [
    "BudgetCost",
    "CostCard",
    "HeldMemory",
    "RivalCost",
    "cost_card",
    "count_flops",
    "inputs_to_break_even",
]
