"""Attention among the tokens of each sequence of a packed batch, and the stock layer on such batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer

from .packing import Sequences, find_runs


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

# Tokens the feed-forward layers take at a time at inference, so that what lies between the two stays in the cache: 5 to
# 10% faster on a CPU than all at once, and less memory.
CHUNK_TOKENS = 1024


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


def attend_packed(parts: Sequence[torch.Tensor], sequences: Sequences, dropout: float = 0.0) -> torch.Tensor:
    """Attention core within each of the sequences that lie one after the other.

    One call for all where variable-length flash attention serves, else one for all neighbours of one length.

    Args:
        parts: Query, key and value, each (T, h, d).
        sequences: Their lengths, together T.
        dropout: Of the attention weights.

    Returns:
        (T, h * d).
    """
    lengths, padded_first, bounds = sequences
    if bounds is not None and not (dropout or padded_first) and _flash_serves(parts[0]):
        bounds, longest = bounds.to(parts[0].device), max(lengths)
        query, key, value = (x.contiguous() for x in parts)
        context: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        return context.flatten(-2)
    whole = len(lengths) - padded_first
    runs = [(*run, 0) for run in find_runs(lengths[:whole])] + [(*run, 1) for run in find_runs(lengths[whole:])]
    contexts, start = [], 0
    for count, length, skipped in runs:
        stop = start + count * length
        q, k, v = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        part = F.scaled_dot_product_attention(q, k[:, :, skipped:], v[:, :, skipped:], dropout_p=dropout)
        contexts.append(part.transpose(1, 2).reshape(count * length, -1))  # (count * length, h * d)
        start = stop
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def attend_padded(parts: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """The same of a padded batch: query, key and value (B, L, h, d), and a mask (B, L) -> (B, L, h * d)."""
    q, k, v = (x.transpose(1, 2) for x in parts)  # (B, h, L, d)
    allowed = None if mask is None else (mask != 0)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2)


class EncoderLayer(BertLayer):
    """The stock transformer layer, which also takes packed batches; parameters and names are the stock layer's."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As upstream; or, given `sequences`, (T, D) -> (T, D) of a packed batch."""
        if sequences is None:
            output: torch.Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return output
        own = self.attention.self
        heads = (own.num_attention_heads, own.attention_head_size)
        parts = [layer(hidden_states).unflatten(-1, heads) for layer in (own.query, own.key, own.value)]
        context = attend_packed(parts, sequences, own.dropout.p if own.training else 0.0)
        attended = self.attention.output(context, hidden_states)
        return self.feed_forward_packed(attended)

    def feed_forward_packed(self, attended: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D), some tokens at a time where no gradient is needed."""
        if torch.is_grad_enabled() or len(attended) <= CHUNK_TOKENS:
            return self.feed_forward_chunk(attended)
        return torch.cat([self.feed_forward_chunk(chunk) for chunk in attended.split(CHUNK_TOKENS)])
