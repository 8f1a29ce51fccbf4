"""Deciding: what a budget opens, in which looks it is spent, and which answers are doubted.

Counts of open units for each layer are all that passes on to `narrow.py`, which runs them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .backbones import BACKBONES


# Of a plain call on a model whose looks nobody set, and the margin below which an answer is doubted.
DEFAULT_LOOKS = (1 / 12, 1.0)
DEFAULT_CONFIDENCE = 0.8
# Shares of the narrow budget that training draws from.
TRAINED_SHARES = (1 / 3, 2 / 3, 1.0)
# How many times the share of the neurons that is open the share of the heads is, until all heads are open.
HEADS_PACE = 3
# Budgets are compared with sums of shares: 1/4 must pay for three of twelve units, whatever the last bit says.
_SLACK = 1e-6


class Counts(NamedTuple):
    """Open units of each layer.

    Args:
        heads: For each layer, a number of attention heads.
        neurons: For each layer, a number of feed-forward neurons.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


class Look(NamedTuple):
    """One look at an input.

    Args:
        counts: What the narrow encoder opens; None: the full encoder looks.
        cost: Share of the full encoder's work, [0, 1].
    """

    counts: Counts | None
    cost: float


FULL_LOOK = Look(None, 1.0)


class Plan(NamedTuple):
    """Looks, one after the other, each at the inputs that the one before it left in doubt.

    Args:
        looks: At least one.
        thresholds: After each look but the last: confidences below it are doubted.
    """

    looks: tuple[Look, ...]
    thresholds: tuple[float, ...] = ()


def feed_forward_blocks(config: Any) -> int:
    """Blocks that the neurons of a layer open in: `config.feed_forward_blocks`, or as many as heads."""
    return config.feed_forward_blocks or min(config.num_attention_heads, config.intermediate_size)


def default_opening_order(config: Any) -> list[int]:
    """Heads open at three times the pace of blocks of neurons, in all layers alike, earlier layers first at each step.

    At small budgets heads are worth more than neurons of the same cost: GRAIN found so of static pruning, and
    `benchmarks/accuracy` of narrow encoders.

    Returns:
        Numbers of sublayers, 2 n for the attention and 2 n + 1 for the feed-forward of layer n, one for each unit.
    """
    units = (config.num_attention_heads, feed_forward_blocks(config))
    paces = (HEADS_PACE * units[0], units[1])
    steps = [
        (round((unit + 1) / paces[sublayer % 2], 9), sublayer)
        for sublayer in range(2 * config.num_hidden_layers)
        for unit in range(units[sublayer % 2])
    ]
    return [sublayer for _, sublayer in sorted(steps)]


class OpeningOrder:
    """What the narrow encoder opens as the budget grows, and what that costs.

    FLOPs are those of matrix products, for a token of an input of `config.reference_length` tokens; a unit's cost is
    its share of those of all heads and neurons of the full encoder.

    Args:
        config: A `BudgetFormerConfig`.

    Attributes:
        looks: What the first 0, 1, 2... units are.
        costs: Of each of them, rising from 0; shares of the full encoder's work.
    """

    def __init__(self, config: Any) -> None:
        layers, blocks = config.num_hidden_layers, feed_forward_blocks(config)
        size = config.hidden_size // config.num_attention_heads
        # Bounds of the blocks, as even as can be.
        self.bounds = [round(block * config.intermediate_size / blocks) for block in range(blocks + 1)]
        self.head_flops = 8 * config.hidden_size * size + 4 * config.reference_length * size
        # A gated neuron has two rows that it reads by, and one column.
        gated = BACKBONES[config.backbone_model_type].names.gate is not None
        self.neuron_flops = (6 if gated else 4) * config.hidden_size
        self.layers = layers
        total = self.head_flops * config.num_attention_heads + self.neuron_flops * config.intermediate_size
        self.total_flops = layers * total
        self.sublayers = config.opening_order or default_opening_order(config)
        opened = [0] * (2 * layers)
        flops = 0
        self.looks = [Look(self._counts(opened), 0.0)]
        for sublayer in self.sublayers:
            opened[sublayer] += 1
            if sublayer % 2:
                block = opened[sublayer]
                flops += self.neuron_flops * (self.bounds[block] - self.bounds[block - 1])
            else:
                flops += self.head_flops
            self.looks.append(Look(self._counts(opened), flops / self.total_flops))
        self.costs = [look.cost for look in self.looks]

    def _counts(self, opened: Sequence[int]) -> Counts:
        neurons = tuple(self.bounds[blocks] for blocks in opened[1::2])
        return Counts(tuple(opened[::2]), neurons)

    def look(self, budget: float) -> Look:
        """The longest prefix of the order that `budget` pays for."""
        paid = sum(cost <= budget + _SLACK for cost in self.costs) - 1  # bisect cannot be traced
        return self.looks[paid]


def problem_type(config: Any) -> str:
    """What a classifier's answer is, by the names of `config.problem_type`, where that is not set too."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def has_confidence(config: Any) -> bool:
    """Whether answers can be doubted: a regression's cannot."""
    return config.num_labels > 1 and config.problem_type != "regression"


def confidence(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """How sure an answer is, in [0, 1].

    Args:
        logits: (B, num_labels); of one label of many there may be other dimensions before the last.
        problem_type: As in a configuration. Of one label of many it is the margin between the two best probabilities;
            of several labels the least margin between a label's probability and its complement.

    Returns:
        (B,), at least float32; or what is before the last dimension.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "multi_label_classification":
        return (2.0 * logits.sigmoid() - 1.0).abs().amin(-1)
    best = logits.softmax(-1).topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def first_look_budget(config: Any) -> float:
    """Budget of the first look of a mean budget, where none is stored with the margins."""
    budget = DEFAULT_LOOKS[0] if config.looks is None else config.looks[0]
    return min(budget, config.narrow_budget)


def plan_looks(config: Any, order: OpeningOrder) -> Plan:
    """The looks of a plain call: `config.looks`, or the default."""
    budgets = (first_look_budget(config), 1.0) if config.looks is None else config.looks
    looks = tuple(FULL_LOOK if budget == 1.0 else order.look(budget) for budget in budgets)
    thresholds = config.confidence or [DEFAULT_CONFIDENCE] * (len(looks) - 1)
    return Plan(looks, tuple(thresholds))


def plan_budget(config: Any, order: OpeningOrder, budget: float) -> Plan:
    """The looks of a budget that is asked for.

    Args:
        config: A `BudgetFormerConfig`.
        order: Its opening order.
        budget: In (0, 1]. Up to `config.narrow_budget` every input is looked at once, by the narrow encoder; 1 is the
            full encoder alone; between the two it is the mean to spend.

    Raises:
        ValueError: Between the two, where margins are needed and none are stored.
    """
    if budget == 1.0 and config.full_encoder:
        return Plan((FULL_LOOK,))
    if budget <= config.narrow_budget + _SLACK:
        return Plan((order.look(budget),))
    if not config.full_encoder:
        raise ValueError(
            f"budget must be at most {config.narrow_budget:g} for a model that was cut to it, got {budget:g}."
        )
    if config.margins is None:
        if not has_confidence(config):
            raise ValueError(
                f"budget must be at most narrow_budget={config.narrow_budget:g}, or 1.0, for a model whose answers "
                f"cannot be doubted, got {budget:g}."
            )
        raise ValueError(
            f"budget={budget:g} lies between narrow_budget={config.narrow_budget:g} and 1: to spend it in the mean the "
            "model must know how sure its first look is. Call hf_budgetformer.tools.tuning.calibrate_margins(model, "
            "batches) once, or train with BudgetCallback and an evaluation set."
        )
    first = order.look(config.margins["budget"])
    threshold = _quantile(config.margins["quantiles"], budget - first.cost)
    return Plan((first, FULL_LOOK), (threshold,))


def _quantile(quantiles: Sequence[float], share: float) -> float:
    """The value below which `share` of what evenly spaced `quantiles` describe lies."""
    place = min(max(share, 0.0), 1.0) * (len(quantiles) - 1)
    low = min(int(place), len(quantiles) - 2)
    return quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])
