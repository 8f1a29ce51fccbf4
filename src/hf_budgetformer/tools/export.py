"""Graphs of classifiers at a constant budget: made, made smaller, and checked before they are there."""

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..backbones import BACKBONES, max_input_length
from ..runtime import DTYPES, OnnxGraph, OpenVINOGraph, unreported
from .checkpoints import check_classifier
from .narrowing import cut, stock_model


# Tokens of the inputs that an exported model is traced with, and, in other batches and lengths, checked with.
_TRACED, _CHECKED = (8, 5, 8), ((5,), (11, 2, 7, 1), (16, 16))
_TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": math.inf}
# A scale for each output, and seven bits: with eight, sums overflow on processors without VNNI.
INT8 = {"per_channel": True, "reduce_range": True}


class TracedModel(nn.Module):
    """What is exported: tensors in, logits out.

    Args:
        static: As `static_model` gives it; moved to the CPU, in float32.
        longest: Tokens that it takes at most.
    """

    def __init__(self, static: Any, longest: int) -> None:
        super().__init__()
        self.model, self.longest = static.to("cpu", torch.float32), longest
        kind = getattr(static.config, "backbone_model_type", static.config.model_type)
        has_types = BACKBONES[kind].token_types and static.config.type_vocab_size > 1
        self.names = ["input_ids", "attention_mask"] + ["token_type_ids"] * has_types
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (B, L) in the order of `names` -> logits (B, num_labels)."""
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
        if "token_type_ids" not in self.names:
            return ids, mask
        return ids, mask, torch.randint(config.type_vocab_size, mask.shape, generator=draw)

    def write(self, path: Path) -> None:
        """Writes the graph in float32; raises RuntimeError where onnxruntime does not answer as the model does."""
        with quiet():
            self._trace().save(path, external_data=False)
        self.check(OnnxGraph(path))

    def _trace(self) -> Any:
        import onnxscript.optimizer

        example = self.make_inputs(_TRACED)
        axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        with torch.no_grad():
            program: Any = torch.onnx.export(
                torch.export.export(self, example, dynamic_shapes=((axes,) * len(example),)),
                dynamo=True,
                input_names=self.names,
                output_names=["logits"],
                dynamic_shapes=(({0: "batch", 1: "length"},) * len(example),),
                verbose=False,
            )
        # Parts of weights become weights, whatever their size: what quantises sees no others.
        onnxscript.optimizer.fold_constants(program.model, input_size_limit=2**62, output_size_limit=2**62)
        onnxscript.optimizer.remove_unused_nodes(program.model)
        return program

    @torch.no_grad()
    def check(self, graph: OnnxGraph | OpenVINOGraph, dtype: str = "fp32") -> None:
        """Raises RuntimeError unless the graph answers as the model does; with int8 unless it answers."""
        for lengths in _CHECKED:
            inputs = self.make_inputs(lengths)
            expected = self(*inputs)
            got = torch.from_numpy(graph({name: x.numpy() for name, x in zip(self.names, inputs, strict=True)}))
            difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
            if not difference <= _TOLERANCES[dtype]:
                runtime = type(graph).__name__.removesuffix("Graph")
                raise RuntimeError(
                    f"{runtime} must answer as the model does, within {_TOLERANCES[dtype]:g}, got a difference of "
                    f"{difference:.2g} on inputs of {list(lengths)} tokens: nothing was written."
                )


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


def export_onnx(model: nn.Module, path: str | Path, budget: float | None = None, dtype: str = "fp32") -> Path:
    """Writes a classifier as one ONNX file, for batches and lengths of any size; checks it in onnxruntime before.

    A graph has no room for doubt: it runs one budget, and holds nothing else. Inputs are `input_ids`, `attention_mask`
    and, where the backbone tells types apart, `token_type_ids`, all (B, L) int64; the output is `logits`
    (B, num_labels), float32.

    Args:
        model: A BudgetFormer classifier; a copy in float32 is exported.
        path: Of the file; folders are made as needed, and nothing is left there if the check fails.
        budget: As in `static_model`.
        dtype: Of the weights, "fp32", "fp16" or "int8"; with int8 activations are quantised as they come
            (onnxruntime's dynamic quantisation). What int8 costs in accuracy is not checked: evaluate it.

    Raises:
        ValueError: An argument is not allowed.
        OSError: The file cannot be written.
        RuntimeError: onnxruntime does not answer as the model does.
        ImportError: A package is missing.
    """
    check_dtype(dtype)
    check_onnx()
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}.")
    traced = TracedModel(static_model(model, budget), max_input_length(model.config))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".onnx") as folder:
        made = Path(folder) / "fp32.onnx"
        traced.write(made)
        if dtype != "fp32":
            made = convert_onnx(made, Path(folder) / "small.onnx", dtype)
            traced.check(OnnxGraph(made), dtype)
        os.replace(made, path)
    return path


def check_dtype(dtype: str) -> None:
    """Raises ValueError where it is none of a graph."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}.")


def check_onnx() -> None:
    """Raises ImportError where what makes ONNX graphs is not installed."""
    try:
        import onnxruntime.quantization  # type: ignore[import-untyped]  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError('ONNX needs other packages: pip install "hf-budgetformer[onnx]".') from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and the runtimes tell of their progress, and of packages and steps that are not needed."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.WARNING)
            yield
        finally:
            logging.disable(before)


def convert_onnx(source: Path, target: Path, dtype: str) -> Path:
    """Writes a float32 graph in "fp16" or "int8"; inputs and outputs stay as they are."""
    with quiet():
        if dtype == "int8":
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(source, target, **INT8)
        else:
            import onnx
            from onnxruntime.transformers.float16 import (  # type: ignore[import-untyped]
                convert_float_to_float16,
            )

            onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)
    return target


def quantize_openvino(source: Path, inputs: Sequence[Mapping[str, Any]]) -> Any:
    """An OpenVINO model with weights and activations in int8, by NNCF.

    Args:
        source: Of an ONNX file in float32.
        inputs: Batches that ranges are taken from, arrays (B, L) by name; of these the graph's own inputs are read.
            NNCF keeps all that it has seen inside the model, so they are to be few.

    Raises:
        ImportError: OpenVINO or NNCF is not installed.
    """
    try:
        with unreported():
            import nncf  # type: ignore[import-untyped]
            import openvino  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError('int8 in OpenVINO needs packages: pip install "hf-budgetformer[rivals]".') from None
    # Half the range of int8, or sums overflow on processors without VNNI; onnxruntime's `reduce_range`.
    advanced = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    with quiet():
        graph = openvino.Core().read_model(source)
        names = [given.any_name for given in graph.inputs]
        return nncf.quantize(
            graph,
            nncf.Dataset([{name: batch[name] for name in names} for batch in inputs]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(inputs),
            advanced_parameters=advanced,
        )


def write_openvino(source: Path, target: Path, dtype: str, inputs: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes a float32 ONNX graph as an OpenVINO xml file, its weights beside it; arguments as `quantize_openvino`."""
    with unreported():
        import openvino
    graph = quantize_openvino(source, inputs) if dtype == "int8" else openvino.Core().read_model(source)
    openvino.save_model(graph, target, compress_to_fp16=dtype == "fp16")


__all__ = [
    "INT8",
    "TracedModel",
    "check_dtype",
    "check_onnx",
    "convert_onnx",
    "export_onnx",
    "quantize_openvino",
    "quiet",
    "static_model",
    "write_openvino",
]
