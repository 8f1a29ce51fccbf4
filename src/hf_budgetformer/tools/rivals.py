"""What a user would pick instead: the stock model in onnxruntime and OpenVINO, in float32 and in int8."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..budgets import has_confidence
from ..runtime import INPUTS, OnnxGraph, OpenVINOGraph, unreported
from .export import convert_onnx, export_onnx, quantize_openvino
from .narrowing import stock_model


# What a user could pick instead: the stock model on batches sorted by length, or in another runtime.
RIVALS = ("onnx", "onnx-int8", "openvino", "openvino-int8")
AGAINST = ("sorted", *RIVALS)
# Batches that OpenVINO's int8 model is calibrated on, at most: more take longer and change no speed.
_CALIBRATION_BATCHES = 8
# Rows of each: 32 of 512 tokens took 19 GiB.
_CALIBRATION_ROWS = 4
_TOLERANCE = 1e-4

Batch = Mapping[str, torch.Tensor]
Answer = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """The stock model in another runtime, on the CPU.

    Attributes:
        answer: From `input_ids`, `attention_mask` and, where there are any, `token_type_ids`, all (B, L) int64 on the
            CPU, to logits (B, num_labels), float32.
        agreement: Share of the inputs it was checked on that it labels as the stock model does; None for a regression.
    """

    answer: Answer
    agreement: float | None


def check_against(against: Sequence[str], allowed: Sequence[str] = AGAINST) -> None:
    """Raises ValueError where a name is not allowed."""
    if unknown := [name for name in against if name not in allowed]:
        raise ValueError(f"against must be of {list(allowed)}, got {unknown}.")


@torch.no_grad()
def make_rivals(names: Sequence[str], model: nn.Module, batches: Sequence[Batch], threads: int) -> dict[str, Rival]:
    """The full model of a BudgetFormer classifier in other runtimes, each checked against the stock model.

    Args:
        names: Of `RIVALS`. "onnx-int8" has weights in int8 and activations quantised as they come, as
            `export_onnx` makes it; "openvino-int8" has both quantised by NNCF, calibrated on some of `batches`.
        model: A BudgetFormer classifier with a full encoder.
        batches: What it takes, on the CPU; a float32 rival must answer them as the stock model does.
        threads: That each may use, >= 1.

    Raises:
        ValueError: A name is unknown, or the model was cut.
        RuntimeError: A float32 rival answers otherwise than the stock model.
        ImportError: A package is missing.
    """
    check_against(names, RIVALS)
    if not names:
        return {}
    _check_installed(names)
    stock = stock_model(model).to("cpu", torch.float32)
    rivals = {}
    with TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "float32.onnx", 1.0)
        for name in names:
            if name.startswith("onnx"):
                answer = _in_onnxruntime(path, name.endswith("int8"), threads)
            else:
                answer = _in_openvino(path, batches if name.endswith("int8") else None, threads)
            rivals[name] = Rival(answer, _check(name, answer, stock, batches))
    return rivals


def _check_installed(names: Sequence[str]) -> None:
    """Raises ImportError where a runtime is missing, before the others are timed."""
    try:
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401

        with unreported():
            if any(name.startswith("openvino") for name in names):
                import openvino  # type: ignore[import-untyped]  # noqa: F401
            if "openvino-int8" in names:
                import nncf  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        raise ImportError('Other runtimes need packages: pip install "hf-budgetformer[rivals]".') from None


def _arrays(names: Sequence[str], batch: Batch) -> dict[str, Any]:
    """Inputs by name; token types that were not given are zero, as in the stock model."""
    return {name: batch.get(name, torch.zeros_like(batch["input_ids"])).numpy() for name in names}


def _in_onnxruntime(path: Path, int8: bool, threads: int) -> Answer:
    if int8:
        path = convert_onnx(path, path.with_name("int8.onnx"), "int8")
    return _answer_by(OnnxGraph(path, threads))


def _in_openvino(path: Path, calibration: Sequence[Batch] | None, threads: int) -> Answer:
    if calibration is None:
        return _answer_by(OpenVINOGraph(path, threads))
    inputs = [_arrays(INPUTS, batch) for batch in _spread(calibration)]
    return _answer_by(OpenVINOGraph(quantize_openvino(path, inputs), threads))


def _answer_by(graph: OnnxGraph | OpenVINOGraph) -> Answer:
    def answer(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(graph(_arrays(graph.names, batch)))

    return answer


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    """At most `_CALIBRATION_BATCHES`, evenly spread, of few rows: NNCF keeps all that it has seen inside the model."""
    step = max(1, len(batches) // _CALIBRATION_BATCHES)
    return [
        {name: x[:_CALIBRATION_ROWS] for name, x in batch.items()} for batch in batches[::step][:_CALIBRATION_BATCHES]
    ]


def _check(name: str, answer: Answer, stock: Any, batches: Sequence[Batch]) -> float | None:
    """Share of the inputs labelled as by the stock model; raises RuntimeError where a float32 rival is not right."""
    same = rows = 0
    for batch in batches:
        expected, got = stock(**batch).logits, answer(batch)
        difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
        if not name.endswith("int8") and not difference <= _TOLERANCE:
            raise RuntimeError(
                f"{name} differs by {difference:.2g} from the stock model, more than {_TOLERANCE:g}: what is not right "
                "is not timed."
            )
        if stock.config.problem_type == "multi_label_classification":
            same += ((got > 0) == (expected > 0)).all(-1).sum().item()
        else:
            same += (got.argmax(-1) == expected.argmax(-1)).sum().item()
        rows += len(expected)
    return same / rows if has_confidence(stock.config) else None


__all__ = ["AGAINST", "RIVALS", "Rival", "check_against", "make_rivals"]
