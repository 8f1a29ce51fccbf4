"""The encoders BudgetFormer can be built on, as data: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaEmbeddings


@dataclass(frozen=True)
class LayerNames:
    """Where a transformer layer of the stock class keeps its parts, as dotted names of modules.

    `query`, `key`, `value` and `up` hold a row for each number of a head and each neuron, `attention_output` and `down`
    a column. `gate` is the second projection of a gated feed-forward, None where it is plain.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    gate: str | None = None
    down: str = "output.dense"
    feed_forward_norm: str = "output.LayerNorm"


def _linear_classifier(config: Any) -> nn.Module:
    return nn.Linear(config.hidden_size, config.num_labels)


@dataclass(frozen=True)
class Backbone:
    """What distinguishes one BERT-family architecture from another.

    Attributes:
        prefix: Name under which the stock classes keep the encoder, and so the first part of every weight's name.
        embeddings: Stock embedding module, built from a config.
        classifier: Builds the stock classification head from a config.
        reads_pooler: Whether the head reads the pooler's output (B, D), after a dropout of the model's own, rather than
            all hidden states (B, L, D).
        positions_follow_padding: Whether position numbers start after the padding index, which costs that many rows
            of the position table.
        names: Of the parts of a layer.
        norm_first: Whether a sublayer normalises what it reads, rather than the sum that it writes.
        bias: Whether the layers have biases.
    """

    prefix: str
    embeddings: type[nn.Module]
    classifier: Callable[[Any], nn.Module]
    reads_pooler: bool
    positions_follow_padding: bool
    names: LayerNames = LayerNames()
    norm_first: bool = False
    bias: bool = True


BACKBONES: dict[str, Backbone] = {
    "bert": Backbone("bert", BertEmbeddings, _linear_classifier, reads_pooler=True, positions_follow_padding=False),
    "roberta": Backbone(
        "roberta", RobertaEmbeddings, RobertaClassificationHead, reads_pooler=False, positions_follow_padding=True
    ),
}


def max_input_length(config: Any) -> int:
    """Longest input, in tokens, that the position table of `config` can number."""
    if BACKBONES[config.backbone_model_type].positions_follow_padding:
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings
