"""Attention among the tokens of each sequence of a packed batch, and stock layers on such batches."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import BACKBONES, Backbone
from .packing import Sequences, find_runs, first_tokens


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

# Values between the two products of a feed-forward part at a time at inference, so that they stay in the cache: 5 to
# 10% faster on a CPU than all tokens at once, and less memory. Where few neurons are open, all tokens fit.
CHUNK_VALUES = 1024 * 1536
# Queries that share a band of keys where attention is local.
BAND_QUERIES = 128


class Reach(NamedTuple):
    """Where the tokens of a layer are, and how far they see.

    A named tuple, for hooks that spread layers over devices move tuples and tensors, not objects.

    Args:
        rotary: Cosine and sine that turn queries and keys, (T, d) of a packed batch, (1 or B, L, d) of a padded one;
            None: positions are in the embeddings.
        window: Most positions between a query and a key; None: all of the sequence.
        first_is_global: Whether the first position sees all of the sequence in spite of it, and all see the first.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    window: int | None = None
    first_is_global: bool = False

    def sees_all(self, length: int, first: bool) -> bool:
        """Whether no key of a sequence is hidden from a query; `first`: from that of the first position."""
        return self.window is None or length <= self.window + 1 or (first and self.first_is_global)

    def mask_function(self) -> Callable[..., Any]:
        """The same for masks that upstream makes."""

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return _near(query, key, self)

        return sees


EVERYTHING = Reach()


def pick_first(tokens: torch.Tensor, layout: Sequences | torch.Tensor | None) -> torch.Tensor:
    """Values at the first positions of a batch's inputs.

    Args:
        tokens: (T, ...) of a packed batch, or (1 or B, L, ...) of a padded one.
        layout: The packed batch's sequences; or a padded one's mask, or None.

    Returns:
        (B, ...) in packed order, or (1 or B, 1, ...).
    """
    if isinstance(layout, Sequences):
        return tokens.index_select(0, first_tokens(layout, tokens.device))
    return tokens[:, :1]


def turn(
    parts: Sequence[torch.Tensor], layout: Sequences | torch.Tensor | None, reach: Reach
) -> Sequence[torch.Tensor]:
    """Rotates query and key by their positions, value not; each (..., h, d), in float32 as upstream.

    The query may be of first positions alone, as `pick_first` gives them.

    Method: Su et al. 2021 (arXiv 2104.09864).
    """
    if reach.rotary is None:
        return parts
    query, key, value = parts
    turned = []
    places = 0 if isinstance(layout, Sequences) else 1
    for given in (query, key):
        alone = given.shape[places] != key.shape[places]
        cos, sin = ((pick_first(x, layout) if alone else x).unsqueeze(-2) for x in reach.rotary)
        x = given.float()
        left, right = x.chunk(2, dim=-1)
        turned.append((x * cos + torch.cat((-right, left), dim=-1) * sin).to(given.dtype))
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
        parts: Query, key and value, each (T, h, d); the query (B, h, d) where only first tokens ask.
        sequences: Their lengths, together T.
        dropout: Of the attention weights.
        reach: Of the layer.

    Returns:
        (T, h * d), or (B, h * d).
    """
    parts = turn(parts, sequences, reach)
    first = len(parts[0]) < len(parts[1])
    lengths, padded_first, bounds = sequences
    # A window is counted from the end of a sequence there, which is where a lone query would be taken to stand.
    in_place = reach.sees_all(max(lengths), first) or not (first or reach.first_is_global)
    if bounds is not None and in_place and not (dropout or padded_first) and _flash_serves(parts[0]):
        return _attend_varlen(parts, sequences, reach, first)
    whole = len(lengths) - padded_first
    runs = [(*run, 0) for run in find_runs(lengths[:whole])] + [(*run, 1) for run in find_runs(lengths[whole:])]
    contexts = []
    sequence = token = 0
    for count, length, skipped in runs:
        places = slice(token, token + count * length)
        asking, queries = (slice(sequence, sequence + count), 1) if first else (places, length)
        q = parts[0][asking].unflatten(0, (count, queries)).transpose(1, 2)  # (count, h, queries, d)
        k, v = (x[places].unflatten(0, (count, length)).transpose(1, 2) for x in parts[1:])
        last = None if reach.window is None or reach.sees_all(length, first) else reach.window + 1
        if first or last is None:
            part = F.scaled_dot_product_attention(q, k[:, :, skipped:last], v[:, :, skipped:last], dropout_p=dropout)
        else:
            part = attend_band(q, k, v, reach, skipped, dropout)
        contexts.append(part.transpose(1, 2).reshape(count * queries, -1))  # (count * queries, h * d)
        sequence += count
        token += count * length
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _attend_varlen(parts: Sequence[torch.Tensor], sequences: Sequences, reach: Reach, first: bool) -> torch.Tensor:
    """All sequences in one call."""
    query, key, value = (x.contiguous() for x in parts)
    bounds: Any = sequences.bounds
    bounds, longest = bounds.to(query.device), max(sequences.lengths)
    asking, longest_query = bounds, longest
    if first:
        asking, longest_query = torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device), 1
    near = -1 if reach.window is None or reach.sees_all(longest, first) else reach.window
    context: Any = varlen_attn(query, key, value, asking, bounds, longest_query, longest, window_size=(near, near))
    return context.flatten(-2)


def _near(queries: torch.Tensor, keys: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Whether positions see others, bool of the shape that theirs broadcast to."""
    near = (queries - keys).abs() <= (reach.window or 0)
    return near | (queries == 0) | (keys == 0) if reach.first_is_global else near


def attend_band(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reach: Reach, skipped: int = 0, dropout: float = 0.0
) -> torch.Tensor:
    """Attention to keys at most `reach.window` positions away: blocks of queries against the keys they can see.

    The work is linear in the length, and exact: what is masked within a block is what stock masks. A first position
    that is global (Beltagy et al. 2020, arXiv 2004.05150) is one more key of each block, and its query asks alone.

    Args:
        query: (B, h, L, d).
        key: (B, h, L, d).
        value: (B, h, L, d).
        reach: Of the layer, with a window >= 1.
        skipped: Keys at the start that nothing attends to, 0 or 1.
        dropout: Of the attention weights.

    Returns:
        (B, h, L, d).
    """
    length, window, device = query.shape[2], reach.window or 0, query.device
    blocks = -(-length // BAND_QUERIES)
    if length**2 <= blocks * BAND_QUERIES * (BAND_QUERIES + 2 * window):  # the square is less
        places = torch.arange(length, device=device)
        near = _near(places[:, None], places, reach) & (places >= skipped)
        near[:, skipped] |= ~near.any(-1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=near, dropout_p=dropout)
    missing = blocks * BAND_QUERIES - length
    band = BAND_QUERIES + 2 * window
    q = F.pad(query, (0, 0, 0, missing)).unflatten(2, (blocks, BAND_QUERIES))  # (B, h, blocks, queries, d)
    k, v = (
        F.pad(x, (0, 0, window, window + missing)).unfold(2, band, BAND_QUERIES).transpose(-1, -2) for x in (key, value)
    )  # (B, h, blocks, band, d)
    queries = torch.arange(blocks * BAND_QUERIES, device=device).view(blocks, BAND_QUERIES, 1)
    first = torch.arange(blocks, device=device) * BAND_QUERIES - window
    keys = (first[:, None] + torch.arange(band, device=device))[:, None]  # (blocks, 1, band)
    seen = ((queries - keys).abs() <= window) & (keys >= skipped) & (keys < length)
    if reach.first_is_global:
        k, v = (
            torch.cat([x[:, :, :1, None].expand(-1, -1, blocks, -1, -1), bands], 3)
            for x, bands in ((key, k), (value, v))
        )
        seen = torch.cat([(queries > window) & (skipped == 0), seen], -1)  # nearer ones have it in their band
    # The last block's queries beyond the end see something too: a row without a key would be undefined.
    seen = seen | (queries >= length)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * blocks, h, ...)
    mask = seen[:, None].repeat(query.shape[0], 1, 1, 1)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    context = context.unflatten(0, (query.shape[0], blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    if not reach.first_is_global:
        return context
    context_of_first = F.scaled_dot_product_attention(
        query[:, :, :1], key[:, :, skipped:], value[:, :, skipped:], dropout_p=dropout
    )
    return torch.cat([context_of_first, context[:, :, 1:]], 2)


def attend_padded(parts: Sequence[torch.Tensor], mask: torch.Tensor | None, reach: Reach = EVERYTHING) -> torch.Tensor:
    """The same of a padded batch.

    Args:
        parts: Query, key and value, each (B, L, h, d); the query (B, 1, h, d) where only first positions ask.
        mask: (B, L), nonzero for real tokens; None: no padding.
        reach: Of the layer.

    Returns:
        As the query, (B, L or 1, h * d).
    """
    q, k, v = (x.transpose(1, 2) for x in turn(parts, mask, reach))  # (B, h, L, d)
    queries, length = q.shape[2], k.shape[2]
    allowed = None if mask is None else (mask != 0)[:, None, None, :].expand(-1, 1, queries, -1)
    if not reach.sees_all(length, queries < length):
        places = torch.arange(length, device=q.device)
        near = _near(places[:queries, None], places, reach)
        allowed = near if allowed is None else allowed & near
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2)


def project_heads(
    layer: Any, backbone: Backbone, hidden: torch.Tensor, heads: int, asking: torch.Tensor | None = None
) -> Sequence[torch.Tensor]:
    """Query, key and value of a stock layer: (T, D) -> (T, H, d) each; the query of `asking` (B, D) alone, if given."""
    names = backbone.names
    if names.query == names.key:
        fused = names.of(layer, "query")
        query, key, value = fused(hidden).unflatten(-1, (3, heads, -1)).unbind(-3)
        if asking is not None:
            query = fused(asking).unflatten(-1, (3, heads, -1)).select(-3, 0)
        return query, key, value
    read = {"query": hidden if asking is None else asking, "key": hidden, "value": hidden}
    return [names.of(layer, part)(x).unflatten(-1, (heads, -1)) for part, x in read.items()]


def _drop(layer: Any, names: Any, part: str, hidden: torch.Tensor) -> torch.Tensor:
    dropout = names.of(layer, part)
    return hidden if dropout is None or not layer.training else dropout(hidden)


def run_in_chunks(
    feed_forward: Callable[[torch.Tensor], torch.Tensor], attended: torch.Tensor, neurons: int
) -> torch.Tensor:
    """A feed-forward part of so many neurons, (T, D) -> (T, D), some tokens at a time where no gradient is needed."""
    tokens = CHUNK_VALUES // max(1, neurons)
    if torch.is_grad_enabled() or len(attended) <= tokens:
        return feed_forward(attended)
    return torch.cat([feed_forward(chunk) for chunk in attended.split(tokens)])


def feed_forward_packed(layer: Any, backbone: Backbone, attended: torch.Tensor) -> torch.Tensor:
    """Feed-forward part of a stock layer, (T, D) -> (T, D)."""
    run = partial(_feed_forward, layer, backbone)
    if layer.training:  # dropout draws otherwise in chunks, and losses with a gradient cache draw twice
        return run(attended)
    return run_in_chunks(run, attended, backbone.names.of(layer, "up").out_features)


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
    layer: Any,
    backbone: Backbone,
    hidden: torch.Tensor,
    sequences: Sequences,
    reach: Reach,
    heads: int,
    first: bool = False,
) -> torch.Tensor:
    """A stock layer on a packed batch: (T, D) -> (T, D), or of the first token of each sequence alone, (B, D)."""
    names, norm = backbone.names, backbone.names.of(layer, "attention_norm")
    read = norm(hidden) if backbone.norm_first else hidden
    asking = pick_first(read, sequences) if first else None
    parts = project_heads(layer, backbone, read, heads, asking)
    dropout = names.of(layer, "attention_dropout")
    share = getattr(dropout, "p", dropout) if layer.training else 0.0
    context = attend_packed(parts, sequences, share, reach)
    hidden = pick_first(hidden, sequences) if first else hidden
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
