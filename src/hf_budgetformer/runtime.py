"""Answers of exported looks, without torch or transformers: numpy, tokenizers, and onnxruntime or OpenVINO.

What is read here, `budgetformer export CHECKPOINT FOLDER` writes.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer


VERSION = 1
RUNTIMES = ("onnx", "openvino")
DTYPES = ("fp32", "fp16", "int8")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LOOKS_FILE = "looks.json"
TOKENIZER_FILE = "tokenizer.json"
_PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")


class ExportError(ValueError):
    """An exported folder that cannot be used; names the file that is at fault."""


@dataclass(frozen=True)
class Looks:
    """What `looks.json` holds: all that is needed beside the graphs and the tokenizer.

    Attributes:
        runtime: "onnx" or "openvino".
        dtype: Of the weights: "fp32", "fp16" or "int8".
        graphs: Names of the files of the looks, in the folder named after the runtime.
        costs: What each look costs, shares of the full model's work, (0, 1].
        thresholds: After each look but the last: answers whose confidence is below it are doubted.
        agreement: Of each look, the share of the calibration rows that it labels as it does in float32; None: there
            were no such rows.
        promise: As in `BudgetFormerConfig.promise`, of these graphs; None: nothing is promised.
        problem_type: As in a configuration.
        labels: Their names.
        max_length: Tokens kept of a text.
        truncation_side: Where longer ones are cut.
        inputs: What the tokenizer gives, of `INPUTS`; token types that it does not give are zero.
        pad_token_id: Of the tokenizer.
        sha256: Of `tokenizer.json` and the graphs' files, by their paths in the exported folder.
        version: Of this list of fields.
    """

    runtime: str
    dtype: str
    graphs: list[str]
    costs: list[float]
    thresholds: list[float]
    agreement: list[float] | None
    promise: dict[str, Any] | None
    problem_type: str | None
    labels: list[str]
    max_length: int
    truncation_side: str
    inputs: list[str]
    pad_token_id: int
    sha256: dict[str, str]
    version: int = VERSION

    @property
    def chooses_label(self) -> bool:
        """Whether an answer is one label of several."""
        return len(self.labels) > 1 and self.problem_type in (None, "single_label_classification")

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value <= 1.0


def _all(value: Any, accepts: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(map(accepts, value))


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*\.(onnx|xml)", value) is not None


# For each field of `looks.json`, what it must be, in words and as a check.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": (f"{VERSION}", lambda x: _is_count(x) and x == VERSION),
    "runtime": (f"one of {RUNTIMES}", lambda x: x in RUNTIMES),
    "dtype": (f"one of {DTYPES}", lambda x: x in DTYPES),
    "graphs": ("names of files, at least one", lambda x: _all(x, _is_file_name, 1)),
    "costs": ("a number in [0, 1] for each graph", lambda x: _all(x, _is_share, 1)),
    "thresholds": ("a number in [0, 1] for each graph but the last", lambda x: _all(x, _is_share)),
    "agreement": ("null, or a number in [0, 1] for each graph", lambda x: x is None or _all(x, _is_share)),
    "promise": ("null or an object", lambda x: x is None or isinstance(x, dict)),
    "problem_type": (f"one of {_PROBLEM_TYPES}", lambda x: x in _PROBLEM_TYPES),
    "labels": ("names, at least one", lambda x: _all(x, lambda name: isinstance(name, str), 1)),
    "max_length": ("an integer >= 1", lambda x: _is_count(x, 1)),
    "truncation_side": ("'left' or 'right'", lambda x: x in ("left", "right")),
    "inputs": (f"of {INPUTS}, input_ids at least", lambda x: _all(x, INPUTS.__contains__) and "input_ids" in x),
    "pad_token_id": ("an integer >= 0", _is_count),
    "sha256": (
        "an object of file names and digests",
        lambda x: isinstance(x, dict) and all(isinstance(digest, str) for digest in x.values()),
    ),
}


def read_looks(path: str | Path) -> Looks:
    """Reads `looks.json`.

    Raises:
        ExportError: It cannot be read, or does not hold what it must.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: looks cannot be read ({error}): export them again.") from None
    if not isinstance(values, dict):
        raise ExportError(f"{path}: must hold an object, got {type(values).__name__}.")
    names = [field.name for field in fields(Looks)]
    if differing := sorted(set(names) ^ values.keys()):
        raise ExportError(f"{path}: must hold {names}; missing or unknown are {differing}.")
    for name, (allowed, accepts) in _ALLOWED.items():
        if not accepts(values[name]):
            raise ExportError(f"{path}: {name} must be {allowed}, got {values[name]!r:.200}.")
    looks = Looks(**values)
    count = len(looks.graphs)
    if len(looks.costs) != count or len(looks.thresholds) != count - 1:
        raise ExportError(
            f"{path}: {count} graphs need {count} costs and {count - 1} thresholds, got {len(looks.costs)} and "
            f"{len(looks.thresholds)}."
        )
    if looks.agreement is not None and len(looks.agreement) != count:
        raise ExportError(f"{path}: agreement must hold a number for each graph, got {len(looks.agreement)}.")
    if count > 1 and (len(looks.labels) == 1 or looks.problem_type == "regression"):
        raise ExportError(f"{path}: graphs must be one where answers cannot be doubted, got {count}.")
    return looks


def file_digest(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def graph_files(name: str) -> list[str]:
    """Names of a graph's files: OpenVINO keeps the weights beside it."""
    return [name, f"{name.removesuffix('.xml')}.bin"] if name.endswith(".xml") else [name]


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Keeps OpenVINO and NNCF from reporting their use to their makers, which they read at import whether to do."""
    before = {name: os.environ.get(name) for name in ("CI", "NNCF_CI")}
    os.environ.update(dict.fromkeys(before, "true"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class OnnxGraph:
    """A graph in onnxruntime.

    Args:
        path: Of the file.
        threads: That it may use; None: as many as there are cores.
        providers: Of onnxruntime, the preferred one first.

    Attributes:
        names: Of its inputs.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("These graphs need onnxruntime: pip install onnxruntime.") from None
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        # Or idle threads of one graph would take the processor from another.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        self.names = [given.name for given in self.session.get_inputs()]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Inputs (B, L) int64 by name -> logits (B, num_labels) float32."""
        [logits] = self.session.run(["logits"], {name: inputs[name] for name in self.names})
        answers: np.ndarray = logits
        return answers


class OpenVINOGraph:
    """A graph in OpenVINO, on the CPU.

    Args:
        graph: Path of an xml or onnx file, or an OpenVINO model.
        threads: That it may use; None: as many as there are cores.

    Attributes:
        names: Of its inputs.

    Raises:
        ImportError: OpenVINO is not installed.
    """

    def __init__(self, graph: Any, threads: int | None = None) -> None:
        try:
            with unreported():
                import openvino  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("These graphs need OpenVINO: pip install openvino.") from None
        core = openvino.Core()
        if isinstance(graph, str | Path):
            graph = core.read_model(graph)
        # float32 is meant: where the processor has bfloat16, OpenVINO would take that unasked.
        settings: dict[str, Any] = {"NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.names = [given.any_name for given in graph.inputs]
        self.request = core.compile_model(graph, "CPU", settings).create_infer_request()
        self.lock = threading.Lock()  # a request answers one caller at a time

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Inputs (B, L) int64 by name -> logits (B, num_labels) float32."""
        with self.lock:
            logits = self.request.infer({name: inputs[name] for name in self.names})[0]
            copied: np.ndarray = logits.copy()  # the request writes its next answer there
        return copied


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(-np.logaddexp(np.float32(0.0), -logits))
    return shares


def confidence(logits: np.ndarray, problem_type: str | None) -> np.ndarray:
    """How sure an answer is, in [0, 1]: (B, num_labels) float32 -> (B,) float32, as `budgets.confidence`."""
    if problem_type == "multi_label_classification":
        distances: np.ndarray = np.abs(2.0 * _sigmoid(logits) - 1.0).min(-1)
        return distances
    best = np.partition(_softmax(logits), -2, axis=-1)[..., -2:]
    margins: np.ndarray = best[..., 1] - best[..., 0]
    return margins


class Seen(NamedTuple):
    """What one look made of a batch.

    Args:
        logits: (B, num_labels), float32.
        doubted: (B,), bool: whether the next look is to answer.
    """

    logits: np.ndarray
    doubted: np.ndarray


class Answers(NamedTuple):
    """Answers to N texts, in their order.

    Args:
        labels: (N,), names of the labels; of several labels (N, num_labels), bool, whether each is on; None of a
            regression.
        scores: (N,), float32, probability of the label; of several labels (N, num_labels), probability of each; of a
            regression (N, num_labels), the values.
        spent: (N,), float32, share of the full model's work, all looks together.
        logits: (N, num_labels), float32, of the look that answered.
    """

    labels: np.ndarray | None
    scores: np.ndarray
    spent: np.ndarray
    logits: np.ndarray


class LooksClassifier:
    """A classifier from an exported folder: cheap looks first, the full model for the texts that they doubt.

    Use one of its two kinds, `OnnxClassifier` and `OpenVINOClassifier`. It may be called from several threads.

    ```python
    classifier = OnnxClassifier("folder")
    labels, scores, spent, logits = classifier(["a gripping film", "a film"])
    ```

    Args:
        folder: As `budgetformer export` writes it.
        threads: That a graph may use; None: as many as there are cores.

    Attributes:
        looks: What the export says of itself, its promise too.

    Raises:
        ExportError: A file is missing, or is not as it was exported.
        ImportError: The runtime is not installed.
    """

    runtime = ""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        folder = Path(folder)
        path = folder / self.runtime / LOOKS_FILE
        self.looks = read_looks(path)
        if self.looks.runtime != self.runtime:
            raise ExportError(f"{path}: runtime must be {self.runtime!r} here, got {self.looks.runtime!r}.")
        self.tokenizer = self._load_tokenizer(folder)
        self.graphs = [self._load_graph(folder, name, threads) for name in self.looks.graphs]
        self.folder = folder / self.runtime
        for number in range(len(self.graphs)):
            self._ask(number, self.pad(self.encode([""])))  # what cannot answer is known now

    def _load_tokenizer(self, folder: Path) -> Tokenizer:
        path = self._checked_file(folder, TOKENIZER_FILE)
        try:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            side = self.looks.truncation_side
            tokenizer.enable_truncation(self.looks.max_length, strategy="longest_first", direction=side)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ExportError(f"{path}: the tokenizer cannot be read ({error}).") from None
        return tokenizer

    def _load_graph(self, folder: Path, name: str, threads: int | None) -> Any:
        for part in graph_files(name):
            self._checked_file(folder, f"{self.runtime}/{part}")
        path = folder / self.runtime / name
        try:
            graph = self.make_graph(path, threads)
        except ImportError:
            raise
        except Exception as error:  # each runtime has its own errors
            raise ExportError(f"{path}: the graph cannot be read ({error}).") from None
        return graph

    def _checked_file(self, folder: Path, name: str) -> Path:
        path = folder / name
        try:
            digest = file_digest(path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be read ({error}): export again.") from None
        if digest != self.looks.sha256.get(name):
            raise ExportError(f"{path}: is not the file that {LOOKS_FILE} was written for: export again.")
        return path

    def make_graph(self, path: Path, threads: int | None) -> Any:
        """Loads a graph."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> list[Encoding]:
        """Texts as token ids, cut, without padding; arguments as of a call."""
        for name, values in (("texts", texts), ("text_pairs", text_pairs)):
            if isinstance(values, str) or not all(isinstance(text, str) for text in values or ()):
                raise ValueError(f"{name} must be a list of strings, got {values!r:.100}.")
        if text_pairs is None:
            return self.tokenizer.encode_batch(list(texts))
        if len(text_pairs) != len(texts):
            raise ValueError(f"text_pairs must be as many as texts, {len(texts)}, got {len(text_pairs)}.")
        return self.tokenizer.encode_batch(list(zip(texts, text_pairs, strict=True)))

    def pad(self, rows: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """Rows as a batch, padded on the right: by name (B, L) int64."""
        shape = (len(rows), max([1, *map(len, rows)]))
        batch = {name: np.zeros(shape, np.int64) for name in INPUTS}
        batch["input_ids"].fill(self.looks.pad_token_id)
        for place, row in enumerate(rows):
            batch["input_ids"][place, : len(row)] = row.ids
            batch["attention_mask"][place, : len(row)] = 1
            if "token_type_ids" in self.looks.inputs:
                batch["token_type_ids"][place, : len(row)] = row.type_ids
        return batch

    def take_look(self, number: int, rows: Sequence[Encoding]) -> Seen:
        """One look, from 0, at a batch of rows as `encode` gives them."""
        logits = self._ask(number, self.pad(rows))
        if number == len(self.graphs) - 1:
            return Seen(logits, np.zeros(len(rows), bool))
        sure = confidence(logits, self.looks.problem_type) >= np.float32(self.looks.thresholds[number])
        return Seen(logits, ~sure)

    def _ask(self, number: int, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        path, shape = self.folder / self.looks.graphs[number], batch["input_ids"].shape
        try:
            logits = self.graphs[number](batch)
        except Exception as error:  # each runtime has its own errors
            raise ExportError(f"{path}: the graph cannot answer a batch of {shape} tokens ({error}).") from None
        expected = (shape[0], len(self.looks.labels))
        if logits.shape != expected:
            raise ExportError(f"{path}: must give logits of {expected}, got {logits.shape}.")
        return logits

    def make_answers(self, logits: np.ndarray, spent: np.ndarray) -> Answers:
        """Final logits (N, num_labels) and what was spent (N,) as answers."""
        if self.looks.chooses_label:
            shares = _softmax(logits)
            return Answers(np.array(self.looks.labels)[logits.argmax(-1)], shares.max(-1), spent, logits)
        if self.looks.problem_type == "multi_label_classification":
            return Answers(logits > 0, _sigmoid(logits), spent, logits)
        return Answers(None, logits, spent, logits)

    def __call__(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None, batch_size: int = 32) -> Answers:
        """Answers texts; each look is at all that are left, before the next one begins.

        Args:
            texts: N of them.
            text_pairs: The second of each pair of texts; None: there are no pairs.
            batch_size: Texts of a batch, >= 1; batches are of like length.

        Raises:
            ValueError: An argument is not allowed.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}.")
        rows = self.encode(texts, text_pairs)
        logits = np.zeros((len(rows), len(self.looks.labels)), np.float32)
        spent = np.zeros(len(rows), np.float32)
        left = np.arange(len(rows))
        for number, cost in enumerate(self.looks.costs):
            doubted = [left[:0]]
            for places in places_by_length(rows, left, batch_size):
                seen = self.take_look(number, [rows[place] for place in places])
                logits[places] = seen.logits
                spent[places] += np.float32(cost)
                doubted.append(places[seen.doubted])
            left = np.concatenate(doubted)
        return self.make_answers(logits, spent)


def places_by_length(rows: Sequence[Encoding], places: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Those `places` (n,) of rows in batches of like length, shortest first."""
    lengths = np.array([len(rows[place]) for place in places], int)
    order = places[np.argsort(lengths, kind="stable")]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class OnnxClassifier(LooksClassifier):
    """Exported looks in onnxruntime.

    Args:
        folder: As in `LooksClassifier`.
        threads: As in `LooksClassifier`.
        providers: Of onnxruntime, the preferred one first.

    Raises:
        ExportError: As in `LooksClassifier`.
        ImportError: onnxruntime is not installed.
    """

    runtime = "onnx"

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.providers = providers
        super().__init__(folder, threads)

    def make_graph(self, path: Path, threads: int | None) -> OnnxGraph:
        """Loads a graph."""
        return OnnxGraph(path, threads, self.providers)


class OpenVINOClassifier(LooksClassifier):
    """Exported looks in OpenVINO, on the CPU."""

    runtime = "openvino"

    def make_graph(self, path: Path, threads: int | None) -> OpenVINOGraph:
        """Loads a graph."""
        return OpenVINOGraph(path, threads)


class Answer(NamedTuple):
    """The answer to one text: one row of `Answers`."""

    label: Any
    score: Any
    spent: float


@dataclass
class _Pending:
    """A text that is not answered yet, what it has cost, and when a look doubted it last."""

    row: Encoding
    future: "Future[Answer]"
    spent: Any = 0.0  # as a float32, once a look has been taken
    since: float = 0.0


class AnswerQueue:
    """Answers texts that come one by one, from any thread, in batches.

    A batch is what waits when the one before it is done. Texts that a look doubts wait for others, of batches to come
    too, until they fill a batch of the next look: while new texts wait, and no longer than `max_wait_ms`.

    ```python
    with AnswerQueue(OnnxClassifier("folder")) as queue:
        print(queue.submit("a gripping film").result().label)
    ```

    Args:
        classifier: What answers.
        batch_size: Most texts of a batch, >= 1.
        max_wait_ms: How long a doubted text waits for others, in milliseconds, >= 0.

    Raises:
        ValueError: An argument is not allowed.
    """

    def __init__(self, classifier: LooksClassifier, batch_size: int = 32, max_wait_ms: float = 10.0) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}.")
        if not max_wait_ms >= 0:
            raise ValueError(f"max_wait_ms must be a number >= 0, got {max_wait_ms!r}.")
        self.classifier, self.batch_size, self.max_wait = classifier, batch_size, max_wait_ms / 1e3
        self.waiting: list[deque[_Pending]] = [deque() for _ in classifier.graphs]  # for each look
        self.changed = threading.Condition()
        self.closed = False
        self.worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self.worker.start()

    def submit(self, text: str, text_pair: str | None = None) -> "Future[Answer]":
        """Asks for an answer; `asyncio.wrap_future` makes one to await of what comes back.

        Raises:
            ValueError: A text is no string.
            RuntimeError: The queue is closed.
        """
        [row] = self.classifier.encode([text], None if text_pair is None else [text_pair])
        pending = _Pending(row, Future())
        with self.changed:
            if self.closed:
                raise RuntimeError("the queue is closed, and takes no more texts.")
            self.waiting[0].append(pending)
            self.changed.notify()
        return pending.future

    def close(self) -> None:
        """Answers what was asked, then ends."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.worker.join()

    def __enter__(self) -> "AnswerQueue":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or any(self.waiting))
                if not any(self.waiting):
                    return
                number = self._next_look()
                queue = self.waiting[number]
                batch = [queue.popleft() for _ in range(min(self.batch_size, len(queue)))]
            if number == 0:
                batch = [pending for pending in batch if pending.future.set_running_or_notify_cancel()]
            if batch:
                self._look(number, batch)

    def _next_look(self) -> int:
        """Which look comes next: a later one that is full or overdue, or else the first that texts wait for."""
        overdue = time.monotonic() - self.max_wait
        for number in reversed(range(1, len(self.waiting))):
            queue = self.waiting[number]
            if len(queue) >= self.batch_size or (queue and queue[0].since <= overdue):
                return number
        return next(number for number, queue in enumerate(self.waiting) if queue)

    def _look(self, number: int, batch: list[_Pending]) -> None:
        try:
            seen = self.classifier.take_look(number, [pending.row for pending in batch])
        except Exception as error:  # whoever asked is told, and the queue goes on
            for pending in batch:
                pending.future.set_exception(error)
            return
        cost, now = np.float32(self.classifier.looks.costs[number]), time.monotonic()
        for pending in batch:
            pending.spent, pending.since = np.float32(pending.spent) + cost, now
        spent = np.array([pending.spent for pending in batch])
        answers = self.classifier.make_answers(seen.logits, spent)
        for place, pending in enumerate(batch):
            if not seen.doubted[place]:
                label = None if answers.labels is None else answers.labels[place]
                pending.future.set_result(Answer(label, answers.scores[place], float(pending.spent)))
        if seen.doubted.any():
            self.waiting[number + 1].extend(batch[place] for place in np.flatnonzero(seen.doubted))


__all__ = [
    "Answer",
    "AnswerQueue",
    "Answers",
    "ExportError",
    "Looks",
    "LooksClassifier",
    "OnnxClassifier",
    "OnnxGraph",
    "OpenVINOClassifier",
    "OpenVINOGraph",
    "Seen",
    "confidence",
    "read_looks",
]
