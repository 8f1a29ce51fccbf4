"""Padded and packed batches: padding leaves once, before the first layer, and returns only where it is asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch


class Sequences(NamedTuple):
    """The sequences of a packed batch, one after the other.

    A named tuple, for hooks that spread layers over devices move tuples and tensors, not objects.

    Args:
        lengths: Tokens of each sequence.
        padded_first: How many of the last sequences begin with a token that is not attended to.
        bounds: (B + 1,) int32, where each begins and the last one ends, on a GPU; else None.
    """

    lengths: list[int]
    padded_first: int = 0
    bounds: torch.Tensor | None = None


def first_tokens(sequences: Sequences, device: torch.device) -> torch.Tensor:
    """Where each sequence of a packed batch begins, (B,) int64."""
    if sequences.bounds is not None:
        return sequences.bounds[:-1].to(device, torch.int64)
    return torch.tensor([0, *accumulate(sequences.lengths[:-1])], device=device)


def find_runs(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """(sequences, length) of each stretch of neighbours of one length."""
    return [(len(list(same)), length) for length, same in groupby(lengths)]


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as a tokenizer pads it: hidden states (B, L, D).

    Args:
        mask: (B, L), nonzero for real tokens; None: no padding.
    """

    mask: torch.Tensor | None

    @property
    def layout(self) -> torch.Tensor | None:
        """What a layer is told of the batch: the mask."""
        return self.mask

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the first position of each input: (B, L, D) -> (B, D)."""
        return hidden[:, 0]

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of first positions as a layer left them, (B, 1, D) -> (B, D)."""
        return rows[:, 0]

    def select(self, hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, "PaddedBatch"]:
        """The inputs `rows` (b,) int64 alone."""
        return hidden[rows], PaddedBatch(None if self.mask is None else self.mask[rows])

    def pad(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, L, D) as it is."""
        return hidden


@dataclass(frozen=True)
class PackedBatch:
    """Index maps between a padded batch and its packed tokens (T, D).

    Sequences are sorted by length, longest first, so that those of one length are neighbours and share their calls. The
    first position of an input is always kept, for that is where the stock models classify from; where it is padding,
    its token asks but is not attended to. Such inputs come last.

    Args:
        sequences: Lengths, in packed order.
        shape: (B, L) of the padded batch.
        order: (B,) int64, the row of the padded batch each packed sequence came from.
        indices: (T,) int64, the place of each packed token in the flattened (B * L) batch; None where every token is
            kept, in the order it was in.
    """

    sequences: Sequences
    shape: tuple[int, int]
    order: torch.Tensor
    indices: torch.Tensor | None

    @property
    def layout(self) -> Sequences:
        """What a layer is told of the batch: its sequences."""
        return self.sequences

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (T, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def pad(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (B, L, ...), zero where nothing was kept."""
        if self.indices is not None:
            empty = hidden.new_zeros(self.shape[0] * self.shape[1], *hidden.shape[1:])
            hidden = empty.index_copy(0, self.indices.to(hidden.device), hidden)
        return hidden.unflatten(0, self.shape)

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """Values of each input, in packed order (B, ...) -> in the batch's own order (B, ...)."""
        return rows if self.indices is None else torch.empty_like(rows).index_copy(0, self.order.to(rows.device), rows)

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """Values of each input, in the batch's own order (B, ...) -> in packed order (B, ...)."""
        return rows if self.indices is None else rows.index_select(0, self.order.to(rows.device))

    @cached_property
    def owners(self) -> torch.Tensor:
        """The sequence, in packed order, that each token belongs to, (T,) int64."""
        counts = torch.tensor(self.sequences.lengths, device=self.order.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the first position of each input: (T, D) -> (B, D), in the batch's own order."""
        if self.indices is None:
            return hidden[:: self.shape[1]]
        return self.unsort(hidden[first_tokens(self.sequences, hidden.device)])

    def select(self, hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, "PackedBatch"]:
        """The inputs `rows` (b,) int64, distinct, alone; the new batch has them in that order."""
        new_row = torch.full((self.shape[0],), -1, device=rows.device).index_copy(
            0, rows, torch.arange(len(rows), device=rows.device)
        )
        kept = self.sort(new_row)  # in packed order, -1 for those that stay behind
        kept_list = kept.tolist()
        lengths = [length for length, row in zip(self.sequences.lengths, kept_list, strict=True) if row >= 0]
        whole = len(kept_list) - self.sequences.padded_first
        padded_first = sum(row >= 0 for row in kept_list[whole:])
        tokens = (kept >= 0).index_select(0, self.owners).nonzero()[:, 0]
        order = kept[kept >= 0]
        places = self.indices if self.indices is not None else torch.arange(len(hidden), device=tokens.device)
        places = places.index_select(0, tokens)
        old_row = self.order[kept >= 0].repeat_interleave(torch.tensor(lengths, device=tokens.device))
        moved = order.repeat_interleave(torch.tensor(lengths, device=tokens.device)) - old_row
        batch = PackedBatch(
            _sequences(lengths, padded_first, rows.device),
            (len(rows), self.shape[1]),
            order,
            places + moved * self.shape[1],
        )
        return hidden.index_select(0, tokens.to(hidden.device)), batch


def _sequences(lengths: Sequence[int], padded_first: int, device: torch.device) -> Sequences:
    bounds = None
    if device.type == "cuda":
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Sequences(list(lengths), padded_first, bounds)


def find_packing(mask: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> PackedBatch:
    """Finds the tokens to keep of a batch, wherever its padding is: left, right, or in the middle.

    Args:
        mask: (B, L), nonzero for real tokens; None: no padding.
        shape: (B, L).
        device: Where the indices are needed.
    """
    batch, length = shape
    if mask is not None:
        kept = mask.to(device) != 0
        if not kept.all():
            padded_first = ~kept[:, 0]
            kept[:, 0] = True
            counts = kept.sum(-1)
            order = (counts - padded_first * (length + 1)).argsort(descending=True, stable=True)
            places = torch.arange(batch * length, device=device).view(shape)[order][kept[order]]
            sequences = _sequences(counts[order].tolist(), int(padded_first.sum()), device)
            return PackedBatch(sequences, shape, order, places)
    return PackedBatch(_sequences([length] * batch, 0, device), shape, torch.arange(batch, device=device), None)
