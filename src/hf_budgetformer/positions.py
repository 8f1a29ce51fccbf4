"""Longer inputs: a position table grows by tiling its trained rows."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .backbones import BACKBONES


logger = logging.get_logger(__name__)


@torch.no_grad()
def extend_positions(model: Any, rows: int) -> None:
    """Gives an encoder a position table of so many rows, in place.

    A longer table holds the trained rows again and again, which keeps what a token learned of its near neighbours
    (Longformer, Beltagy et al. 2020, arXiv 2004.05150); a shorter one their beginning. Positions that were never
    trained are only a start: train the model on inputs of that length. Where positions are rotations, only the
    configuration changes.

    Args:
        model: A stock model of a supported backbone, or a BudgetFormer.
        rows: Of the table, as `config.max_position_embeddings` counts them: RoBERTa's includes the two that number no
            token.

    Raises:
        ValueError: The backbone is not supported, or there are too few rows for a token.
    """
    config = model.config
    kind = getattr(config, "backbone_model_type", config.model_type)
    if kind not in BACKBONES:
        raise ValueError(f"model must be of one of the types {sorted(BACKBONES)}, got {kind!r}.")
    backbone = BACKBONES[kind]
    kept = config.pad_token_id + 1 if backbone.positions_follow_padding else 0
    if not isinstance(rows, int) or isinstance(rows, bool) or rows <= kept:
        raise ValueError(f"max_position_embeddings must be an integer > {kept}, got {rows!r}.")
    before = config.max_position_embeddings
    base = model.base_model
    for part in {model, base}:  # of a stock model's base the configuration is its own
        part.config.max_position_embeddings = rows
    if backbone.rotary is not None or rows == before:
        return
    embeddings = getattr(base, backbone.embeddings[0])
    old = embeddings.position_embeddings
    trained = old.weight[kept:]
    tiles = -(-(rows - kept) // len(trained))
    table = torch.cat([old.weight[:kept], trained.repeat(tiles, 1)[: rows - kept]])
    new = nn.Embedding(rows, table.shape[1], old.padding_idx, _weight=table.contiguous())
    new.weight.requires_grad_(old.weight.requires_grad)
    embeddings.position_embeddings = new
    device = table.device
    if hasattr(embeddings, "position_ids"):
        embeddings.position_ids = torch.arange(rows, device=device).expand((1, -1))
    if hasattr(embeddings, "token_type_ids"):
        embeddings.token_type_ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
    if rows > before:
        logger.warning(
            f"The position table was extended from {before} to {rows} rows by repeating the trained ones: train the "
            "model on inputs of that length before you trust its answers to them."
        )


__all__ = ["extend_positions"]
