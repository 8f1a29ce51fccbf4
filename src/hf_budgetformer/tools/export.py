"""A classifier as one ONNX graph at a constant budget, checked in onnxruntime before it is there."""

import copy
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..backbones import max_input_length
from .checkpoints import check_classifier
from .narrowing import cut
from .profiling import stock_model


# Tokens of the inputs that an exported model is traced with, and, in other batches and lengths, checked with.
_TRACED, _CHECKED = (8, 5, 8), ((5,), (11, 2, 7, 1), (16, 16))
_TOLERANCE = 1e-4
# A scale for each output, and seven bits: with eight, sums overflow on processors without VNNI.
INT8 = {"per_channel": True, "reduce_range": True}


class _Traced(nn.Module):
    """What is exported: tensors in, logits out."""

    def __init__(self, model: Any, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest
        self.names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (model.config.type_vocab_size > 1)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits

    def make_inputs(self, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Random tokens of so many inputs, padded on the right."""
        config: Any = self.model.config
        size = torch.tensor(lengths).clamp(max=self.longest)[:, None]
        mask = (torch.arange(int(size.max())) < size).long()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, mask.shape, generator=draw)
        ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
        types = torch.randint(config.type_vocab_size, mask.shape, generator=draw)
        return (ids, mask, types)[: len(self.names)]


def static_model(model: nn.Module, budget: float | None = None) -> Any:
    """What a constant budget runs, alone: the stock model, or the narrow encoder cut to the budget.

    Args:
        model: A BudgetFormer classifier.
        budget: 1.0, or at most `config.narrow_budget`. None: 1.0; of a model that was cut, as it is.

    Raises:
        ValueError: An argument is not allowed.
    """
    ours: Any = model
    check_classifier(model)
    if not ours.config.full_encoder and budget is None:
        return copy.deepcopy(ours)
    if ours.config.router == "layer" and budget != 1.0:
        raise ValueError(f"budget must be 1.0 with router='layer', whose heads differ by input, got {budget}.")
    if ours.config.full_encoder and budget in (None, 1.0):
        return stock_model(model)
    return cut(model, budget)  # type: ignore[arg-type]


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | Path, budget: float | None = None, quantize: bool = False) -> Path:
    """Writes a classifier as one ONNX file, for batches and lengths of any size; checks it in onnxruntime before.

    A graph has no room for doubt: it runs one budget, and holds nothing else. Inputs are `input_ids`, `attention_mask`
    and, where the backbone tells types apart, `token_type_ids`, all (B, L) int64; the output is `logits`
    (B, num_labels), float32.

    Args:
        model: A BudgetFormer classifier; a copy in float32 is exported.
        path: Of the file; folders are made as needed, and nothing is left there if the check fails.
        budget: As in `static_model`.
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
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}.")
    static = static_model(model, budget).to("cpu", torch.float32)
    traced = _Traced(static, max_input_length(model.config)).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = logging.root.manager.disable
    with TemporaryDirectory(dir=path.parent, prefix=".onnx") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and onnxruntime tell of packages and steps that are not needed
        files = [os.path.join(folder, name) for name in ("float32.onnx", "int8.onnx")]
        try:
            logging.disable(logging.WARNING)
            _trace(traced).save(files[0], external_data=False)
            _check(traced, files[0], _TOLERANCE)
            if quantize:
                quantize_dynamic(files[0], files[1], **INT8)
                _check(traced, files[1], math.inf)
        finally:
            logging.disable(before)
        os.replace(files[quantize], path)
    return path


def _trace(traced: _Traced) -> Any:
    example = traced.make_inputs(_TRACED)
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    return torch.onnx.export(
        torch.export.export(traced, example, dynamic_shapes=((axes,) * len(example),)),
        dynamo=True,
        input_names=traced.names,
        output_names=["logits"],
        dynamic_shapes=(({0: "batch", 1: "length"},) * len(example),),
        verbose=False,
    )


def _check(traced: _Traced, file: str, tolerance: float) -> None:
    """Raises RuntimeError unless onnxruntime answers as the model does; if all is tolerated, unless it answers."""
    import onnxruntime as ort  # type: ignore[import-untyped]

    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for lengths in _CHECKED:
        inputs = traced.make_inputs(lengths)
        expected = traced(*inputs)
        given = {name: x.numpy() for name, x in zip(traced.names, inputs, strict=True)}
        got = torch.from_numpy(session.run(["logits"], given)[0])
        difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"onnxruntime must answer as the model does, within {tolerance:g}, got a difference of "
                f"{difference:.2g} on inputs of {list(lengths)} tokens: nothing was written."
            )


__all__ = ["INT8", "export_onnx", "static_model"]
