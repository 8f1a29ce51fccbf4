"""The narrow encoder: beside the full one, its most important heads and neurons, of which a budget opens the first.

A budget's units are views of the first rows and columns: nothing is gathered. Masked, every unit is computed and closed
ones are multiplied by zero: the reference. Nested widths are DynaBERT's (arXiv 2004.04037) and MatFormer's
(arXiv 2310.07707).
"""

import random
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .attention import EVERYTHING, Reach, attend_packed, attend_padded, pick_first, run_in_chunks
from .backbones import BACKBONES, Backbone, LayerNames
from .budgets import TRAINED_SHARES, Counts, Look, OpeningOrder
from .packing import PackedBatch, PaddedBatch, Sequences


# Ends the names of the narrow encoder's copies of the stock head's parts.
_COPY = "_copy"


class Importance(NamedTuple):
    """Of the units of one layer of the full encoder, the larger the more important.

    Args:
        heads: (H,), float.
        neurons: (I,), float.
    """

    heads: torch.Tensor
    neurons: torch.Tensor


def is_plain(linear: Any) -> bool:
    """Whether a layer computes `W x + b` of a plain tensor and nothing else, so that views of W can stand in for it.

    Adapters, parametrisations, hooks, offloading, quantised and sharded weights are more than that.
    """
    weight = getattr(linear, "weight", None)
    # While exporting, plain weights are stand-ins of another type; wrapped ones can be flattened there too.
    plain_weight = type(weight) in (nn.Parameter, torch.Tensor) or torch.compiler.is_compiling()
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    plain_weight = plain_weight and not hasattr(weight, "__tensor_flatten__")
    return type(linear) is nn.Linear and plain_weight and not linear.weight.is_meta and not hooked


def first_outputs(linear: Any, hidden: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` outputs of a linear layer: (..., in) -> (..., count)."""
    if count == linear.out_features or not is_plain(linear):
        output: torch.Tensor = linear(hidden)
        return output[..., :count]
    bias = None if linear.bias is None else linear.bias[:count]
    return F.linear(hidden, linear.weight[:count], bias)


def from_first_inputs(linear: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of its first inputs, the others zero: (..., count) -> (..., out)."""
    missing = linear.in_features - hidden.shape[-1]
    if not missing or not is_plain(linear):
        output: torch.Tensor = linear(F.pad(hidden, (0, missing)) if missing else hidden)
        return output
    if not hidden.shape[-1] and _is_exporting():  # other runtimes know no matrix without rows
        nothing = hidden.new_zeros(*hidden.shape[:-1], linear.out_features)
        return nothing if linear.bias is None else nothing + linear.bias
    return F.linear(hidden, linear.weight[:, : hidden.shape[-1]], linear.bias)


def _is_exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _add(output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The residual; in place where nobody needs the summand. A trace is one graph, with gradients or without."""
    return output + hidden if torch.is_grad_enabled() or torch.jit.is_tracing() else output.add_(hidden)


class NarrowLayer(nn.Module):
    """A transformer layer of which the first heads and neurons run; norms before or after, feed-forward gated or plain.

    Query, key and value are stacked by head, so that the first heads are the first rows of one matrix.

    Args:
        config: A `BudgetFormerConfig`.
        backbone: Row of the table: where norms stand, and whether the feed-forward is gated.
        heads: Most that can open, >= 1.
        neurons: Most that can open, >= 1.
        first: Whether it is the first layer.
    """

    def __init__(self, config: Any, backbone: Backbone, heads: int, neurons: int, first: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        if width % config.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {width} and {config.num_attention_heads}."
            )
        self.size = width // config.num_attention_heads
        self.heads, self.neurons = heads, neurons
        self.norm_first = backbone.norm_first
        # Fields of architectures that can do without; the others have biases everywhere.
        attention, feed_forward = getattr(config, "attention_bias", True), getattr(config, "mlp_bias", True)
        norm = {"eps": config.layer_norm_eps, "bias": getattr(config, "norm_bias", True)}
        self.qkv = nn.Linear(width, heads * 3 * self.size, bias=attention)
        self.attention_output = nn.Linear(heads * self.size, width, bias=attention)
        self.attention_norm: nn.Module = nn.LayerNorm(width, **norm)
        if first and not backbone.first_norm:
            self.attention_norm = nn.Identity()
        self.up = nn.Linear(width, neurons, bias=feed_forward)
        self.gate = nn.Linear(width, neurons, bias=feed_forward) if backbone.names.gate else None
        self.down = nn.Linear(neurons, width, bias=feed_forward)
        self.feed_forward_norm = nn.LayerNorm(width, **norm)
        self.activation = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden: torch.Tensor,
        layout: Sequences | torch.Tensor | None,
        heads: int,
        neurons: int,
        masked: bool = False,
        reach: Reach = EVERYTHING,
        first: bool = False,
    ) -> torch.Tensor:
        """Runs the first units.

        Args:
            hidden: (T, D) of a packed batch, or (B, L, D) of a padded one.
            layout: The packed batch's sequences; or the padded one's mask (B, L), None where nothing is padded.
            heads: How many run.
            neurons: How many run.
            masked: Whether to compute all units and multiply closed ones by zero.
            reach: Where the tokens are, and how far they see.
            first: Whether to answer for the first position of each input alone, (B, D) in packed order or (B, 1, D).
        """
        read = self.attention_norm(hidden) if self.norm_first else hidden
        context = self._attend(read, layout, heads, masked, reach, first)
        attended = _add(context, pick_first(hidden, layout) if first else hidden)
        if not self.norm_first:
            attended = self.attention_norm(attended)
        if hidden.dim() == 3:
            return self._feed_forward(attended, neurons, masked)
        return run_in_chunks(lambda chunk: self._feed_forward(chunk, neurons, masked), attended, neurons)

    def _attend(
        self,
        hidden: torch.Tensor,
        layout: Sequences | torch.Tensor | None,
        heads: int,
        masked: bool,
        reach: Reach,
        first: bool,
    ) -> torch.Tensor:
        computed = self.heads if masked else heads
        if not computed:
            read = pick_first(hidden, layout) if first else hidden
            return from_first_inputs(self.attention_output, self._open(self.qkv, read, 0))
        asking = pick_first(hidden, layout) if first else None
        parts = self._project(hidden, computed, asking)
        if isinstance(layout, Sequences):
            context = attend_packed(parts, layout, reach=reach)
        else:
            context = attend_padded(parts, layout, reach)
        return from_first_inputs(self.attention_output, self._close(context, heads * self.size, masked))

    def _project(self, hidden: torch.Tensor, heads: int, asking: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Query, key and value of the first heads, each (..., h, d); the query of `asking` (..., D) alone, if given."""
        rows = heads * 3 * self.size
        if asking is None:
            stacked = first_outputs(self.qkv, hidden, rows)
            return stacked.unflatten(-1, (heads, 3, self.size)).unbind(-2)
        if not is_plain(self.qkv):
            query = self._project(asking, heads, None)[0]
            return query, *self._project(hidden, heads, None)[1:]
        weight = self.qkv.weight[:rows].unflatten(0, (heads, 3, self.size))
        bias = None if self.qkv.bias is None else self.qkv.bias[:rows].unflatten(0, (heads, 3, self.size))
        # Copies of a few rows, which cost less than the queries that nobody asks for.
        query = F.linear(asking, weight[:, 0].flatten(0, 1), None if bias is None else bias[:, 0].flatten())
        pairs = F.linear(hidden, weight[:, 1:].flatten(0, 2), None if bias is None else bias[:, 1:].flatten())
        key, value = pairs.unflatten(-1, (heads, 2, self.size)).unbind(-2)
        return query.unflatten(-1, (heads, self.size)), key, value

    def _feed_forward(self, attended: torch.Tensor, neurons: int, masked: bool) -> torch.Tensor:
        read = self.feed_forward_norm(attended) if self.norm_first else attended
        computed = self.neurons if masked else neurons
        inner = self.activation(self._open(self.up, read, computed))
        if self.gate is not None:
            inner = inner * self._open(self.gate, read, computed)
        output = _add(from_first_inputs(self.down, self._close(inner, neurons, masked)), attended)
        return output if self.norm_first else self.feed_forward_norm(output)

    def _open(self, linear: Any, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """First outputs. In training none come of the layer too: distributed training waits for its gradients."""
        return first_outputs(linear, hidden, count) if count or self.training else hidden[..., :0]

    @staticmethod
    def _close(values: torch.Tensor, count: int, masked: bool) -> torch.Tensor:
        """Values (..., n), those from `count` on set to zero where units are masked."""
        if not masked:
            return values
        return values * (torch.arange(values.shape[-1], device=values.device) < count).to(values.dtype)


class NarrowEncoder(nn.Module):
    """A copy of the full encoder's most important units, with a small head of its own. It has no dropout.

    Args:
        config: A `BudgetFormerConfig`.
        pooler: A pooler like the stock class's, to be its own; None: that has none.
        head: Parts of the stock class's head by name, to be its own; None: there is none.

    Attributes:
        steps: Training forward passes seen, an int64 scalar buffer: 0 until it has been trained.
        order: What a budget opens.
    """

    steps: torch.Tensor

    def __init__(self, config: Any, pooler: nn.Module | None, head: Mapping[str, nn.Module] | None) -> None:
        super().__init__()
        backbone = BACKBONES[config.backbone_model_type]
        self.order = OpeningOrder(config)
        self.widest = self.order.look(config.narrow_budget)
        counts: Any = self.widest.counts
        # One unit of each sublayer at least, closed or not: parameters without elements trouble optimisers.
        self.layer = nn.ModuleList(
            NarrowLayer(config, backbone, max(1, heads), max(1, neurons), first=not index)
            for index, (heads, neurons) in enumerate(zip(counts.heads, counts.neurons, strict=True))
        )
        self.norm = None
        if backbone.final_norm:
            norm_bias = getattr(config, "norm_bias", True)
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=norm_bias)
        self.pooler = pooler
        # Of other names than the stock ones, which adapters look for.
        self.head = None if head is None else nn.ModuleDict({name + _COPY: part for name, part in head.items()})
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        hidden: torch.Tensor,
        batch: PackedBatch | PaddedBatch,
        counts: Counts,
        masked: bool = False,
        reaches: Sequence[Reach] = (),
        first: bool = False,
    ) -> torch.Tensor:
        """Encodes a batch with the first units of each layer.

        Args:
            hidden: Embedded tokens, (T, D) or (B, L, D).
            batch: How they lie.
            counts: Units to open.
            masked: Whether to compute all units and multiply closed ones by zero.
            reaches: Of each layer; none: every token sees its whole sequence.
            first: Whether only the first position of each input is needed: the last layer then runs for it alone.

        Returns:
            As `hidden`; of first positions (B, D) in packed order, or (B, 1, D).
        """
        every = reaches or [EVERYTHING] * len(self.layer)
        for index, (layer, reach) in enumerate(zip(self.layer, every, strict=True)):
            last = first and index == len(self.layer) - 1
            hidden = layer(hidden, batch.layout, counts.heads[index], counts.neurons[index], masked, reach, last)
        return hidden if self.norm is None else self.norm(hidden)

    def head_parts(self) -> dict[str, nn.Module]:
        """Parts of its head, by the stock class's names."""
        return {name.removesuffix(_COPY): part for name, part in (self.head or {}).items()}

    def pool(self, first: torch.Tensor) -> torch.Tensor | None:
        """Pooler's output of first tokens, (B, D) -> (B, D); None without a pooler."""
        return None if self.pooler is None else self.pooler(first[:, None])

    def count_step(self, output: torch.Tensor) -> None:
        """Counts a training forward pass, if anything of what led to `output` is trained, and not all frozen."""
        self.steps.add_(int(output.requires_grad))

    def is_whole(self) -> bool:
        """Whether all parameters of its layers are trained, and so, where an adapter is saved, saved."""
        return all(parameter.requires_grad for parameter in self.layer.parameters())

    @torch.compiler.disable  # or every step would be compiled anew
    def draw(self) -> Look:
        """What a training step opens: drawn anew for each step, from the number of steps and nothing else."""
        share = random.Random(int(self.steps)).choice(TRAINED_SHARES)
        return self.order.look(share * self.widest.cost)

    @torch.no_grad()
    def copy_units(self, layers: Sequence[Any], names: LayerNames, importance: Sequence[Importance] | None) -> None:
        """Becomes a copy of the most important units of the full encoder's layers.

        Args:
            layers: Of the full encoder.
            names: Where they keep their parts.
            importance: Of each layer's units; None: by the norms of their weights.
        """
        narrow_layer: Any
        for index, (narrow_layer, full) in enumerate(zip(self.layer, layers, strict=True)):
            weights = layer_weights(full, names)
            chosen = weight_importance(weights, narrow_layer.size) if importance is None else importance[index]
            heads = chosen.heads.to(weights["query", "weight"].device).argsort(descending=True, stable=True)
            neurons = chosen.neurons.to(heads.device).argsort(descending=True, stable=True)
            _copy_layer(narrow_layer, weights, heads[: narrow_layer.heads], neurons[: narrow_layer.neurons])


def layer_weights(layer: Any, names: LayerNames) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and biases of a stock layer, by part and kind; of parts that share a matrix, each its rows."""
    weights = {}
    for part in vars(names):
        module = names.of(layer, part)
        sharing = [other for other in vars(names) if getattr(names, other) == getattr(names, part)]
        for kind in ("weight", "bias"):  # by attribute, for an adapter around a layer has other parameters too
            value = getattr(module, kind, None)
            if value is not None:
                weights[part, kind] = _gathered(value).chunk(len(sharing))[sharing.index(part)]
    return weights


@torch.no_grad()
def copy_parameters(copy: nn.Module, full: nn.Module) -> None:
    """Copies a module's parameters from another of its kind, which an adapter may have wrapped."""
    for name, parameter in copy.named_parameters():
        _assign(parameter, _gathered(full.get_parameter(name)))


def weight_importance(weights: dict[tuple[str, str], torch.Tensor], size: int) -> Importance:
    """Importance by the norms of a unit's weights, what goes in times what comes out.

    Args:
        weights: Of one layer, by part and kind.
        size: Of a head.
    """
    values = weights["value", "weight"].float().unflatten(0, (-1, size)).norm(dim=(1, 2))
    outputs = weights["attention_output", "weight"].float().unflatten(1, (-1, size)).norm(dim=(0, 2))
    up, down = weights["up", "weight"].float().norm(dim=1), weights["down", "weight"].float().norm(dim=0)
    return Importance(values * outputs, up * down)


def _copy_layer(
    layer: NarrowLayer, weights: dict[tuple[str, str], torch.Tensor], heads: torch.Tensor, neurons: torch.Tensor
) -> None:
    rows = (heads[:, None] * layer.size + torch.arange(layer.size, device=heads.device)).flatten()
    parts = ("qkv", "attention_output", "attention_norm", "up", "gate", "down", "feed_forward_norm")
    for part, kind in product(parts, ("weight", "bias")):  # by attribute, see `layer_weights`
        parameter = getattr(getattr(layer, part), kind, None)
        if parameter is None:
            continue
        if part == "qkv":
            stacked = [weights[x, kind][rows].unflatten(0, (-1, layer.size)) for x in ("query", "key", "value")]
            value = torch.stack(stacked, dim=1).flatten(0, 2)
        elif part in ("up", "gate"):
            value = weights[part, kind][neurons]
        elif (part, kind) == ("attention_output", "weight"):
            value = weights[part, kind][:, rows]
        elif (part, kind) == ("down", "weight"):
            value = weights[part, kind][:, neurons]
        else:
            value = weights[part, kind]
        _assign(parameter, value)


def _gathered(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):  # FSDP2
        value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
