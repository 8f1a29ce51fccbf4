"""Documents longer than a model reads: cut to what it reads, or read in chunks whose answers are put together."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..budgets import confidence, problem_type
from .looking import Answers, answer_rows
from .tuning import FirstLook, TestedLooks, decisions, find_looks, find_losses


POOLINGS = ("mean", "max", "vote")
# Of probabilities, for logarithms; float32 tells it from 0.
_LEAST = 1e-6


class Chunks(NamedTuple):
    """Documents in chunks, the chunks of each one after the other.

    Args:
        rows: The chunks' columns, as `batching.tokenized` gives them.
        owners: (N,), int64, the document of each chunk, rising from 0; each has one at least.
    """

    rows: dict[str, list[Any]]
    owners: np.ndarray

    def select(self, places: np.ndarray) -> "Chunks":
        """The chunks at `places` (n,) int64, rising, alone; documents keep their numbers."""
        return Chunks({name: [values[x] for x in places] for name, values in self.rows.items()}, self.owners[places])

    def lengths(self) -> np.ndarray:
        """Tokens of each chunk, (N,) int64."""
        return np.array([len(ids) for ids in self.rows["input_ids"]])


def split_documents(
    columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, stride: int = 0
) -> Chunks:
    """Cuts documents into chunks, each with the special tokens, and of a pair with all of `text_pair`.

    Args:
        columns: `text` and, for pairs, `text_pair`, lists of equal length. `text` is what is cut.
        tokenizer: Of the model, a fast one.
        max_length: Tokens >= 1 of a chunk, all together. None: all the tokenizer allows.
        stride: Tokens >= 0 that a chunk shares with the one before.

    Raises:
        ValueError: An argument is not allowed, or a chunk has no room for text beside the pair, special tokens and
            `stride`.
    """
    check_chunks("mean", stride)
    texts, pairs = columns["text"], columns.get("text_pair")
    length = tokenizer.model_max_length if max_length is None else max_length
    longest_pair = 0 if pairs is None else max(map(len, tokenizer(pairs, add_special_tokens=False)["input_ids"]))
    room = length - longest_pair - tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if room <= stride:
        raise ValueError(
            f"max_length must leave more than stride={stride} tokens for text, got {length}, of which {max(0, room)} "
            "remain beside special tokens and text_pair."
        )
    encoded = tokenizer(
        texts,
        pairs,
        truncation=True if pairs is None else "only_first",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    rows = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    return Chunks(rows, np.array(encoded["overflow_to_sample_mapping"]))


def keep_ends(columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Token ids of the beginning and the end of documents, in equal parts, where they do not fit.

    Method: "head + tail" of Sun et al. 2019 (arXiv 1905.05583), which keeps a quarter of the beginning; halves here.

    Args:
        columns: As in `split_documents`.
        tokenizer: Of the model, a fast one.
        max_length: Tokens of a document, all together.
    """
    pairs = columns.get("text_pair")
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    texts = []
    plain = tokenizer(columns["text"], add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    beside = (
        [0] * len(columns["text"])
        if pairs is None
        else [len(ids) for ids in tokenizer(pairs, add_special_tokens=False)["input_ids"]]
    )
    for text, offsets, taken in zip(columns["text"], plain["offset_mapping"], beside, strict=True):
        room = max(2, max_length - special - taken)
        if len(offsets) > room:
            half = room // 2
            text = f"{text[: offsets[half - 1][1]]} {text[offsets[half - room][0] :]}"
        texts.append(text)
    encoded = tokenizer(texts, pairs, truncation=True if pairs is None else "only_first", max_length=max_length)
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}


def check_chunks(pooling: str | None, stride: int) -> None:
    """Raises ValueError where documents cannot be read that way; None: not in chunks."""
    if pooling is None and stride:
        raise ValueError(f"stride must be 0 without chunks, got {stride!r}.")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"chunks must be one of {list(POOLINGS)}, got {pooling!r}.")
    if not isinstance(stride, int) or stride < 0:
        raise ValueError(f"stride must be an integer >= 0, got {stride!r}.")


def pool_answers(logits: torch.Tensor, owners: np.ndarray, pooling: str, problem: str) -> torch.Tensor:
    """Answers to documents, by those to their chunks.

    Args:
        logits: Of N chunks, (N, num_labels), float32.
        owners: (N,), the document of each, integers that rise; numbers may be left out.
        pooling: "mean": of the chunks' probabilities. "max": what the surest chunk says; of several labels at once each
            by the chunk that shows it most. "vote": the share of the chunks that say so.
        problem: As in a configuration.

    Returns:
        (documents, num_labels), float32: logits whose probabilities are the document's. Of a regression the mean.

    Raises:
        ValueError: A regression is pooled by "max" or "vote".
    """
    check_chunks(pooling, 0)
    _, places, counts = np.unique(owners, return_inverse=True, return_counts=True)
    index = torch.from_numpy(places)

    def mean(values: torch.Tensor) -> torch.Tensor:
        sums = values.new_zeros(len(counts), values.shape[1]).index_add(0, index, values)
        return sums / torch.from_numpy(counts)[:, None].to(values.dtype)

    if problem == "regression":
        if pooling != "mean":
            raise ValueError(f"chunks must be 'mean' for a regression, got {pooling!r}.")
        return mean(logits)
    several = problem == "multi_label_classification"
    if pooling == "max" and several:
        lowest = torch.full((len(counts), logits.shape[1]), float("-inf"))
        return lowest.scatter_reduce(0, index[:, None].expand_as(logits), logits, "amax")
    if pooling == "max":
        sure = logits.softmax(-1).amax(-1).numpy()
        order = np.lexsort((-sure, places))  # by document, surest first
        return logits[torch.from_numpy(order[np.cumsum(counts) - counts])]
    if pooling == "vote":
        said = (logits > 0).float() if several else F.one_hot(logits.argmax(-1), logits.shape[1]).float()
    else:
        said = logits.sigmoid() if several else logits.softmax(-1)
    shares = mean(said).clamp(_LEAST, 1.0 - _LEAST)
    return shares.logit() if several else shares.log()


class DocumentLook(NamedTuple):
    """A look at documents.

    Args:
        chunks: How many chunks of each it reads, evenly spread, the first among them; None: all.
        budget: Share of the full model's work on each; None: a plain call, which looks again at chunks it doubts.
    """

    chunks: int | None
    budget: float | None


# From places of chunks (n,) int64 and a budget to logits (n, num_labels) and what was spent on each (n,), float32.
Ask = Callable[[np.ndarray, float | None], tuple[torch.Tensor, torch.Tensor]]


def answer_documents(
    model: Any,
    chunks: Chunks,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    budget: float | None = None,
    pooling: str = "mean",
    looks: Sequence[DocumentLook] | None = None,
    thresholds: Sequence[float] = (),
) -> Answers:
    """Answers documents by their chunks.

    Args:
        model: A classifier in eval mode, stock or BudgetFormer.
        chunks: Of the documents.
        tokenizer: Of the model.
        batch_size: Chunks at a time, >= 1.
        budget: Without `looks`: what is asked for on every chunk, as in `forward`, a float; None: a plain call, which
            looks again at chunks that it doubts: most need little.
        pooling: As in `pool_answers`.
        looks: At documents, see `look_through`.
        thresholds: As there.

    Returns:
        One for each document, in their order.

    Raises:
        ValueError: An argument is not allowed, or the model cannot spend a budget.
    """

    def ask(places: np.ndarray, budget: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        logits, spent = torch.zeros(len(places), model.config.num_labels), torch.zeros(len(places))
        for answers in answer_rows(model, chunks.select(places).rows, tokenizer, batch_size, budget):
            logits[answers.places], spent[answers.places] = answers.logits, answers.spent
        return logits, spent

    steps = [DocumentLook(None, budget)] if looks is None else looks
    return look_through(ask, chunks, steps, thresholds, pooling, problem_type(model.config))


def look_through(
    ask: Ask,
    chunks: Chunks,
    looks: Sequence[DocumentLook],
    thresholds: Sequence[float],
    pooling: str,
    problem: str,
) -> Answers:
    """Answers documents by looks that read more of them, or think harder about what they read.

    A chunk that was answered at a look's budget before is not asked about again.

    Args:
        ask: Who answers chunks.
        chunks: Of the documents.
        looks: At least one, each at the documents that the one before left in doubt.
        thresholds: Of confidence, in [0, 1], after each look but the last.
        pooling: As in `pool_answers`.
        problem: As in a configuration.

    Returns:
        One for each document, in their order; what was spent is the share of the full model's work on all of its
        tokens.

    Raises:
        ValueError: An argument is not allowed.
    """
    check_chunks(pooling, 0)
    if not looks or len(thresholds) != len(looks) - 1:
        raise ValueError(
            f"thresholds must hold one number less than looks, of which there must be one, got {len(thresholds)} and "
            f"{len(looks)}."
        )
    for look in looks:
        if look.chunks is not None and look.chunks < 1:
            raise ValueError(f"looks must read at least one chunk, got {look.chunks}.")
    owners, lengths = chunks.owners, chunks.lengths()
    count = int(owners[-1]) + 1
    left, work, answers = np.arange(count), np.zeros(count), torch.zeros(0)
    known: dict[float | None, torch.Tensor] = {}
    seen: dict[float | None, np.ndarray] = {}
    for number, look in enumerate(looks):
        places = _spread(owners, left, look.chunks)
        before = seen.setdefault(look.budget, np.zeros(len(owners), dtype=bool))
        new = places[~before[places]]
        if len(new):
            logits, spent = ask(new, look.budget)
            np.add.at(work, owners[new], spent.numpy() * lengths[new])
            all_known = known.setdefault(look.budget, logits.new_zeros(len(owners), logits.shape[1]))
            all_known[new] = logits
            before[new] = True
        pooled = pool_answers(known[look.budget][places], owners[places], pooling, problem)
        if number == 0:
            answers = pooled.clone()
        answers[left] = pooled
        if number < len(thresholds):
            left = left[(confidence(pooled, problem) < thresholds[number]).numpy()]
            if not len(left):
                break
    whole = np.bincount(owners, lengths, count)
    return Answers(np.arange(count), answers, torch.from_numpy((work / whole).astype(np.float32)))


def tune_documents(
    model: Any,
    chunks: Chunks,
    tokenizer: PreTrainedTokenizerBase,
    first_looks: Sequence[DocumentLook],
    disagreement: float = 0.01,
    confidence_level: float = 0.95,
    batch_size: int = 32,
    pooling: str = "mean",
) -> list[TestedLooks]:
    """For each first look the cheapest threshold that keeps a promise: as `tuning.tune` does, of whole documents.

    The second look is the full model's at all chunks, `DocumentLook(None, 1.0)`.

    Args:
        model: A BudgetFormer classifier in eval mode.
        chunks: Of documents like those to come; no labels are needed.
        tokenizer: Of the model.
        first_looks: To choose from, at least one.
        disagreement: Share in (0, 1) of the documents that may be answered otherwise than by the second look.
        confidence_level: Of the promise, in (0, 1).
        batch_size: Chunks at a time, >= 1.
        pooling: As in `pool_answers`.

    Returns:
        One for each first look, in their order; `budget` is the share of the work on all chunks that it took.

    Raises:
        ValueError: An argument is not allowed, or documents are too few for the promise; says how many it takes.
    """
    problem = problem_type(model.config)

    def ask(look: DocumentLook) -> tuple[Answers, float]:
        start = time.perf_counter()
        answers = answer_documents(model, chunks, tokenizer, batch_size, pooling=pooling, looks=[look])
        return answers, time.perf_counter() - start

    full, whole = ask(DocumentLook(None, 1.0))
    expected = decisions(full.logits, problem).numpy()
    tried = []
    for look in first_looks:
        answers, seconds = ask(look)
        losses = find_losses(decisions(answers.logits, problem).numpy(), expected)
        sure, work = confidence(answers.logits, problem).numpy(), float(answers.spent.mean())
        tried.append(FirstLook(work, work, seconds / whole, sure, losses))
    return find_looks(tried, "disagreement", disagreement, confidence_level)


def _spread(owners: np.ndarray, documents: np.ndarray, most: int | None) -> np.ndarray:
    """Places of at most so many chunks of each of these documents, evenly spread, rising."""
    if most is None:
        return np.flatnonzero(np.isin(owners, documents))
    starts = np.searchsorted(owners, documents)
    ends = np.searchsorted(owners, documents, side="right")
    places = []
    for start, end in zip(starts, ends, strict=True):
        kept = np.linspace(0, end - start - 1, min(most, end - start))
        places.append(start + np.round(kept).astype(np.int64))
    return np.concatenate(places)


__all__ = [
    "POOLINGS",
    "Chunks",
    "DocumentLook",
    "answer_documents",
    "check_chunks",
    "keep_ends",
    "look_through",
    "pool_answers",
    "split_documents",
    "tune_documents",
]
