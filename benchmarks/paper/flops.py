"""FLOPs of a model with the paper's routers, counted part by part for the heads that they open."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def count_flops(model: Any, batch: Mapping[str, torch.Tensor], budget: float | None = None) -> dict[str, int]:
    """FLOPs of one batch without padding and closed heads; runs the model once.

    Matrix products alone count, 2 for each multiply-add. It is what skipping every closed head would compute; the
    executor computes more where that is faster.

    Args:
        model: A classifier with `router="layer"`, in eval mode.
        batch: `input_ids` and `attention_mask`, (B, L).
        budget: As in `forward`.

    Returns:
        By part: "projections" are query, key, value and output, "core" the scores and the weighted sum, "head" the
        pooler and the classifier.
    """
    gates = model(**batch, budget=budget, output_head_gates=True).head_gates  # (B, layers, H)
    opened = gates.sum((1, 2)).round().long()  # (B,)
    lengths = batch["attention_mask"].sum(-1)  # (B,)
    config = model.config
    rows, width, layers = len(lengths), config.hidden_size, config.num_hidden_layers
    size = width // config.num_attention_heads
    share = config.looks[0] if budget is None and config.looks else budget
    router = 2 * config.router_hidden_size * (width + 1) + 2 * width * config.num_attention_heads
    # Beyond the layers every matrix is applied once to each input: to its pooled or its first token.
    outside = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer." not in name]
    return {
        "projections": 8 * width * size * int((opened * lengths).sum()),
        "core": 4 * size * int((opened * lengths * lengths).sum()),
        "feed_forward": 4 * layers * width * config.intermediate_size * int(lengths.sum()),
        "router": 0 if share == 1.0 else rows * layers * router,
        "head": 2 * rows * sum(module.weight.numel() for module in outside),
    }
