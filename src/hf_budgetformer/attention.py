"""Self-attention whose heads can be closed, one by one, for each input."""

from typing import Any

import torch
from transformers.models.bert.modeling_bert import BertSelfAttention


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
