"""Self-attention whose heads can be closed, one by one, for each input.

Masked is the reference: it computes every head and multiplies. The sparse executors work on packed batches and compute
open heads only, projections included; all give the same result.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertSelfAttention

from .packing import Packing, find_runs


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class GatedSelfAttention(BertSelfAttention):
    """Stock self-attention, each head's result multiplied by its gate: the masked, trainable reference.

    Every head is computed, so nothing is saved; a gate of one returns the stock result bit for bit, a gate of zero
    removes the head (arXiv 2604.22583, head selection).
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gates: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends, then gates.

        Args:
            hidden_states: (B, L, D).
            attention_mask: As the attention implementation wants it, see `transformers.masking_utils`.
            gates: (B, H), float; None leaves all heads open.
            **kwargs: For the attention implementation.

        Returns:
            The context (B, L, D), and the attention weights (B, H, L, L) where the implementation gives them.
        """
        context, weights = super().forward(hidden_states, attention_mask, **kwargs)
        if gates is not None:
            heads = context.unflatten(-1, (self.num_attention_heads, self.attention_head_size))  # (B, L, H, d)
            context = (heads * gates[:, None, :, None].to(heads.dtype)).flatten(-2)  # (B, L, D)
        return context, weights

    def keep_heads(self, count: int, output: nn.Linear) -> nn.Linear:
        """Makes room for `count` heads only, weights yet to be filled; returns an output projection to match."""
        self.num_attention_heads, self.all_head_size = count, count * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(x.in_features, self.all_head_size) for x in self.projections)
        return nn.Linear(self.all_head_size, output.out_features)

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Query, key and value."""
        return self.query, self.key, self.value


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


def attend(
    parts: Sequence[torch.Tensor],
    lengths: Sequence[int],
    padded_first: int = 0,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention core within each of the sequences that lie one after the other.

    One call for all where variable-length flash attention serves, else one for all neighbours of one length.

    Args:
        parts: Query, key and value, each (T, h, d).
        lengths: Of the sequences; together T.
        padded_first: How many of the last sequences begin with a token that is not attended to.
        dropout: Of the attention weights.

    Returns:
        (T, h, d).
    """
    if not (dropout or padded_first) and _flash_serves(parts[0]):
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=parts[0].device)
        longest = max(lengths)
        query, key, value = (x.contiguous() for x in parts)
        result: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        return result
    whole = len(lengths) - padded_first
    runs = [(*run, 0) for run in find_runs(lengths[:whole])] + [(*run, 1) for run in find_runs(lengths[whole:])]
    contexts, start = [], 0
    for count, length, skipped in runs:
        stop = start + count * length
        q, k, v = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        context = F.scaled_dot_product_attention(q, k[:, :, skipped:], v[:, :, skipped:], dropout_p=dropout)
        contexts.append(context.transpose(1, 2).flatten(0, 1))  # (count * length, h, d)
        start = stop
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def attend_all_heads(
    attention: GatedSelfAttention, output: nn.Linear, hidden: torch.Tensor, packing: Packing, gates: torch.Tensor | None
) -> torch.Tensor:
    """Computes every head of a packed batch, then gates: dense work, free of padding; trainable.

    Args:
        attention: The layer's self-attention.
        output: The layer's output projection.
        hidden: (T, D).
        packing: Of the batch.
        gates: (B, H) in packed order; None leaves all heads open.

    Returns:
        (T, D), the result of the output projection.
    """
    heads = (attention.num_attention_heads, attention.attention_head_size)
    parts = [projection(hidden).unflatten(-1, heads) for projection in attention.projections]
    dropout = attention.dropout.p if attention.training else 0.0
    context = attend(parts, packing.lengths, packing.padded_first, dropout)  # (T, H, d)
    if gates is not None:
        spread = gates.to(context.dtype).index_select(0, packing.owners)[:, :, None]  # (T, H, 1)
        context = context * spread if torch.is_grad_enabled() else context.mul_(spread)
    return output(context.flatten(-2))


class OpenHeads:
    """The open heads of a packed batch, inputs with the same ones put together.

    Args:
        rows: The gates, (B, H) in packed order, 0 or 1, as lists.

    Attributes:
        counts: Open heads of each input.
        groups: For each set of heads, its heads and the inputs that chose it, in packed order.
    """

    def __init__(self, rows: list[list[float]]) -> None:
        agreeing: dict[tuple[float, ...], list[int]] = {}
        for index, row in enumerate(rows):
            agreeing.setdefault(tuple(row), []).append(index)
        self.counts = [int(sum(row)) for row in rows]
        self.groups = [([h for h, gate in enumerate(row) if gate], inputs) for row, inputs in agreeing.items()]

    def members(self) -> dict[int, list[tuple[int, int]]]:
        """For each head, the inputs that keep it, each with the number of that pair, counted input by input."""
        starts = [0, *accumulate(self.counts)]
        members: dict[int, list[tuple[int, int]]] = {}
        for heads, inputs in self.groups:
            for place, head in enumerate(heads):
                members.setdefault(head, []).extend((index, starts[index] + place) for index in inputs)
        return members

    def indices(self, device: torch.device) -> list[torch.Tensor]:
        """Heads of each group, (k,) int64."""
        flat = torch.tensor([head for heads, _ in self.groups for head in heads], device=device)
        return list(flat.split([len(heads) for heads, _ in self.groups]))


def attend_by_group(
    attention: GatedSelfAttention, output: nn.Linear, hidden: torch.Tensor, packing: Packing, open_heads: OpenHeads
) -> torch.Tensor:
    """Computes open heads only, set by set: the weights of a set are gathered once, for all inputs that chose it.

    A batch that agrees is one group: one slice of the weights and plain attention. Arguments and result as in
    `attend_all_heads`.
    """
    size, width = attention.attention_head_size, hidden.shape[-1]
    weights = [x.weight.view(-1, size * width) for x in attention.projections]
    biases = torch.stack([x.bias.view(-1, size) for x in attention.projections])  # (3, H, d)
    columns = output.weight.view(width, -1, size)
    starts = [0, *accumulate(packing.lengths)]
    whole = len(packing.lengths) - packing.padded_first
    result = torch.empty_like(hidden)
    for heads, (_, inputs) in zip(open_heads.indices(hidden.device), open_heads.groups, strict=True):
        lengths = [packing.lengths[index] for index in inputs]
        spans = [slice(starts[index], starts[index + 1]) for index in inputs]
        if inputs[-1] - inputs[0] + 1 == len(inputs):
            spans = [slice(spans[0].start, spans[-1].stop)]
        tokens = hidden[spans[0]] if len(spans) == 1 else torch.cat([hidden[span] for span in spans])
        gathered = hidden.new_empty(3, len(heads), size * width)
        for place, weight in zip(gathered, weights, strict=True):
            torch.index_select(weight, 0, heads, out=place)
        parts = F.linear(tokens, gathered.view(-1, width), biases.index_select(1, heads).flatten())
        padded_first = sum(index >= whole for index in inputs)
        context = attend(parts.unflatten(-1, (3, -1, size)).unbind(1), lengths, padded_first).flatten(-2)
        weight = columns.index_select(1, heads).view(width, -1)
        if len(spans) == 1:
            torch.addmm(output.bias, context, weight.t(), out=result[spans[0]])
        else:
            for span, piece in zip(spans, F.linear(context, weight, output.bias).split(lengths), strict=True):
                result[span] = piece
    return result


def attend_by_pair(
    attention: GatedSelfAttention, output: nn.Linear, hidden: torch.Tensor, packing: Packing, open_heads: OpenHeads
) -> torch.Tensor:
    """Computes open heads only, one pair of an input and a head at a time, on views: nothing is gathered.

    For inputs that chose different heads. The cores of neighbours of one length share a call, however many heads each
    of them opened. Arguments and result as in `attend_all_heads`.
    """
    size, width = attention.attention_head_size, hidden.shape[-1]
    weights = [x.weight.view(-1, size, width) for x in attention.projections]
    biases = torch.cat([x.bias.view(-1, size) for x in attention.projections], dim=1)  # (H, 3 d)
    lengths, counts = packing.lengths, open_heads.counts
    pair_lengths = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    tokens = hidden.split(lengths)
    projected = hidden.new_empty(sum(pair_lengths), 3 * size)
    places = projected.split(pair_lengths)
    members = open_heads.members()
    for head, pairs in members.items():  # one head after the other, so that its weights stay in the cache
        weight = torch.cat([x[head] for x in weights]).t()  # (D, 3 d)
        for index, pair in pairs:
            torch.addmm(biases[head], tokens[index], weight, out=places[pair])

    padded_first = sum(counts[len(counts) - packing.padded_first :])
    context = attend(projected.view(-1, 3, 1, size).unbind(1), pair_lengths, padded_first)
    contexts = context[:, 0].split(pair_lengths)  # each (L, d)
    result = output.bias.repeat(len(hidden), 1)
    results = result.split(lengths)
    if hidden.dtype in (torch.bfloat16, torch.float16):  # adding head by head would round head by head
        columns, starts = output.weight.view(width, -1, size), [0, *accumulate(counts)]
        for heads, (_, inputs) in zip(open_heads.indices(hidden.device), open_heads.groups, strict=True):
            weight = columns.index_select(1, heads).view(width, -1).t()  # (k d, D)
            for index in inputs:
                joined = torch.cat(contexts[starts[index] : starts[index + 1]], dim=-1)  # (L, k d)
                torch.addmm(output.bias, joined, weight, out=results[index])
        return result
    rows = output.weight.t().split(size)  # of each head, (d, D)
    for head, pairs in members.items():
        for index, pair in pairs:
            torch.addmm(results[index], contexts[pair], rows[head], out=results[index])
    return result


EXECUTORS: dict[str, Callable[..., torch.Tensor]] = {
    "all_heads": attend_all_heads,
    "by_group": attend_by_group,
    "by_pair": attend_by_pair,
}

# Microseconds on one thread for each GFLOP of matrix products, GFLOP of attention cores, million numbers of weights
# read where they are, million of weights gathered, million numbers of tokens gathered, and call. Fitted by
# benchmarks/calibrate.py; only ratios matter.
_COSTS = (13_900.0, 10_900.0, 73.1, 653.0, 667.0, 9.24)
# Skipping heads must promise this much less, and these microseconds: estimates err by a tenth in the median.
_MARGIN = (0.92, 30.0)
# Microseconds of products that skipping could save at best, below which it is not worth the asking.
_LEAST_SAVING = 150.0


def executor_work(lengths: Sequence[int], open_heads: OpenHeads, heads: int, size: int) -> dict[str, tuple[float, ...]]:
    """What each executor would have to do for one layer, in the units of its cost model.

    Args:
        lengths: Tokens of each input.
        open_heads: What the router chose.
        heads: Number of heads H.
        size: Of a head, d.

    Returns:
        For each name in `EXECUTORS`, an amount for each of `_COSTS`.
    """
    width = heads * size
    counts, tokens = open_heads.counts, sum(lengths)
    pairs = sum(count * length for count, length in zip(counts, lengths, strict=True))
    core = 4e-9 * size * sum(count * length * length for count, length in zip(counts, lengths, strict=True))
    product = 8e-9 * size * width * pairs
    every_product, every_core = 8e-9 * width * width * tokens, 4e-9 * width * sum(n * n for n in lengths)
    stretches = len(set(lengths))

    gathered, moved, calls = 0, 0, 0
    for chosen, inputs in open_heads.groups:
        gathered += len(chosen)
        calls += 12 + 5 * len({lengths[index] for index in inputs})
        if inputs[-1] - inputs[0] + 1 != len(inputs):
            moved += 2 * width * sum(lengths[index] for index in inputs)
            calls += 3 * len(inputs)
    head = size * width / 1e6
    pair_calls = 20 + heads + 5 * stretches + 1.5 * sum(counts)  # calls that write into a place cost less
    return {
        "all_heads": (every_product, every_core, 4 * heads * head, 0, tokens * width / 1e6, 10 + 5 * stretches),
        "by_group": (product, core, 0, 4 * gathered * head, moved / 1e6, calls),
        "by_pair": (product, core, 3 * heads * head, 0, pairs * width / 1e6, pair_calls),
    }


def choose_executor(
    lengths: Sequence[int], open_heads: OpenHeads, heads: int, size: int, threads: int, sparse: bool = False
) -> str:
    """The cheapest executor for one layer by a linear cost model.

    Args:
        lengths: Tokens of each input.
        open_heads: What the router chose.
        heads: Number of heads H.
        size: Of a head, d.
        threads: That share the matrix products and cores.
        sparse: Whether closed heads must not be computed, whatever it costs.

    Returns:
        A key of `EXECUTORS`.
    """
    costs = (_COSTS[0] / threads, _COSTS[1] / threads, *_COSTS[2:])
    estimates = {
        name: sum(cost * amount for cost, amount in zip(costs, work, strict=True))
        for name, work in executor_work(lengths, open_heads, heads, size).items()
    }
    dense = estimates.pop("all_heads")
    name = min(estimates, key=estimates.__getitem__)
    return name if sparse or estimates[name] < _MARGIN[0] * dense - _MARGIN[1] else "all_heads"


def _is_plain(linear: nn.Module) -> bool:
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and linear.bias is not None and not linear.weight.is_meta and not hooked


def gated_attention(
    attention: GatedSelfAttention,
    output: nn.Linear,
    hidden: torch.Tensor,
    packing: Packing,
    gates: torch.Tensor | None,
    executor: str = "auto",
) -> torch.Tensor:
    """Attention of a packed batch by the cheapest executor.

    All heads are computed, through the projections' own forward, where gradients are needed, under autocast, and where
    a projection is more than a plain linear layer (adapters, quantisation, offloading, hooks): the sparse executors
    read the weights themselves.

    Args:
        attention: The layer's self-attention.
        output: The layer's output projection.
        hidden: (T, D).
        packing: Of the batch.
        gates: (B, H) in packed order; None leaves all heads open.
        executor: "auto", or "sparse" to compute open heads only, whatever it costs.

    Returns:
        (T, D), the result of the output projection.
    """
    learning = attention.training or torch.is_grad_enabled()
    if gates is None or learning or torch.is_autocast_enabled(hidden.device.type):
        return attend_all_heads(attention, output, hidden, packing, gates)
    rows = gates.tolist()
    heads, size = attention.num_attention_heads, attention.attention_head_size
    sparse, threads = executor == "sparse", torch.get_num_threads()
    closed = sum((heads - sum(row)) * length for row, length in zip(rows, packing.lengths, strict=True))
    if not closed and not sparse:
        return attend_all_heads(attention, output, hidden, packing, None)
    worth_asking = 8e-9 * closed * size * hidden.shape[-1] * _COSTS[0] > _LEAST_SAVING * threads
    if not (sparse or worth_asking) or not all(_is_plain(linear) for linear in (*attention.projections, output)):
        return attend_all_heads(attention, output, hidden, packing, gates)
    open_heads = OpenHeads(rows)
    name = choose_executor(packing.lengths, open_heads, heads, size, threads, sparse)
    chosen: Any = gates if name == "all_heads" else open_heads
    return EXECUTORS[name](attention, output, hidden, packing, chosen)
