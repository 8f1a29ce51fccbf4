"""The encoders BudgetFormer can be built on, as data: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaEmbeddings


class PooledClassifier(nn.Linear):
    """Dropout and one linear layer on the pooler's output, under the stock BERT classifier's parameter names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, config.num_labels)
        dropout = config.classifier_dropout
        self.dropout = config.hidden_dropout_prob if dropout is None else dropout

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) -> logits (B, num_labels)."""
        return super().forward(F.dropout(pooled, self.dropout, self.training))


@dataclass(frozen=True)
class Backbone:
    """What distinguishes one BERT-family architecture from another.

    The transformer layers themselves are the same code upstream, so they need no column.

    Attributes:
        prefix: Name under which the stock classes keep the encoder, and so the first part of every weight's name.
        embeddings: Stock embedding module, built from a config.
        classifier: Builds the classification head from a config; its parameters carry the stock names.
        reads_pooler: Whether the head reads the pooler's output (B, D) rather than all hidden states (B, L, D).
        positions_follow_padding: Whether position numbers start after the padding index, which costs that many rows
            of the position table.
    """

    prefix: str
    embeddings: type[nn.Module]
    classifier: Callable[[Any], nn.Module]
    reads_pooler: bool
    positions_follow_padding: bool


BACKBONES: dict[str, Backbone] = {
    "bert": Backbone("bert", BertEmbeddings, PooledClassifier, reads_pooler=True, positions_follow_padding=False),
    "roberta": Backbone(
        "roberta", RobertaEmbeddings, RobertaClassificationHead, reads_pooler=False, positions_follow_padding=True
    ),
}


def max_input_length(config: Any) -> int:
    """Longest input, in tokens, that the position table of `config` can number."""
    if BACKBONES[config.backbone_model_type].positions_follow_padding:
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings
