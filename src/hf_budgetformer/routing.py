"""Which heads an input gets: a budget (how many), a relevance (which), and gates that training can shape.

Method: arXiv 2604.22583. Hard gates with a straight-through gradient, stochastic rounding and requested budgets are
this project's; `gate_type="soft"` is the paper's own way.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .packing import Packing


# Keeps a share such as 5/8 of 4 heads from being decided by the last bit of a sigmoid, which may differ between the
# rows of a batch.
_ROUNDING_SLACK = 1e-4


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


class OwnBudget(nn.Module):
    """The budget the model chooses when none is requested: one trainable scalar, a logit, for all layers.

    It is the output bias of the controllers, shared and taken out so that a request can stand in its place; named
    bias, it is also spared weight decay.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.multiplier = float(config.router_lr_multiplier)
        target = config.target_head_budget
        share = min(0.5 if target is None else target, 1.0 - 1e-4)  # an infinite logit could not be trained
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
        start, end = self.config.initial_temperature, self.config.final_temperature
        return start * (end / start) ** progress, self.config.score_noise * (1.0 - progress)


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


def count_open(budget: torch.Tensor, heads: int) -> torch.Tensor:
    """Open heads at inference: `budget * heads` rounded half up, within [1, heads].

    Args:
        budget: (B,), shares in [0, 1].
        heads: Number of heads H.

    Returns:
        (B,) int64.
    """
    return (budget * heads + (0.5 + _ROUNDING_SLACK)).long().clamp(1, heads)


def count_open_ceil(budget: torch.Tensor, heads: int) -> torch.Tensor:
    """As `count_open` but rounded up, as the paper does; spends half a head a layer more than asked for."""
    return torch.ceil(budget * heads - _ROUNDING_SLACK).long().clamp(1, heads)


def count_open_stochastic(budget: torch.Tensor, heads: int) -> torch.Tensor:
    """As `count_open` for training: the marginal head opens with probability frac(budget * heads)."""
    return torch.floor(budget * heads + torch.rand_like(budget)).long().clamp(1, heads)


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
    """f_o of the paper: a two-layer network from the pooled input to a budget.

    Its last layer starts at zero and has no bias, so every layer and input begins at the budget asked for, which
    comes in as a logit, and learns to deviate from it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.hidden = GateLinear(config.hidden_size, config.router_hidden_size, config)
        self.output = GateLinear(config.router_hidden_size, 1, config, bias=False, zero_init=True)

    def forward(self, pooled: torch.Tensor, budget_logit: torch.Tensor) -> torch.Tensor:
        """(B, D) and (B,) -> budget (B,) in [0, 1]; exactly 1 where the logit is infinite."""
        deviation = self.output(F.gelu(self.hidden(pooled)))[:, 0]
        return torch.sigmoid(deviation + budget_logit)


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
        temperature: torch.Tensor | float = 1.0,
        noise: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes a batch. Training mode explores and passes gradients; inference is deterministic and passes none.

        Args:
            pooled: (B, D), see `pool_tokens`.
            budget_logit: (B,), logit of the budget asked for; infinity opens all heads.
            temperature: Scalar > 0 of the scores; training only.
            noise: Scalar >= 0, scale of the Gumbel noise on the scores; training only.

        Returns:
            gates (B, H): 0 or 1, with soft gates in training within [0, 1]; budget (B,); scores (B, H) free of noise.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            budget = self.controller(pooled, budget_logit)
            scores = self.scorer(pooled)
            if not self.training:
                return self._choose(budget.detach(), scores.detach()), budget, scores
            uniform = torch.rand_like(scores).clamp(min=1e-6, max=1.0 - 1e-6)
            noisy = scores - noise * torch.log(-torch.log(uniform))
            if self.soft:
                weights = budget[:, None] * scores.shape[-1] * (noisy / temperature).softmax(-1)
                return weights.clamp(max=1.0), budget, scores
            count = count_open_stochastic(budget.detach(), scores.shape[-1])
            ranks = rank_heads(noisy.detach())
            smooth = gate_surrogate(budget, noisy, ranks, score_threshold(noisy, count), temperature)
            hard = (ranks < count[:, None]).to(smooth.dtype)
            return hard + (smooth - smooth.detach()), budget, scores

    def _choose(self, budget: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rounded = count_open_ceil if self.soft else count_open
        return (rank_heads(scores) < rounded(budget, scores.shape[-1])[:, None]).to(scores.dtype)
