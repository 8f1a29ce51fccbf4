"""Attention among the tokens of each sequence of a packed batch, and stock layers on such batches."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import BACKBONES, Backbone
from .packing import Sequences, find_runs


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

# Tokens the feed-forward layers take at a time at inference, so that what lies between the two stays in the cache: 5 to
# 10% faster on a CPU than all at once, and less memory.
CHUNK_TOKENS = 1024
# Queries that share a band of keys where attention is local.
BAND_QUERIES = 128


class Reach(NamedTuple):
    """Where the tokens of a layer are, and how far they see.

    A named tuple, for hooks that spread layers over devices move tuples and tensors, not objects.

    Args:
        rotary: Cosine and sine that turn queries and keys, (T, d) of a packed batch, (1 or B, L, d) of a padded one;
            None: positions are in the embeddings.
        window: Most positions between a query and a key; None: all of the sequence.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    window: int | None = None


EVERYTHING = Reach()


def turn(parts: Sequence[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor] | None) -> Sequence[torch.Tensor]:
    """Rotates query and key by their positions, value not; each (..., h, d), in float32 as upstream.

    Method: Su et al. 2021 (arXiv 2104.09864).
    """
    if rotary is None:
        return parts
    cos, sin = (x.unsqueeze(-2) for x in rotary)
    query, key, value = parts
    turned = []
    for given in (query, key):
        x = given.float()
        first, second = x.chunk(2, dim=-1)
        turned.append((x * cos + torch.cat((-second, first), dim=-1) * sin).to(given.dtype))
    return [*turned, value]


def _flash_serves(query: torch.Tensor) -> bool:
    """Whether torch has variable-length flash attention for such a tensor: half precision on a recent NVIDIA GPU."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_packed(
    parts: Sequence[torch.Tensor], sequences: Sequences, dropout: float = 0.0, reach: Reach = EVERYTHING
) -> torch.Tensor:
    """Attention core within each of the sequences that lie one after the other.

    One call for all where variable-length flash attention serves, else one for all neighbours of one length.

    Args:
        parts: Query, key and value, each (T, h, d).
        sequences: Their lengths, together T.
        dropout: Of the attention weights.
        reach: Of the layer.

    Returns:
        (T, h * d).
    """
    parts = turn(parts, reach.rotary)
    lengths, padded_first, bounds = sequences
    if bounds is not None and not (dropout or padded_first) and _flash_serves(parts[0]):
        bounds, longest = bounds.to(parts[0].device), max(lengths)
        query, key, value = (x.contiguous() for x in parts)
        near = -1 if reach.window is None else reach.window
        context: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(near, near))
        return context.flatten(-2)
    whole = len(lengths) - padded_first
    runs = [(*run, 0) for run in find_runs(lengths[:whole])] + [(*run, 1) for run in find_runs(lengths[whole:])]
    contexts, start = [], 0
    for count, length, skipped in runs:
        stop = start + count * length
        q, k, v = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        if reach.window is None or length <= reach.window + 1:
            part = F.scaled_dot_product_attention(q, k[:, :, skipped:], v[:, :, skipped:], dropout_p=dropout)
        else:
            part = attend_band(q, k, v, reach.window, skipped, dropout)
        contexts.append(part.transpose(1, 2).reshape(count * length, -1))  # (count * length, h * d)
        start = stop
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def attend_band(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, skipped: int = 0, dropout: float = 0.0
) -> torch.Tensor:
    """Attention to keys at most `window` positions away: blocks of queries, each against the keys that it can see.

    The work is linear in the length, and exact: what is masked within a block is what stock masks.

    Args:
        query: (B, h, L, d).
        key: (B, h, L, d).
        value: (B, h, L, d).
        window: Most positions between a query and a key, >= 1.
        skipped: Keys at the start that nothing attends to.
        dropout: Of the attention weights.

    Returns:
        (B, h, L, d).
    """
    length = query.shape[2]
    blocks = -(-length // BAND_QUERIES)
    if length**2 <= blocks * BAND_QUERIES * (BAND_QUERIES + 2 * window):  # the square is less
        places = torch.arange(length, device=query.device)
        near = ((places[:, None] - places).abs() <= window) & (places >= skipped)
        near[:, skipped] |= ~near.any(-1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=near, dropout_p=dropout)
    missing = blocks * BAND_QUERIES - length
    band = BAND_QUERIES + 2 * window
    q = F.pad(query, (0, 0, 0, missing)).unflatten(2, (blocks, BAND_QUERIES))  # (B, h, blocks, queries, d)
    k, v = (
        F.pad(x, (0, 0, window, window + missing)).unfold(2, band, BAND_QUERIES).transpose(-1, -2) for x in (key, value)
    )  # (B, h, blocks, band, d)
    queries = torch.arange(blocks * BAND_QUERIES, device=query.device).view(blocks, BAND_QUERIES, 1)
    first = torch.arange(blocks, device=query.device) * BAND_QUERIES - window
    keys = (first[:, None] + torch.arange(band, device=query.device))[:, None]  # (blocks, 1, band)
    seen = ((queries - keys).abs() <= window) & (keys >= skipped) & (keys < length)
    # The last block's queries beyond the end see something too: a row without a key would be undefined.
    seen = seen | (queries >= length)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * blocks, h, ...)
    mask = seen[:, None].repeat(query.shape[0], 1, 1, 1)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    context = context.unflatten(0, (query.shape[0], blocks)).transpose(1, 2).flatten(2, 3)
    return context[:, :, :length]


def attend_padded(parts: Sequence[torch.Tensor], mask: torch.Tensor | None, reach: Reach = EVERYTHING) -> torch.Tensor:
    """The same of a padded batch: query, key and value (B, L, h, d), and a mask (B, L) -> (B, L, h * d)."""
    q, k, v = (x.transpose(1, 2) for x in turn(parts, reach.rotary))  # (B, h, L, d)
    length = q.shape[2]
    allowed = None if mask is None else (mask != 0)[:, None, None, :].expand(-1, 1, length, -1)
    if reach.window is not None and length > reach.window + 1:
        places = torch.arange(length, device=q.device)
        near = (places[:, None] - places).abs() <= reach.window
        allowed = near if allowed is None else allowed & near
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2)


def project_heads(layer: Any, backbone: Backbone, hidden: torch.Tensor, heads: int) -> Sequence[torch.Tensor]:
    """Query, key and value of a stock layer: (..., D) -> (..., H, d) each."""
    names = backbone.names
    if names.query == names.key:
        fused: torch.Tensor = names.of(layer, "query")(hidden)
        return fused.unflatten(-1, (3, heads, -1)).unbind(-3)
    return [names.of(layer, part)(hidden).unflatten(-1, (heads, -1)) for part in ("query", "key", "value")]


def _drop(layer: Any, names: Any, part: str, hidden: torch.Tensor) -> torch.Tensor:
    dropout = names.of(layer, part)
    return hidden if dropout is None or not layer.training else dropout(hidden)


def feed_forward_packed(layer: Any, backbone: Backbone, attended: torch.Tensor) -> torch.Tensor:
    """Feed-forward part of a stock layer, (T, D) -> (T, D), some tokens at a time at inference."""
    if layer.training or torch.is_grad_enabled() or len(attended) <= CHUNK_TOKENS:
        return _feed_forward(layer, backbone, attended)
    return torch.cat([_feed_forward(layer, backbone, chunk) for chunk in attended.split(CHUNK_TOKENS)])


def _feed_forward(layer: Any, backbone: Backbone, attended: torch.Tensor) -> torch.Tensor:
    names = backbone.names
    norm = names.of(layer, "feed_forward_norm")
    read = norm(attended) if backbone.norm_first else attended
    inner, gate = names.of(layer, "up")(read), None
    if names.gate is not None:
        inner, gate = inner.chunk(2, dim=-1) if names.gate == names.up else (inner, names.of(layer, "gate")(read))
    inner = names.of(layer, "activation")(inner)
    inner = _drop(layer, names, "inner_dropout", inner if gate is None else inner * gate)
    output: torch.Tensor = _drop(layer, names, "down_dropout", names.of(layer, "down")(inner)) + attended
    return output if backbone.norm_first else norm(output)


def run_packed(
    layer: Any, backbone: Backbone, hidden: torch.Tensor, sequences: Sequences, reach: Reach, heads: int
) -> torch.Tensor:
    """A stock layer on a packed batch: (T, D) -> (T, D)."""
    names, norm = backbone.names, backbone.names.of(layer, "attention_norm")
    parts = project_heads(layer, backbone, norm(hidden) if backbone.norm_first else hidden, heads)
    dropout = names.of(layer, "attention_dropout")
    share = getattr(dropout, "p", dropout) if layer.training else 0.0
    context = attend_packed(parts, sequences, share, reach)
    attended = _drop(layer, names, "output_dropout", names.of(layer, "attention_output")(context)) + hidden
    return feed_forward_packed(layer, backbone, attended if backbone.norm_first else norm(attended))


@cache  # so that layers of one kind stay of one kind
def packed_kind(kind: Any, backbone_type: str, heads: int) -> Any:
    """A stock layer's class, which also takes packed batches; parameters and names are the stock layer's."""

    class PackedLayer(kind):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """As upstream; or, given `sequences` and `reach`, (T, D) -> (T, D) of a packed batch."""
            if "sequences" not in kwargs:
                return super().forward(hidden_states, *args, **kwargs)
            return run_packed(self, BACKBONES[backbone_type], hidden_states, **kwargs, heads=heads)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a class made here has no name to be found by
            return _empty_layer, (kind, backbone_type, heads), self.__dict__

    PackedLayer.__name__, PackedLayer.__qualname__ = kind.__name__, kind.__qualname__
    return PackedLayer


def _empty_layer(kind: Any, backbone_type: str, heads: int) -> nn.Module:
    made = packed_kind(kind, backbone_type, heads)
    layer: nn.Module = made.__new__(made)
    return layer
