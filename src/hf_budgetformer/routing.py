"""Which heads an input gets: a budget (how many), a relevance (which), and gates that training can shape.

Method: arXiv 2604.22583. Hard gates with a straight-through gradient, stochastic rounding and requested budgets are
this project's; `gate_type="soft"` is the paper's own way.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .packing import Packing


# Keeps a share such as 5/8 of 4 heads from being decided by the last bit of a sigmoid, which may differ between the
# rows of a batch.
_ROUNDING_SLACK = 1e-4
# Of the head scores while training: Gumbel noise falls from this scale to none, the temperature from high to low.
_SCORE_NOISE = 0.5
_TEMPERATURES = (2.3, 0.3)
# Standard deviations an input's need may differ from the batch's mean and still count.
_NEED_LIMIT = 2.0


def scaled(parameter: torch.Tensor, multiplier: float) -> torch.Tensor:
    """`multiplier * parameter` in value, the identity in gradient.

    An optimiser like Adam, whose step does not depend on the gradient's scale, then moves the value `multiplier`
    times faster, while clipping by a global norm sees an ordinary gradient (after Karras et al. 2018, equalised
    learning rate).
    """
    return parameter + (multiplier - 1.0) * parameter.detach()


def _in_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GateLinear(nn.Linear):
    """Linear layer of a router: at least float32 inside, and a step `config.router_lr_multiplier` times larger.

    A class of its own, without children, so that `_init_weights` can tell it from the backbone's layers.

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
        super().__init__(in_features, out_features, bias=bias)
        self.multiplier = float(config.router_lr_multiplier)
        self.initial_std = 0.0 if zero_init else config.initializer_range / self.multiplier

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, in_features), at least float32 -> (B, out_features)."""
        weight = _in_full_precision(self.weight)
        bias = None if self.bias is None else _in_full_precision(self.bias)
        if not torch.is_grad_enabled():
            return self.multiplier * F.linear(hidden, weight, bias)  # less to multiply than the weights
        return F.linear(
            hidden, scaled(weight, self.multiplier), None if bias is None else scaled(bias, self.multiplier)
        )


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
        target, least = config.target_head_budget, least_budget(config)
        share = ((0.5 if target is None else target) - least) / (1.0 - least)
        share = min(max(share, 1e-4), 1.0 - 1e-4)  # an infinite logit could not be trained
        self.initial = math.log(share / (1.0 - share))
        self.bias = nn.Parameter(torch.empty(1))

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


def pool_tokens(hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, layer-normed without parameters, cut off from the backbone's gradient.

    Args:
        hidden_states: (B, L, D), float.
        token_mask: (B, L), 1 for real tokens and 0 for padding.

    Returns:
        (B, D), at least float32.
    """
    hidden_states = _in_full_precision(hidden_states.detach())
    weights = token_mask.to(hidden_states.dtype)
    total = torch.bmm(weights[:, None, :], hidden_states)[:, 0]  # (B, D)
    return F.layer_norm(total / weights.sum(-1, keepdim=True).clamp(min=1.0), hidden_states.shape[-1:])


def pool_packed_tokens(hidden_states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """As `pool_tokens`, of a packed batch: (T, D) -> (B, D), at least float32, in packed order."""
    hidden_states = _in_full_precision(hidden_states.detach())
    total = hidden_states.new_zeros(len(packing.lengths), hidden_states.shape[-1])
    total.index_add_(0, packing.owners, hidden_states)
    counts, last = packing.counts, packing.padded_first
    if last:  # what they begin with is not theirs
        total[-last:] -= hidden_states[(counts.cumsum(0) - counts)[-last:]]
        counts = torch.cat([counts[:-last], counts[-last:] - 1])
    return F.layer_norm(total / counts.clamp(min=1)[:, None], hidden_states.shape[-1:])


def rank_heads(scores: torch.Tensor) -> torch.Tensor:
    """Place of each head when sorted by falling score, from 0; ties go to the lower index. (B, H) -> (B, H) int64."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def count_open(budget: torch.Tensor, carry: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Open heads of a layer, whole, such that the layers together spend what their budgets say.

    What rounding down leaves over is carried to the next layer (error diffusion), so that the heads of all layers
    differ from the sum of their budgets by less than one. With a first carry drawn uniformly from [0, 1) every layer
    opens `budget * heads` in the mean (systematic sampling): so in training; at inference it is one half.

    Args:
        budget: (B,), shares in [0, 1].
        carry: (B,), in [0, 1].
        heads: Number of heads H.

    Returns:
        (B,) int64 within [1, H], and the carry for the next layer, (B,).
    """
    amount = budget * heads + carry
    count = (amount + _ROUNDING_SLACK).long().clamp(1, heads)
    return count, (amount - count).clamp(0.0, 1.0)


def count_open_ceil(budget: torch.Tensor, heads: int) -> torch.Tensor:
    """Open heads as the paper counts them, rounded up: half a head a layer more than asked for. (B,) -> (B,) int64."""
    return torch.ceil(budget * heads - _ROUNDING_SLACK).long().clamp(1, heads)


def score_threshold(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Midway between the last open and the first closed head's score; minus infinity where all are open.

    Args:
        scores: (B, H).
        count: (B,) int64, open heads.

    Returns:
        (B, 1), detached: the surrogate treats it as a constant.
    """
    ranked = F.pad(scores.detach().sort(dim=-1, descending=True).values, (0, 1), value=-math.inf)  # (B, H + 1)
    return (ranked.gather(-1, count[:, None] - 1) + ranked.gather(-1, count[:, None])) / 2


def gate_surrogate(
    budget: torch.Tensor,
    scores: torch.Tensor,
    ranks: torch.Tensor,
    threshold: torch.Tensor,
    temperature: torch.Tensor | float,
) -> torch.Tensor:
    """The smooth function whose gradient the hard gates take.

    `clamp(budget * H - rank, 0, 1) + sigmoid((score - threshold) / temperature)`: the first term tells the budget
    what one more head is worth, the second tells the scores which head it should be. Ranks and threshold are
    constants in it.

    Args:
        budget: (B,), shares.
        scores: (B, H).
        ranks: (B, H) int64, see `rank_heads`.
        threshold: (B, 1), see `score_threshold`.
        temperature: Scalar > 0.

    Returns:
        (B, H).
    """
    share_open = (budget[:, None] * scores.shape[-1] - ranks).clamp(0.0, 1.0)
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

        Args:
            pooled: (B, D), see `pool_tokens`.
            budget_logit: (B,), the budget asked for, see `budget_to_logit`; infinity opens all heads.
            carry: (B,), of the layer before, see `count_open`.
            temperature: Scalar > 0 of the scores; training only.
            noise: Scalar >= 0, scale of the Gumbel noise on the scores; training only.
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
                return Routing(self._choose(count, scores.detach()), budget, scores, need, carry)
            uniform = torch.rand_like(scores).clamp(min=1e-6, max=1.0 - 1e-6)
            noisy = scores - noise * torch.log(-torch.log(uniform))
            if self.soft:
                weights = budget[:, None] * heads * (noisy / temperature).softmax(-1)
                return Routing(weights.clamp(max=1.0), budget, scores, need, carry)
            ranks = rank_heads(noisy.detach())
            smooth = gate_surrogate(budget, noisy, ranks, score_threshold(noisy, count), temperature)
            hard = (ranks < count[:, None]).to(smooth.dtype)
            return Routing(hard + (smooth - smooth.detach()), budget, scores, need, carry)

    def _choose(self, count: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Gates that open the `count` (B,) best of the heads (B, H)."""
        return (rank_heads(scores) < count[:, None]).to(scores.dtype)
