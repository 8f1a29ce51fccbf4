"""Padding leaves a batch once, before the first layer, and returns once, after the last."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch


def find_runs(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """(inputs, length) of each stretch of neighbours of one length."""
    return [(len(list(same)), length) for length, same in groupby(lengths)]


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed batch belong.

    Inputs are sorted by length, longest first, so that inputs of one length are neighbours and share their calls. The
    first position of an input is always kept, for that is where the stock models classify from; where it is padding,
    its token asks but is not attended to. Such inputs come last.

    Args:
        lengths: Number of kept tokens of each input, in packed order.
        padded_first: How many of the last inputs begin with a token of padding.
        shape: (B, L) of the padded batch.
        order: (B,) int64, the row of the padded batch each packed input came from.
        indices: (T,) int64, the place of each packed token in the flattened (B * L) batch; None where every token is
            kept.
        owners: (T,) int64, the input, in packed order, each token belongs to.
        counts: (B,) int64, the same as `lengths`.
    """

    lengths: list[int]
    padded_first: int
    shape: tuple[int, int]
    order: torch.Tensor
    indices: torch.Tensor | None
    owners: torch.Tensor
    counts: torch.Tensor

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (T, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (B, L, ...), zero where nothing was kept."""
        if self.indices is not None:
            padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = padded.index_copy(0, self.indices, packed)
        return packed.unflatten(0, self.shape)

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """Values of each input, in the batch's own order (B, ...) -> in packed order (B, ...)."""
        return rows if self.indices is None else rows.index_select(0, self.order)

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """Values of each input, in packed order (B, ...) -> in the batch's own order (B, ...)."""
        return rows if self.indices is None else torch.empty_like(rows).index_copy(0, self.order, rows)


def find_packing(attention_mask: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> Packing:
    """Finds the tokens to keep of a batch, wherever its padding is: left, right, or in the middle.

    Args:
        attention_mask: (B, L), nonzero for real tokens; None: no padding.
        shape: (B, L).
        device: Where the indices are needed.
    """
    batch, length = shape
    rows = torch.arange(batch, device=device)
    if attention_mask is not None:
        kept = attention_mask.to(device) != 0
        if not kept.all():
            padded_first = ~kept[:, 0]
            kept[:, 0] = True
            counts = kept.sum(-1)
            order = (counts - padded_first * (length + 1)).argsort(descending=True, stable=True)
            places = torch.arange(batch * length, device=device).view(shape)[order][kept[order]]
            counts = counts[order]
            owners = rows.repeat_interleave(counts)
            return Packing(counts.tolist(), int(padded_first.sum()), shape, order, places, owners, counts)
    counts = torch.full_like(rows, length)
    return Packing([length] * batch, 0, shape, rows, None, rows.repeat_interleave(length), counts)
