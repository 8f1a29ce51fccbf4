"""The looks of a plain call as a folder of graphs, for `hf_budgetformer.runtime` and other readers of `onnx/`."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Encoding
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..backbones import max_input_length
from ..budgets import first_look_budget, has_confidence
from ..runtime import (
    INPUTS,
    LOOKS_FILE,
    RUNTIMES,
    TOKENIZER_FILE,
    ExportError,
    Looks,
    LooksClassifier,
    OnnxClassifier,
    OnnxGraph,
    OpenVINOClassifier,
    confidence,
    file_digest,
    graph_files,
    places_by_length,
    read_looks,
    unreported,
)
from .checkpoints import check_classifier
from .export import TracedModel, check_dtype, check_onnx, convert_onnx, static_model, write_openvino
from .looking import plan_call
from .narrowing import stock_model
from .results import write_json
from .tables import label_ids
from .tuning import FirstLook, decisions, find_losses, kept_promise, tune_looks


if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

# Names of files that Optimum and others look for.
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
_FULL_NAMES = {"onnx": "model", "openvino": "openvino_model"}
_TAKEN = "model.onnx"
_ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
_CLASSIFIERS: dict[str, type[LooksClassifier]] = {"onnx": OnnxClassifier, "openvino": OpenVINOClassifier}
# Rows that NNCF takes ranges from: more take long, much memory, and change little.
_RANGE_ROWS = 32
_RANGE_BATCH_SIZE = 4
_BATCH_SIZE = 32
_DEFAULT_PROMISE: dict[str, Any] = {"risk": "disagreement", "level": 0.01, "confidence": 0.95}


@dataclass(frozen=True)
class LooksExport:
    """The answer of `export_looks`.

    Attributes:
        folder: Where everything is.
        looks: As written to `looks.json`.
        taken: Whether the full model's graph was there already, and stayed.
    """

    folder: Path
    looks: Looks
    taken: bool

    def __str__(self) -> str:
        looks = self.looks
        lines = [f"Saved in {self.folder / looks.runtime}:"]
        for number, (graph, cost) in enumerate(zip(looks.graphs, looks.costs, strict=True)):
            line = f"{graph}: {cost:.3f} of the work"
            if number < len(looks.thresholds):
                line += f", doubted below {looks.thresholds[number]:.5g}"
            if looks.agreement is not None:
                line += f"; {looks.agreement[number]:.1%} of the calibration labelled as in float32"
            lines.append(line + ("; it was there already." if self.taken and graph == _TAKEN else "."))
        return "\n".join(lines)


def export_looks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    runtime: str = "onnx",
    dtype: str = "fp32",
    calibration: "Dataset | None" = None,
    max_length: int | None = None,
) -> LooksExport:
    """Writes a graph for each look of a plain call, tokenizer, thresholds and promise: what `runtime.py` serves.

    Graphs are in `folder`/onnx or `folder`/openvino, under the names that Optimum uses: the full model is `model.onnx`,
    `model_fp16.onnx` or `model_quantized.onnx`, and the narrow encoder's looks, cut to their budgets, stand beside it.
    A `model.onnx` of another exporter is taken as it is if it answers as the full model does.

    Graphs in float32 are checked against the model. Others answer otherwise, and what is promised of the model does not
    hold for them: with `calibration`, thresholds are calibrated anew on the graphs as they are written, so that their
    answers keep the promise (`config.promise`, or 1% disagreement) towards the full model in float32.

    Args:
        model: A BudgetFormer classifier with a full encoder, `router="look"`.
        tokenizer: Of the model, a fast one.
        folder: Made as needed. `looks.json` is written last; what was cut off does not load.
        runtime: "onnx" or "openvino".
        dtype: Of the weights, "fp32", "fp16" or "int8": onnxruntime's dynamic quantisation, or NNCF's, which takes
            ranges from 32 of the calibration's rows; the others calibrate the thresholds. Where the full model in int8
            breaks the promise by itself, it stays in float32.
        calibration: Rows like those to come, as in `tuning.tune`; labels are needed for a tolerance only.
        max_length: Tokens kept of a text. None: all the tokenizer allows.

    Raises:
        ValueError: An argument is not allowed, the folder holds other things, or rows are too few for the promise.
        OSError: A file cannot be written.
        RuntimeError: A graph in float32 does not answer as the model does.
        ImportError: A package is missing.
    """
    ours: Any = model
    _check_arguments(ours, tokenizer, runtime, dtype, calibration, max_length)
    folder = Path(folder)
    looks = _describe(ours, tokenizer, max_length)
    _check_looks(looks, ours.config, dtype, calibration is not None)
    names = _graph_names(looks.costs, runtime, dtype)
    _check_folder(folder, ours.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(folder) as made:
        there = folder / "onnx" / _TAKEN if runtime == "onnx" else None
        traced, taken = _write_float32(ours, tokenizer, looks, made, there)
        reference = OnnxClassifier(made, torch.get_num_threads())
        rows = [] if calibration is None else _encode(reference, calibration)
        of_ranges = np.arange(0)
        if (runtime, dtype) == ("openvino", "int8"):
            of_ranges = np.linspace(0, len(rows) - 1, min(_RANGE_ROWS, (len(rows) + 1) // 2)).astype(int)
        graphs: LooksClassifier = reference
        if (runtime, dtype) != ("onnx", "fp32"):
            graphs = _convert(reference, made, runtime, dtype, names, [rows[row] for row in of_ranges])
            for of_look, graph in zip(traced, graphs.graphs, strict=True):
                of_look.check(graph, dtype)
        looks = graphs.looks
        if calibration is not None:
            places = np.setdiff1d(np.arange(len(rows)), of_ranges)
            looks = _calibrate(reference, graphs, rows, places, ours.config, calibration, made)
        _move(made, folder, looks)
    return LooksExport(folder, looks, taken)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder beside this one, of one name, so that what a killed export left there goes with the next."""
    folder = folder.resolve()  # which may be "."
    place = folder.with_name(f".{folder.name}.export")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _check_arguments(
    model: Any, tokenizer: Any, runtime: str, dtype: str, calibration: Any, max_length: int | None
) -> None:
    check_classifier(model)
    if model.narrow is None or not model.config.full_encoder:
        raise ValueError("model must have a narrow encoder beside a full one, for looks: export others as one file.")
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {list(RUNTIMES)}, got {runtime!r}.")
    check_dtype(dtype)
    if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer must be a fast one with a pad token, got {type(tokenizer).__name__}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be None or an integer >= 1, got {max_length}.")
    if (runtime, dtype) == ("openvino", "int8") and calibration is None:
        raise ValueError("calibration must be given with int8 in OpenVINO, which takes ranges from it, got None.")
    if calibration is not None and not (len(calibration) and "text" in calibration.column_names):
        got = f"{len(calibration)} rows of {calibration.column_names}"
        raise ValueError(f"calibration must have rows, and a column 'text', got {got}.")
    check_onnx()
    if runtime == "openvino":
        try:
            with unreported():
                import openvino  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            raise ImportError('OpenVINO needs packages: pip install "hf-budgetformer[rivals]".') from None


def _check_looks(looks: Looks, config: Any, dtype: str, calibrated: bool) -> None:
    """Raises ValueError where thresholds are needed that cannot be found."""
    if len(looks.costs) == 1:
        return
    if dtype == "int8" and not calibrated:
        raise ValueError("calibration must be given with int8, whose looks need thresholds of their own, got None.")
    if calibrated and (len(looks.costs) > 2 or looks.costs[-1] < 1.0):
        raise ValueError(
            f"config.looks must be a first look and 1.0 for a threshold to be calibrated, got {config.looks}."
        )


def _check_folder(folder: Path, config: Any) -> None:
    """Raises OSError or ValueError where it is none, or of another model."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be one, got the file {folder}.")
    path = folder / "config.json"
    if path.is_file():
        kind = json.loads(path.read_text("utf-8")).get("model_type")
        if kind != config.backbone_model_type:
            raise ValueError(
                f"folder must be a new one, or one of a {config.backbone_model_type} model, got {folder} with a "
                f"config.json of type {kind!r}."
            )


def _check_replaceable(folder: Path, looks: Looks) -> None:
    """Raises ValueError where a graph would be written over that is neither this one nor of an earlier export."""
    try:
        before = read_looks(folder / looks.runtime / LOOKS_FILE).sha256
    except ExportError:
        before = {}
    for name, digest in looks.sha256.items():
        path = folder / name
        ours = path.name.startswith("look_") or path.name == TOKENIZER_FILE
        if not ours and path.is_file() and file_digest(path) not in (digest, before.get(name)):
            raise ValueError(
                f"folder must not hold graphs of other exporters that answer otherwise, got {path}: remove it, or name "
                "another folder."
            )


def _describe(model: Any, tokenizer: Any, max_length: int | None) -> Looks:
    """The looks in float32, in onnxruntime, without digests."""
    config = model.config
    plan = plan_call(model, None)
    costs = [look.cost for look in plan.looks]
    longest = min(tokenizer.model_max_length, max_input_length(config))
    return Looks(
        runtime="onnx",
        dtype="fp32",
        graphs=_graph_names(costs, "onnx", "fp32"),
        costs=costs,
        thresholds=list(plan.thresholds),
        agreement=None,
        promise=kept_promise(config),
        problem_type=config.problem_type,
        labels=[config.id2label[number] for number in range(config.num_labels)],
        max_length=longest if max_length is None else min(longest, max_length),
        truncation_side=tokenizer.truncation_side,
        inputs=[name for name in INPUTS if name in tokenizer.model_input_names],
        pad_token_id=tokenizer.pad_token_id,
        sha256={},
    )


def _graph_names(costs: Sequence[float], runtime: str, dtype: str) -> list[str]:
    names = [_FULL_NAMES[runtime] if cost == 1.0 else f"look_{number}" for number, cost in enumerate(costs, 1)]
    return [f"{name}{_SUFFIXES[dtype]}{_ENDINGS[runtime]}" for name in names]


def _graph_paths(runtime: str, graphs: Iterable[str]) -> list[str]:
    return [f"{runtime}/{part}" for name in graphs for part in graph_files(name)]


def _digests(folder: Path, runtime: str, graphs: Iterable[str]) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in (TOKENIZER_FILE, *_graph_paths(runtime, graphs))}


def _write_float32(
    model: Any, tokenizer: Any, looks: Looks, made: Path, there: Path | None
) -> tuple[list[TracedModel], bool]:
    """Writes tokenizer, configuration and graphs; takes the graph that is `there`, if it is the full model's.

    Returns:
        What was traced for each look, and whether that graph was taken.
    """
    config, longest = model.config, max_input_length(model.config)
    stock = stock_model(model)
    stock.config.architectures = [type(stock).__name__]
    stock.config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "onnx").mkdir()
    traced, taken = [], False
    budgets = config.looks or [first_look_budget(config), 1.0][-len(looks.costs) :]
    for budget, name in zip(budgets, looks.graphs, strict=True):
        path = made / "onnx" / name
        traced.append(TracedModel(static_model(model, float(budget)), longest))
        if there is not None and name == there.name and there.is_file():
            shutil.copyfile(there, path)
            taken = _answers_right(traced[-1], path)
        if not taken or budget < 1.0:
            traced[-1].write(path)
    write_json(made / "onnx" / LOOKS_FILE, replace(looks, sha256=_digests(made, "onnx", looks.graphs)).to_dict())
    return traced, taken


def _answers_right(traced: TracedModel, path: Path) -> bool:
    try:
        traced.check(OnnxGraph(path))
    except Exception:  # of inputs and outputs with other names, or a file that is no graph, too
        return False
    return True


def _encode(classifier: LooksClassifier, rows: "Dataset") -> list[Encoding]:
    columns = rows.with_format(None)[:]
    return classifier.encode(columns["text"], columns.get("text_pair"))


def _convert(
    reference: LooksClassifier, made: Path, runtime: str, dtype: str, names: Sequence[str], rows: Sequence[Encoding]
) -> LooksClassifier:
    """Writes the float32 graphs in another form; rows are those that ranges are taken from."""
    target = made / runtime
    target.mkdir(exist_ok=True)
    batches = [
        reference.pad([rows[place] for place in places])
        for places in places_by_length(rows, np.arange(len(rows)), _RANGE_BATCH_SIZE)
    ]
    for before, name in zip(reference.looks.graphs, names, strict=True):
        source = made / "onnx" / before
        if runtime == "onnx":
            convert_onnx(source, target / name, dtype)
        else:
            write_openvino(source, target / name, dtype, batches)
    looks = replace(
        reference.looks,
        runtime=runtime,
        dtype=dtype,
        graphs=list(names),
        promise=reference.looks.promise if dtype == "fp32" else None,
        sha256=_digests(made, runtime, names),
    )
    write_json(target / LOOKS_FILE, looks.to_dict())
    return _CLASSIFIERS[runtime](made, torch.get_num_threads())


def _ask(classifier: LooksClassifier, rows: Sequence[Encoding], places: np.ndarray) -> tuple[list[np.ndarray], Any]:
    """Logits of every look, (n, num_labels) each, of the rows in these places (n,); and the seconds each look took."""
    logits = [np.zeros((len(rows), len(classifier.looks.labels)), np.float32) for _ in classifier.graphs]
    seconds = []
    for number, scores in enumerate(logits):
        start = time.perf_counter()
        for some in places_by_length(rows, places, _BATCH_SIZE):
            scores[some] = classifier.take_look(number, [rows[place] for place in some]).logits
        seconds.append(time.perf_counter() - start)
    return [scores[places] for scores in logits], seconds


def _calibrate(
    reference: LooksClassifier,
    graphs: LooksClassifier,
    rows: Sequence[Encoding],
    places: np.ndarray,
    config: Any,
    calibration: "Dataset",
    made: Path,
) -> Looks:
    """The looks of these graphs, with a threshold that keeps the promise towards the full model in float32.

    Where the full model's own graph changes too many answers for that, or nothing is saved, its place is taken by the
    one in float32.

    Args:
        reference: The same looks in float32.
        graphs: As they are written.
        rows: Of the calibration.
        places: (n,), of those that count.
        config: Of the model.
        calibration: Where labels are, if the promise needs them.
        made: Folder of the graphs.
    """
    looks, kind = graphs.looks, config.problem_type
    if not has_confidence(config) or not len(places):
        return looks
    exact, _ = _ask(reference, rows, places)
    logits, seconds = (exact, [1.0, 1.0]) if graphs is reference else _ask(graphs, rows, places)
    answers, expected = ([decisions(logits, kind) for logits in x] for x in (logits, exact))
    same = [find_losses(answer, right) == 0 for answer, right in zip(answers, expected, strict=True)]
    agreement = [float(x.mean()) for x in same]
    looks = replace(looks, agreement=agreement)
    if len(looks.graphs) == 1:
        return looks
    promise = kept_promise(config) or _DEFAULT_PROMISE
    labels = label_ids(calibration, config)[places] if promise["risk"] == "tolerance" else None
    first = FirstLook(
        budget=first_look_budget(config),
        work=looks.costs[0],
        seconds=seconds[0] / seconds[1],
        confidence=confidence(logits[0], kind),
        losses=find_losses(answers[0], expected[1], labels),
        doubted_losses=find_losses(answers[1], expected[1], labels),
    )
    risk, level, sure = promise["risk"], promise["level"], promise["confidence"]
    if graphs is not reference:  # two full models may be tried, each at half the error
        sure = (1.0 + sure) / 2.0
    tuning = tune_looks([first], risk, level, sure)
    if tuning.looks == [1.0] and graphs is not reference:
        looks, agreement = _keep_full_model(looks, made), [agreement[0], 1.0]
        tuning = tune_looks([replace(first, doubted_losses=None)], risk, level, sure)
    kept = slice(1, 2) if tuning.looks == [1.0] else slice(0, len(tuning.looks))
    names = looks.graphs[kept]
    return replace(
        looks,
        graphs=names,
        costs=looks.costs[kept],
        thresholds=tuning.confidence or [],
        agreement=agreement[kept],
        promise={**tuning.promise, "confidence": promise["confidence"]},
        sha256={name: looks.sha256[name] for name in (TOKENIZER_FILE, *_graph_paths(looks.runtime, names))},
    )


def _keep_full_model(looks: Looks, made: Path) -> Looks:
    """The looks, the last of them in float32."""
    [name] = _graph_names([1.0], looks.runtime, "fp32")
    if looks.runtime == "openvino":
        write_openvino(made / "onnx" / "model.onnx", made / looks.runtime / name, "fp32")
    names = [*looks.graphs[:-1], name]
    return replace(looks, graphs=names, sha256=_digests(made, looks.runtime, names))


def _move(made: Path, folder: Path, looks: Looks) -> None:
    """Moves into the folder what `looks` needs, which is written last: without it, or with another, nothing loads."""
    _check_replaceable(folder, looks)
    files = [path.name for path in made.iterdir() if path.is_file()]
    if any(folder.glob("*.safetensors")):  # of the stock model, whose configuration it is
        files.remove("config.json")
    for name in {**dict.fromkeys(files), **looks.sha256}:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or file_digest(target) != file_digest(made / name):
            os.replace(made / name, target)
    write_json(folder / looks.runtime / LOOKS_FILE, looks.to_dict())


__all__ = ["LooksExport", "export_looks"]
