"""From a model that chooses to one that has chosen: small, and plain enough for any runtime."""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..backbones import max_input_length
from .baselines import prune
from .data import check_classifier


# Tokens of the inputs that an exported model is traced with, and, in other batches and lengths, checked with.
_TRACED, _CHECKED = (8, 5, 8), ((5,), (11, 2, 7, 1), (16, 16))
_TOLERANCE = 1e-4
# A scale for each output, and seven bits: with eight, sums overflow on processors without VNNI.
INT8 = {"per_channel": True, "reduce_range": True}


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


class _Traced(nn.Module):
    """What is exported: tensors in, tensors out, and every head computed."""

    model: Any

    def __init__(self, model: Any, names: Sequence[str], head_budget: float | None) -> None:
        super().__init__()
        self.model, self.names, self.head_budget = model, names, head_budget
        self.outputs = ["logits"] if model.config.static_heads else ["logits", "head_budget"]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        out = self.model(**given, head_budget=self.head_budget, executor="masked")
        return tuple(out[name] for name in self.outputs)

    def make_inputs(self, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Random tokens of so many inputs, padded on the right."""
        config, longest = self.model.config, max_input_length(self.model.config)
        size = torch.tensor(lengths).clamp(max=longest)[:, None]
        mask = (torch.arange(int(size.max())) < size).long()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, mask.shape, generator=draw)
        ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
        types = torch.randint(config.type_vocab_size, mask.shape, generator=draw)
        return (ids, mask, types)[: len(self.names)]


def _sort_stable(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable, which torch does not translate: TopK puts the lower index first, too."""
    from onnxscript import opset18 as op

    place: Any = op.Constant(value_ints=[dim])
    size = op.Gather(op.Shape(values), place)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | Path, head_budget: float | None = None, quantize: bool = False) -> Path:
    """Writes a classifier as one ONNX file, for batches and lengths of any size; checks it in onnxruntime before.

    A baked model is as small and fast there as it is here. A dynamic one routes as it does here, but computes all of
    its heads and multiplies the closed ones by zero: that saves nothing. Inputs are `input_ids`, `attention_mask`
    and, where the backbone tells types apart, `token_type_ids`, all (B, L) int64; outputs `logits` (B, num_labels)
    and, of a dynamic model, `head_budget` (B,), both float32.

    Args:
        model: A BudgetFormer classifier; a copy in float32 is exported.
        path: Of the file; folders are made as needed, and nothing is left there if the check fails.
        head_budget: Share of the heads that a dynamic model is asked for, fixed in the file; None: its own.
        quantize: Whether to make the weights int8, and the activations as they come (onnxruntime's dynamic
            quantisation). What it costs in accuracy is not checked: evaluate it.

    Raises:
        ValueError: An argument is not allowed.
        OSError: The file cannot be written.
        RuntimeError: onnxruntime does not answer as the model does.
        ImportError: A package is missing.
    """
    try:
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import quantize_dynamic  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError('ONNX needs other packages: pip install "hf-budgetformer[onnx]".') from None
    ours: Any = model
    check_classifier(model)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}.")
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (ours.config.type_vocab_size > 1)
    traced = _Traced(copy.deepcopy(ours).to("cpu", torch.float32), names, head_budget).eval()
    example = traced.make_inputs(_TRACED)
    traced(*example)  # says what is wrong with head_budget
    path.parent.mkdir(parents=True, exist_ok=True)
    before = logging.root.manager.disable
    with TemporaryDirectory(dir=path.parent, prefix=".onnx") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and onnxruntime tell of packages and steps that are not needed
        files = [os.path.join(folder, name) for name in ("float32.onnx", "int8.onnx")]
        try:
            logging.disable(logging.WARNING)
            _trace(traced, example).save(files[0], external_data=False)
            _check(traced, files[0], _TOLERANCE)
            if quantize:
                quantize_dynamic(files[0], files[1], **INT8)
                _check(traced, files[1], math.inf)
        finally:
            logging.disable(before)
        os.replace(files[quantize], path)
    return path


def _trace(traced: _Traced, example: tuple[torch.Tensor, ...]) -> Any:
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(traced, example, dynamic_shapes=((axes,) * len(example),))
    return torch.onnx.export(
        program,
        dynamo=True,
        input_names=traced.names,
        output_names=traced.outputs,
        dynamic_shapes=(({0: "batch", 1: "length"},) * len(example),),
        custom_translation_table={torch.ops.aten.sort.stable: _sort_stable},
        verbose=False,
    )


def _check(traced: _Traced, file: str, tolerance: float) -> None:
    """Raises RuntimeError unless onnxruntime answers as the model does; if all is tolerated, unless it answers."""
    import onnxruntime as ort  # type: ignore[import-untyped]

    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for lengths in _CHECKED:
        inputs = traced.make_inputs(lengths)
        expected = traced(*inputs)[0]
        given = {name: x.numpy() for name, x in zip(traced.names, inputs, strict=True)}
        got = torch.from_numpy(session.run(["logits"], given)[0])
        difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
        alike = tolerance == math.inf or torch.equal(got.argmax(-1), expected.argmax(-1))
        if not (difference <= tolerance and alike):
            raise RuntimeError(
                f"onnxruntime must answer as the model does, within {tolerance:g} and with the same labels, got a "
                f"difference of {difference:.2g} on inputs of {list(lengths)} tokens: nothing was written."
            )


__all__ = ["INT8", "bake", "count_open_heads", "export_onnx"]
