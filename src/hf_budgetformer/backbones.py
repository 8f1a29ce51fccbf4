"""The encoders BudgetFormer can be built on, as data: one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from transformers import CONFIG_MAPPING


@dataclass(frozen=True)
class LayerNames:
    """Where a transformer layer of the stock class keeps its parts, as dotted names.

    `query`, `key`, `value` and `up` hold a row for each number of a head and each neuron, `attention_output` and `down`
    a column. `gate` is the second projection of a gated feed-forward, None where it is plain. Parts of one name are one
    matrix, one below the other. Dropouts are modules, or their probability; None where there is none.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    gate: str | None = None
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    feed_forward_norm: str = "output.LayerNorm"
    attention_dropout: str = "attention.self.dropout"
    output_dropout: str | None = "attention.output.dropout"
    inner_dropout: str | None = None
    down_dropout: str | None = "output.dropout"

    def of(self, layer: Any, part: str) -> Any:
        """A part of a layer; None where it has none."""
        name = getattr(self, part)
        return None if name is None else attrgetter(name)(layer)


@dataclass(frozen=True)
class Backbone:
    """What distinguishes one architecture from another.

    Attributes:
        names: Of the parts of a layer.
        layers: Where the stock encoder keeps its layers, a dotted name.
        embeddings: Modules of the stock encoder that make hidden states of tokens, one after the other.
        fields: Names of our configuration's fields in the stock one, where they differ.
        token_types: Whether the embeddings tell segments apart.
        positions_follow_padding: Whether position numbers start after the padding index, which costs that many rows
            of the position table.
        norm_first: Whether a sublayer normalises what it reads, rather than the sum that it writes.
        first_norm: Whether the first layer's attention has that norm too.
        final_norm: Of the stock encoder, behind its last layer; None: there is none.
        rotary: Module of the stock encoder that turns positions into rotations of queries and keys; layers are then of
            several types, `config.layer_types`. None: positions are embedded.
    """

    names: LayerNames = LayerNames()
    layers: str = "encoder.layer"
    embeddings: tuple[str, ...] = ("embeddings",)
    fields: Mapping[str, str] = field(default_factory=dict)
    token_types: bool = True
    positions_follow_padding: bool = False
    norm_first: bool = False
    first_norm: bool = True
    final_norm: str | None = None
    rotary: str | None = None


_ROBERTA = Backbone(positions_follow_padding=True)
BACKBONES: dict[str, Backbone] = {
    "bert": Backbone(),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Backbone(embeddings=("embeddings", "embeddings_project")),
    "distilbert": Backbone(
        LayerNames(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            activation="ffn.activation",
            down="ffn.lin2",
            feed_forward_norm="output_layer_norm",
            attention_dropout="attention.dropout",
            output_dropout=None,
            down_dropout="ffn.dropout",
        ),
        layers="transformer.layer",
        fields={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        token_types=False,
    ),
    "modernbert": Backbone(
        LayerNames(
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            attention_output="attn.Wo",
            attention_norm="attn_norm",
            up="mlp.Wi",
            gate="mlp.Wi",
            activation="mlp.act",
            down="mlp.Wo",
            feed_forward_norm="mlp_norm",
            attention_dropout="attn.attention_dropout",
            output_dropout="attn.out_drop",
            inner_dropout="mlp.drop",
            down_dropout=None,
        ),
        layers="layers",
        fields={
            "hidden_act": "hidden_activation",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "layer_norm_eps": "norm_eps",
        },
        token_types=False,
        norm_first=True,
        first_norm=False,
        final_norm="final_norm",
        rotary="rotary_emb",
    ),
}

# Of a stock configuration, what belongs to a checkpoint rather than to an architecture.
_IDENTITY = {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"}


def stock_config(config: Any, **changes: Any) -> Any:
    """The configuration of the stock class that a BudgetFormer configuration adopted.

    Args:
        config: A `BudgetFormerConfig`.
        **changes: Fields to set otherwise, by our names.
    """
    kind, fields = CONFIG_MAPPING[config.backbone_model_type], BACKBONES[config.backbone_model_type].fields
    known = kind().to_dict().keys() - _IDENTITY
    ours = {**config.to_dict(), **changes}
    if "layer_types" in ours:
        ours["layer_types"] = ours["layer_types"][: ours["num_hidden_layers"]]
    renamed = {fields.get(name, name): value for name, value in ours.items() if name not in set(fields.values())}
    stock = kind.from_dict({name: value for name, value in renamed.items() if name in known})
    stock._attn_implementation = config._attn_implementation
    return stock


def max_input_length(config: Any) -> int:
    """Longest input, in tokens, that the position table of `config` can number."""
    if BACKBONES[config.backbone_model_type].positions_follow_padding:
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings
