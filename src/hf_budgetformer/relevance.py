"""The paper's routers: in every layer a budget, how many heads, and a relevance, which ones, for each input.

Method: arXiv 2604.22583. Hard gates with a straight-through gradient, stochastic rounding, requested budgets and needs
are this project's; `gate_type="soft"` is the paper's own way. `config.router="layer"` turns them on; heads alone are
gated, so a budget is here a share of the heads.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.utils.output_capturing import capture_outputs

from .attention import EVERYTHING, attend_packed, feed_forward_packed, run_packed
from .backbones import BACKBONES
from .losses import (
    ENTROPY_WEIGHT,
    budget_distance,
    budget_hinge,
    need_loss,
    score_entropy,
    task_cost,
    teacher_divergence,
)
from .narrow import is_plain
from .packing import PackedBatch, PaddedBatch, Sequences


# Keeps a share such as 5/8 of 4 heads from being decided by the last bit of a sigmoid, which may differ between the
# rows of a batch.
_ROUNDING_SLACK = 1e-4
# Of the head scores while training: Gumbel noise falls from this scale to none, the temperature from high to low.
_SCORE_NOISE = 0.5
_TEMPERATURES = (2.3, 0.3)
# Standard deviations an input's need may differ from the batch's mean and still count.
_NEED_LIMIT = 2.0
# Numbers that must be multiplied and added for gathering one weight to pay.
_WORK_PER_WEIGHT = 200


def scaled(parameter: torch.Tensor, multiplier: float) -> torch.Tensor:
    """`multiplier * parameter` in value, the identity in gradient.

    An optimiser like Adam, whose step does not depend on the gradient's scale, then moves the value `multiplier`
    times faster, while clipping by a global norm sees an ordinary gradient (after Karras et al. 2018, equalised
    learning rate).
    """
    return parameter + (multiplier - 1.0) * parameter.detach()


def _in_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GateLinear(nn.Module):
    """Linear layer of a router: at least float32 inside, and a step `config.router_lr_multiplier` times larger.

    Not an `nn.Linear`: adapters and quantisers replace those by what computes `W x + b`, which this one does not.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        config: A `BudgetFormerConfig`.
        bias: Whether a bias is added.
        zero_init: Whether the layer starts at zero rather than at the backbone's initializer range.
    """

    def __init__(
        self, in_features: int, out_features: int, config: Any, bias: bool = True, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.multiplier = float(config.router_lr_multiplier)
        self.initial_std = 0.0 if zero_init else config.initializer_range / self.multiplier
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def init_weights(self) -> None:
        """Writes the initial weights."""
        init.normal_(self.weight, std=self.initial_std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, in_features), at least float32 -> (B, out_features)."""
        weight = scaled(_in_full_precision(self.weight), self.multiplier)
        bias = None if self.bias is None else scaled(_in_full_precision(self.bias), self.multiplier)
        return F.linear(hidden, weight, bias)


def least_budget(config: Any) -> float:
    """The share no layer goes below: one head. Soft gates know none, their budget is a plain sigmoid (the paper's)."""
    return 0.0 if config.gate_type == "soft" or config.num_attention_heads == 1 else 1.0 / config.num_attention_heads


def budget_to_logit(share: torch.Tensor, least: float) -> torch.Tensor:
    """Logit of how far a share of the heads lies between `least` and 1: minus infinity at `least`, infinity at 1.

    On this scale controllers deviate from what is asked: freely in the middle, and not at all at either end, where
    no layer could make up for another.
    """
    return torch.logit(((share - least) / (1.0 - least)).clamp(0.0, 1.0))


class OwnBudget(nn.Module):
    """The budget the model chooses when none is requested: one trainable scalar, a logit, for all layers.

    It is the output bias of the controllers, shared and taken out so that a request can stand in its place; named
    bias, it is also spared weight decay.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.multiplier = float(config.router_lr_multiplier)
        target, least = config.target_budget, least_budget(config)
        share = ((0.5 if target is None else target) - least) / (1.0 - least)
        share = min(max(share, 1e-4), 1.0 - 1e-4)  # an infinite logit could not be trained
        self.initial = math.log(share / (1.0 - share))
        self.bias = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        """Writes the initial budget."""
        init.constant_(self.bias, self.initial / self.multiplier)

    def forward(self) -> torch.Tensor:
        """The logit, (1,), at least float32."""
        return scaled(_in_full_precision(self.bias), self.multiplier)


class ExplorationSchedule(nn.Module):
    """From exploration to exploitation by the number of training forward passes, kept in the state dict.

    Attributes:
        steps: Training forward passes seen, an int64 scalar buffer: it survives saving, loading and resuming.
    """

    steps: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def init_weights(self) -> None:
        """Starts anew."""
        init.zeros_(self.steps)

    def progress(self) -> torch.Tensor:
        """Scalar in [0, 1]: 0 explores, 1 exploits."""
        if self.config.exploration_steps == 0:
            return torch.ones((), device=self.steps.device)
        return (self.steps / self.config.exploration_steps).clamp(max=1.0)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Temperature (geometric from initial to final) and Gumbel scale (linear to zero), both scalars."""
        progress = self.progress()
        start, end = _TEMPERATURES
        return start * (end / start) ** progress, _SCORE_NOISE * (1.0 - progress)


def pool_tokens(hidden: torch.Tensor, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Mean over real tokens, layer-normed without parameters, cut off from the backbone's gradient.

    (B, L, D) or packed (T, D) -> (B, D), at least float32; of a packed batch in packed order.
    """
    hidden = _in_full_precision(hidden.detach())
    if isinstance(batch, PaddedBatch):
        weights = hidden.new_ones(hidden.shape[:2]) if batch.mask is None else batch.mask.to(hidden.dtype)
        total, counts = torch.bmm(weights[:, None, :], hidden)[:, 0], weights.sum(-1)  # (B, D), (B,)
    else:
        lengths, last = batch.sequences.lengths, batch.sequences.padded_first
        total = hidden.new_zeros(len(lengths), hidden.shape[-1])
        total.index_add_(0, batch.owners.to(hidden.device), hidden)
        counts = torch.tensor(lengths, device=hidden.device)
        if last:  # what they begin with is not theirs
            total[-last:] -= hidden[(counts.cumsum(0) - counts)[-last:]]
            counts = torch.cat([counts[:-last], counts[-last:] - 1])
    return F.layer_norm(total / counts.clamp(min=1)[:, None], hidden.shape[-1:])


def places_by_score(scores: torch.Tensor) -> torch.Tensor:
    """Place of each head when sorted by falling score, from 0; ties go to the lower index. (B, H) -> (B, H) int64."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def count_open(budget: torch.Tensor, carry: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Open heads of a layer, whole, such that the layers together spend what their budgets say.

    What rounding down leaves over is carried to the next layer (error diffusion). With a first carry drawn uniformly
    from [0, 1) every layer opens `budget * heads` in the mean: so in training; at inference it is one half. Budget (B,)
    and carry (B,), both in [0, 1] -> (B,) int64 within [1, heads], and the next layer's carry (B,).
    """
    amount = budget * heads + carry
    count = (amount + _ROUNDING_SLACK).long().clamp(1, heads)
    return count, (amount - count).clamp(0.0, 1.0)


def count_open_ceil(budget: torch.Tensor, heads: int) -> torch.Tensor:
    """Open heads as the paper counts them, rounded up: half a head a layer more than asked for. (B,) -> (B,) int64."""
    return torch.ceil(budget * heads - _ROUNDING_SLACK).long().clamp(1, heads)


def score_threshold(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Midway between the last open and the first closed head's score; minus infinity where all are open.

    Scores (B, H), counts of open heads (B,) int64 -> (B, 1), detached: the surrogate treats it as a constant.
    """
    ranked = F.pad(scores.detach().sort(dim=-1, descending=True).values, (0, 1), value=-math.inf)  # (B, H + 1)
    return (ranked.gather(-1, count[:, None] - 1) + ranked.gather(-1, count[:, None])) / 2


def gate_surrogate(
    budget: torch.Tensor,
    scores: torch.Tensor,
    places: torch.Tensor,
    threshold: torch.Tensor,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """The smooth function whose gradient the hard gates take.

    `clamp(budget * H - place, 0, 1) + sigmoid((score - threshold) / temperature)`: the first term tells the budget
    what one more head is worth, the second tells the scores which head it should be. Places and threshold are
    constants in it. Budget (B,), scores and places (B, H), threshold (B, 1), temperature a scalar > 0 -> (B, H).
    """
    share_open = (budget[:, None] * scores.shape[-1] - places).clamp(0.0, 1.0)
    return share_open + torch.sigmoid((scores - threshold) / temperature)


class BudgetController(nn.Module):
    """f_o of the paper: a two-layer network from the pooled input to a budget; and what a low budget would cost it.

    The cost is what the network is told: it regresses the measured one (`losses.need_loss`), and inputs that need more
    are given more, `config.need_scale` logits for each standard deviation. Beyond that it learns to deviate from the
    budget asked for by the gradient of the gates; that output starts at zero and has no bias, so that every layer
    begins at the budget asked for.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.least = least_budget(config)
        self.need_scale = float(config.need_scale)
        self.hidden = GateLinear(config.hidden_size, config.router_hidden_size, config)
        self.output = GateLinear(config.router_hidden_size, 1, config, bias=False, zero_init=True)
        self.need = GateLinear(config.router_hidden_size, 1, config, zero_init=True)

    def forward(self, pooled: torch.Tensor, budget_logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D) and (B,), see `budget_to_logit` -> budget (B,), exactly 1 where the logit is infinite; need (B,)."""
        features = F.gelu(self.hidden(pooled))
        need = self.need(features)[:, 0]
        deviation = self.output(features)[:, 0] + self.need_scale * need.detach().clamp(-_NEED_LIMIT, _NEED_LIMIT)
        return self.least + (1.0 - self.least) * torch.sigmoid(deviation + budget_logit), need


class Routing(NamedTuple):
    """What a router says of a batch.

    Args:
        gates: (B, H): 0 or 1, with soft gates in training within [0, 1].
        budget: (B,), shares.
        scores: (B, H), free of noise.
        need: (B,), the predicted cost of a low budget, in standard deviations.
        carry: (B,), for the next layer, see `count_open`.
    """

    gates: torch.Tensor
    budget: torch.Tensor
    scores: torch.Tensor
    need: torch.Tensor
    carry: torch.Tensor


class HeadRouter(nn.Module):
    """Budget and relevance of one layer's heads, and the gates that follow from them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.soft = config.gate_type == "soft"
        self.controller = BudgetController(config)
        self.scorer = GateLinear(config.hidden_size, config.num_attention_heads, config)  # g_d of the paper

    def forward(
        self,
        pooled: torch.Tensor,
        budget_logit: torch.Tensor,
        carry: torch.Tensor,
        temperature: torch.Tensor | float = 1.0,
        noise: torch.Tensor | float = 0.0,
    ) -> Routing:
        """Routes a batch. Training mode explores and passes gradients; inference is deterministic and passes none.

        Pooled inputs (B, D), the budget asked for as a logit (B,), the carry of the layer before (B,); of the scores
        while training the temperature and the scale of their Gumbel noise.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            budget, need = self.controller(pooled, budget_logit)
            scores = self.scorer(pooled)
            heads = scores.shape[-1]
            if self.soft:
                count = count_open_ceil(budget.detach(), heads)
            else:
                count, carry = count_open(budget.detach(), carry, heads)
            if not self.training:
                gates = (places_by_score(scores.detach()) < count[:, None]).to(scores.dtype)
                return Routing(gates, budget, scores, need, carry)
            uniform = torch.rand_like(scores).clamp(min=1e-6, max=1.0 - 1e-6)
            noisy = scores - noise * torch.log(-torch.log(uniform))
            if self.soft:
                weights = budget[:, None] * heads * (noisy / temperature).softmax(-1)
                return Routing(weights.clamp(max=1.0), budget, scores, need, carry)
            places = places_by_score(noisy.detach())
            smooth = gate_surrogate(budget, noisy, places, score_threshold(noisy, count), temperature)
            hard = (places < count[:, None]).to(smooth.dtype)
            return Routing(hard + (smooth - smooth.detach()), budget, scores, need, carry)


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
        """As upstream, then gates (B, H); None leaves all heads open."""
        context, weights = super().forward(hidden_states, attention_mask, **kwargs)
        if gates is not None:
            heads = context.unflatten(-1, (self.num_attention_heads, self.attention_head_size))  # (B, L, H, d)
            context = (heads * gates[:, None, :, None].to(heads.dtype)).flatten(-2)  # (B, L, D)
        return context, weights


def attend_gated(
    attention: BertSelfAttention, output: nn.Module, hidden: torch.Tensor, batch: PackedBatch, gates: torch.Tensor
) -> torch.Tensor:
    """Attention of a packed batch (T, D) and its output projection, every head computed, then gated; trainable.

    Gates (B, H) are in packed order.
    """
    heads = (attention.num_attention_heads, attention.attention_head_size)
    parts = [layer(hidden).unflatten(-1, heads) for layer in (attention.query, attention.key, attention.value)]
    dropout = attention.dropout.p if attention.training else 0.0
    context = attend_packed(parts, batch.sequences, dropout).unflatten(-1, heads)  # (T, H, d)
    spread = gates.to(context.dtype).index_select(0, batch.owners.to(gates.device))  # (T, H)
    context = context * spread[:, :, None] if torch.is_grad_enabled() else context.mul_(spread[:, :, None])
    projected: torch.Tensor = output(context.flatten(-2))
    return projected


def attend_open_heads(
    attention: BertSelfAttention, output: Any, hidden: torch.Tensor, batch: PackedBatch, gates: torch.Tensor
) -> torch.Tensor:
    """The same, open heads alone: inputs that opened the same heads share one gathering of their weights.

    Gates are 0 or 1, and the projections plain linear layers with biases. Arguments and result as in `attend_gated`.
    """
    size, width = attention.attention_head_size, hidden.shape[-1]
    projections = (attention.query, attention.key, attention.value)
    weights = [x.weight.view(-1, size * width) for x in projections]
    biases = torch.stack([x.bias.view(-1, size) for x in projections])  # (3, H, d)
    columns = output.weight.view(width, -1, size)
    distinct, group = gates.bool().unique(dim=0, return_inverse=True)
    lengths, padded_first, _ = batch.sequences
    whole = len(lengths) - padded_first
    group_of_token = group.index_select(0, batch.owners)
    groups = group.tolist()
    result = torch.empty_like(hidden)
    for number, row in enumerate(distinct):
        heads = row.nonzero()[:, 0]
        tokens = (group_of_token == number).nonzero()[:, 0]
        members = [index for index, other in enumerate(groups) if other == number]
        sequences = Sequences([lengths[index] for index in members], sum(index >= whole for index in members))
        gathered = torch.cat([weight.index_select(0, heads).view(-1, width) for weight in weights])
        parts = F.linear(hidden.index_select(0, tokens), gathered, biases.index_select(1, heads).flatten())
        context = attend_packed(parts.unflatten(-1, (3, -1, size)).unbind(1), sequences)
        weight = columns.index_select(1, heads).view(width, -1)
        result.index_copy_(0, tokens, F.linear(context, weight, output.bias))
    return result


def gathering_pays(gates: torch.Tensor, batch: PackedBatch) -> bool:
    """Whether closed heads spare more than gathering the open ones' weights costs. Gates (B, H) are in packed order."""
    lengths, opened = torch.tensor(batch.sequences.lengths, device=gates.device), gates.sum(-1)
    most = ((gates.shape[-1] - opened) * lengths).sum() / _WORK_PER_WEIGHT  # weights of heads that may be gathered
    if most <= opened.max():
        return False
    return bool(most > gates.bool().unique(dim=0).sum())


class RoutedLayer(BertLayer):
    """Stock transformer layer whose attention is gated by a router of its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.attention.self = GatedSelfAttention(config, layer_idx=layer_idx)
        self.router = HeadRouter(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        batch: PackedBatch | PaddedBatch,
        budget_logit: torch.Tensor | None,
        schedule: tuple[torch.Tensor, torch.Tensor],
        carry: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Routes, attends and feeds forward. Keeps nothing: under gradient checkpointing it runs twice.

        Args:
            hidden_states: (B, L, D), or packed (T, D).
            attention_mask: Of a padded batch, as the attention implementation wants it.
            batch: How the tokens lie.
            budget_logit: (B,), the budget asked for; None: all heads, and nothing is routed.
            schedule: Temperature and noise, scalars.
            carry: (B,), see `Routing`.

        Returns:
            hidden states as they came, and the fields of a `Routing`.
        """
        if budget_logit is None:
            gates = carry.new_ones(len(carry), self.attention.self.num_attention_heads)
            routing = Routing(gates, gates.mean(-1), gates, carry, carry)
        else:
            routing = self.router(pool_tokens(hidden_states, batch), budget_logit, carry, *schedule)
        bert = BACKBONES["bert"]
        if isinstance(batch, PackedBatch):
            if budget_logit is None:
                heads = self.attention.self.num_attention_heads
                return run_packed(self, bert, hidden_states, batch.sequences, EVERYTHING, heads), *routing
            output = self.attention.output
            attend = self._attend(hidden_states, batch, routing.gates)
            projected = attend(self.attention.self, output.dense, hidden_states, batch, routing.gates)
            attended = output.LayerNorm(output.dropout(projected) + hidden_states)
            return feed_forward_packed(self, bert, attended), *routing
        context, _ = self.attention.self(hidden_states, attention_mask, gates=routing.gates)
        return self.feed_forward_chunk(self.attention.output(context, hidden_states)), *routing

    def _attend(self, hidden: torch.Tensor, batch: PackedBatch, gates: torch.Tensor) -> Any:
        projections = self.attention.self
        linears = (projections.query, projections.key, projections.value, self.attention.output.dense)
        learning = self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type)
        sparse = not learning and all(map(is_plain, linears)) and gathering_pays(gates, batch)
        return attend_open_heads if sparse else attend_gated


@dataclass
class RoutedOutput(BaseModelOutput):
    """Stock encoder output, and what the routers said.

    Args:
        routing: Of the layers, stacked: gates (B, layers, H), budget (B, layers)..., in the batch's own order.
        loss: While learning, the routers' terms of the loss, a scalar.
    """

    routing: Any = None
    loss: torch.Tensor | None = None


class RoutedEncoder(PreTrainedModel):
    """The layers, each with its router, the budget they start from, and their part of the training loss.

    A model of its own, in place of the stock encoder's layers, so that its routers are not initialised as those are.

    Attributes:
        training_log: Scalars of the last training forward pass, detached, by name: what `BudgetCallback` logs.
    """

    _can_record_outputs = {"hidden_states": RoutedLayer, "attentions": BertSelfAttention}
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.ModuleList(RoutedLayer(config, index) for index in range(config.num_hidden_layers))
        self.own_budget = OwnBudget(config)
        self.exploration = ExplorationSchedule(config)
        self.training_log: dict[str, torch.Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (GateLinear, OwnBudget, ExplorationSchedule)):
            module.init_weights()
        else:
            super()._init_weights(module)

    @capture_outputs
    def forward(
        self,
        hidden: torch.Tensor,
        batch: PackedBatch | PaddedBatch,
        attention_mask: torch.Tensor | None,
        requested: torch.Tensor | None,
        known: bool = True,
        **kwargs: Any,
    ) -> RoutedOutput:
        """Runs the heads that the routers open.

        Args:
            hidden: Embedded tokens, (B, L, D) or packed (T, D).
            batch: How they lie.
            attention_mask: Of a padded batch, as the attention implementation wants it.
            requested: (B,), shares of the heads asked for, in the batch's own order; None: the model's own.
            known: Whether values can be asked for, which they cannot while a graph is made.
            **kwargs: `output_hidden_states` and `output_attentions`, as upstream.

        Returns:
            `last_hidden_state` as it came.
        """
        rows = batch.shape[0] if isinstance(batch, PackedBatch) else len(hidden)
        learning = self.training and torch.is_grad_enabled()
        logit, target, sampled = self._ask(requested, rows, known, hidden.device)
        if isinstance(batch, PackedBatch) and logit is not None:
            logit = batch.sort(logit)
        carry = torch.full((rows,), 0.5, device=hidden.device)
        if self.training:
            carry = torch.rand_like(carry)
        schedule = self.exploration()
        routed = []
        for layer in self.layer:
            hidden, *parts = layer(hidden, attention_mask, batch, logit, schedule, carry)
            routed.append(Routing(*parts))
            carry = routed[-1].carry
        routing = Routing(*(torch.stack(parts, dim=1) for parts in zip(*routed, strict=True)))
        if isinstance(batch, PackedBatch):
            routing = Routing(*map(batch.unsort, routing))
        loss = self._loss(routing, target, sampled) if learning else None
        return RoutedOutput(last_hidden_state=hidden, routing=routing, loss=loss)

    def _ask(
        self, requested: torch.Tensor | None, rows: int, known: bool, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The budget to aim for: a logit (B,), the mean share (1,) to train towards, whether it is a request (1,).

        The logit is None where all heads run and nothing is learned: there is nothing to route.
        """
        learned, least = self.own_budget(), least_budget(self.config)
        if requested is not None:
            mean, everything = requested.mean(0, keepdim=True), torch.ones_like(learned).bool()
            if not self.training and known and bool((requested == 1.0).all()):
                return None, mean, everything
            # The own budget stays in the graph, or distributed training would wait for its gradient.
            return budget_to_logit(requested, least) + 0.0 * learned, mean, everything
        target = torch.full_like(learned, self.config.target_budget or 0.0)
        if not self.training:
            return learned.expand(rows), target, torch.zeros_like(learned).bool()
        draw, which = torch.rand(2, 1, device=learned.device, dtype=learned.dtype)
        sampled = which < self.config.budget_sampling
        # In (1/H, 1], most of all low: starting from a trained backbone, it is there that there is most to learn.
        share = self.config.num_attention_heads ** -draw.sqrt()
        logit = torch.where(sampled, budget_to_logit(share, least), learned)
        return logit.expand(rows), torch.where(sampled, share, target), sampled

    def _loss(self, routing: Routing, target: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        config, exploration = self.config, self.exploration
        spent, entropy, progress = routing.budget.mean(), score_entropy(routing.scores), exploration.progress()
        if config.target_budget is None:
            budget_loss = torch.where(sampled, budget_distance(spent, target.clamp(min=1e-6)), budget_hinge(spent))
        else:
            budget_loss = budget_distance(spent, target)
        budget_loss = budget_loss.mean()
        self.training_log = {
            "budget": spent.detach(),
            "budget_loss": budget_loss.detach(),
            "entropy": entropy.detach(),
            "temperature": exploration()[0].detach(),
            "progress": progress.detach(),
            **{f"heads/layer_{n:02}": x for n, x in enumerate(routing.gates.detach().mean((0, 2)))},
        }
        exploration.steps += 1
        loss = config.budget_loss_weight * budget_loss + 0.0 * routing.need.sum()  # in the graph, whoever trains it
        if config.gate_type == "soft":  # the paper's: rewarded while exploring, penalised while exploiting
            loss = loss + ENTROPY_WEIGHT * (2.0 * progress - 1.0) * entropy
        return loss

    def answer_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        teacher_logits: torch.Tensor | None,
        need: torch.Tensor,
        problem_type: str,
    ) -> torch.Tensor:
        """What the answers add to the routers' terms: the teacher's divergence, and the regression of need; a scalar.

        Logits and teacher's logits (B, num_labels), labels as in `forward`, need (B, layers).
        """
        total = logits.new_zeros(())
        cost = None if labels is None else task_cost(logits.detach(), labels, problem_type)
        if teacher_logits is not None:
            cost = teacher_divergence(logits, teacher_logits, problem_type)
            self.training_log["distillation_loss"] = cost.detach().mean()
            total = total + self.config.distillation_weight * cost.mean()
        if cost is not None and self.config.need_scale:
            regression = need_loss(need, cost)
            self.training_log["need_loss"] = regression.detach()
            total = total + regression
        return total
